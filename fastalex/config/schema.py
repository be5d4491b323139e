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


class Activation(Enum):
    """The non-linear function of the four-layer network."""

    relu = "relu"
    tanh = "tanh"


class Norm(Enum):
    """Normalisation after AlexNet's first two convolutions."""

    lrn = "lrn"
    batch = "batch"
    none = "none"


class OnError(Enum):
    """What happens at a damaged image."""

    fail = "fail"
    skip = "skip"


class Flip(Enum):
    """How a training epoch uses the mirror image."""

    none = "none"
    random = "random"  # each image mirrored with probability one half
    both = "both"  # each image twice an epoch, as it is and mirrored
    alternate = "alternate"  # each image mirrored every other epoch; in which half it starts is random


class Fit(Enum):
    """How an image that is not square becomes the square that crops are cut from."""

    square = "square"  # both sides are resized to data.resize, which changes its shape
    shorter_side = "shorter_side"  # the shorter side is resized to data.resize, and the centre is cut out


class Color(Enum):
    """How a training epoch changes colours."""

    none = "none"
    pca = "pca"  # a shift along the principal components of the training images' colours


class Schedule(Enum):
    """Learning-rate schedule."""

    one_cycle = "one_cycle"
    plateau = "plateau"  # divided by ten when validation error stops improving


class Optimizer(Enum):
    """The optimizer."""

    sgd = "sgd"
    muon = "muon"  # sgd, except that a step of a convolution goes equally far in all directions
    lars = "lars"  # for batches of thousands: scales each layer's step to the norm of its weights


class Scaling(Enum):
    """How the learning rate depends on the batch size."""

    none = "none"
    linear = "linear"  # train.lr is for a batch of 128, and grows in proportion


class Strategy(Enum):
    """How a network is divided over processes."""

    ddp = "ddp"  # each process has the whole network, and a part of the batch
    hybrid = "hybrid"  # as ddp, but each process has a part of the units of AlexNet's hidden layers


class Compression(Enum):
    """The dtype in which gradients are sent between processes."""

    none = "none"
    bf16 = "bf16"


class OnWriteError(Enum):
    """What happens when a checkpoint cannot be written."""

    stop = "stop"
    warn = "warn"  # training continues, and the older checkpoint stays


class Budget(Enum):
    """How long a reproduction trains."""

    full = "full"
    quick = "quick"  # a few epochs on the digits: tests the whole path; the figures mean nothing


class ExportFormat(Enum):
    """What a trained network is written as."""

    onnx = "onnx"  # for ONNX Runtime and other programs
    pt2 = "pt2"  # a program of torch.export
    state_dict = "state_dict"  # its weights, with the network's definition in plain PyTorch beside them


class Graph(Enum):
    """What a GPU records as a CUDA graph, whose kernels one call launches."""

    network = "network"  # the network's forward pass, and its backward pass
    step = "step"  # the whole training step
    off = "off"


