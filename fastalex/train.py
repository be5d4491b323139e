"""``python -m fastalex.train key=value ...``: train a network and report its error on the test set."""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from torch import nn
from tqdm import tqdm

from fastalex import runtime as runtimes
from fastalex.checkpoint import Checkpoint, plain, save_weights
from fastalex.cli import command
from fastalex.config import Config, model_options, validate
from fastalex.data import DataSplits, Loader, StagedLoader, Views, build_loader, load_splits, resolve_loader
from fastalex.errors import DivergedError
from fastalex.evaluation import Evaluation, evaluate
from fastalex.flops import matmul_flops_per_second
from fastalex.models import check_crop, count_parameters, create_model
from fastalex.profiling import STEPS, profile_steps
from fastalex.runtime import Runtime
from fastalex.tracking import RunFolder, versions
from fastalex.trainer import Epoch, Trainer


def train(config: Config, run_dir: Path, *, given: bool = True) -> dict[str, Any]:
    """Run one training from a configuration to ``summary.json``.

    Args:
        config: what to train, on what, and how.
        run_dir: the folder for the run's files.
        given: whether that folder was asked for by name; if not, a neighbour is taken where it is in use.

    Returns:
        The content of ``summary.json``.

    Raises:
        FastalexError: for input that has to be mended, before anything is written; or DivergedError.
    """
    began = time.perf_counter()
    validate(config)
    for crop in (config.data.crop, *(stage.crop for stage in config.train.stages)):
        check_crop(config.model.name, crop)
    runtime = runtimes.choose(config.runtime)
    print(runtime)
    splits = load_splits(config.data, config.seed)
    config.loader = resolve_loader(config.loader, splits, runtime.device)
    print(_describe(config, splits))
    torch.manual_seed(config.seed)
    model = create_model(config.model.name, len(splits.classes), **model_options(config.model))
    runtime.place(model)
    train_loader = _staged_loader(config, splits, runtime)
    validation_loader = _loader(config, splits, runtime, Views.center) if splits.has_errors else None

    folder = RunFolder(run_dir, given, config)
    folder.augmented_inputs(next(iter(train_loader))[0], config.data.mean, config.data.std)
    progress = tqdm(
        total=STEPS if config.profile else config.train.epochs * len(train_loader),
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 20,
    )

    def on_step(step: int, loss: float | None) -> None:
        progress.update()
        if loss is not None:
            folder.loss(step, loss)
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)

    trainer = Trainer(
        model,
        config.train,
        train_loader,
        validation_loader,
        runtime,
        log_every=config.log_every,
        on_step=on_step,
        peak_flops=matmul_flops_per_second(runtime),
    )
    if config.profile:
        profiled = profile_steps(trainer, folder.path)
        progress.close()
        print(
            f"\n{profiled.table()}\n\ntrace.json (for ui.perfetto.dev) and profile.txt are in {folder.path}"
        )
        return {"profile": vars(profiled)}
    startup_seconds = time.perf_counter() - began
    best: tuple[float, int, dict[str, torch.Tensor]] | None = None
    checkpoint_path = folder.path / "checkpoint.pt"
    classes = list(splits.classes)
    while not trainer.finished:
        try:
            epoch = trainer.run_epoch()
        except DivergedError as error:
            progress.close()
            kept = (
                f"the last good checkpoint is {checkpoint_path}"
                if trainer.epoch
                else "no epoch was completed"
            )
            raise DivergedError(f"{error}; {kept}") from error
        folder.epoch(epoch)
        progress.write(_line(epoch, config.train.epochs), file=sys.stdout)
        Checkpoint(
            plain(config), classes, model.state_dict(), trainer.state_dict(), trainer.averaged_weights()
        ).save(checkpoint_path)
        with trainer.evaluated():
            error_now = epoch.validation_top1_error
            if error_now is not None and (best is None or error_now < best[0]):
                best = (error_now, epoch.epoch, copy.deepcopy(model.state_dict()))
                save_weights(model, config, classes, folder.path / "best.safetensors")
    progress.close()
    with trainer.evaluated():
        save_weights(model, config, classes, folder.path / "model.safetensors")

    summary: dict[str, Any] = {}
    if splits.has_errors:
        with trainer.evaluated():
            final = evaluate(trainer.network, splits.test, config, runtime)
        print(f"\n{final.table('test set, final weights')}")
        summary = final.as_dict()
        if best is not None:
            validation_error, best_epoch, weights = best
            chosen = final if best_epoch == trainer.epoch else _with(model, weights, trainer, splits, config)
            if chosen is not final:
                print(chosen.table(f"test set, best on validation (epoch {best_epoch})"))
            summary["best_on_validation"] = {
                "epoch": best_epoch,
                "validation_top1_error": validation_error,
                **chosen.as_dict(),
            }
    else:
        print("\nsynthetic data: the throughput is real, an error would mean nothing and none is reported")
    summary |= {
        "data": splits.source,
        "train_images": len(splits.train),
        "validation_images": len(splits.validation),
        "skipped_images": splits.skipped,
        "epochs": trainer.epoch,
        "steps": trainer.step,
        "images_per_second": trainer.images_per_second,
        "input_wait_fraction": trainer.input_wait_fraction,
        "flops_utilization": trainer.flops_utilization,
        "startup_seconds": startup_seconds,
        "wall_seconds": time.perf_counter() - began,
        "parameters": count_parameters(model),
        "seed": config.seed,
        "hardware": runtime.hardware,
        "runtime": str(runtime),
        "versions": versions(),
    }
    folder.summary(summary)
    print(
        f"{trainer.images_per_second:,.1f} images/s in training, "
        f"{trainer.input_wait_fraction:.1%} of the time waiting for input; the arithmetic runs at "
        f"{trainer.flops_utilization:.0%} of a large matrix product's rate\n"
        f"the run's files are in {folder.path}"
    )
    return summary


