"""Processes that help: how many, and work spread over them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from fastalex.config import LoaderConfig
from fastalex.errors import DataError
from fastalex.runtime import available_cores

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def num_workers(loader: LoaderConfig) -> int:
    """``loader.workers``, where -1 means one for each core beyond the first."""
    return available_cores() - 1 if loader.workers < 0 else loader.workers


def map_unordered(
    function: Callable[[_In], _Out], items: Sequence[_In], workers: int
) -> Iterator[tuple[int, _Out]]:
    """Yields (i, function(items[i])) as each is done, in worker processes, or in this one if workers < 2.

    Processes, because Pillow holds the interpreter lock for most of a small image: two threads are slower
    than one. The function must be one that pickle finds by its name.
    """
    if (
        workers < 2 or len(items) < 2 or multiprocessing.current_process().daemon
    ):  # a daemon may have no children
        yield from ((i, function(item)) for i, item in enumerate(items))
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), initializer=_start_worker)
    try:
        futures = {pool.submit(function, item): i for i, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()  # popped: a result must not outlive its use
    except BrokenProcessPool:
        raise DataError(
            "a process that was decoding images was killed, perhaps for lack of memory; "
            "free some and start again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is for the parent to handle, and a worker whose parent was killed has no reason to live.

    One thread a worker, as in torch's DataLoader: after a fork OpenMP would wait forever for the others.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
