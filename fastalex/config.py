"""The configuration: what can be set, its type, its default and its limits.

Every key of ``python -m fastalex.train key=value`` is a field here. Hydra composes the YAML files of
``configs/`` onto these dataclasses, so an unknown key or a wrong type is refused before anything runs;
:func:`validate` refuses the values that no type can (a crop larger than the image it is cut from, say).
"""

from __future__ import annotations

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


class Schedule(Enum):
    """Learning-rate schedule."""

    one_cycle = "one_cycle"
    plateau = "plateau"  # divided by ten when validation error stops improving


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

    name: str = MISSING  # torchvision, resident, dali, ffcv
    workers: int = -1  # processes or threads that prepare images; -1: one for each core beyond the first


@dataclass
class TrainConfig:
    """The recipe."""

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Schedule = Schedule.one_cycle
    warmup: float = 0.15  # one_cycle: the share of the steps in which the rate rises
    patience: int = 3  # plateau: epochs without improvement before the rate is divided by ten
    min_lr: float = 1e-5  # plateau: training ends when the rate falls below this


@dataclass
class RuntimeConfig:
    """Where and in what arithmetic the network runs."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Precision = Precision.auto
    channels_last: bool = True
    compile: bool = False
    threads: int = 0  # of the CPU; 0: all


@dataclass
class Config:
    """One training run."""

    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    loader: LoaderConfig = MISSING
    train: TrainConfig = MISSING
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = 0