def _staged_loader(config: Config, splits: DataSplits, runtime: Runtime) -> Loader:
    """The training loader: one for each stage of the resolution schedule, and the last."""
    stages = config.train.stages
    data = [replace(config.data, resize=stage.resize, crop=stage.crop) for stage in stages]
    loaders = [_loader(replace(config, data=each), splits, runtime, Views.random) for each in data]
    last = _loader(config, splits, runtime, Views.random)
    return StagedLoader([*loaders, last], [stage.epochs for stage in stages]) if stages else last


def _loader(config: Config, splits: DataSplits, runtime: Runtime, views: Views) -> Loader:
    return build_loader(
        splits.train if views is Views.random else splits.validation,
        config.data,
        config.loader,
        views=views,
        batch_size=config.train.batch_size,
        seed=config.seed,
        device=runtime.device,
        dtype=runtime.dtype,
        channels_last=runtime.channels_last,
    )


def _with(
    model: nn.Module, weights: dict[str, torch.Tensor], trainer: Trainer, splits: DataSplits, config: Config
) -> Evaluation:
    """Evaluate with other weights; the model keeps them."""
    model.load_state_dict(weights)
    return evaluate(trainer.network, splits.test, config, trainer.runtime)


def _describe(config: Config, splits: DataSplits) -> str:
    skipped = f", {splits.skipped} damaged images skipped" if splits.skipped else ""
    return (
        f"{splits.source}: {len(splits.train):,} training, {len(splits.validation):,} validation and "
        f"{len(splits.test):,} test images in {len(splits.classes)} classes{skipped}; "
        f"{config.loader.name} loader, {config.data.crop}x{config.data.crop} crops of "
        f"{config.data.resize}x{config.data.resize}"
    )


def _line(epoch: Epoch, epochs: int) -> str:
    line = f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  loss {epoch.train_loss:.4f}"
    if epoch.validation_top1_error is not None:
        line += (
            f"  validation loss {epoch.validation_loss:.4f}"
            f"  top-1 error {epoch.validation_top1_error:.4f}  top-5 {epoch.validation_top5_error:.4f}"
        )
    return (
        f"{line}  lr {epoch.learning_rate:.2g}  {epoch.images_per_second:,.1f} images/s"
        f"  {epoch.flops_per_second / 1e9:,.0f} GFLOP/s ({epoch.flops_utilization:.0%})"
    )


@command("config", Config)
def main(config: Config, run_dir: Path) -> None:
    """Train, and say where the run's files are."""
    given = any("hydra.run.dir=" in override for override in HydraConfig.get().overrides.hydra)
    train(config, run_dir, given=given)


if __name__ == "__main__":
    main()
