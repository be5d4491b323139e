"""``python -m fastalex.train key=value ...``: train a network and report its error on the test set."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from torch import nn
from tqdm import tqdm

from fastalex import crops, distributed, limits, memory
from fastalex import runtime as runtimes
from fastalex.checkpoint import Checkpoint, plain, save_weights
from fastalex.cli import asked_for, command
from fastalex.config import Config, Stage, Strategy, model_options, validate
from fastalex.data import (
    CutMixLoader,
    DataSplits,
    Loader,
    StagedLoader,
    Views,
    build_loader,
    load_splits,
    resolve_loader,
)
from fastalex.data.sampling import mix
from fastalex.distributed import World
from fastalex.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ReportedError,
    StoppedError,
)
from fastalex.evaluation import evaluate
from fastalex.files import remove_empty
from fastalex.flops import matmul_flops_per_second
from fastalex.models import check_batch, check_crop, count_parameters, create_model
from fastalex.profiling import STEPS, profile_steps
from fastalex.resume import Found, find
from fastalex.runtime import Runtime
from fastalex.saving import NEWEST, BestWeights, CheckpointWriter, OutputPolicy
from fastalex.signals import StopSignals
from fastalex.tracking import RunFolder, versions
from fastalex.trainer import Epoch, StopTraining, Trainer


def train(
    config: Config, run_dir: Path, *, given: bool = True, asked: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Run one training from a configuration, or from where ``config.resume`` says, to ``summary.json``.

    Args:
        config: what to train, on what, and how. A run that goes on does so as it began: of all this, it takes
            what ``asked`` names, if it is one of ``fastalex.resume.CHANGEABLE``.
        run_dir: the folder for the run's files.
        given: whether that folder was asked for by name; if not, a neighbour is taken where it is in use.
        asked: the values that were asked for by name, by their dotted keys.

    Returns:
        The content of ``summary.json``.

    Raises:
        FastalexError: for input that has to be mended, before anything is written; DivergedError; or
            StoppedError after SIGTERM or SIGINT.
    """
    began = time.perf_counter()
    distributed.alike(lambda: validate(config))  # before the processes wait for each other
    with StopSignals() as signals, distributed.joined(config.distributed.timeout) as world, world.watched():
        # In a function of its own: what it made is gone when the processes part.
        return _take_part(config, run_dir, given, asked or {}, signals, world, began)


def _take_part(
    config: Config,
    run_dir: Path,
    given: bool,
    asked: Mapping[str, Any],
    signals: StopSignals,
    world: World,
    began: float,
) -> dict[str, Any]:
    """Do what :func:`train` does, in one of the processes."""
    if distributed.restarted():
        config.resume = _resume_again(config.resume, given)
    found: Found | None = None

    def where_to_begin() -> tuple[Config, Checkpoint] | None:
        nonlocal found
        found = find(config.resume, run_dir, given) if config.resume else None
        if found is None:
            _check(config, world)
            if config.resume:
                print("resume=auto: there is no unfinished run with a checkpoint; a new one begins")
            return None
        if found.folder.resolve() != run_dir.resolve():
            remove_empty(run_dir)
        resumed = found.configuration(asked)
        _check(resumed, world)
        print(f"going on with the run in {found.folder} from step {found.checkpoint.step}")
        return resumed, found.checkpoint

    try:
        beginning = world.on_main(where_to_begin)
        resumed, checkpoint = beginning or (config, None)
        with limits.explained(resumed):
            trainer, splits = _prepare(resumed, signals, world)
            if checkpoint is not None:
                _restore(trainer, checkpoint, splits)  # in all at once: they divide the weights among them
            if not world.main:
                with signals.deferred():
                    return Follower(resumed, splits, trainer, run_dir).take_part()
            folder = _folder(resumed, run_dir, given, found, trainer)
            return _lead(Run(resumed, splits, trainer, folder, found, began), signals)
    finally:
        if found is not None:
            found.lock.release()


def _resume_again(resume: str, given: bool) -> str:
    """What to resume in a process that torchrun has started again, such that no progress is lost."""
    if resume == "auto" or not resume:
        # Without a folder of that name, the newest unfinished run may be another command's.
        return "auto" if given else resume
    path = Path(resume)
    return str(path.parent) if path.is_file() else resume


