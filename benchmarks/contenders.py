"""The programs that `test_step.py` lets train by turns, each in a process of its own.

python -m benchmarks.contenders NAME ROOT BATCH_SIZE       answers requests on standard input
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Protocol
from unittest import mock

import torch
from hydra import compose, initialize_config_module
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from benchmarks import memory, reference
from benchmarks.hardware import DEVICE, KIND, KINDS, seconds
from benchmarks.kernel_table import kernel_times
from benchmarks.parts import profile_step
from benchmarks.turns import serve
from fastalex.config import Config
from fastalex.config.plain import model_options, to_dataclass
from fastalex.config.schema import register
from fastalex.data import Views, build_loader, load_splits, resolve_loader
from fastalex.data.wrappers import FirstBatches
from fastalex.distributed.processes import ALONE, World
from fastalex.models import create_model
from fastalex.runtime import choose_runtime
from fastalex.training.evaluation import TEN_CROP
from fastalex.training.memory import room_for_images
from fastalex.training.metrics import predict
from fastalex.training.trainer import Trainer


class Contender(Protocol):
    """A program that trains and evaluates."""

    def train(self, steps: int) -> None: ...
    def evaluate(self, batches: int) -> None: ...


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def evaluation_batch(batch_size: int) -> int:
    """Images whose ten crops make about a training batch: 12 for 128, as in `reference`."""
    return max(1, batch_size // TEN_CROP)


class Reference:
    """benchmarks/reference.py: its network, its loops, its DataLoader."""

    def __init__(self, root: Path, batch_size: int) -> None:
        data = reference.open_split(root, "train", reference.train_transform())
        test = reference.open_split(root, "test", reference.ten_crop_transform())
        self.model: nn.Module = reference.AlexNet(len(data.classes)).to(DEVICE)
        self.optimizer = SGD(self.model.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
        # Iterators live longer than a turn, so that workers start once, as in an epoch.
        self.batches = endless(reference.train_loader(data, batch_size))
        ten_crops: DataLoader = DataLoader(
            test, evaluation_batch(batch_size), num_workers=reference.WORKERS
        )  # as in ten_crop_evaluate
        self.ten_crops = endless(ten_crops)

    def train(self, steps: int) -> None:
        reference.train_epoch(self.model, self.optimizer, self.batches, steps)  # type: ignore[arg-type]

    def evaluate(self, batches: int) -> None:
        reference.evaluate(self.model, self.ten_crops, batches)  # type: ignore[arg-type]


class Stock(Reference):
    """The same network and data as a careful user of stock PyTorch runs them."""

    def __init__(self, root: Path, batch_size: int) -> None:
        super().__init__(root, batch_size)
        self.model.to(memory_format=torch.channels_last)
        mode = "default"
        if DEVICE == "cuda":
            mode = "reduce-overhead"  # CUDA graphs
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        self.network = torch.compile(self.model, dynamic=False, mode=mode)
        self.optimizer = SGD(self.model.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4, fused=True)

    def train(self, steps: int) -> None:
        self.model.train()
        for images, labels in islice(self.batches, steps):
            images = images.to(DEVICE, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=KINDS[KIND] == torch.bfloat16):
                loss = F.cross_entropy(self.network(images), labels.to(DEVICE, non_blocking=True))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()


class Fastalex:
    """What `python -m fastalex.train recipe=one_cycle data.root=ROOT` runs: a `Trainer`, an epoch per turn.

    That recipe has the same work in a step as the other programs: SGD, and batches that are not mixed.

    Args:
        root: of CIFAR-10.
        batch_size: of all processes together.
        overrides: KEY=VALUE, as on the command line.
        world: the processes that train together, each of which has its own instance.
    """

    def __init__(
        self,
        root: Path,
        batch_size: int,
        overrides: Sequence[str] = (),
        world: World = ALONE,
    ) -> None:
        register()
        with initialize_config_module("fastalex.configs", version_base="1.3"):
            config = to_dataclass(compose("config", ["recipe=one_cycle", *overrides]), Config)
        config.data.root = str(root)
        config.train.batch_size = batch_size
        config.train.epochs = 1_000_000  # the schedule needs a length; no turn may be the last epoch
        self.runtime = choose_runtime(config.runtime, world)
        splits = load_splits(config.data, config.seed)
        model = create_model(config.model.name, len(splits.classes), **model_options(config.model))
        room = room_for_images(model, config, self.runtime, world)
        loader = resolve_loader(config.loader, splits, room)
        self.runtime.place(model)
        train = build_loader(
            splits.train,
            config.data,
            loader,
            views=Views.random,
            batch_size=batch_size // world.size,
            runtime=self.runtime,
            world=world,
            network=model,
        )
        few = evaluation_batch(batch_size)
        test = build_loader(
            splits.test,
            config.data,
            loader,
            views=Views.ten_crop,
            batch_size=few,
            runtime=self.runtime,
            network=model,
        )
        self.ten_crops = endless(test)
        self.loader = FirstBatches(train, 1)
        self.trainer = Trainer(
            model,
            config.train,
            self.loader,
            None,
            self.runtime,
            world=world,
            distributed=config.distributed,
        )

    def train(self, steps: int) -> None:
        self.loader.count = steps
        self.trainer.run_epoch()

    def host_seconds(self, steps: int) -> float:
        """Seconds that Python takes to enqueue a step: the median over steps that do not read the loss."""
        before, found = time.perf_counter(), []

        def on_step(step: int, loss: float | None) -> None:
            nonlocal before
            now = time.perf_counter()
            if loss is None:  # otherwise the host has waited for the device
                found.append(now - before)
            before = time.perf_counter()

        with mock.patch.object(self.trainer, "on_step", on_step):
            self.train(steps)
        return median(found or [math.nan])

    def waits(self, steps: int) -> int:
        """How often the host waits for the GPU during these steps, by PyTorch's own count."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.train(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    def evaluate(self, batches: int) -> None:
        predict(self.trainer.network, islice(self.ten_crops, batches), self.runtime)
        self.runtime.synchronize()


