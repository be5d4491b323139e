"""Whether compiled programs on this device compute the same as plain PyTorch.

    python -m benchmarks.card.agreement FOLDER ROOT [--toy]

Each check trains AlexNet from the same weights on the same batches in two ways and compares the losses. No
two programs round alike, so the bound is twice plain PyTorch's own rounding error: the distance between its
bf16 run and its fp32 run, which differ only in rounding. Writes ``agreement.json``, and exits with 1 if a
check fails.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.card.place import given_place
from benchmarks.hardware import DEVICE
from fastalex.config import Graph, Precision, RuntimeConfig, TrainConfig
from fastalex.data import CutMixLoader
from fastalex.files import write_text
from fastalex.models import create_model
from fastalex.models.factored_linear import FactoredLinear
from fastalex.models.pooled_linear import PooledLinear
from fastalex.runtime import choose_runtime
from fastalex.training.trainer import StopTraining, Trainer

CLASSES = 10
FACTOR = 2.0


class BatchList:
    """A loader over batches in memory; see ``fastalex.data.Loader``."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches
        self._start = 0
        self.num_samples = sum(len(labels) for _, labels in batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self._start = start_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches[self._start :])


@dataclass(frozen=True)
class Size:
    """The size of an epoch and of the network.

    Attributes:
        batch: images per step; the last step of an epoch has a third of them.
        crop: pixels per side.
        steps: per epoch.
        units: in each hidden layer.
    """

    batch: int
    crop: int
    steps: int
    units: int = 4096


@dataclass(frozen=True)
class Check:
    """One comparison: its name, the value found, the largest value allowed, and the outcome."""

    name: str
    value: float
    bound: float
    passed: bool


@dataclass
class Losses:
    """The losses of a training run: of each step, and on the validation images after each epoch."""

    steps: list[float]
    validations: list[float]


