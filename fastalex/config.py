"""The configuration: what can be set, its type, its default and its limits.

Every key of ``python -m fastalex.train key=value`` is a field here. Hydra composes the YAML files of
``configs/`` onto these dataclasses, so an unknown key or a wrong type is refused before anything runs;
:func:`validate` refuses the values that no type can (a crop larger than the image it is cut from, say).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from fastalex.errors import ConfigError


class Init(Enum):
    """Weight initialisation of AlexNet."""

    default = "default"  # PyTorch's: uniform, Kaiming with a = sqrt(5)
    paper = "paper"  # N(0, 0.01), some biases 1
    he = "he"  # Kaiming normal, fan-in; output layer N(0, 0.01)


class Norm(Enum):
    """Normalisation after AlexNet's first two convolutions."""

    lrn = "lrn"
    batch = "batch"
    none = "none"


class OnError(Enum):
    """What a damaged image does."""

    fail = "fail"
    skip = "skip"


class Flip(Enum):
    """How a training epoch uses the mirror image."""

    none = "none"
    random = "random"  # each image mirrored with probability one half
    both = "both"  # each image twice an epoch, as it is and mirrored
    alternate = "alternate"  # each image mirrored every other epoch; in which half it starts is random


class Schedule(Enum):
    """Learning-rate schedule."""

    one_cycle = "one_cycle"
    plateau = "plateau"  # divided by ten when validation error stops improving


class Optimizer(Enum):
    """What turns gradients into steps."""

    sgd = "sgd"
    lars = "lars"  # for batches of thousands: each layer's step in proportion to its weights


class Scaling(Enum):
    """How the rate follows the size of the batch."""

    none = "none"
    linear = "linear"  # train.lr is for a batch of 128, and grows in proportion


class Strategy(Enum):
    """How a network is divided over processes."""

    ddp = "ddp"  # each has all of it, and a part of the batch
    hybrid = "hybrid"  # of AlexNet's hidden layers, each has a part of the units


class Compression(Enum):
    """In what gradients travel between processes."""

    none = "none"
    bf16 = "bf16"


class OnWriteError(Enum):
    """What a checkpoint that cannot be written does to the run."""

    stop = "stop"
    warn = "warn"  # the run goes on, and the older checkpoint stays


class Budget(Enum):
    """What a reproduction takes."""

    full = "full"
    quick = "quick"  # a few epochs on the digits, to prove the path; the figures mean nothing


class Precision(Enum):
    """Arithmetic of the forward and backward pass; master weights are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass
class ModelConfig:
    """A network by name, as :func:`fastalex.models.create_model` knows it."""

    name: str = MISSING


@dataclass
class AlexNetConfig(ModelConfig):
    """Options of AlexNet; see :class:`fastalex.models.alexnet.AlexNet`."""

    name: str = "alexnet"
    groups: int = 1
    norm: Norm = Norm.lrn
    overlapping_pool: bool = True
    dropout: float = 0.5
    init: Init = Init.default


@dataclass
class DataConfig:
    """A data set and the geometry of the views that are cut from its images."""

    name: str = MISSING  # cifar10, digits, imagefolder, tiny_imagenet, synthetic
    root: str = "data"
    download: bool = True
    resize: int = 256  # each image is resized to resize x resize pixels ...
    crop: int = 224  # ... and a crop x crop square is cut from it
    flip: Flip = Flip.random
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    validation_fraction: float = 0.2  # of the training images, where the data set has no split of its own
    on_error: OnError = OnError.fail
    # synthetic only
    images: int = 2048
    classes: int = 10


@dataclass
class LoaderConfig:
    """How images reach the device."""

    name: str = MISSING  # auto, resident, torchvision, dali, ffcv
    workers: int = -1  # processes or threads that prepare images; -1: one for each core beyond the first
    fold: bool = True  # resident only: where it pays, the first convolution reads small images as they are
    beton: str = ""  # ffcv only: the folder of .beton files; empty: fastalex's cache


@dataclass
class Stage:
    """A first part of a run at another resolution: ``train.stages=[{epochs: 4, resize: 128, crop: 112}]``."""

    epochs: int = MISSING
    resize: int = MISSING
    crop: int = MISSING
    lr: float | None = None  # one_cycle: the peak of a cycle that ends with this stage; null: it goes on
    cutmix: float | None = None  # in this stage; null: as in the epochs after the stages


@dataclass
class TrainConfig:
    """The recipe."""

    epochs: int = 30
    batch_size: int = 128  # of all processes together
    optimizer: Optimizer = Optimizer.sgd
    lr: float = 0.02  # the peak rate of one_cycle, the first rate of plateau
    lr_scaling: Scaling = Scaling.none
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip_norm: float = 0.0  # the gradient's greatest Euclidean norm, beyond which it is scaled down; 0: any
    schedule: Schedule = Schedule.one_cycle
    warmup: float = 0.15  # one_cycle: the share of the steps in which the rate rises
    patience: int = 3  # plateau: epochs without improvement that pass; after the next, the rate is divided
    label_smoothing: float = 0.0  # the share of each label that is spread over all classes
    cutmix: float = 0.0  # the share of the batches in which each image has a rectangle of another
    ema_decay: float = 0.0  # of the average of the weights, a step; the average is then what counts; 0: none
    accumulate: int = 1  # the parts that a batch is computed in, one after another, to take less memory
    stages: list[Stage] = field(default_factory=list)  # in order; the epochs after them are at data.crop


@dataclass
class RuntimeConfig:
    """Where and in what arithmetic the network runs."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Precision = Precision.auto
    channels_last: bool = True
    compile: bool | None = None  # null: where it pays, which is on a GPU
    winograd: bool = True  # CPU: convolutions with less than half the products and more rounding
    threads: int = 0  # of the CPU; 0: all its cores


