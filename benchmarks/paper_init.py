"""Which smallest change makes the paper's initialisation learn? Short runs of AlexNet, one change each.

    python -m benchmarks.paper_init --data ROOT [--crop 64] [--batch-size 128] [--steps 300]
                                     [--only NAME ...]

Each trial trains for a few hundred steps on CIFAR-10 and is judged by its error on validation images: a
network that has learnt nothing has an error of 0.90, and its loss stays at ln(10) = 2.303. Each trial adds
one line to ``results/trials/paper_init.csv`` and to the table beside it; docs/recipe.md discusses them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.report import read_records, write_records
from fastalex.config import DataConfig, LoaderConfig, Precision, RuntimeConfig, Schedule, TrainConfig
from fastalex.data import ImageSet, Loader, Views, build_loader, load_splits
from fastalex.data.wrappers import FirstBatches
from fastalex.errors import DivergedError
from fastalex.files import write_text
from fastalex.markdown import table
from fastalex.models import create_model
from fastalex.runtime import Runtime, choose_runtime
from fastalex.training.trainer import Trainer

TRIALS_FILE = Path(__file__).parents[1] / "results" / "trials" / "paper_init.csv"
VALIDATION_IMAGES = 2000
LEVELS = 255.0
LEARNS = 0.85  # validation error; chance is 0.90, with a standard deviation of 0.007 on 2,000 images


@dataclass(frozen=True)
class Trial:
    """One change to the paper's initialisation under the paper's learning rate.

    Attributes:
        init: AlexNet's initialisation.
        bias: replaces the biases of 1; None keeps them.
        hidden_std: standard deviation of the weights of the two hidden fully connected layers; None keeps it.
        pixels: the range of a pixel's values before the mean is subtracted: 1, or 255 as in the paper.
        train: the recipe.
        precision: of the arithmetic.
        longer: the number of steps, as a multiple of the other trials'.
    """

    init: str = "paper"
    bias: float | None = None
    hidden_std: float | None = None
    pixels: float = 1.0
    train: TrainConfig = field(default_factory=lambda: constant(0.01))
    precision: Precision = Precision.auto
    longer: int = 1


def constant(lr: float, clip_norm: float = 0.0) -> TrainConfig:
    """A constant learning rate: a plateau schedule over a single epoch."""
    return TrainConfig(lr=lr, schedule=Schedule.plateau, clip_norm=clip_norm)


def one_cycle(lr: float, warmup: float, clip_norm: float = 0.0) -> TrainConfig:
    return TrainConfig(lr=lr, warmup=warmup, clip_norm=clip_norm)


TRIALS = {
    "default": Trial(init="default"),
    "he": Trial(init="he"),
    "paper": Trial(),
    "paper, fp32": Trial(precision=Precision.fp32),
    "pixels of 0 to 255": Trial(pixels=LEVELS),
    "bias 0.1": Trial(bias=0.1),
    "bias 0": Trial(bias=0.0),
    "pixels of 0 to 255, rate 0.001": Trial(pixels=LEVELS, train=constant(0.001)),
    "pixels of 0 to 255, rate 0.003": Trial(pixels=LEVELS, train=constant(0.003)),
    "pixels of 0 to 255, clip 1": Trial(pixels=LEVELS, train=constant(0.01, clip_norm=1.0)),
    "rate 0.001": Trial(train=constant(0.001)),
    "rate 0.05": Trial(train=constant(0.05)),
    "rate 0.1": Trial(train=constant(0.1)),
    "warm-up to 0.02": Trial(train=one_cycle(0.02, 0.5)),
    "fast recipe": Trial(train=one_cycle(0.02, 0.15, clip_norm=5.0)),
    "clip 1": Trial(train=constant(0.01, clip_norm=1.0)),
    "default, longer plateau": Trial(init="default", longer=4),
    "longer plateau": Trial(longer=4),
    "bias 0.1, longer plateau": Trial(bias=0.1, longer=4),
    "fast recipe, longer plateau": Trial(train=one_cycle(0.02, 0.15, clip_norm=5.0), longer=4),
    "bias 0.1, rate 0.1": Trial(bias=0.1, train=constant(0.1)),
    "Caffe": Trial(bias=0.1, hidden_std=0.005),
    "Caffe, pixels of 0 to 255": Trial(bias=0.1, hidden_std=0.005, pixels=LEVELS),
    "pixels of 0 to 255, fast recipe": Trial(pixels=LEVELS, train=one_cycle(0.02, 0.15, clip_norm=5.0)),
}


def initialise(trial: Trial, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("alexnet", init=trial.init)
    with torch.no_grad():
        for name, layer in model.named_children():
            if not isinstance(layer, (nn.Conv2d, nn.Linear)):
                continue
            assert layer.bias is not None
            if trial.bias is not None and (layer.bias == 1).all():
                layer.bias.fill_(trial.bias)
            if trial.hidden_std is not None and name in ("fc6", "fc7"):
                layer.weight.normal_(std=trial.hidden_std)
    return model


def run(name: str, trial: Trial, data: DataConfig, batch_size: int, steps: int, seed: int) -> dict[str, str]:
    """Train once; return one line of the table."""
    began = time.perf_counter()
    runtime = choose_runtime(RuntimeConfig(precision=trial.precision))
    data = replace(data, std=[1 / trial.pixels] * 3)
    splits = load_splits(data, seed)
    pixels, labels = splits.validation.pixels, splits.validation.labels
    assert pixels is not None  # CIFAR-10's images are of one size
    some = np.random.default_rng(0).permutation(len(labels))[:VALIDATION_IMAGES]
    validation = replace(splits.validation, pixels=pixels[some], labels=labels[some])
    config = replace(trial.train, epochs=1, batch_size=batch_size)
    steps *= trial.longer
    losses: list[float] = []
    model = runtime.place(initialise(trial, seed))
    trainer = Trainer(
        model,
        config,
        FirstBatches(_loader(splits.train, data, runtime, Views.random, config.batch_size, seed), steps),
        _loader(validation, data, runtime, Views.center, config.batch_size, seed),
        runtime,
        log_every=10,
        on_step=lambda step, loss: losses.append(loss) if loss is not None else None,
    )
    row = {
        "trial": name,
        "steps": str(steps),
        "batch_size": str(batch_size),
        "crop": str(data.crop),
        "init": trial.init,
        "bias": "" if trial.bias is None else f"{trial.bias:g}",
        "hidden_std": "" if trial.hidden_std is None else f"{trial.hidden_std:g}",
        "pixels": f"{trial.pixels:g}",
        "lr": f"{config.lr:g}",
        "schedule": config.schedule.value,
        "clip_norm": f"{config.clip_norm:g}",
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "seed": str(seed),
    }
    try:
        epoch = trainer.run_epoch()
        assert epoch.validation_loss is not None
        assert epoch.validation_top1_error is not None
        row |= {
            "train_loss": f"{np.mean(losses[-3:]):.4f}",
            "validation_loss": f"{epoch.validation_loss:.4f}",
            "validation_top1_error": f"{epoch.validation_top1_error:.4f}",
            "outcome": "learns" if epoch.validation_top1_error < LEARNS else "does not learn",
        }
    except DivergedError as error:
        row |= {"train_loss": "", "validation_loss": "", "validation_top1_error": "", "outcome": str(error)}
    row["curve"] = " ".join(f"{loss:.3f}" for loss in losses[:: max(1, len(losses) // 15)])
    row["seconds"] = f"{time.perf_counter() - began:.0f}"
    return row


def _loader(
    images: ImageSet, data: DataConfig, runtime: Runtime, views: Views, batch_size: int, seed: int
) -> Loader:
    return build_loader(
        images,
        data,
        LoaderConfig("resident"),
        views=views,
        batch_size=batch_size,
        seed=seed,
        runtime=runtime,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="TRIAL")
    parser.add_argument("--out", type=Path, default=TRIALS_FILE)
    arguments = parser.parse_args()
    data = DataConfig("cifar10", root=arguments.data, resize=arguments.crop * 9 // 8, crop=arguments.crop)
    rows = read_records(arguments.out)
    for name in arguments.only:
        row = run(name, TRIALS[name], data, arguments.batch_size, arguments.steps, arguments.seed)
        print(*row.values(), sep="  ", flush=True)
        same = ("trial", "steps", "batch_size", "crop", "seed")
        rows = [old for old in rows if any(old[key] != row[key] for key in same)] + [row]
        write(rows, arguments.out)


def write(rows: list[dict[str, str]], path: Path) -> None:
    """Write all trials as a CSV file, and as a Markdown table beside it."""
    write_records(rows, path)
    heads = [name for name in rows[0] if name not in ("curve", "seconds")]
    text = table(heads, [[row[name] for name in heads] for row in rows])
    write_text(path.with_suffix(".md"), f"{text}\n")


if __name__ == "__main__":
    main()
