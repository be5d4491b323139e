"""Short training runs and collectives for ``tests/test_distributed.py``, on several ranks or one process.

``torchrun --nproc-per-node=2 tests/ranks.py FOLDER`` writes each rank's results to FOLDER/RANK.pt. To start
the ranks takes longer than most of what they do, so they do one thing after the other.
"""

from __future__ import annotations

import copy
import gc
import io
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastalex.config import (
    Compression,
    DistributedConfig,
    Optimizer,
    Precision,
    RuntimeConfig,
    Schedule,
    Strategy,
    TrainConfig,
)
from fastalex.distributed import processes
from fastalex.distributed.processes import World, joined
from fastalex.models import alexnet, create_model
from fastalex.models.factored_linear import FactoredLinear
from fastalex.models.pooled_linear import PooledLinear
from fastalex.runtime import choose_runtime
from fastalex.training.trainer import Trainer
from tests import tiny_train
from tests.listed import Listed

BATCH, CROP, VALIDATION = 8, 63, 27  # of 27 images, rank 0 validates 14 and rank 1 13, in batches of 7


@dataclass(frozen=True)
class Case:
    """A short training run.

    Attributes:
        recipe: the recipe, of one epoch.
        network: options of AlexNet.
        steps: number of steps in the epoch.
        distributed: the strategy.
        dtype: of the network and its images; in bf16, under autocast. What ranks do does not depend on it,
            and in float64 the order of their sums makes no difference to speak of.
    """

    recipe: TrainConfig
    network: dict[str, Any]
    steps: int
    distributed: DistributedConfig
    dtype: torch.dtype = torch.float64


def recipe(**options: Any) -> TrainConfig:
    plain = {"epochs": 1, "batch_size": BATCH, "lr": 4e-4, "schedule": Schedule.plateau, "clip_norm": 0.0}
    return TrainConfig(**{**plain, **options})


DDP, HYBRID = DistributedConfig(Strategy.ddp), DistributedConfig(Strategy.hybrid)
CASES = {
    "ddp": Case(recipe(), {}, 6, DDP),
    "hybrid": Case(recipe(), {}, 6, HYBRID),
    "two towers, ddp": Case(recipe(), {"groups": 2}, 3, DDP),
    "two towers, hybrid": Case(recipe(), {"groups": 2}, 3, HYBRID),
    "batch normalisation, ddp": Case(recipe(), {"norm": "batch"}, 5, DDP),
    "batch normalisation, hybrid": Case(recipe(), {"norm": "batch"}, 5, HYBRID),
    "clipped and in parts, ddp": Case(recipe(clip_norm=0.5, accumulate=2), {}, 4, DDP),
    "clipped and in parts, hybrid": Case(recipe(clip_norm=0.5, accumulate=2), {}, 4, HYBRID),
    # Nine steps: the average is updated after every eighth.
    "averaged, ddp": Case(recipe(ema_decay=0.5), {}, 9, DDP),
    "Muon, ddp": Case(recipe(optimizer=Optimizer.muon, muon_lr=1e-3), {"groups": 2}, 4, DDP),
    "Muon, hybrid": Case(recipe(optimizer=Optimizer.muon, muon_lr=1e-3), {}, 4, HYBRID),
    "compressed, ddp": Case(recipe(), {}, 4, DistributedConfig(compression=Compression.bf16), torch.float32),
    "frozen with batch normalisation, ddp": Case(
        recipe(freeze=["conv1", "norm_pool1", "fc6"], head_lr=1e-3), {"norm": "batch"}, 4, DDP
    ),
    "frozen, hybrid": Case(recipe(freeze=["conv1", "fc6"], head_lr=1e-3), {}, 4, HYBRID),
    "bf16, hybrid": Case(recipe(), {}, 4, HYBRID, torch.bfloat16),
}

# A run of the command that has time to be interrupted, and what the command refuses.
RUN = [
    "data=digits",
    "model=resnet18",  # a group without options
    "model.name=interruptible",
    "data.resize=36",
    "data.crop=32",
    "train.epochs=4",
    "runtime.precision=fp32",
]
COMMANDS = {
    "undisturbed": RUN,
    "accumulated": [*RUN, "train.batch_size=12", "train.accumulate=4"],
    "hybrid": [*RUN, "distributed.strategy=hybrid"],
}