class Precision(Enum):
    """Arithmetic of the forward and backward pass; master weights are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass
class ModelConfig:
    """A network by name, as :func:`fastalex.models.create_model` knows it."""

    name: str = MISSING  # as model=NAME sets it, with the options of that network


@dataclass
class AlexNetConfig(ModelConfig):
    """Options of AlexNet; see :class:`fastalex.models.alexnet.AlexNet`."""

    name: str = "alexnet"
    groups: int = 1  # 2: the paper's two towers
    norm: Norm = Norm.lrn  # after the first two convolutions
    overlapping_pool: bool = True  # windows of 3x3 with stride 2; false: 2x2
    dropout: float = 0.5  # probability that a unit of the hidden layers is dropped
    init: Init = Init.he  # of the weights


@dataclass
class FourLayerConfig(ModelConfig):
    """Options of the four-layer network; see :class:`fastalex.models.four_layer.FourLayer`."""

    name: str = "four_layer"
    activation: Activation = Activation.relu  # the non-linear function


# Networks with options of their own; the others take a ModelConfig.
MODEL_CONFIGS: dict[str, type[ModelConfig]] = {"alexnet": AlexNetConfig, "four_layer": FourLayerConfig}


@dataclass
class DataConfig:
    """A data set, and the geometry of the views that are cut from its images."""

    name: str = MISSING  # cifar10, digits, imagefolder, tiny_imagenet, synthetic
    root: str = "data"  # the folder of the images
    download: bool = True  # CIFAR-10, if it is not there
    resize: int = 256  # each image becomes a square of resize x resize pixels ...
    crop: int = 224  # ... and a crop x crop square is cut from it
    fit: Fit = Fit.square  # how an image that is not square becomes one
    random_crop: bool = True  # of the training images; false: their centre crop, as in validation
    flip: Flip = Flip.random  # when training images are mirrored
    color: Color = Color.none  # how the colours of training images are changed
    # of the colours, for color=pca; where they are empty, they are computed from the training images
    color_eigenvalues: list[float] = field(default_factory=list)
    color_eigenvectors: list[list[float]] = field(default_factory=list)  # a row for each eigenvalue
    # of pixels in 0 to 1, for each colour: subtracted from them
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])  # by which they are then divided
    validation_fraction: float = 0.2  # of the training images, where the data set has no split of its own
    train_fraction: float = 1.0  # of the training images that are left, drawn from each class alike
    on_error: OnError = OnError.fail  # what happens at a damaged image
    images: int = 2048  # synthetic only: how many
    classes: int = 10  # synthetic only


@dataclass
class LoaderConfig:
    """How images reach the device."""

    name: str = MISSING  # auto, resident, torchvision, dali, ffcv
    workers: int = -1  # processes or threads that prepare images; -1: one for each core beyond the first
    fold: bool = True  # resident only: the first convolution may consume lazy batches (kernels/lazy_batch.py)
    beton: str = ""  # ffcv only: the folder of .beton files; empty: fastalex's cache


@dataclass
class Stage:
    """First epochs at another resolution: ``train.stages=[{epochs: 4, resize: 128, crop: 112}]``."""

    epochs: int = MISSING
    resize: int = MISSING
    crop: int = MISSING
    lr: float | None = None  # one_cycle: peak rate of a cycle that ends with this stage; null: no cycle ends
    cutmix: float | None = None  # train.cutmix of this stage; null: that of the epochs after the stages


@dataclass
class TrainConfig:
    """The recipe. The defaults are those of ``recipe=one_cycle``."""

    epochs: int = 30  # passes over the training images
    batch_size: int = 128  # images a step, over all processes
    optimizer: Optimizer = Optimizer.sgd  # muon: of the convolutions' weights, and sgd of everything else
    lr: float = 0.02  # the peak rate of one_cycle, the first rate of plateau
    muon_lr: float = 0.015  # as lr, of the convolutions' weights with optimizer=muon
    lr_scaling: Scaling = Scaling.none  # linear: the rates are for a batch of 128, and grow in proportion
    momentum: float = 0.9  # of all weights that Muon does not update
    weight_decay: float = 5e-4  # as momentum
    muon_weight_decay: float = 0.2  # of the convolutions' weights with optimizer=muon, times muon_lr
    clip_norm: float = 5.0  # the gradient's greatest Euclidean norm, beyond which it is scaled down; 0: none
    schedule: Schedule = Schedule.one_cycle  # plateau: divided by ten when validation error stops improving
    warmup: float = 0.15  # one_cycle: the share of the steps in which the rate rises
    patience: int = 3  # plateau: the rate is divided after more epochs than this without improvement
    label_smoothing: float = 0.0  # fraction of each label that is spread over all classes
    cutmix: float = 0.0  # fraction of the batches in which each image has a rectangle of another
    ema_decay: float = 0.0  # decay a step of an average of the weights, which is then evaluated; 0: none
    accumulate: int = 1  # parts that a batch is computed in, one after another, to use less memory
    # share of the epochs, the first ones, with images half as large and no CutMix, unless stages are given
    progressive_resizing: float = 0.0
    # [{epochs: 4, resize: 128, crop: 112}]: first epochs at another size; the others are at data.crop
    stages: list[Stage] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)  # layers, by name or prefix, that keep their weights
    head_lr: float | None = None  # with init_from: as lr, for the last layer; null: lr

    @property
    def staged_epochs(self) -> int:
        """The number of epochs in stages, before those at the crop of the data."""
        return sum(stage.epochs for stage in self.stages)


@dataclass
class RuntimeConfig:
    """The device and the arithmetic of the network."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Precision = Precision.auto  # of the network; its weights are always kept in fp32
    channels_last: bool = True  # memory format of images and convolutions
    compile: bool | None = None  # torch.compile; null: on a GPU, where it is faster
    graph: Graph = Graph.network  # GPU: what is recorded as a CUDA graph
    winograd: bool = True  # CPU: Winograd convolutions, with under half the products and more rounding
    # add the biases of AlexNet's first two convolutions in the kernel after them; null: no
    fused_bias: bool | None = None
    # keep the gradients of AlexNet's hidden layers as factors, never multiplied out; null: on a CPU
    factored: bool | None = None
    threads: int = 0  # CPU threads; 0: one for each core


@dataclass
class DistributedConfig:
    """How the processes that torchrun starts share the work; without torchrun there is one process."""

    strategy: Strategy = Strategy.ddp  # hybrid: each has a part of the units of AlexNet's hidden layers
    compression: Compression = Compression.none  # of gradients, not of the hybrid's activations
    # seconds that a process waits for the others before it gives up; on resume, give it again
    timeout: float = 600.0