def _check(config: Config, world: World) -> None:
    """Refuse a configuration that cannot work, here and with so many processes."""
    validate(config)
    check_crop(config.model.name, "data.crop", config.data.crop)
    for number, stage in enumerate(config.train.stages):
        check_crop(config.model.name, f"train.stages[{number}].crop", stage.crop)
    train = config.train
    if world.size == 1:
        smallest = min([config.data.crop, *(stage.crop for stage in train.stages)])
        check_batch(config.model.name, train.batch_size // train.accumulate, smallest)
    if train.batch_size % (world.size * train.accumulate):
        parts = f" in train.accumulate={train.accumulate} equal parts each" if train.accumulate > 1 else ""
        raise ConfigError(
            f"train.batch_size={train.batch_size}: is of all {world.size} processes together and does not "
            f"divide among them{parts}; use a multiple of {world.size * train.accumulate}"
        )
    if config.distributed.strategy is Strategy.hybrid and world.size == 1:
        raise ConfigError(
            "distributed.strategy=hybrid: takes several processes; start them with "
            "torchrun --nproc-per-node=2 -m fastalex.train ..."
        )
    if config.profile and world.size > 1:
        raise ConfigError("profile=true: profiles one process; run it without torchrun")


def _prepare(config: Config, signals: StopSignals, world: World) -> tuple[Trainer, DataSplits]:
    """Make all that a run is of, but its folder; the same in each process."""
    runtime = runtimes.choose(config.runtime, world)
    if runtime.needs_loss_scaling and config.distributed.strategy is Strategy.hybrid:
        raise ConfigError(
            "distributed.strategy=hybrid: cannot scale the loss, which fp16 needs; "
            "choose runtime.precision=bf16 or fp32, or distributed.strategy=ddp"
        )
    if world.main:
        print(f"{runtime}, {world.size} processes" if world.size > 1 else runtime)
    splits = world.main_first(lambda: load_splits(config.data, config.seed, progress=world.main))
    fewest = min(len(splits.validation), len(splits.test))
    if splits.has_errors and fewest < world.size:
        raise ConfigError(
            f"data.root={config.data.root}: has {len(splits.validation)} validation and {len(splits.test)} "
            f"test images, and each of {world.size} processes needs one; use at most {fewest} processes"
        )
    torch.manual_seed(config.seed)
    model = create_model(config.model.name, len(splits.classes), **model_options(config.model))
    room = memory.room_for_images(model, config, runtime, world)
    config.loader = resolve_loader(config.loader, splits, room)
    if world.main:
        print(_describe(config, splits))
    runtime.place(model)
    trainer = Trainer(
        model,
        config.train,
        _staged_loader(model, config, splits, runtime, Views.random, world),
        _staged_loader(model, config, splits, runtime, Views.center, world) if splits.has_errors else None,
        runtime,
        log_every=config.log_every,
        should_stop=lambda: signals.received is not None,
        peak_flops=matmul_flops_per_second(runtime),
        world=world,
        distributed=config.distributed,
    )
    steps = config.train.epochs * len(trainer.train_loader)
    if config.profile and steps < STEPS:
        raise ConfigError(
            f"train.epochs={config.train.epochs}: profile=true takes {STEPS} steps, and the run has {steps}; "
            "raise train.epochs"
        )
    if world.size > 1:
        torch.manual_seed(mix(config.seed, world.rank))  # dropout differs from process to process
    return trainer, splits


def _folder(config: Config, run_dir: Path, given: bool, found: Found | None, trainer: Trainer) -> RunFolder:
    """Open the run's folder, a new one or that of the run that goes on."""
    if found is not None:
        try:
            history = [Epoch(**epoch) for epoch in found.checkpoint.training["history"]]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"resume={found.path}: lacks the epochs so far; train again") from error
        return RunFolder.resumed(found.folder, found.lock, history, trainer.step)
    folder = RunFolder.new(run_dir, given, config, restart=config.resume == "auto")
    trainer.train_loader.set_epoch(0)
    images = next(iter(trainer.train_loader))[0]
    shown = images.make() if isinstance(images, crops.Crops) else images
    folder.augmented_inputs(shown, config.data.mean, config.data.std)
    return folder


