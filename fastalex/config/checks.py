"""Refusals: values that no type can exclude, such as a crop larger than the image it is cut from."""

from __future__ import annotations

import math

from fastalex.config.schema import Config, DataConfig, Graph, Optimizer, Schedule, Strategy, TrainConfig
from fastalex.errors import ConfigError

_WITHOUT_FILES = ("digits", "synthetic")  # data sets that have no use for data.root


def validate(config: Config) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: naming the key, its value and the remedy.
    """
    data, train = config.data, config.train
    for key, count in (
        ("data.resize", data.resize),
        ("data.crop", data.crop),
        ("data.images", data.images),
        ("data.classes", data.classes),
        ("train.epochs", train.epochs),
        ("train.batch_size", train.batch_size),
        ("train.accumulate", train.accumulate),
        ("checkpoint.keep", config.checkpoint.keep),
        ("log_every", config.log_every),
    ):
        if count < 1:
            raise ConfigError(f"{key}={count}: must be at least 1")
    if data.crop > data.resize:
        raise ConfigError(
            f"data.crop={data.crop}: larger than data.resize={data.resize}, the image it is cut from; "
            "lower data.crop or raise data.resize"
        )
    _validate_stages(train, data)
    if train.batch_size % train.accumulate:
        raise ConfigError(
            f"train.accumulate={train.accumulate}: does not divide train.batch_size={train.batch_size}; "
            "choose one that does"
        )
    if not data.root and data.name not in _WITHOUT_FILES:
        raise ConfigError("data.root: is empty; name a folder")
    _validate_positive("train.lr", train.lr)
    _validate_positive("train.muon_lr", train.muon_lr)
    _validate_positive("data.validation_fraction", data.validation_fraction, 1.0)
    _validate_positive("distributed.timeout", config.distributed.timeout)
    for key, value, low, high in (
        ("train.momentum", train.momentum, 0.0, 1.0),
        ("train.weight_decay", train.weight_decay, 0.0, math.inf),
        ("train.muon_weight_decay", train.muon_weight_decay, 0.0, math.inf),
        ("train.clip_norm", train.clip_norm, 0.0, math.inf),
        ("train.label_smoothing", train.label_smoothing, 0.0, 1.0),
        ("train.ema_decay", train.ema_decay, 0.0, 1.0),
        ("train.warmup", train.warmup, 0.0, 1.0),
        ("train.progressive_resizing", train.progressive_resizing, 0.0, 1.0),
        ("train.patience", float(train.patience), 0.0, math.inf),
        ("runtime.threads", float(config.runtime.threads), 0.0, 4096.0),
        ("loader.workers", float(config.loader.workers), -1.0, math.inf),
        ("checkpoint.every_seconds", config.checkpoint.every_seconds, 0.0, math.inf),
        ("checkpoint.every_steps", float(config.checkpoint.every_steps), 0.0, math.inf),
    ):
        if not low <= value < high:
            raise _outside(key, value, f"at least {low:g}", high)
    _validate_cutmix("train", train.cutmix)
    _validate_head_lr(train.head_lr, config.init_from)
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed={config.seed}: must be at least 0 and below 2**63")
    if config.distributed.strategy is Strategy.hybrid:
        if train.ema_decay:
            raise ConfigError(
                f"train.ema_decay={train.ema_decay}: no average is kept of a network that is divided over "
                "processes; use distributed.strategy=ddp or leave train.ema_decay out"
            )
        if train.optimizer is Optimizer.lars:
            raise ConfigError(
                "train.optimizer=lars: needs each layer whole in one process; use distributed.strategy=ddp"
            )
    if config.runtime.graph is Graph.step and train.optimizer is Optimizer.lars:
        raise ConfigError(
            "runtime.graph=step: cannot record train.optimizer=lars, which reads its rate on the host; use "
            "runtime.graph=network"
        )
    if not 0 < data.train_fraction <= 1:
        raise ConfigError(
            f"data.train_fraction={data.train_fraction:g}: must be above 0 and at most 1, which is all images"
        )
    three = len(data.mean) == len(data.std) == 3 and all(map(math.isfinite, [*data.mean, *data.std]))
    if not three or min(data.std) <= 0:
        raise ConfigError(
            f"data.mean={data.mean} data.std={data.std}: each needs three numbers, and std positive ones"
        )
    _validate_colors(data)


def _validate_colors(data: DataConfig) -> None:
    values, vectors = data.color_eigenvalues, data.color_eigenvectors
    lengths = [len(values), *map(len, vectors)]
    numbers = [*values, *(number for vector in vectors for number in vector)]
    if lengths != [0] and (lengths != [3] * 4 or not all(map(math.isfinite, numbers)) or min(values) < 0):
        raise ConfigError(
            f"data.color_eigenvalues={values} data.color_eigenvectors={vectors}: need three numbers, at "
            "least 0, and three vectors of three numbers; leave both out to have them computed"
        )


def _validate_stages(train: TrainConfig, data: DataConfig) -> None:
    for number, stage in enumerate(train.stages):
        where = f"train.stages[{number}]"
        for key in ("epochs", "resize", "crop"):
            if getattr(stage, key) < 1:
                raise ConfigError(f"{where}.{key}={getattr(stage, key)}: must be at least 1")
        if stage.crop > stage.resize:
            raise ConfigError(
                f"{where}.crop={stage.crop}: larger than its resize={stage.resize}, the image it is cut from"
            )
        if stage.cutmix is not None:
            _validate_cutmix(where, stage.cutmix)
        if stage.lr is None:
            continue
        if train.schedule is not Schedule.one_cycle:
            raise ConfigError(f"{where}.lr={stage.lr}: is for train.schedule=one_cycle; leave it out")
        _validate_positive(f"{where}.lr", stage.lr)
    if train.stages and train.staged_epochs >= train.epochs:
        raise ConfigError(
            f"train.stages: take {train.staged_epochs} of train.epochs={train.epochs} and leave none at "
            f"data.crop={data.crop}; raise train.epochs or shorten a stage"
        )


def _validate_head_lr(head_lr: float | None, init_from: str) -> None:
    if head_lr is None:
        return
    _validate_positive("train.head_lr", head_lr)
    if not init_from:
        raise ConfigError(
            f"train.head_lr={head_lr}: is the last layer's learning rate where the other layers are trained "
            "already; give their weights with init_from, or leave it out"
        )


def _validate_cutmix(where: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"{where}.cutmix={share:g}: a share of the batches, so from 0 to 1")


def _validate_positive(key: str, value: float, high: float = math.inf) -> None:
    if not 0 < value < high:
        raise _outside(key, value, "greater than 0", high)


def _outside(key: str, value: float, low: str, high: float) -> ConfigError:
    """Return the error of a value that is not ``low``, such as "at least 1", or not below ``high``."""
    if not math.isfinite(value):
        return ConfigError(f"{key}={value}: must be a finite number")
    below = f" and below {high:g}" if math.isfinite(high) else ""
    return ConfigError(f"{key}={value:g}: must be {low}{below}")
