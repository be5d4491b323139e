"""Worker processes: their number, and a map over a pool of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

import torch

from fastalex.config import LoaderConfig
from fastalex.errors import DataError
from fastalex.runtime import available_cores

_In = TypeVar("_In")
_Out = TypeVar("_Out")

AHEAD = 3  # items per worker that are in work or whose results wait for the caller


def num_workers(loader: LoaderConfig) -> int:
    """Return the number of workers of a loader; ``loader.workers=-1`` is one for each core but the first."""
    return available_cores() - 1 if loader.workers < 0 else loader.workers


def map_unordered(
    function: Callable[[_In], _Out], items: Sequence[_In], workers: int
) -> Iterator[tuple[int, _Out]]:
    """Apply a function to each item in worker processes; yield ``(i, function(items[i]))`` as each finishes.

    At most ``AHEAD * workers`` items are ahead of the caller, so that results do not fill the memory. Threads
    would not do: Pillow holds the interpreter lock most of the time on small images, and two threads are
    slower than one.

    Args:
        function: a function that can be pickled, that is, one defined at the top level of a module.
        items: its arguments.
        workers: number of processes; with fewer than 2 the work is done in this process.

    Raises:
        DataError: a worker was killed.
        Exception: whatever the function raises.
    """
    is_daemon = multiprocessing.current_process().daemon  # which may not have children
    if workers < 2 or len(items) < 2 or is_daemon:
        yield from ((i, function(item)) for i, item in enumerate(items))
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), initializer=_start_worker)
    try:
        coming = enumerate(items)
        pending: dict[Future[_Out], int] = {}

        def submit(count: int) -> None:
            pending.update({pool.submit(function, item): i for i, item in islice(coming, count)})

        submit(AHEAD * workers)
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
                submit(1)
    except BrokenProcessPool:
        raise DataError(
            "a process that was decoding images was killed, perhaps for lack of memory; "
            "free some memory and start again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Initialise a worker: leave Ctrl-C to the parent, and exit when the parent is gone.

    Each worker has one thread, as in torch's DataLoader: OpenMP's threads do not survive the fork, and it
    would wait for them forever.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