def batches(size: Size, dtype: torch.dtype) -> BatchList:
    """Noise that is brighter for a higher class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(size.steps):
        count = size.batch if number < size.steps - 1 else size.batch // 3
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        images = torch.randn(count, 3, size.crop, size.crop, generator=generator)
        images += labels.view(-1, 1, 1, 1) / CLASSES
        made.append((images.to(DEVICE, dtype, memory_format=torch.channels_last), labels.to(DEVICE)))
    return BatchList(made)


@cache
def initial_model(units: int) -> Any:
    """AlexNet with the weights that all trainers start from; to initialise them takes seconds."""
    torch.manual_seed(1)
    model: Any = create_model("alexnet", CLASSES, init="he")
    if units != model.fc7.out_features:
        model.fc6 = PooledLinear(256, 6, units)
        model.fc7, model.fc8 = FactoredLinear(units, units), nn.Linear(units, CLASSES)
    return model


def trainer(
    size: Size,
    precision: Precision,
    compiled: bool,
    dropout: float = 0.0,
    cutmix: float = 0.0,
    graph: Graph = Graph.network,
    fused: bool = False,
    **settings: Any,
) -> tuple[Trainer, list[float]]:
    """A trainer that starts from the same weights as all others, and the list that it appends losses to.

    With ``fused`` the passes that a GPU's default leaves apart are fused.
    """
    options: dict[str, Any] = {"factored": fused, "fused_bias": fused, "graph": graph}
    runtime = choose_runtime(RuntimeConfig(precision=precision, compile=compiled, **options))
    model = copy.deepcopy(initial_model(size.units))
    model.dropout.p = dropout
    torch.manual_seed(1)
    runtime.place(model)
    config = TrainConfig(**{"epochs": 2, "lr": 0.002, "clip_norm": 5.0, **settings})
    losses: list[float] = []
    data = batches(size, runtime.dtype)
    made = Trainer(
        model,
        config,
        CutMixLoader(data, CLASSES, cutmix) if cutmix else data,
        data,
        runtime,
        log_every=1,
        on_step=lambda step, loss: losses.append(loss if loss is not None else float("nan")),
    )
    return made, losses


def train(size: Size, precision: Precision, compiled: bool, **settings: Any) -> Losses:
    """Two epochs of training and validation."""
    made, losses = trainer(size, precision, compiled, **settings)
    epochs = [made.run_epoch() for _ in range(2)]
    return Losses(losses, [float(epoch.validation_loss or 0.0) for epoch in epochs])


def distance(one: Losses, other: Losses) -> float:
    """The largest difference between losses of the same step or epoch."""
    pairs = zip(one.steps + one.validations, other.steps + other.validations, strict=True)
    return max(abs(a - b) for a, b in pairs)


def compare(name: str, one: Losses, other: Losses, bound: float) -> Check:
    found = distance(one, other)
    return Check(name, found, bound, found <= bound)


def resumed(size: Size, precision: Precision) -> Losses:
    """Two epochs in two trainers: the first stops in the middle of the first epoch, the second resumes."""
    first, losses = trainer(size, precision, True)
    first.should_stop = lambda: first.step == size.steps // 2
    with suppress(StopTraining):
        first.run_epoch()
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(first.weights())
    second, rest = trainer(size, precision, True)
    second.load_weights(weights)
    second.load_state_dict(state, None)
    epochs = [second.run_epoch() for _ in range(2)]
    return Losses(losses + rest, [float(epoch.validation_loss or 0.0) for epoch in epochs])


def dropout_differs(size: Size, precision: Precision) -> Check:
    """Repeat one batch at a learning rate near zero: only dropout makes the losses differ."""
    made, losses = trainer(size, precision, True, dropout=0.5, lr=1e-12)
    batch = next(iter(batches(size, made.runtime.dtype)))
    made.train_loader = BatchList([batch] * size.steps)
    made.run_epoch()
    different = len(set(losses))
    return Check(
        "different losses of one batch under dropout", different, size.steps, different == size.steps
    )


def check(size: Size) -> list[Check]:
    """Run all checks."""
    exact = train(size, Precision.fp32, False)
    low = Precision.bf16
    plain = train(size, low, False)
    bound = FACTOR * distance(plain, exact)
    found = [
        compare("compiled and eager", train(size, low, True), plain, bound),
        compare("a batch in four parts and whole", train(size, low, True, accumulate=4), plain, bound),
        compare("update from factors, biases in kernels", train(size, low, True, fused=True), plain, bound),
        compare("these, in four parts", train(size, low, True, fused=True, accumulate=4), plain, bound),
        compare("resumed in the middle of an epoch and not", resumed(size, low), plain, bound),
    ]
    if DEVICE == "cuda":
        whole = train(size, low, True, fused=True, graph=Graph.step)
        found.append(compare("these, each step as one graph", whole, plain, bound))
    mixed = {"cutmix": 0.5, "ema_decay": 0.9, "label_smoothing": 0.1}
    exact, plain = train(size, Precision.fp32, False, **mixed), train(size, low, False, **mixed)
    compiled = train(size, low, True, **mixed)
    bound = FACTOR * distance(plain, exact)
    found.append(compare("compiled and eager, with CutMix and averaged weights", compiled, plain, bound))
    found.append(dropout_differs(size, low))
    return found


def main() -> int:
    given = given_place("agreement")
    found = check(Size(4, 63, 3, units=32) if given.toy else Size(128, 112, 12))
    compiler = {group: dict(Counter(counters[group])) for group in ("stats", "inductor", "graph_break")}
    result = {"checks": [asdict(one) for one in found], "compiler": compiler}
    write_text(given.folder / "agreement.json", json.dumps(result, indent=1) + "\n")
    for one in found:
        print(
            f"{'passed' if one.passed else 'FAILED'}: {one.name}: {one.value:.3g} (allowed {one.bound:.3g})"
        )
    print(compiler)
    return 0 if all(one.passed for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
