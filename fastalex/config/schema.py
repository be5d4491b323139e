"""The configuration: what can be set, its type, its default and its limits.

Every key of ``python -m fastalex.train key=value`` is a field here. Hydra composes the YAML files of
``configs/`` onto these dataclasses, so an unknown key or a wrong type is refused before anything runs;
:func:`fastalex.config.checks.validate` refuses the values that no type can exclude, such as a crop larger
than the image it is cut from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


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
    init: Init = Init.he


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
    clip_norm: float = 5.0  # the gradient's greatest Euclidean norm, beyond which it is scaled down; 0: none
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
