"""The checkpoints of a run: written while training goes on, the last few kept, damaged ones passed over."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from fastalex.checkpoint import Checkpoint
from fastalex.config import CheckpointConfig, OnWriteError
from fastalex.errors import CheckpointError, OutputError

NEWEST = "checkpoint.pt"
_OLDER = re.compile(r"checkpoint-(\d+)\.pt")


def older(folder: Path) -> dict[int, Path]:
    """Return the checkpoints before the newest, by their step, the latest first."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _OLDER.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def load_newest(path: Path) -> tuple[Checkpoint, Path] | None:
    """Load a checkpoint; where it is damaged, with a warning, the one before it that is whole.

    Args:
        path: of a checkpoint, or of a run's folder, for its newest.

    Returns:
        The checkpoint and its file; None if the folder holds no checkpoint at all.

    Raises:
        CheckpointError: if all of them are damaged.
    """
    if path.is_dir():
        candidates = [path / NEWEST, *older(path).values()]
        candidates = [candidate for candidate in candidates if candidate.is_file()]
        if not candidates:
            return None
    else:
        match = _OLDER.fullmatch(path.name)
        if not match and path.suffix != ".pt":
            raise CheckpointError(f"resume={path}: is no checkpoint; a run leaves {path.parent / NEWEST}")
        before = older(path.parent).items()
        candidates = [path, *(other for step, other in before if not match or step < int(match[1]))]
    damage: list[CheckpointError] = []
    for candidate in candidates:
        try:
            checkpoint = Checkpoint.load(candidate)
        except CheckpointError as error:
            damage.append(error)
            continue
        for reason in damage:
            print(f"fastalex: warning: {reason}", file=sys.stderr)
        if damage:
            print(f"fastalex: warning: going on from {candidate} instead", file=sys.stderr)
        return checkpoint, candidate
    raise CheckpointError(f"resume={path}: no checkpoint there is whole; the first: {damage[0]}")


class OutputPolicy:
    """What a file that cannot be written does: ends the run, or is a warning and no more.

    Args:
        on_error: which of the two.
    """

    def __init__(self, on_error: OnWriteError) -> None:
        self._on_error = on_error
        self._warned: set[str] = set()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context whose OutputError is a warning, once for each message, if that is the policy."""
        try:
            yield
        except OutputError as error:
            if self._on_error is OnWriteError.stop:
                raise
            if str(error) not in self._warned:
                self._warned.add(str(error))
                print(f"\nfastalex: warning: {error}; training goes on", file=sys.stderr)


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, from a copy of the state: training waits for the copy only.

    A save waits for the write before it, so that there are never two copies. The newest file is always
    ``checkpoint.pt``; it takes that name when it is whole and on the disk. The one that had the name is kept
    as ``checkpoint-STEP.pt``, with its step in six digits.

    Args:
        folder: of the run.
        config: how many to keep.
        policy: for what cannot be written.
        step: of the ``checkpoint.pt`` that is there and that the run goes on from; None if there is none.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, policy: OutputPolicy, step: int | None = None
    ) -> None:
        self.path = folder / NEWEST
        self.written = step  # the step of checkpoint.pt
        self.stalls: list[float] = []  # seconds that training waited, for each checkpoint
        self._config = config
        self._policy = policy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, checkpoint: Checkpoint, then: Callable[[Checkpoint], None] | None = None) -> None:
        """Copy the state and have it written.

        Args:
            checkpoint: of the live state.
            then: what else to write of the copy, before it.

        Raises:
            OutputError: the write before this one failed.
        """
        began = time.perf_counter()
        self.wait()
        copy = checkpoint.snapshot()
        self._pending = self._thread.submit(self._write, copy, then, _copied_when())
        self.stalls.append(time.perf_counter() - began)

    def check(self) -> None:
        """Raise the error of a write that has ended, without waiting for one that has not."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write that is under way, if there is one, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._policy.applied():
                pending.result()

    def close(self) -> None:
        """Wait for the last write and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(
        self,
        checkpoint: Checkpoint,
        then: Callable[[Checkpoint], None] | None,
        ready: torch.cuda.Event | None,
    ) -> None:
        if ready is not None:
            # On a stream of its own: the copy to the host must not stand in the way of the next steps. And on
            # the card of the state: a thread begins on the first one, and would open a context there.
            with torch.cuda.device(ready.device):
                stream = torch.cuda.Stream()
                stream.wait_event(ready)
                with torch.cuda.stream(stream):
                    checkpoint = checkpoint.snapshot("cpu")
        try:
            if then is not None:
                then(checkpoint)
            checkpoint.save(self.path, before_replacing=self._keep_older)
        except OutputError as error:
            last = "none was written before" if self.written is None else f"that of step {self.written} stays"
            raise OutputError(
                f"{error}: the checkpoint of step {checkpoint.step} is lost, {last}; free some space"
            ) from error
        self.written = checkpoint.step
        self._remove_old()

    def _keep_older(self) -> None:
        """Give the file that is about to be replaced its other name."""
        if self.written is None or not self.path.is_file():
            return
        other = self.path.with_name(f"checkpoint-{self.written:06d}.pt")
        other.unlink(missing_ok=True)
        try:
            os.link(self.path, other)  # there is a checkpoint.pt at any moment
        except OSError:
            self.path.rename(other)  # but on a file system without links

    def _remove_old(self) -> None:
        """Keep so many; nor is one kept that a run which went back to an older checkpoint has left behind."""
        assert self.written is not None
        kept = 1
        for step, path in older(self.path.parent).items():
            if step < self.written and kept < self._config.keep:
                kept += 1
            else:
                path.unlink(missing_ok=True)


def _copied_when() -> torch.cuda.Event | None:
    """The moment at which what was asked of a GPU so far is done."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
