"""Several processes that train one network: who they are, and what they tell each other.

``torchrun --nproc-per-node=N -m fastalex.train ...`` starts them. They take the same steps: the batch is
divided among them, and each keeps the same weights, or its part of them
(:mod:`fastalex.distributed.strategies`). Rank 0 alone writes files and prints.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastalex.errors import FastalexError, LostProcessError, ReportedError, StoppedError

T = TypeVar("T")

# What gloo, NCCL and the reducer of DistributedDataParallel say when another process does not answer.
_NO_ANSWER = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|timed? ?out", re.IGNORECASE)


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one among them; alone, it talks to nobody.

    Every method but the properties is collective: all processes must call it, in the same order.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: among those on this machine, which is also the number of its GPU.
        local_size: how many are on this machine.
        timeout: seconds that one waits for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = 600.0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the first process; return to all what it returned.

        Raises:
            FastalexError: the function's in the first process; ReportedError in the others.
            StoppedError: in the first process, as it was stopped in the function.
        """
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        error: FastalexError | StoppedError | None = None
        if self.main:
            try:
                outcome[0] = function()
            except (FastalexError, StoppedError) as caught:
                error = caught
                outcome[1] = caught.exit_status
        dist.broadcast_object_list(outcome, src=0)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise ReportedError(outcome[1])
        value: T = outcome[0]
        return value

    def main_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process, and then in the others: the first fills the caches.

        Raises:
            FastalexError: as for :meth:`on_main`.
        """
        value: list[T] = []
        self.on_main(lambda: value.append(function()))
        return value[0] if self.main else function()

    def sum(self, *values: float) -> list[float]:
        """Add numbers up over the processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(flag)[0])

    def min(self, value: int) -> int:
        """The least of the processes' numbers."""
        if self.size == 1:
            return value
        least = torch.tensor(value)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def gather(self, value: T) -> list[T]:
        """Return every process's object, by rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def interleave(self, rows: Tensor) -> Tensor:
        """Put together what was dealt out row by row: row i is in process i modulo the number of processes.

        Args:
            rows: of this process, ``(n, ...)``; the first processes may have one more than the others.
        """
        if self.size == 1:
            return rows
        most = -self.min(-len(rows))
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        count = int(self.sum(len(rows))[0])
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which a process that no longer answers is an error of one line.

        Raises:
            LostProcessError: saying which process noticed.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, FastalexError) or not _NO_ANSWER.search(str(error)):
                raise
            raise LostProcessError(
                f"process {self.rank} of {self.size}: another process has ended, or did not answer within "
                f"{self.timeout:g} s (distributed.timeout); see its own message, then go on with resume=auto"
            ) from error


ALONE = World()


def is_main() -> bool:
    """Whether this process, in a group yet or not, is the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def restarted() -> bool:
    """Whether torchrun has started this process anew after another failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def alike(function: Callable[[], None]) -> None:
    """Call a function that ends alike in every process, as long as they are not connected.

    Raises:
        FastalexError: the function's in the first process; ReportedError in the others.
    """
    try:
        function()
    except FastalexError as error:
        if is_main():
            raise
        raise ReportedError(error.exit_status) from None


@contextmanager
def joined(timeout: float) -> Iterator[World]:
    """Context in which the processes that torchrun started are connected; without it, a world of one.

    What uses the connection, such as a network that is divided, is to be out of reach at its end.

    Args:
        timeout: seconds that a process waits for the others.
    """
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    # torchrun may hand restarted processes the store of those before them, with the addresses of the dead.
    store = dist.PrefixStore(f"attempt {_restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield World(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            timeout=timeout,
        )
    finally:
        # A divided network refers to the group, and is part of cycles (a trainer and its on_step). As long as
        # anything refers to the group, gloo's threads live on, and one that lets go of a tensor while the
        # interpreter ends aborts the process (pytorch issue 190489).
        gc.collect()
        dist.destroy_process_group()
