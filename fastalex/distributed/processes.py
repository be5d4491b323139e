"""The processes that train one network together, and their collectives.

``torchrun --nproc-per-node=N -m fastalex.train ...`` starts them. All take the same steps: each trains on its
share of the batch and keeps the same weights, or its shard of them
(:mod:`fastalex.distributed.strategies`). Only rank 0 writes files and prints.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastalex.distributed.connection import connect, one_line
from fastalex.distributed.launcher import is_main, under_torchrun
from fastalex.errors import FastalexError, ReportedError, StoppedError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them. A world of size 1 does not communicate.

    Every method except the properties is collective: all ranks must call it, in the same order.

    Attributes:
        rank: rank of this process, from 0.
        size: the world size: number of processes.
        local_rank: rank among the processes on this machine, also the index of this process's GPU.
        local_size: number of processes on this machine.
        timeout: seconds that a process waits for the others.
        restarted: whether torchrun has started the processes again, after one of them or a whole node was
            lost.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = 600.0
    restarted: bool = False

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0, and return its result on all ranks.

        Args:
            function: the function; its result must be picklable.

        Raises:
            FastalexError: on rank 0, as raised by the function; ReportedError on the others.
            StoppedError: on rank 0, as raised by the function; ReportedError on the others.
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
        """Call a function on rank 0 and then on the others, so that rank 0 alone fills caches.

        Args:
            function: the function, called once on each rank.

        Returns:
            What the function returned on this rank.

        Raises:
            FastalexError: as in :meth:`on_main`.
        """
        value: list[T] = []
        self.on_main(lambda: value.append(function()))
        return value[0] if self.main else function()

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(flag)[0])

    def min(self, value: int) -> int:
        """Return the minimum of the value over all ranks."""
        if self.size == 1:
            return value
        least = torch.tensor(value)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def gather(self, value: T) -> list[T]:
        """Return the objects of all ranks, by rank; they must be picklable."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def interleave(self, rows: Tensor) -> Tensor:
        """Gather rows that were dealt out in turn: row i is on rank ``i % size``.

        Args:
            rows: this rank's rows, ``(n, ...)``, any dtype; the lower ranks may have one more than the rest.

        Returns:
            All rows in order, ``(N, ...)``, on every rank.
        """
        if self.size == 1:
            return rows
        most = -self.min(-len(rows))
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        count = int(self.sum(len(rows))[0])
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0.

        Args:
            tensors: on this rank's device; of the same shapes and dtypes, in the same order, on every rank.
        """
        for tensor in tensors:
            self.copy_from(0, tensor)

    def copy_from(self, rank: int, tensor: Tensor) -> None:
        """Overwrite a tensor with that of one rank.

        Args:
            rank: the rank.
            tensor: on this rank's device; contiguous, of the same shape and dtype on every rank.
        """
        if self.size > 1:
            dist.broadcast(tensor, src=rank)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context that turns a lost connection to another process into a one-line error.

        Raises:
            LostProcessError: another process has ended or does not answer; names the rank that noticed.
        """
        if self.size == 1:
            yield
            return
        with one_line(self.rank, self.size, self.timeout):
            yield


ALONE = World()


def alike(function: Callable[[], None]) -> None:
    """Call a function that succeeds or fails identically on every rank; for use before :func:`joined`.

    Args:
        function: the function.

    Raises:
        FastalexError: on rank 0, as raised by the function; ReportedError on the others.
    """
    try:
        function()
    except FastalexError as error:
        if is_main():
            raise
        raise ReportedError(error.exit_status) from None


@contextmanager
def joined(timeout: float) -> Iterator[World]:
    """Context that connects the processes of torchrun; without torchrun, it yields a world of size 1.

    Objects that use the connection, such as a parallelized network, must be unreachable when it exits.

    Args:
        timeout: seconds that a process waits for the others.

    Raises:
        LostProcessError: another process has ended or does not answer, while the processes connect.
    """
    if not under_torchrun():
        yield ALONE
        return
    restarted = connect(timeout)
    try:
        yield World(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            timeout=timeout,
            restarted=restarted,
        )
    finally:
        # A parallelized network refers to the group and is part of reference cycles (a trainer and its
        # on_step). While anything refers to the group, gloo's threads keep running. One that frees a tensor
        # during interpreter shutdown aborts the process (pytorch issue 190489).
        gc.collect()
        dist.destroy_process_group()
