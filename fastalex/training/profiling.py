"""A few training steps under ``torch.profiler``: a trace to open, and a table of where the time goes."""

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

WAIT, WARMUP, ACTIVE = 2, 2, 6  # steps before the profiler, under it unrecorded, and recorded
STEPS = WAIT + WARMUP + ACTIVE
TOP = 20
RANGES = ("input", "forward", "backward", "optimizer")
_NO_OPERATORS = ("ProfilerStep", "autograd::engine", "Optimizer.")


@dataclass(frozen=True)
class Profile:
    """Where the recorded steps' time went.

    Attributes:
        ranges: milliseconds a step within each part of the loop, as the host saw it.
        operators: name, milliseconds a step of its own, share of all of them, calls a step; the greatest
            first. On a GPU these are the kernels, copies and fills that ran there.
        cuda: whether it was a GPU.
    """

    ranges: dict[str, float]
    operators: list[tuple[str, float, float, float]]
    cuda: bool

    def table(self) -> str:
        """Return both as text."""
        whole = sum(self.ranges.values()) or 1.0
        part = "part of the loop" + (", on the host" if self.cuda else "")
        operator = "kernel, on the GPU" if self.cuda else "operator, its own time"
        lines = [f"{part:<52}  {'ms/step':>9}  {'share':>6}"]
        lines += [f"{name:<52}  {ms:9.2f}  {ms / whole:6.1%}" for name, ms in self.ranges.items()]
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


def profile_steps(trainer: Trainer, folder: Path) -> Profile:
    """Train for a few steps under the profiler.

    Writes ``trace.json`` (for ui.perfetto.dev or chrome://tracing) and ``profile.txt`` to the folder.

    Args:
        trainer: its training loader is cut to ``STEPS`` steps, and it is not to be used afterwards.
        folder: of the run.
    """
    # Else Kineto writes lines of its own among ours, one of them an error where there is no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    trainer.train_loader = FirstBatches(trainer.train_loader, STEPS)
    trainer.validation_loader = None
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
        trainer.run_epoch()
    with replacing(folder / "trace.json") as temporary:
        _export(profiler, temporary)
    result = _summarise(profiler.key_averages(), cuda)
    write_text(folder / "profile.txt", f"{trainer.runtime}\n\n{result.table()}\n")
    return result


def _export(profiler: profile, path: Path) -> None:
    """Write the trace, which PyTorch gives up in silence where the disk is full."""
    profiler.export_chrome_trace(str(path))
    for rest in path.parent.glob(f"{path.name}*.tmp"):
        rest.unlink()
    if path.stat().st_size == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_kernel(event: FunctionEvent | FunctionEventAvg) -> bool:
    """Whether an event of the profiler is work of the GPU: a kernel, a copy or a fill.

    What the host marks with ``record_function`` has an event of the same name on the GPU's side, from the
    first kernel launched in it to the last; that one is none, and neither is the operator that launched a
    kernel, though its device time is the kernel's. A kernel of a CUDA graph is one, and may have no operator.
    """
    return bool(event.device_type == DeviceType.CUDA and not event.is_user_annotation)


def short(name: str) -> str:
    """The name of a C++ kernel without its namespaces; any other name as it is."""
    if not name.startswith("void "):
        return name
    return re.sub(r"\(anonymous namespace\)::|\b\w+::", "", name.removeprefix("void "))


def operators(
    averages: Sequence[FunctionEventAvg], steps: int, cuda: bool
) -> list[tuple[str, float, float, float]]:
    """What ran on the device: kernels on a GPU, operators on the CPU; see :class:`Profile`.

    Args:
        averages: ``key_averages()`` of a profiler.
        steps: how many it recorded.
        cuda: whether the device is a GPU.
    """
    rows = []
    for event in averages:
        name = str(event.key)
        if cuda and is_kernel(event):
            rows.append((name, event.self_device_time_total, event.count))
        elif not (cuda or name in RANGES or name.startswith(_NO_OPERATORS)):
            rows.append((name, event.self_cpu_time_total, event.count))
    whole = sum(own for _, own, _ in rows) or 1.0
    rows.sort(key=lambda row: row[1], reverse=True)
    return [(name, own / 1e3 / steps, own / whole, calls / steps) for name, own, calls in rows]


def _summarise(averages: Sequence[FunctionEventAvg], cuda: bool) -> Profile:
    ranges = dict.fromkeys(RANGES, 0.0)
    for event in averages:
        if event.key in ranges and event.device_type == DeviceType.CPU:
            ranges[event.key] += event.cpu_time_total / 1e3 / ACTIVE
    return Profile(ranges, operators(averages, ACTIVE, cuda), cuda)
