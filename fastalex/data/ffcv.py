"""``loader=ffcv``: uint8 pixels from a memory-mapped .beton file; ``augment`` makes the batch on the device.

FFCV gathers the images of a batch in a thread that runs ahead, compiled by Numba. It draws nothing and
changes no pixel: order, crops and mirror images come from the epoch's plan (FFCV's random augmentations
ignore their seeds when there are several workers).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from torch import Tensor

from fastalex.data.beton import ensure_beton, threads_kept
from fastalex.data.loader import PlannedLoader, Views, sent
from fastalex.data.workers import num_workers
from fastalex.kernels import augment, ten_crop

with threads_kept():
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader as BetonLoader
    from ffcv.loader import loader as loader_module
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import OSCacheManager
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import ToTensor

_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_NUMBERS = types.uint64[::1]


class _MemoryMap(OSCacheManager):
    """FFCV's reading from a memory map, with a type of its own for read-only bytes.

    FFCV marks Numba's one type for ``uint8[::1]`` as read-only, which changes its hash while other functions'
    compiled signatures hold it: every kernel that takes uint8 would fail to compile for another dtype.
    """

    @property
    def state_type(self) -> types.Tuple:
        return types.Tuple([_BYTES, _NUMBERS, _NUMBERS])

    def compile_reader(self) -> Any:
        def read(address: Any, state: Any) -> Any:
            size = state[2][np.searchsorted(state[1], address)]
            return state[0][address : address + size]

        return Compiler.compile(read, _BYTES(types.uint64, self.state_type))


loader_module.OSCacheManager = _MemoryMap  # Loader takes no manager, only the choice between its own two


class FfcvLoader(PlannedLoader):
    """Yields batches from a .beton file; see :class:`fastalex.data.loader.Loader`.

    The file is written first where there is none: see :mod:`fastalex.data.beton`, and
    ``python -m fastalex.data.write_beton`` to do that ahead of time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beton = ensure_beton(self.images, self.data, self.loader)
        with threads_kept():
            self._loader = BetonLoader(
                os.fspath(self.beton),
                batch_size=self.batch_size,
                # One core runs the training loop; more threads than Numba has started are an error to FFCV.
                num_workers=min(max(1, num_workers(self.loader)), numba.config.NUMBA_NUM_THREADS),
                os_cache=True,
                pipelines={
                    "image": [SimpleRGBImageDecoder(), ToTensor()],
                    "label": [IntDecoder(), ToTensor()],
                },
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan()
        skipped = self.start_batch * self.batch_size
        if skipped >= len(plan):
            return
        geometry = {
            "resize": self.data.resize,
            "crop": self.data.crop,
            "mean": self.data.mean,
            "std": self.data.std,
            "dtype": self.dtype,
        }
        on_device = plan.to(self.device)  # of the whole epoch at once: the host waits for such a copy
        with threads_kept():
            batches = _Epoch(self._loader, plan.indices[skipped:].numpy().astype(np.uint64))
            first = next(batches)  # by then FFCV's thread has done what it does to the process
        try:
            for number in range(self.start_batch, len(self)):
                # Views of a ring buffer, which FFCV fills again: read, or copied by the host, before the next
                # batch is asked for.
                pixels, labels = first if number == self.start_batch else next(batches)
                pixels = sent(pixels, self.device)
                if self.views is Views.ten_crop:
                    images = ten_crop(pixels, mirror=self.num_views == 10, **geometry)
                else:
                    rows = on_device.batch(number, self.batch_size)
                    images = augment(pixels, rows.offsets, rows.flips, **geometry)
                yield (
                    images if self.channels_last else images.contiguous(),
                    sent(labels.flatten().clone(), self.device),
                )
        finally:
            batches.close()  # else an epoch that is left early leaves its thread behind


class _Epoch(EpochIterator):
    """FFCV's iterator over any order of samples; an error in its thread is raised here instead of hanging."""

    error: Exception | None = None

    def run(self) -> None:
        if torch.cuda.is_available():  # a thread begins on card 0, and would open a context there
            torch.cuda.set_device(self.cuda_streams[0].device)
        try:
            super().run()
        except Exception as error:
            self.error = error
            self.output_queue.put(None)

    def __next__(self) -> tuple[Tensor, Tensor]:
        try:
            pixels, labels = super().__next__()
        except StopIteration:
            raise self.error or RuntimeError("FFCV ended the epoch too early") from None
        return pixels, labels