def _lead(run: Run, signals: StopSignals) -> dict[str, Any]:
    """Take a run to its end, or to where a signal stops it."""
    try:
        if run.config.profile:
            return run.profile()
        with signals.deferred():
            run.fit()
        if signals.received is not None:
            raise StoppedError(f"stopped by {signals.received.name}", signals.received)
        return run.report()
    except (StoppedError, DataError, RuntimeError) as error:
        # A signal to the whole process group ends the loader's workers as well, which is then no error.
        if signals.received is None:
            raise
        how = f"stopped by {signals.received.name}"
        if run.writer.written is not None:
            how += f"; step {run.writer.written} is saved, go on with resume={run.folder.path}"
        raise StoppedError(how, signals.received) from error
    finally:
        run.folder.close()


class Follower:
    """What a process other than the first does: the same steps, and nothing that can be seen.

    Args:
        config: of the run.
        splits: its data.
        trainer: with the state to begin from.
        run_dir: that Hydra made for this process.
    """

    def __init__(self, config: Config, splits: DataSplits, trainer: Trainer, run_dir: Path) -> None:
        self.config = config
        self.splits = splits
        self.trainer = trainer
        self._run_dir = run_dir
        trainer.on_step = self._on_step

    def take_part(self) -> dict[str, Any]:
        """Train to the end of the run.

        Raises:
            ReportedError: the run was stopped, which the first process says.
        """
        trainer = self.trainer
        try:
            while not trainer.finished:
                trainer.run_epoch()
                if trainer.world.any(False):
                    trainer.weights()  # which are the best so far
                if not trainer.finished and trainer.world.any(False):
                    self._save()
            self._save()
        except StopTraining:
            self._save()
            raise ReportedError(128 + signal.SIGTERM) from None
        finally:
            remove_empty(self._run_dir)
        trainer.weights()
        if self.splits.has_errors:
            with trainer.evaluated() as network:
                evaluate(network, self.splits.test, self.config, trainer.runtime, trainer.world)
        return {}

    def _on_step(self, step: int, loss: float | None) -> None:
        if _is_asked(self.config, step) or self.trainer.world.any(False):
            self._save()

    def _save(self) -> None:
        """Contribute to what the first process saves."""
        self.trainer.state_dict()
        self.trainer.weights()


