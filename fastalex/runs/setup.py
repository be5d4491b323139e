"""From a configuration to a trainer: checks, data, network, loaders."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import nn

from fastalex.config import Color, Config, Fit, Stage, Strategy
from fastalex.config.checks import validate
from fastalex.config.plain import model_options
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
from fastalex.data.color import components
from fastalex.data.sampling import mix
from fastalex.distributed.processes import World
from fastalex.distributed.strategies import check_strategy
from fastalex.errors import CheckpointError, ConfigError
from fastalex.models import check_batch, check_crop, create_model, smallest_crop
from fastalex.runs.checkpoint import DIGEST, Checkpoint
from fastalex.runs.initial_weights import InitialWeights
from fastalex.runs.signals import StopSignals
from fastalex.runtime import Runtime, choose_runtime
from fastalex.training.flops import matmul_flops_per_second
from fastalex.training.freezing import freeze
from fastalex.training.memory import room_for_images
from fastalex.training.profiling import STEPS
from fastalex.training.trainer import Trainer


def resize_progressively(config: Config) -> None:
    """Put the stage that ``train.progressive_resizing`` means into ``train.stages``, unless that has stages.

    Its number of epochs is rounded, and its images are half as large. There is none if such a crop is too
    small for the network, nor under the profiler, whose few steps are those at ``data.crop``.

    Args:
        config: that :func:`fastalex.config.checks.validate` has passed.

    Raises:
        ConfigError: if there is no such network.
    """
    train, data = config.train, config.data
    epochs = min(round(train.progressive_resizing * train.epochs), train.epochs - 1)
    crop = data.crop // 2
    if epochs and not train.stages and not config.profile and crop >= smallest_crop(config.model.name):
        train.stages = [Stage(epochs, resize=data.resize // 2, crop=crop, cutmix=0.0)]


def check(config: Config, world: World) -> None:
    """Refuse a configuration that cannot work, here and with this many processes.

    Raises:
        ConfigError: naming the key, its value and the remedy.
    """
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
    outline = _outline(config)  # which refuses options that the network does not have
    if train.freeze or train.head_lr is not None:
        freeze(outline, train)
        check_strategy(outline, config.distributed.strategy)


def initial_weights(config: Config) -> InitialWeights | None:
    """Read what ``init_from`` names; None where it is empty.

    Raises:
        CheckpointError: there is no such file; it is damaged, or of another network.
    """
    if not config.init_from:
        return None
    return InitialWeights.read(config.init_from, _outline(config), config.model)


def _outline(config: Config) -> nn.Module:
    """The network without memory for its weights, for any number of classes."""
    with torch.device("meta"):
        return create_model(config.model.name, 2, **model_options(config.model))


def build(
    config: Config, signals: StopSignals, world: World, initial: InitialWeights | None = None
) -> tuple[Trainer, DataSplits]:
    """Build runtime, data, model and trainer; identical on every rank.

    Rank 0 refuses what cannot work, so that all ranks end together; otherwise torchrun would stop the slower
    ones, which would print a second error.

    Args:
        config: that :func:`check` has passed. In it, ``loader.name=auto`` is replaced by what it stands for,
            and with ``data.color=pca`` the colours' principal components are filled in.
        signals: end the training when one arrives.
        world: the processes that train together.
        initial: the weights to start from, on rank 0, which hands them to the others; None for random ones.

    Raises:
        FastalexError: for input that has to be corrected.
    """
    runtime = choose_runtime(config.runtime, world)
    world.on_main(lambda: _check_loss_scaling(runtime, config))
    if world.main:
        print(f"{runtime}, {world.size} processes" if world.size > 1 else runtime)
    splits = world.main_first(lambda: load_splits(config.data, config.seed, progress=world.main))
    world.on_main(lambda: _check_images(splits, config, world))
    config.data.color_eigenvalues, config.data.color_eigenvectors = world.on_main(
        lambda: components(config.data, splits.train, progress=True)
    )
    torch.manual_seed(config.seed)
    model = create_model(config.model.name, len(splits.classes), **model_options(config.model))
    world.on_main(lambda: _start_from(initial, model, splits, config))
    world.on_main(lambda: check_strategy(model, config.distributed.strategy))
    config.loader = resolve_loader(config.loader, splits, room_for_images(model, config, runtime, world))
    if world.main:
        print(_describe(config, splits))
    runtime.place(model)
    loaders = [
        _staged_loader(model, config, splits, runtime, views, world) for views in (Views.random, Views.center)
    ]
    trainer = Trainer(
        model,
        config.train,
        loaders[0],
        loaders[1] if splits.is_measurable else None,
        runtime,
        log_every=config.log_every,
        should_stop=lambda: signals.received is not None,
        peak_flops=matmul_flops_per_second(runtime),
        world=world,
        distributed=config.distributed,
    )
    world.on_main(lambda: _check_steps(trainer, config))
    if world.size > 1:
        torch.manual_seed(mix(config.seed, world.rank))  # dropout differs from rank to rank
    return trainer, splits


def _start_from(initial: InitialWeights | None, model: nn.Module, splits: DataSplits, config: Config) -> None:
    if initial is not None:
        if warning := initial.warning(config.data):
            print(f"fastalex: warning: {warning}", file=sys.stderr)
        print(initial.copy_to(model, splits.classes, config.train))


def restore(trainer: Trainer, checkpoint: Checkpoint, splits: DataSplits) -> None:
    """Load a checkpoint's state into a trainer; collective.

    Raises:
        CheckpointError: if it is of another network, or of other data.
    """
    images = checkpoint.training.get("train_images")
    if checkpoint.classes != list(splits.classes) or images != len(splits.train):
        raise CheckpointError(
            f"resume: the run was trained on {images} images of {len(checkpoint.classes)} classes, and "
            f"the data are now {len(splits.train)} of {len(splits.classes)} ({splits.source}); restore them"
        )
    if checkpoint.training.get(DIGEST, splits.digest) != splits.digest:  # older checkpoints have none
        raise CheckpointError(
            f"resume: the images are no longer those of the run ({splits.source}), so some that it was "
            "trained on may now be for validation or for the test; restore them"
        )
    trainer.load_weights(checkpoint.model)
    trainer.load_state_dict(checkpoint.training, checkpoint.average)


def _check_loss_scaling(runtime: Runtime, config: Config) -> None:
    if runtime.needs_loss_scaling and config.distributed.strategy is Strategy.hybrid:
        raise ConfigError(
            "distributed.strategy=hybrid: cannot scale the loss, which fp16 needs; "
            "choose runtime.precision=bf16 or fp32, or distributed.strategy=ddp"
        )


def _check_steps(trainer: Trainer, config: Config) -> None:
    if config.profile and trainer.steps < STEPS:
        raise ConfigError(
            f"train.epochs={config.train.epochs}: profile=true takes {STEPS} steps, and the run has "
            f"{trainer.steps}; raise train.epochs"
        )


def _check_images(splits: DataSplits, config: Config, world: World) -> None:
    fewest = min(len(splits.validation), len(splits.test))
    if splits.is_measurable and fewest < world.size:
        raise ConfigError(
            f"data.root={config.data.root}: has {len(splits.validation)} validation and {len(splits.test)} "
            f"test images, and each of {world.size} processes needs one; use at most {fewest} processes"
        )


def _staged_loader(
    model: nn.Module, config: Config, splits: DataSplits, runtime: Runtime, views: Views, world: World
) -> Loader:
    """The loader of training or validation: one for each stage of the resolution schedule, and the last.

    A network errs on objects of another size in pixels than it was trained on, so each stage is validated at
    its own resolution.
    """
    stages = config.train.stages
    loaders = [
        _loader(model, of_stage, splits, runtime, views, world)
        for of_stage in (*(_in_stage(stage, config) for stage in stages), config)
    ]
    return StagedLoader(loaders, [stage.epochs for stage in stages]) if stages else loaders[0]


def _in_stage(stage: Stage, config: Config) -> Config:
    """The configuration with the values that a stage sets for itself."""
    data = replace(config.data, resize=stage.resize, crop=stage.crop)
    cutmix = config.train.cutmix if stage.cutmix is None else stage.cutmix
    return replace(config, data=data, train=replace(config.train, cutmix=cutmix))


def _loader(
    model: nn.Module, config: Config, splits: DataSplits, runtime: Runtime, views: Views, world: World
) -> Loader:
    loader = build_loader(
        splits.train if views is Views.random else splits.validation,
        config.data,
        config.loader,
        views=views,
        batch_size=config.train.batch_size // world.size,
        runtime=runtime,
        world=world,
        seed=config.seed,
        network=model,
    )
    share = config.train.cutmix if views is Views.random else 0.0
    return CutMixLoader(loader, len(splits.classes), share) if share else loader


def _describe(config: Config, splits: DataSplits) -> str:
    count = f"{splits.skipped} damaged image{'s' * (splits.skipped != 1)}"
    skipped = f", {count} skipped" if splits.skipped else ""
    kept = ", their shape kept" if config.data.fit is Fit.shorter_side else ""
    shifted = ", colours shifted" if config.data.color is Color.pca else ""
    sizes = [
        f"{stage.crop}x{stage.crop} crops of {stage.resize}x{stage.resize} for "
        f"{stage.epochs} epoch{'s' * (stage.epochs != 1)}, then "
        for stage in config.train.stages
    ]
    return (
        f"{splits.source}: {len(splits.train):,} training, {len(splits.validation):,} validation and "
        f"{len(splits.test):,} test images in {len(splits.classes)} classes{skipped}; "
        f"{config.loader.name} loader, {''.join(sizes)}{config.data.crop}x{config.data.crop} crops of "
        f"{config.data.resize}x{config.data.resize}{kept}{shifted}"
    )
