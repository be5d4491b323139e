"""Whether compiled programs on this device compute the same as plain PyTorch.

    python -m benchmarks.card.agreement FOLDER ROOT [--toy]

Each check trains AlexNet from the same weights on the same batches in two ways and compares the losses. No
two programs round alike, so the bound is twice plain PyTorch's own rounding error: the distance between its
bf16 run and its fp32 run, which differ only in rounding. Rewrites ``agreement.json`` after each check, and
exits with 1 if one fails or ends with an error.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
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
    """One comparison: its name, the value found, the largest value allowed, and the outcome.

    The value is None if the programs that were to be compared ended with an error.
    """

    name: str
    value: float | None
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


def compare(name: str, program: Callable[[], Losses], other: Losses, bound: float) -> Check:
    """Run a program and compare its losses; an error is a failed check, so that the next can begin."""
    try:
        found = distance(program(), other)
    except Exception:
        traceback.print_exc()
        return Check(name, None, bound, False)
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


def dropout_repeats(size: Size, precision: Precision, **settings: Any) -> Losses:
    """Repeat one batch at a learning rate near zero, so that only dropout makes the losses differ.

    Returns:
        For each step 1 if an earlier step had the same loss, otherwise 0, in the place of its loss.
    """
    made, losses = trainer(size, precision, True, dropout=0.5, lr=1e-12, **settings)
    batch = next(iter(batches(size, made.runtime.dtype)))
    made.train_loader = BatchList([batch] * size.steps)
    made.run_epoch()
    return Losses([float(loss in losses[:number]) for number, loss in enumerate(losses)], [])


def check(size: Size) -> Iterator[Check]:
    """Run all checks, one after another."""
    low = Precision.bf16
    bf16, compiled = partial(train, size, low, False), partial(train, size, low, True)
    has_graphs = DEVICE == "cuda"
    plain = bf16()
    bound = FACTOR * distance(plain, train(size, Precision.fp32, False))
    programs = {
        "compiled and eager": compiled,
        "a batch in four parts and whole": partial(compiled, accumulate=4),
        "update from factors, biases in kernels": partial(compiled, fused=True),
        "these, in four parts": partial(compiled, fused=True, accumulate=4),
        "resumed in the middle of an epoch and not": partial(resumed, size, low),
    }
    if has_graphs:
        programs["these, each step as one graph"] = partial(compiled, fused=True, graph=Graph.step)
    for name, program in programs.items():
        yield compare(name, program, plain, bound)
    mixed: dict[str, Any] = {"cutmix": 0.5, "ema_decay": 0.9, "label_smoothing": 0.1}
    plain = bf16(**mixed)
    bound = FACTOR * distance(plain, train(size, Precision.fp32, False, **mixed))
    name = "compiled and eager, with CutMix and averaged weights"
    yield compare(name, partial(compiled, **mixed), plain, bound)
    if has_graphs:
        recorded = partial(compiled, fused=True, graph=Graph.step, **mixed)
        yield compare("these, each step as one graph", recorded, plain, bound)
    none = Losses([0.0] * size.steps, [])
    for graph in (Graph.network, Graph.step) if has_graphs else (Graph.network,):
        name = f"losses of one batch that repeat under dropout, runtime.graph={graph.value}"
        yield compare(name, partial(dropout_repeats, size, low, graph=graph), none, 0.0)


def main() -> int:
    given = given_place("agreement")
    found: list[Check] = []
    for one in check(Size(4, 63, 3, units=32) if given.toy else Size(128, 112, 12)):
        found.append(one)
        compiler = {group: dict(Counter(counters[group])) for group in ("stats", "inductor", "graph_break")}
        result = {"checks": [asdict(check) for check in found], "compiler": compiler}
        write_text(given.folder / "agreement.json", json.dumps(result, indent=1) + "\n")
        value = "error" if one.value is None else f"{one.value:.3g}"
        outcome = "passed" if one.passed else "FAILED"
        print(f"{outcome}: {one.name}: {value} (allowed {one.bound:.3g})", flush=True)
    return 0 if all(one.passed for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