@dataclass
class DistributedConfig:
    """How the processes that torchrun starts share the work; without torchrun there is one."""

    strategy: Strategy = Strategy.ddp
    compression: Compression = Compression.none  # of gradients; not of the hybrid's activations
    # seconds that a process waits for the others before it gives up; to be given again where a run goes on
    timeout: float = 600.0


@dataclass
class CheckpointConfig:
    """When a run saves its state; the newest is ``checkpoint.pt``, older ones ``checkpoint-STEP.pt``."""

    every_seconds: float = 120.0  # after the first step that ends so long after the last checkpoint began
    every_steps: int = 0  # beside that, after each so many steps, however fast they are; 0: not
    keep: int = 2  # the newest so many; the one before is what a damaged file falls back on
    on_error: OnWriteError = OnWriteError.stop


@dataclass
class Config:
    """One training run: what ``python -m fastalex.train`` takes."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    loader: LoaderConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: str = ""  # auto: the newest unfinished run, or that in hydra.run.dir; else a checkpoint or a run
    seed: int = 0
    log_every: int = 20  # steps between two looks at the loss, each of which waits for the device
    profile: bool = False  # run a few steps under torch.profiler instead of training


@dataclass
class EvaluateData:
    """Where the images are now, if they have moved since the run."""

    root: str | None = None


@dataclass
class EvaluateRuntime:
    """Where, and in what arithmetic, the network runs now."""

    device: str = "auto"
    precision: Precision | None = None  # null: that of the run; where it was auto, what is best here


@dataclass
class ReproduceRuntime:
    """Where the networks run."""

    device: str = "auto"


@dataclass
class EvaluateConfig:
    """What ``python -m fastalex.evaluate`` takes; everything else is read from the checkpoint."""

    checkpoint: str = MISSING
    data: EvaluateData = field(default_factory=EvaluateData)
    runtime: EvaluateRuntime = field(default_factory=EvaluateRuntime)


@dataclass
class ReproduceConfig:
    """What ``python -m fastalex.reproduce`` takes; everything else is in ``configs/row/``."""

    rows: list[str] = field(default_factory=list)  # none: all
    budget: Budget = Budget.full
    dry_run: bool = False  # print what would be run and an estimate of its time
    folder: str = "results"
    readme: str = "README.md"  # its table is written anew, where the file has one
    data: EvaluateData = field(default_factory=EvaluateData)
    runtime: ReproduceRuntime = field(default_factory=ReproduceRuntime)


@dataclass
class BetonConfig:
    """What ``python -m fastalex.data.write_beton`` takes."""

    data: DataConfig = MISSING
    loader: LoaderConfig = MISSING
    seed: int = 0


def register() -> None:
    """Tell Hydra the types of every key, under the names that the YAML files refer to."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="schema_evaluate", node=EvaluateConfig)
    store.store(name="schema_reproduce", node=ReproduceConfig)
    store.store(name="schema_write_beton", node=BetonConfig)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="model", name="schema_alexnet", node=AlexNetConfig)
    store.store(group="data", name="schema", node=DataConfig)
    store.store(group="loader", name="schema", node=LoaderConfig)


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
    for key, value, high in (
        ("train.lr", train.lr, math.inf),
        ("data.validation_fraction", data.validation_fraction, 1.0),
        ("distributed.timeout", config.distributed.timeout, math.inf),
    ):
        if not 0 < value < high:
            raise ConfigError(f"{key}={value}: must lie between 0 and {high:g}, both left out")
    for key, value, low, high in (
        ("train.momentum", train.momentum, 0.0, 1.0),
        ("train.weight_decay", train.weight_decay, 0.0, math.inf),
        ("train.clip_norm", train.clip_norm, 0.0, math.inf),
        ("train.label_smoothing", train.label_smoothing, 0.0, 1.0),
        ("train.ema_decay", train.ema_decay, 0.0, 1.0),
        ("train.warmup", train.warmup, 0.0, 1.0),
        ("train.patience", float(train.patience), 0.0, math.inf),
        ("runtime.threads", float(config.runtime.threads), 0.0, 4096.0),
        ("loader.workers", float(config.loader.workers), -1.0, math.inf),
        ("checkpoint.every_seconds", config.checkpoint.every_seconds, 0.0, math.inf),
        ("checkpoint.every_steps", float(config.checkpoint.every_steps), 0.0, math.inf),
    ):
        if not low <= value < high:
            raise ConfigError(f"{key}={value:g}: must be at least {low:g} and below {high:g}")
    _validate_cutmix("train", train.cutmix)
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
    three = len(data.mean) == len(data.std) == 3 and all(map(math.isfinite, [*data.mean, *data.std]))
    if not three or min(data.std) <= 0:
        raise ConfigError(
            f"data.mean={data.mean} data.std={data.std}: each needs three numbers, and std positive ones"
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
        if not 0 < stage.lr < math.inf:
            raise ConfigError(f"{where}.lr={stage.lr}: must be above 0")
    before = sum(stage.epochs for stage in train.stages)
    if train.stages and before >= train.epochs:
        raise ConfigError(
            f"train.stages: take {before} of train.epochs={train.epochs} and leave none at "
            f"data.crop={data.crop}; raise train.epochs or shorten a stage"
        )


def _validate_cutmix(where: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"{where}.cutmix={share:g}: a share of the batches, so from 0 to 1")


def model_options(config: ModelConfig) -> dict[str, Any]:
    """Return the keyword arguments that :func:`fastalex.models.create_model` takes beside the name."""
    options = {key: value for key, value in vars(config).items() if key != "name"}
    return {key: value.value if isinstance(value, Enum) else value for key, value in options.items()}