def forget_peak_memory() -> None:
    """Reset the peaks that `memory` reads."""
    memory.forget_peak()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()  # memory that choosing kernels took during the warm-up
        torch.cuda.reset_peak_memory_stats()


CONTENDERS: dict[str, Callable[[Path, int], Contender]] = {
    "reference": Reference,
    "stock": Stock,
    "fastalex": Fastalex,
    "fastalex without graphs": partial(Fastalex, overrides=["runtime.graph=off"]),
    "fastalex eager": partial(Fastalex, overrides=["runtime.compile=false"]),
    "fastalex step graph": partial(Fastalex, overrides=["runtime.graph=step"]),
    "fastalex factored": partial(Fastalex, overrides=["runtime.factored=true"]),
    "fastalex fused bias": partial(Fastalex, overrides=["runtime.fused_bias=true"]),
}


def kernels(train: Callable[[int], None], steps: int) -> list[tuple[str, float, float, float]]:
    """What `kernel_times` finds in these training steps, per step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        train(steps)
        torch.cuda.synchronize()
    return [(name, calls / steps, ms / steps, share) for name, calls, ms, share in kernel_times(profiler)]


def start(name: str, root: str, batch_size: str) -> dict[str, Callable[..., Any]]:
    """The functions that a program's process offers."""
    torch.manual_seed(0)
    contender: Any = CONTENDERS[name](Path(root), int(batch_size))
    return {
        "train": lambda steps: seconds(lambda: contender.train(steps)),
        "evaluate": lambda batches: seconds(lambda: contender.evaluate(batches)),
        "profile": lambda steps: profile_step(lambda: contender.train(steps), steps),
        "host seconds": lambda steps: contender.host_seconds(steps),
        "waits": lambda steps: contender.waits(steps),
        "kernels": lambda steps: kernels(contender.train, steps),
        "forget peak memory": forget_peak_memory,
        "peak memory": memory.peak_bytes,
        **memory.DEVICE_PEAKS,
    }


if __name__ == "__main__":
    serve(lambda: start(*sys.argv[1:]))