@dataclass
class CheckpointConfig:
    """When a run saves its state; the newest is ``checkpoint.pt``, older ones ``checkpoint-STEP.pt``."""

    every_seconds: float = 120.0  # at most one checkpoint in this time, after the first step that ends later
    every_steps: int = 0  # additionally, after each multiple of this number of steps; 0: none
    keep: int = 2  # how many of the newest to keep; if the newest is damaged, the one before is used
    on_error: OnWriteError = OnWriteError.stop  # what happens when one cannot be written


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
    init_from: str = ""  # start from the weights of a run or a file; empty: from random ones
    resume: str = ""  # auto: the newest unfinished run, or the one in hydra.run.dir; or a checkpoint or run
    seed: int = 0  # of the weights, the validation images, and the order and augmentation of the images
    log_every: int = 20  # steps between two reads of the loss, each of which waits for the device
    profile: bool = False  # run a few steps under torch.profiler instead of training

    def epochs_by_crop(self) -> list[tuple[int, int]]:
        """Return the number of epochs and their crop in pixels, of each stage and of what follows."""
        train = self.train
        last = train.epochs - train.staged_epochs, self.data.crop
        return [*((stage.epochs, stage.crop) for stage in train.stages), last]


@dataclass
class EvaluateData:
    """The folder of the images, if they have moved since the run."""

    root: str | None = None  # where they are now; null: where the settings have them


@dataclass
class EvaluateLoader:
    """How images reach the device."""

    workers: int | None = None  # processes or threads that prepare images; null: as many as in the run


@dataclass
class EvaluateRuntime:
    """The device and the arithmetic of the evaluation."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Precision | None = None  # null: that of the run; where that was auto, the fastest here


@dataclass
class ReproduceRuntime:
    """The device of the trainings."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


@dataclass
class EvaluateConfig:
    """What ``python -m fastalex.evaluate`` takes; everything else is read with the weights."""

    weights: str = ""  # a run's folder, checkpoint.pt, model.safetensors or best.safetensors
    checkpoint: str = ""  # another name of weights
    output: str | None = None  # folder of what is written; null: that of the weights
    batch_size: int | None = None  # null: that of the run
    data: EvaluateData = field(default_factory=EvaluateData)
    loader: EvaluateLoader = field(default_factory=EvaluateLoader)
    runtime: EvaluateRuntime = field(default_factory=EvaluateRuntime)


@dataclass
class PredictConfig:
    """What ``python -m fastalex.predict`` takes; how images are prepared is read with the weights."""

    weights: str = MISSING  # a run's folder, checkpoint.pt, model.safetensors or best.safetensors
    images: str = MISSING  # an image, a folder or a text file of paths
    output: str | None = None  # .csv, .jsonl or .parquet; null: predictions.csv if there are many images
    views: int = 1  # or 10
    batch_size: int | None = None  # null: that of the run
    on_error: OnError = OnError.fail
    loader: EvaluateLoader = field(default_factory=EvaluateLoader)
    runtime: EvaluateRuntime = field(default_factory=EvaluateRuntime)


@dataclass
class ExportConfig:
    """What ``python -m fastalex.export`` takes; how images are prepared is read with the weights."""

    weights: str = MISSING  # a run's folder, checkpoint.pt, model.safetensors or best.safetensors
    format: ExportFormat = ExportFormat.onnx
    output: str = MISSING  # ends with .onnx or .pt2; of a state dict, with .pt or .safetensors


@dataclass
class ReproduceConfig:
    """What ``python -m fastalex.reproduce`` takes; everything else is in ``configs/row/``."""

    rows: list[str] = field(default_factory=list)  # or groups of rows: claims; none: those of no group
    budget: Budget = Budget.full
    dry_run: bool = False  # print what would be run and an estimate of its time
    folder: str = "outputs/reproduction"  # of the runs and of what is written about them
    results: str | None = None  # the committed runs, to compare with; null: results/ of this checkout
    publish: bool = False  # for maintainers: put the rows' runs among the committed ones, and in the README
    data: EvaluateData = field(default_factory=EvaluateData)
    runtime: ReproduceRuntime = field(default_factory=ReproduceRuntime)


@dataclass
class BetonConfig:
    """What ``python -m fastalex.data.write_beton`` takes."""

    data: DataConfig = MISSING
    loader: LoaderConfig = MISSING
    seed: int = 0  # of the validation images


def register() -> None:
    """Tell Hydra the types of every key, under the names that the YAML files refer to."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(name="schema_evaluate", node=EvaluateConfig)
    store.store(name="schema_predict", node=PredictConfig)
    store.store(name="schema_export", node=ExportConfig)
    store.store(name="schema_reproduce", node=ReproduceConfig)
    store.store(name="schema_write_beton", node=BetonConfig)
    store.store(group="model", name="schema", node=ModelConfig)
    for name, node in MODEL_CONFIGS.items():
        store.store(group="model", name=f"schema_{name}", node=node)
    store.store(group="data", name="schema", node=DataConfig)
    store.store(group="loader", name="schema", node=LoaderConfig)
