"""A few training steps under ``torch.profiler``: a trace to open, and a table of where the time goes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, schedule

from fastalex.crops import Crops
from fastalex.data import Loader
from fastalex.files import replacing, write_text
from fastalex.trainer import Trainer

WAIT, WARMUP, ACTIVE = 2, 2, 6  # steps before the profiler, under it unrecorded, and recorded
STEPS = WAIT + WARMUP + ACTIVE
TOP = 20
RANGES = ("input", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Profile:
    """Where the recorded steps' time went.

    Attributes:
        ranges: milliseconds a step within each part of the loop, as the host saw it.
        operators: name, milliseconds a step of its own on the device, share of all operators', calls a step;
            the greatest first.
    """

    ranges: dict[str, float]
    operators: list[tuple[str, float, float, float]]

    def table(self) -> str:
        """Return both as text."""
        whole = sum(self.ranges.values())
        lines = [f"{'part of the loop':<52}  {'ms/step':>9}  {'share':>6}"]
        lines += [f"{name:<52}  {ms:9.2f}  {ms / whole:6.1%}" for name, ms in self.ranges.items()]
        lines += ["", f"{'operator, its own time':<52}  {'ms/step':>9}  {'share':>6}  {'calls/step':>10}"]
        lines += [
            f"{name[:52]:<52}  {ms:9.2f}  {share:6.1%}  {calls:10.1f}"
            for name, ms, share, calls in self.operators[:TOP]
        ]
        rest = self.operators[TOP:]
        if rest:
            ms, share = sum(row[1] for row in rest), sum(row[2] for row in rest)
            lines.append(f"{f'{len(rest)} others':<52}  {ms:9.2f}  {share:6.1%}")
        return "\n".join(lines)


class FirstBatches:
    """A loader's first batches, as an epoch of their own; those of the next epochs where one is too short."""

    def __init__(self, loader: Loader, count: int) -> None:
        self._loader = loader
        self._count = count
        self.num_samples = count * loader.num_samples // len(loader)

    def __len__(self) -> int:
        return self._count

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self._loader.set_epoch(epoch, start_batch)

    def __iter__(self) -> Iterator[tuple[Tensor | Crops, Tensor]]:
        left, epoch = self._count, 0
        while left:
            for batch in self._loader:
                yield batch
                left -= 1
                if not left:
                    return
            epoch += 1
            self._loader.set_epoch(epoch)


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


def _summarise(averages: Sequence[FunctionEventAvg], cuda: bool) -> Profile:
    ranges = dict.fromkeys(RANGES, 0.0)
    operators = []
    for event in averages:
        name = str(event.key)
        if name in ranges:
            ranges[name] = event.cpu_time_total / 1e3 / ACTIVE
        elif not name.startswith(("ProfilerStep", "autograd::engine", "Optimizer.")):
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            operators.append((name, own / 1e3 / ACTIVE, event.count / ACTIVE))
    whole = sum(own for _, own, _ in operators) or 1.0
    operators.sort(key=lambda row: row[1], reverse=True)
    return Profile(ranges, [(name, own, own / whole, calls) for name, own, calls in operators])
