"""Training steps under ``torch.profiler``: a trace file, and a table of where the time goes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, schedule

from fastalex.data.wrappers import FirstBatches
from fastalex.files import replacing, write_text
from fastalex.training.trainer import Trainer

WAIT, WARMUP, ACTIVE = 2, 2, 6  # steps without the profiler, under it but discarded, and recorded
STEPS = WAIT + WARMUP + ACTIVE
TOP = 20
RANGES = ("input", "forward", "backward", "optimizer")
_NO_OPERATORS = ("ProfilerStep", "autograd::engine", "Optimizer.")


@dataclass(frozen=True)
class Profile:
    """Where the time of the recorded steps went.

    Attributes:
        ranges: milliseconds per step in each part of the loop, measured on the host.
        operators: name, own milliseconds per step, fraction of the total, and calls per step; the slowest
            first. On a GPU these are kernels, copies and fills.
        cuda: whether the device is a GPU.
    """

    ranges: dict[str, float]
    operators: list[tuple[str, float, float, float]]
    cuda: bool

    def table(self) -> str:
        """Return ranges and operators as a text table."""
        total = sum(self.ranges.values()) or 1.0
        part = "part of the loop" + (", on the host" if self.cuda else "")
        operator = "kernel, on the GPU" if self.cuda else "operator, its own time"
        lines = [f"{part:<52}  {'ms/step':>9}  {'share':>6}"]
        lines += [f"{name:<52}  {ms:9.2f}  {ms / total:6.1%}" for name, ms in self.ranges.items()]
        lines += ["", f"{operator:<52}  {'ms/step':>9}  {'share':>6}  {'calls/step':>10}"]
        lines += [
            f"{short(name)[:52]:<52}  {ms:9.2f}  {share:6.1%}  {calls:10.1f}"
            for name, ms, share, calls in self.operators[:TOP]
        ]
        rest = self.operators[TOP:]
        if rest:
            ms, share = sum(row[1] for row in rest), sum(row[2] for row in rest)
            lines.append(f"{f'{len(rest)} others':<52}  {ms:9.2f}  {share:6.1%}")
        return "\n".join(lines)


def take_steps(trainer: Trainer) -> None:
    """Train for :data:`STEPS` steps, as a rank whose steps are not profiled.

    Args:
        trainer: the trainer. Its loaders are replaced: do not use it afterwards.
    """
    trainer.train_loader = FirstBatches(trainer.train_loader, STEPS)
    trainer.validation_loader = None
    trainer.run_epoch()


def profile_steps(trainer: Trainer, folder: Path) -> Profile:
    """Train for :data:`STEPS` steps under the profiler; the other ranks have to :func:`take_steps`.

    Writes ``trace.json`` (for ui.perfetto.dev or chrome://tracing) and ``profile.txt`` to the folder.

    Args:
        trainer: the trainer. Its loaders and ``on_step`` are replaced: do not use it afterwards.
        folder: the run's folder.

    Raises:
        OutputError: a file cannot be written.
    """
    # Kineto otherwise prints lines among ours, one of them an error if there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_step = trainer.on_step
    cuda = trainer.runtime.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(
        activities=activities, schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE)
    ) as profiler:

        def step(number: int, loss: float | None) -> None:
            trainer.runtime.synchronize()
            on_step(number, loss)
            profiler.step()

        trainer.on_step = step
        take_steps(trainer)
    with replacing(folder / "trace.json") as temporary:
        _export(profiler, temporary)
    result = _summarise(profiler.key_averages(), cuda)
    ranks = f", rank 0 of {trainer.world.size}" if trainer.world.size > 1 else ""
    write_text(folder / "profile.txt", f"{trainer.runtime}{ranks}\n\n{result.table()}\n")
    return result


def _export(profiler: profile, path: Path) -> None:
    """Write the trace.

    Raises:
        OSError: the disk is full, which PyTorch does not report.
    """
    profiler.export_chrome_trace(str(path))
    for rest in path.parent.glob(f"{path.name}*.tmp"):
        rest.unlink()
    if path.stat().st_size == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_kernel(event: FunctionEvent | FunctionEventAvg) -> bool:
    """Whether an event of the profiler is GPU work: a kernel, a copy or a fill.

    Two kinds of event also have device time but are not GPU work: the GPU-side range of a
    ``record_function``, from the first kernel launched in it to the last, and the operator that launched a
    kernel. A kernel of a CUDA graph may have no operator.

    Args:
        event: an event, or an average of events.
    """
    return bool(event.device_type == DeviceType.CUDA and not event.is_user_annotation)


def short(name: str) -> str:
    """Return the name of a C++ kernel without its namespaces, and any other name unchanged."""
    if not name.startswith("void "):
        return name
    return re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name.removeprefix("void "))


def operators(
    averages: Sequence[FunctionEventAvg], steps: int, cuda: bool
) -> list[tuple[str, float, float, float]]:
    """Return :attr:`Profile.operators`: kernels on a GPU, operators on the CPU.

    Args:
        averages: ``key_averages()`` of a profiler.
        steps: number of recorded steps.
        cuda: whether the device is a GPU.
    """
    rows = []
    for event in averages:
        name = str(event.key)
        if cuda and is_kernel(event):
            rows.append((name, event.self_device_time_total, event.count))
        elif not (cuda or name in RANGES or name.startswith(_NO_OPERATORS)):
            rows.append((name, event.self_cpu_time_total, event.count))
    total = sum(own for _, own, _ in rows) or 1.0
    rows.sort(key=lambda row: row[1], reverse=True)
    return [(name, own / 1e3 / steps, own / total, calls / steps) for name, own, calls in rows]


def _summarise(averages: Sequence[FunctionEventAvg], cuda: bool) -> Profile:
    ranges = dict.fromkeys(RANGES, 0.0)
    for event in averages:
        if event.key in ranges and event.device_type == DeviceType.CPU:
            ranges[event.key] += event.cpu_time_total / 1e3 / ACTIVE
    return Profile(ranges, operators(averages, ACTIVE, cuda), cuda)
