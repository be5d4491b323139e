"""The checkpoints of a run: written in the background, the newest kept, damaged ones skipped on loading."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalex.config import CheckpointConfig, OnWriteError
from fastalex.errors import CheckpointError, OutputError
from fastalex.runs.background import Background
from fastalex.runs.checkpoint import DIGEST, Checkpoint, read_weights, save_weights

NEWEST = "checkpoint.pt"
_OLDER = re.compile(r"checkpoint-(\d+)\.pt")


def older(folder: Path) -> dict[int, Path]:
    """Return the older checkpoints of a folder, ``checkpoint-STEP.pt``, by their step, the latest first."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _OLDER.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def load_newest(path: Path) -> tuple[Checkpoint, Path] | None:
    """Load a checkpoint; where it is damaged, warn and load the next older one that is not.

    Args:
        path: a checkpoint, or a run's folder, whose newest is loaded.

    Returns:
        The checkpoint and its file; None if the folder holds no checkpoint at all.

    Raises:
        CheckpointError: all of them are damaged.
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
            print(f"fastalex: warning: resuming from {candidate} instead", file=sys.stderr)
        return checkpoint, candidate
    raise CheckpointError(f"resume={path}: every checkpoint there is damaged; the first: {damage[0]}")


class OutputPolicy:
    """What happens when a file cannot be written: the run ends, or a warning is printed.

    Args:
        on_error: which of the two.
    """

    def __init__(self, on_error: OnWriteError) -> None:
        self._on_error = on_error
        self._warned: set[str] = set()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which an OutputError becomes a warning, once for each message, if that is the policy."""
        try:
            yield
        except OutputError as error:
            if self._on_error is OnWriteError.stop:
                raise
            if str(error) not in self._warned:
                self._warned.add(str(error))
                print(f"\nfastalex: warning: {error}; training continues", file=sys.stderr)


@dataclass(frozen=True)
class _Kept:
    """A copy of weights, and what their file is to say of them."""

    weights: dict[str, Tensor]
    facts: dict[str, Any]