class Run:
    """A training run with all it writes: what the first process does.

    Args:
        config: of the run.
        splits: its data.
        trainer: with the state to begin from.
        folder: for its files.
        found: what it goes on from, if it does.
        began: when the process started on it, by ``time.perf_counter``.
    """

    def __init__(
        self,
        config: Config,
        splits: DataSplits,
        trainer: Trainer,
        folder: RunFolder,
        found: Found | None,
        began: float,
    ) -> None:
        self.config = config
        self.splits = splits
        self.trainer = trainer
        self.folder = folder
        self.policy = OutputPolicy(config.checkpoint.on_error)
        newest = found.checkpoint.step if found is not None and found.path.name == NEWEST else None
        self.writer = CheckpointWriter(folder.path, config.checkpoint, self.policy, newest)
        self._classes = list(splits.classes)
        self._began = began
        before = found.checkpoint.training if found is not None else {}
        self._earlier_seconds: float = before.get("wall_seconds", 0.0)  # of processes before this one
        self._startup_seconds: float = before.get("startup_seconds", 0.0)
        self._between_seconds: float = before.get("between_epochs_seconds", 0.0)
        self._trained = time.perf_counter()
        self._best = BestWeights(folder.path / "best.safetensors", plain(config), self._classes)
        self._find_best_so_far()
        self._progress = tqdm(
            total=STEPS if config.profile else config.train.epochs * len(trainer.train_loader),
            initial=trainer.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 20,
        )
        trainer.on_step = self._on_step

    @property
    def wall_seconds(self) -> float:
        """Of this process and those before it."""
        return self._earlier_seconds + time.perf_counter() - self._began

    def profile(self) -> dict[str, Any]:
        """Run a few steps under the profiler."""
        try:
            profiled = profile_steps(self.trainer, self.folder.path)
        finally:
            self._progress.close()
        print(
            f"\n{profiled.table()}\n\ntrace.json (for ui.perfetto.dev) and profile.txt are in "
            f"{self.folder.path}"
        )
        return {"profile": vars(profiled)}

    def fit(self) -> None:
        """Train to the end, or to where the trainer is told to stop; the state is then saved."""
        self._startup_seconds += time.perf_counter() - self._began
        try:
            with suppress(StopTraining):
                while not self.trainer.finished:
                    self._end_epoch(self.trainer.run_epoch())
            self._trained = time.perf_counter()
            self._save()
            with self.policy.applied():
                self.folder.finish()
        except DivergedError as error:
            # The state is worthless; what is good is that of the epochs before.
            self.writer.wait()
            for write in (self._best.write, self.folder.finish):
                with self.policy.applied():
                    write()
            kept = (
                "no checkpoint was written"
                if self.writer.written is None
                else f"the last good checkpoint is {self.writer.path}"
            )
            raise DivergedError(f"{error}; {kept}") from error
        finally:
            self._progress.close()
            self.writer.close()

    def report(self) -> dict[str, Any]:
        """Evaluate what was learnt, and write it down."""
        trainer, runtime = self.trainer, self.trainer.runtime
        weights = trainer.averaged_weights() or trainer.weights()
        with self.policy.applied():
            save_weights(weights, self.folder.path / "model.safetensors", plain(self.config), self._classes)
        if self.splits.has_errors:
            summary = self._evaluate()
        else:
            summary = {}
            print(
                "\nsynthetic data: the throughput is real, an error would mean nothing and none is reported"
            )
        summary |= {
            "data": self.splits.source,
            "train_images": len(self.splits.train),
            "validation_images": len(self.splits.validation),
            "skipped_images": self.splits.skipped,
            "epochs": trainer.epoch,
            "steps": trainer.step,
            "images_per_second": trainer.images_per_second,
            "input_wait_fraction": trainer.input_wait_fraction,
            "flops_utilization": trainer.flops_utilization,
            "checkpoint_stall_seconds": max(self.writer.stalls, default=0.0),
            **self._seconds(),
            "parameters": count_parameters(trainer.model),
            "seed": self.config.seed,
            "hardware": runtime.hardware,
            "runtime": str(runtime),
            "versions": versions(),
        }
        self.folder.summary(summary)
        print(
            f"{trainer.images_per_second:,.1f} images/s in training, "
            f"{trainer.input_wait_fraction:.1%} of the time waiting for input; the arithmetic runs at "
            f"{trainer.flops_utilization:.0%} of a large matrix product's rate\n"
            f"the run's files are in {self.folder.path}"
        )
        return summary

    def _seconds(self) -> dict[str, float]:
        """Where the wall time went; the last is the sum of those before it."""
        spent = self.trainer.spent
        epochs = sum(epoch.seconds for epoch in self.folder.epochs)
        return {
            "startup_seconds": self._startup_seconds,
            "warmup_seconds": spent.warmup,
            "training_seconds": spent.seconds,
            "validation_seconds": epochs - spent.warmup - spent.seconds,
            "between_epochs_seconds": self._between_seconds,
            "closing_seconds": time.perf_counter() - self._trained,
            "wall_seconds": self.wall_seconds,
        }

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate the final weights on the test set, and those that were best on validation."""
        trainer, runtime = self.trainer, self.trainer.runtime
        with trainer.evaluated() as network:
            final = evaluate(network, self.splits.test, self.config, runtime, trainer.world)
        print(f"\n{final.table('test set, final weights')}")
        summary = final.as_dict()
        kept = self._best.read("its errors are left out") if self._best.error is not None else None
        if kept is not None:
            weights, facts = kept
            chosen = final
            if facts["epoch"] != trainer.epoch:
                best = trainer.undivided(weights)
                chosen = evaluate(best, self.splits.test, self.config, runtime)
                print(chosen.table(f"test set, best on validation (epoch {facts['epoch']})"))
            summary["best_on_validation"] = {
                "epoch": facts["epoch"],
                "validation_top1_error": facts["validation_top1_error"],
                **chosen.as_dict(),
            }
        return summary

    def _on_step(self, step: int, loss: float | None) -> None:
        self._progress.update()
        if loss is not None:
            with self.policy.applied():
                self.folder.loss(step, loss)
            self._progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if self.config.profile:
            return
        self.writer.check()
        if _is_asked(self.config, step) or self.trainer.world.any(self.writer.due):
            self._save()

    def _end_epoch(self, epoch: Epoch) -> None:
        """Do what is done between epochs, which training waits for."""
        began = time.perf_counter()
        trainer = self.trainer
        with self.policy.applied():
            self.folder.epoch(epoch)
        self._progress.write(_line(epoch, self.config.train.epochs), file=sys.stdout)
        error = epoch.validation_top1_error
        # Errors at another resolution do not compare with those at the one that is asked for.
        early = epoch.epoch <= sum(stage.epochs for stage in self.config.train.stages)
        better = error is not None and not early and self._best.improved_by(error)
        if trainer.world.any(better):
            assert error is not None
            weights = trainer.weights()
            self._best.keep(trainer.averaged_weights() or weights, epoch.epoch, error)
        # The end of the last epoch is that of the run, and saved as such.
        if not trainer.finished and trainer.world.any(self.writer.due):
            self._save()
        self._between_seconds += time.perf_counter() - began

    def _save(self) -> None:
        trainer = self.trainer
        training = {
            **trainer.state_dict(),
            "history": [asdict(epoch) for epoch in self.folder.epochs],
            "train_images": len(self.splits.train),
            "wall_seconds": self.wall_seconds,
            "startup_seconds": self._startup_seconds,
            "between_epochs_seconds": self._between_seconds,
        }
        checkpoint = Checkpoint(
            plain(self.config), self._classes, trainer.weights(), training, trainer.averaged_weights()
        )
        # The best weights first: who goes on from a checkpoint finds those of the epochs in it.
        self.writer.save(checkpoint, self._best.writing())

    def _find_best_so_far(self) -> None:
        """Take up the best validation error of a run that goes on, if its weights are still there."""
        staged = sum(stage.epochs for stage in self.config.train.stages)
        if not any(epoch.validation_top1_error is not None for epoch in self.folder.epochs[staged:]):
            return
        kept = self._best.read("the best on validation is sought among the epochs to come")
        if kept is not None:
            self._best.error = kept[1]["validation_top1_error"]


def _is_asked(config: Config, step: int) -> bool:
    """Whether a checkpoint after this step was asked for by number, whenever the last one was."""
    every = config.checkpoint.every_steps
    return every > 0 and step % every == 0


def _restore(trainer: Trainer, checkpoint: Checkpoint, splits: DataSplits) -> None:
    """Put a checkpoint's state into the trainer.

    Raises:
        CheckpointError: if it is of another network, or of other data.
    """
    images = checkpoint.training.get("train_images")
    if checkpoint.classes != list(splits.classes) or images != len(splits.train):
        raise CheckpointError(
            f"resume: the run was trained on {images} images of {len(checkpoint.classes)} classes, and "
            f"the data are now {len(splits.train)} of {len(splits.classes)} ({splits.source}); restore them"
        )
    trainer.load_weights(checkpoint.model)
    trainer.load_state_dict(checkpoint.training, checkpoint.average)


def _staged_loader(
    model: nn.Module, config: Config, splits: DataSplits, runtime: Runtime, views: Views, world: World
) -> Loader:
    """The loader of training or validation: one for each stage of the resolution schedule, and the last.

    A network errs on objects of another size in pixels than it was trained on, so each stage is validated at
    its own resolution.
    """
    stages = config.train.stages
    loaders = [_loader(model, _during(stage, config), splits, runtime, views, world) for stage in stages]
    last = _loader(model, config, splits, runtime, views, world)
    return StagedLoader([*loaders, last], [stage.epochs for stage in stages]) if stages else last


def _during(stage: Stage, config: Config) -> Config:
    """The configuration with what a stage has of its own."""
    data = replace(config.data, resize=stage.resize, crop=stage.crop)
    cutmix = config.train.cutmix if stage.cutmix is None else stage.cutmix
    return replace(config, data=data, train=replace(config.train, cutmix=cutmix))


def _loader(
    model: nn.Module, config: Config, splits: DataSplits, runtime: Runtime, views: Views, world: World
) -> Loader:
    images = splits.train if views is Views.random else splits.validation
    loader = build_loader(
        images,
        config.data,
        config.loader,
        views=views,
        batch_size=config.train.batch_size // world.size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        device=runtime.device,
        dtype=runtime.dtype,
        channels_last=runtime.channels_last,
        fold=crops.pays(model, images, config.data, config.loader, runtime.device),
    )
    share = config.train.cutmix if views is Views.random else 0.0
    return CutMixLoader(loader, len(splits.classes), share) if share else loader


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
    resuming = config.resume or distributed.restarted()
    train(config, run_dir, given=given, asked=asked_for() if resuming else None)


if __name__ == "__main__":
    main()