class Batches(Listed):
    """A rank's share of batches of noise whose mean depends on the class.

    Args:
        world: the ranks.
        sizes: images in each batch, over all ranks.
        per_rank: images in a batch of this rank; what is more becomes further batches.
        dtype: of the images.
    """

    def __init__(self, world: World, sizes: list[int], per_rank: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for size in sizes:
            labels = torch.randint(10, (size,), generator=generator)
            images = torch.randn(size, 3, CROP, CROP, generator=generator)
            images = (images + labels.view(-1, 1, 1, 1) / 2 - 2) / 4
            mine = images.to(dtype, memory_format=torch.channels_last)[world.rank :: world.size]
            parts = mine.split(per_rank), labels[world.rank :: world.size].split(per_rank)
            self.batches += list(zip(*parts, strict=True))


def narrow_alexnet(num_classes: int = 10, **options: Any) -> nn.Module:
    """AlexNet with 256 hidden units: sharded like the full one, in a tenth of the time."""
    torch.manual_seed(0)
    first, second = PooledLinear(256, 6, 256), FactoredLinear(256, 256)
    # Not replaced afterwards: drawing the full layers' 54 million weights takes seconds.
    with mock.patch.multiple(alexnet, PooledLinear=lambda *_: first, FactoredLinear=lambda *_: second):
        model = create_model("alexnet", init="he", dropout=0.0, **options)
    model.fc8 = nn.Linear(256, num_classes)
    nn.init.normal_(model.fc8.weight, std=0.01)
    return model


def a_trainer(case: Case, world: World, losses: list[float]) -> Trainer:
    precision = Precision.bf16 if case.dtype == torch.bfloat16 else Precision.fp32
    weights = torch.promote_types(case.dtype, torch.float32)
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=precision, threads=1, winograd=False))
    trainer = Trainer(
        runtime.place(narrow_alexnet(**case.network).to(weights)),
        case.recipe,
        Batches(world, [BATCH] * case.steps, BATCH // world.size, case.dtype),
        Batches(world, [VALIDATION], 14 // world.size, case.dtype),
        runtime,
        log_every=1,
        world=world,
        distributed=case.distributed,
    )

    def on_step(step: int, loss: float | None) -> None:
        assert step == trainer.step  # a reference cycle with the trainer, as in the program
        assert loss is not None
        losses.append(loss)

    trainer.on_step = on_step
    return trainer


def run(case: Case, world: World) -> dict[str, Any]:
    """Train; return the losses, the epoch's figures and the gathered weights."""
    losses: list[float] = []
    trainer = a_trainer(case, world, losses)
    epoch = trainer.run_epoch()
    with mock.patch.object(DTensor, "full_tensor", autospec=True, side_effect=DTensor.full_tensor) as gather:
        weights = {name: value.clone() for name, value in trainer.weights().items()}
        with trainer.evaluated() as network:
            evaluated = {name: value.clone() for name, value in network.state_dict().items()}
    return {
        "gathers after validation": gather.call_count,
        "evaluated": evaluated,
        "losses": losses,
        "epoch": {
            name: getattr(epoch, name)
            for name in ("train_loss", "train_top1_error", "validation_loss", "validation_top1_error")
        },
        "weights": weights,
        "average": trainer.averaged_weights(),
        "parameters here": sum(
            (p.to_local() if hasattr(p, "to_local") else p).numel() for p in trainer.model.parameters()
        ),
    }


def resumed(case: Case, world: World) -> bool:
    """Whether a trainer resumed from another's state reaches bit-identical weights."""
    first = a_trainer(case, world, [])
    first.run_epoch()
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(first.weights())
    second = a_trainer(case, world, [])
    second.load_weights(weights)
    second.load_state_dict(state, None)
    first.run_epoch()
    second.run_epoch()
    resumed_weights = second.weights()
    moved = any(not torch.equal(value, weights[name]) for name, value in first.weights().items())
    return moved and all(torch.equal(value, resumed_weights[name]) for name, value in first.weights().items())


def command(arguments: list[str], world: World) -> dict[str, Any]:
    """Run the command ``fastalex.train`` in these processes; return its exit status and standard error."""
    with (
        mock.patch.object(processes, "joined", return_value=nullcontext(world)),
        mock.patch.object(sys, "argv", ["fastalex", *arguments]),
        redirect_stderr(io.StringIO()) as err,
    ):
        try:
            tiny_train.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return {"status": status, "stderr": err.getvalue()}


def collectives(world: World) -> dict[str, Any]:
    """Call each collective; return the results."""
    rows = torch.arange(7).view(7, 1).expand(7, 2)[world.rank :: world.size]
    return {
        "sum": world.sum(world.rank + 1, 0.5),
        "any": (world.any(world.rank == 1), world.any(False)),
        "min": world.min(5 - world.rank),
        "gather": world.gather(f"process {world.rank}"),
        "interleave": world.interleave(rows),
        "main": world.on_main(lambda: f"from process {world.rank}"),
    }


def gloo_threads() -> set[int]:
    """Return the ids of this process's gloo threads."""
    threads = Path("/proc/self/task").iterdir()
    return {int(thread.name) for thread in threads if (thread / "comm").read_text() == "pt_gloo_runloop\n"}


def main(folder: Path) -> None:
    gc.disable()  # so that only joined() collects garbage
    with joined(60) as world:
        world.sum(1)  # starts the threads
        own = gloo_threads()
        results: dict[str, Any] = {name: run(case, world) for name, case in CASES.items()}
        for name in ("ddp", "hybrid", "batch normalisation, hybrid", "frozen, hybrid"):
            results[f"{name}, resumed"] = resumed(replace(CASES[name], steps=3), world)
        results["collectives"] = collectives(world)
        results["commands"] = {
            name: command([*arguments, f"hydra.run.dir={folder / name}"], world)
            for name, arguments in COMMANDS.items()
        }
    results["gloo's threads"] = {"own": list(own), "left": list(own & gloo_threads())}
    torch.save(results, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
