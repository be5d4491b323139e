"""The reference loader: torch's DataLoader over torchvision's transforms.

Its workers resize, crop and flip uint8 images, as torchvision recommends: the resized image is rounded to
whole grey levels, so the result is within one level of the loaders that resize in floating point. The uint8
crops cross to the device, a quarter of the bytes, and are normalised there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from fastalex.config import DataConfig, Flip
from fastalex.data.imageset import ImageSet
from fastalex.data.loader import PlannedLoader, Views
from fastalex.data.sampling import EpochPlan
from fastalex.data.workers import num_workers
from fastalex.errors import DataError

_Row = tuple[int, int, int, bool]  # of the epoch's plan: image, top, left, flip
_Item = tuple[Tensor, int]  # uint8 (V, crop, crop, 3) and label


class TorchvisionLoader(PlannedLoader):
    """See :class:`fastalex.data.loader.Loader` for what it yields.

    The worker processes live from the first iteration until the loader is collected or the program ends.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        workers = num_workers(self.loader)
        self._rows = _Rows()
        self._batches: DataLoader[_Item] = DataLoader(
            _ViewsOfImages(self.images, self.data, self.views),
            batch_sampler=self._rows,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=_collate,
            worker_init_fn=_leave_interrupts_to_the_parent,
            generator=torch.Generator(),  # its own: the global one belongs to the network's dropout
        )
        # Here and not with each batch: the host waits for such a copy. (channels, 1, 1)
        mean, std = torch.tensor([self.data.mean, self.data.std], dtype=torch.float32)[..., None, None]
        self._mean, self._std = mean.to(self.device), std.to(self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan()
        self._rows.batches = [plan.batch(i, self.batch_size) for i in range(self.start_batch, len(self))]
        with _sigchld_handler_kept():
            batches = iter(self._batches)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # Damaged images are returned, not raised, and what else goes wrong within a worker comes as
                # "Caught ...": any other error, whichever it happens to be, is of reading from a dead one.
                if self._batches.num_workers == 0 or str(error).startswith("Caught "):
                    raise
                first_line = (str(error) or type(error).__name__).splitlines()[0]
                raise DataError(
                    f"loader.workers={self.loader.workers}: a worker process died ({first_line}), perhaps "
                    "for lack of memory or of /dev/shm (docker run --shm-size); use fewer, or 0 to see why"
                ) from None
            if isinstance(batch, DataError):
                try:
                    raise batch
                finally:
                    del batch  # the error holds this frame: were it held in turn, the workers would live on
            yield self._on_device(*batch)

    def _on_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = F.to_dtype(images, torch.float32, scale=True)
        images = images.sub_(self._mean).div_(self._std)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return (
            images.to(self.dtype).contiguous(memory_format=layout),
            labels.to(self.device, non_blocking=True),
        )


class _Rows:
    """The rows of the plan, a batch at a time: what tells the workers which views to make.

    They come from the parent at each iteration, so workers that persist need not know the epoch. It knows
    nothing of its loader: in a cycle the loader would outlive its last use, and its workers with it.
    """

    def __init__(self) -> None:
        self.batches: list[EpochPlan] = []

    def __iter__(self) -> Iterator[list[_Row]]:
        for batch in self.batches:
            top, left = batch.offsets.T.tolist()
            yield list(zip(batch.indices.tolist(), top, left, batch.flips.tolist(), strict=True))


class _ViewsOfImages(Dataset[_Item]):
    """Maps a row of the plan to the views it describes.

    A DataError is returned, not raised: a worker would wrap it in a traceback.
    """

    def __init__(self, images: ImageSet, data: DataConfig, views: Views) -> None:
        self.images = images
        self.data = data
        self.views = views

    def __getitem__(self, row: _Row) -> _Item | DataError:  # type: ignore[override]
        index, top, left, flip = row
        size, crop = [self.data.resize] * 2, self.data.crop
        try:
            # Copied only where it is a view of images that are mapped read-only.
            pixels = torch.from_numpy(np.require(self.images.image(index), requirements="W"))
        except DataError as error:
            return error
        # With channels innermost in memory torchvision resizes faster than it does planes.
        image = F.resize(pixels.permute(2, 0, 1), size, antialias=True)
        if self.views is not Views.ten_crop:
            view = F.crop(image, top, left, crop, crop)
            views = (F.horizontal_flip(view) if flip else view,)
        elif self.data.flip is Flip.none:
            views = F.five_crop(image, [crop, crop])
        else:
            views = F.ten_crop(image, [crop, crop])
        return torch.stack([view.permute(1, 2, 0) for view in views]), int(self.images.labels[index])


@contextmanager
def _sigchld_handler_kept() -> Iterator[None]:
    """Context after which SIGCHLD is handled as before it.

    torch's DataLoader installs a handler that raises a dead worker's error in whichever line the main thread
    has reached: in the middle of a training step, or of reporting the worker before. Without it the next
    batch that is waited for raises the error, within seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where torch installs none
        return
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the parent finishes its step first, and needs us for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(items: list[_Item | DataError]) -> tuple[Tensor, Tensor] | DataError:
    """uint8 (B * V, crop, crop, 3) and int64 (B,), or the first error."""
    images, labels = [], []
    for item in items:
        if isinstance(item, DataError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.cat(images), torch.tensor(labels)