class BestWeights:
    """The weights with the lowest validation error so far: kept in memory until they are written.

    Args:
        path: the file to write them to.
        config: the run's configuration, as plain values.
        classes: class names, in the order of the network's outputs.
        digest: of the run's images.
    """

    def __init__(self, path: Path, config: dict[str, Any], classes: list[str], digest: str) -> None:
        self.path = path
        self.error: float | None = None
        self._config = config
        self._classes = classes
        self._digest = digest
        self._waiting: _Kept | None = None
        self._lock = threading.Lock()  # of _waiting, which one thread sets and another writes

    def improved_by(self, error: float) -> bool:
        """Whether a top-1 error is lower than the best so far."""
        return self.error is None or error < self.error

    def keep(self, weights: Mapping[str, Tensor], epoch: int, error: float) -> None:
        """Copy weights on their device, without waiting for it; they replace those not yet written."""
        copy = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.error = error
        with self._lock:
            facts = {DIGEST: self._digest, "epoch": epoch, "validation_top1_error": error}
            self._waiting = _Kept(copy, facts)

    def write(self) -> None:
        """Write the weights kept last, if they were not written yet, and release them.

        Raises:
            OutputError: they cannot be written; they are kept for the next time.
        """
        self.writing()()

    def writing(self) -> Callable[[], None]:
        """Return a function that writes the weights kept now, for another thread to call later."""
        kept = self._waiting

        def write() -> None:
            if kept is None:
                return
            save_weights(kept.weights, self.path, self._config, self._classes, **kept.facts)
            with self._lock:
                if self._waiting is kept:
                    self._waiting = None

        return write

    def read(self, consequence: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the file: the weights, their epoch and error.

        Args:
            consequence: for the warning where the file is missing or damaged.

        Returns:
            None where the file is missing or damaged.
        """
        try:
            weights, facts = read_weights(self.path)
            return weights, {key: facts[key] for key in ("epoch", "validation_top1_error")}
        except (CheckpointError, KeyError):
            print(f"fastalex: warning: {self.path}: is missing or damaged; {consequence}", file=sys.stderr)
            return None


class CheckpointWriter(Background):
    """Writes a run's checkpoints in a thread, from a copy of the state: training waits only for the copy.

    A save waits for the write before it, so that there are never two copies; :attr:`due` says when it would
    not wait. The newest file is always ``checkpoint.pt``; it gets that name when it is complete and on the
    disk. The file that had the name is kept as ``checkpoint-STEP.pt``, with its step in six digits.

    Args:
        folder: the run's folder.
        config: how often a checkpoint is due, and how many to keep.
        policy: what happens when one cannot be written.
        step: the step of the ``checkpoint.pt`` that the run resumes from; None for a new run.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, policy: OutputPolicy, step: int | None = None
    ) -> None:
        super().__init__("checkpoint", config.every_seconds)
        self.path = folder / NEWEST
        self.written = step  # the step of checkpoint.pt
        self.stalls: list[float] = []  # seconds that training waited, for each checkpoint
        self._config = config
        self._policy = policy

    def save(self, checkpoint: Checkpoint, before: Callable[[], None] = lambda: None) -> None:
        """Copy the state and write it in the background.

        Args:
            checkpoint: the live state.
            before: writes something else first, in the same thread; if it fails, so does the checkpoint.

        Raises:
            OutputError: the write before this one failed.
        """
        began = time.perf_counter()
        self.wait()
        copy, ready = checkpoint.snapshot(), _copied_when()
        self.start(lambda: self._write(copy, before, ready))
        self.stalls.append(time.perf_counter() - began)

    def wait(self) -> None:
        """Wait for the current write, if there is one; the policy decides about its error."""
        with self._policy.applied():
            super().wait()

    def _write(
        self, checkpoint: Checkpoint, before: Callable[[], None], ready: torch.cuda.Event | None
    ) -> None:
        try:
            with _beside_training(ready):
                before()
                if ready is not None:
                    checkpoint = checkpoint.snapshot("cpu")
            checkpoint.save(self.path, before_replacing=self._keep_older)
        except OutputError as error:
            last = "none was written before" if self.written is None else f"that of step {self.written} stays"
            raise OutputError(
                f"{error}: the checkpoint of step {checkpoint.step} is lost, {last}; free some space"
            ) from error
        self.written = checkpoint.step
        self._remove_old()

    def _keep_older(self) -> None:
        """Give the file that is about to be replaced its numbered name."""
        if self.written is None or not self.path.is_file():
            return
        other = self.path.with_name(f"checkpoint-{self.written:06d}.pt")
        other.unlink(missing_ok=True)
        try:
            os.link(self.path, other)  # there is a checkpoint.pt at any moment
        except OSError:
            self.path.rename(other)  # but on a file system without links

    def _remove_old(self) -> None:
        """Keep the newest ``keep``; also delete later steps left after resuming from an older checkpoint."""
        assert self.written is not None
        kept = 1
        for step, path in older(self.path.parent).items():
            if step < self.written and kept < self._config.keep:
                kept += 1
            else:
                path.unlink(missing_ok=True)


def _copied_when() -> torch.cuda.Event | None:
    """An event that completes when the GPU work queued so far has; None without a GPU."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@contextmanager
def _beside_training(ready: torch.cuda.Event | None) -> Iterator[None]:
    """Context whose copies to the host run beside a GPU's next steps, on a stream of their own.

    Args:
        ready: completes when the tensors to copy are ready; None without a GPU.
    """
    if ready is None:
        yield
        return
    # A thread starts on the first card, and would open a context there: the event knows the right one.
    with torch.cuda.device(ready.device):
        # PyTorch hands out 32 streams of each priority in turn: of the usual one, this might be a stream on
        # which a graph is being recorded.
        stream = torch.cuda.Stream(priority=-1)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            yield
