"""``loader=torchvision``, the reference: torch's DataLoader over torchvision's transforms.

Worker processes resize, crop and flip uint8 images, as torchvision recommends: the resized image is rounded
to whole grey levels, so that the result is within one level of the loaders that resize in floating point. The
uint8 crops, a quarter of the bytes of fp32, are copied to the device and normalised there.
"""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from fastalex.config import DataConfig, Flip
from fastalex.data.fit import fitted
from fastalex.data.imageset import ImageSet
from fastalex.data.loader import PlannedLoader, Views
from fastalex.data.sampling import EpochPlan
from fastalex.data.workers import num_workers
from fastalex.errors import DataError, ShortageError
from fastalex.shortage import SHARED_MEMORY, shared_memory_free, shortage

PREFETCHED = 2  # batches that each worker prepares ahead
_Row = tuple[int, int, int, bool]  # one sample of the epoch's plan: image, top, left, flip
_Item = tuple[Tensor, int]  # uint8 (V, crop, crop, 3) and label


class TorchvisionLoader(PlannedLoader):
    """Loader with worker processes; :class:`fastalex.data.loader.Loader` is its interface.

    The workers start with the first iteration and end when the loader is freed or the program ends. The
    arguments are those of :func:`fastalex.data.build_loader`.

    Raises:
        ShortageError: the batches that the workers prepare ahead do not fit the free shared memory.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        workers = num_workers(self.loader)
        self._check_shared_memory(workers)
        self._started = False
        self._sampler = _PlanSampler()
        self._batches: DataLoader[_Item] = DataLoader(
            _ViewDataset(self.images, self.data, self.views),
            batch_sampler=self._sampler,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=_collate,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # DataLoader would draw from the global one, which dropout uses
        )
        # Copied once and not per batch, because the host waits for such a copy. Each is (channels, 1, 1).
        mean, std = torch.tensor([self.data.mean, self.data.std], dtype=torch.float32)[..., None, None]
        self._mean, self._std = mean.to(self.device), std.to(self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan()
        # The whole epoch at once, because the host waits for such a copy.
        colors = None if plan.colors is None else plan.colors.to(self.device)[..., None, None]
        self._sampler.batches = [plan.batch(i, self.batch_size) for i in range(self.start_batch, len(self))]
        if not self._started:
            _check_descriptors(self._batches.num_workers)
            self._started = True
        with _preserve_sigchld_handler():
            batches = iter(self._batches)
        for number in count(self.start_batch):
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # Damaged images are returned, not raised, and DataLoader re-raises any other error of a
                # worker as "Caught ...". So every other error comes from reading from a dead worker.
                if self._batches.num_workers == 0 or str(error).startswith("Caught "):
                    raise
                if shortage(error) is not None:  # this process's own
                    raise
                first_line = (str(error) or type(error).__name__).splitlines()[0]
                raise DataError(
                    f"loader.workers={self.loader.workers}: a worker process died ({first_line}), perhaps "
                    "for lack of memory or of /dev/shm (docker run --shm-size); use fewer, or 0 to see why"
                ) from None
            if isinstance(batch, Exception):
                try:
                    raise batch
                finally:
                    # The error's traceback refers to this frame; a cycle would keep the workers alive.
                    del batch
            images, labels = batch
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
            yield self._on_device(images, labels, self._mean if colors is None else self._mean - colors[rows])

    def _check_shared_memory(self, workers: int) -> None:
        """Refuse workers whose batches do not fit: the run would fail as soon as it is slower than they."""
        free = shared_memory_free()
        if not workers or free is None:
            return
        batch = min(self.batch_size, self.num_samples) * self.num_views * 3 * self.data.crop**2
        batches = self.world.local_size * min(PREFETCHED * workers + 1, len(self))  # and the one in use
        needed = batches * batch
        if needed > free:
            raise ShortageError(
                f"loader.workers={self.loader.workers}: up to {batches} batches wait in shared memory, "
                f"{_megabytes(needed)}, and {SHARED_MEMORY} has {_megabytes(free)} free; lower "
                "loader.workers (0 needs none) or train.batch_size (evaluating: batch_size), or give it more "
                "room (docker run --shm-size=1g)"
            )

    def _on_device(self, images: Tensor, labels: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = F.to_dtype(images, torch.float32, scale=True)
        images = images.sub_(mean).div_(self._std)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return (
            images.to(self.dtype).contiguous(memory_format=layout),
            # Shared memory has a file descriptor, and an evaluation keeps the labels of all its batches.
            labels.to(self.device, non_blocking=True, copy=True),
        )


class _PlanSampler:
    """Batch sampler: the samples of the epoch's plan, one list per batch.

    The parent sets the batches before each iteration, so that persistent workers need not know the epoch. It
    has no reference to its loader: a reference cycle would keep the loader and its workers alive after use.
    """

    def __init__(self) -> None:
        self.batches: list[EpochPlan] = []

    def __iter__(self) -> Iterator[list[_Row]]:
        for batch in self.batches:
            top, left = batch.offsets.T.tolist()
            yield list(zip(batch.indices.tolist(), top, left, batch.flips.tolist(), strict=True))


class _ViewDataset(Dataset[_Item]):
    """Maps a sample of the plan to its views and its label.

    A DataError is returned, not raised: DataLoader would add a worker's traceback to its message.
    """

    def __init__(self, images: ImageSet, data: DataConfig, views: Views) -> None:
        self.images = images
        self.data = data
        self.views = views

    def __getitem__(self, row: _Row) -> _Item | DataError:  # type: ignore[override]
        index, top, left, flip = row
        crop = self.data.crop
        try:
            # Copies only an image of a read-only mapped array.
            pixels = torch.from_numpy(np.require(self.images.image(index), requirements="W"))
        except DataError as error:
            return error
        # torchvision resizes channels-last images faster than planar ones.
        image = fitted(pixels.permute(2, 0, 1), self.data.resize, self.data.fit)
        if self.views is not Views.ten_crop:
            view = F.crop(image, top, left, crop, crop)
            views = (F.horizontal_flip(view) if flip else view,)
        elif self.data.flip is Flip.none:
            views = F.five_crop(image, [crop, crop])
        else:
            views = F.ten_crop(image, [crop, crop])
        return torch.stack([view.permute(1, 2, 0) for view in views]), int(self.images.labels[index])


def _check_descriptors(workers: int) -> None:
    """Open as many files as there are in a process with workers, and close them again.

    A worker without descriptors cannot send a batch, and prints tracebacks while the parent waits for it.

    Raises:
        OSError: there are too few.
    """
    if not workers:
        return
    queues = 4 * workers + 2  # with what is known of each process
    received = 2 * (PREFETCHED * workers + 1)  # images and labels
    sent = 4 * (PREFETCHED + 1) + 3  # by a worker: also a copy of each until it is received, and a connection
    with ExitStack() as files:
        for _ in range(queues + max(sent, received)):
            files.callback(os.close, os.open(os.devnull, os.O_RDONLY))


@contextmanager
def _preserve_sigchld_handler() -> Iterator[None]:
    """Restore the SIGCHLD handler on exit.

    torch's DataLoader installs a handler that raises a dead worker's error wherever the main thread happens
    to be: in the middle of a training step, or while another worker's death is being reported. Without the
    handler, waiting for the next batch raises the error within seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # torch installs no handler here
        return
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _start_worker(worker: int) -> None:
    """Initialise a worker: ignore Ctrl-C, and report a batch that cannot be sent.

    A terminal sends Ctrl-C to all processes, and the parent needs workers to finish its step.

    A thread sends the batches and leaves them in shared memory. If that is full, for instance, Python's queue
    prints the error and drops the batch, and the parent would wait for it forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: multiprocessing.queues.Queue[Any], error: Exception, item: Any) -> None:
    """Send an error in the place of a batch; Python's queue calls this in its thread.

    Args:
        queue: that of the batches.
        error: why the item could not be sent.
        item: the number of the batch and its content.
    """
    number, content = item
    if isinstance(content, Exception):
        os._exit(1)  # nothing can be sent; the parent notices within seconds that the worker has ended
    queue.put((number, error))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _collate(items: list[_Item | DataError]) -> tuple[Tensor, Tensor] | DataError:
    """Return images, uint8 (B * V, crop, crop, 3), and labels, int64 (B,), or the first error."""
    images, labels = [], []
    for item in items:
        if isinstance(item, DataError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.cat(images), torch.tensor(labels)
