"""``loader=ffcv``: uint8 pixels from a memory-mapped .beton file; ``augment`` computes batches on the device.

A prefetching thread of FFCV, compiled by Numba, gathers the images of a batch. FFCV draws no random numbers
and changes no pixel: order, crops and flips come from the epoch's plan, because FFCV's random augmentations
ignore their seeds when there are several workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from queue import Empty
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
    """FFCV's reader of a memory map, with a Numba type of its own for read-only bytes.

    FFCV's own reader marks Numba's shared type ``uint8[::1]`` as read-only. This changes the hash of a type
    that is part of other functions' compiled signatures: every kernel that takes uint8 would then fail to
    compile for another dtype.
    """

    @property
    def state_type(self) -> types.Tuple:
        return types.Tuple([_BYTES, _NUMBERS, _NUMBERS])

    def compile_reader(self) -> Any:
        def read(address: Any, state: Any) -> Any:
            size = state[2][np.searchsorted(state[1], address)]
            return state[0][address : address + size]

        return Compiler.compile(read, _BYTES(types.uint64, self.state_type))


loader_module.OSCacheManager = _MemoryMap  # FFCV's Loader has no argument for a manager


class FfcvLoader(PlannedLoader):
    """Loader of a .beton file; :class:`fastalex.data.loader.Loader` is its interface.

    If the file does not exist, it is written first (:mod:`fastalex.data.beton`);
    ``python -m fastalex.data.write_beton`` does so ahead of time. The arguments are those of
    :func:`fastalex.data.build_loader`.

    Raises:
        DataError: an image cannot be decoded, or the file is damaged.
        OutputError: the file cannot be written.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beton = ensure_beton(self.images, self.data, self.loader)
        with threads_kept():
            self._loader = BetonLoader(
                os.fspath(self.beton),
                batch_size=self.batch_size,
                # FFCV fails with more threads than Numba has started.
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
        on_device = plan.to(self.device)  # the whole epoch at once, because the host waits for this copy
        with ExitStack() as stack:
            with threads_kept():
                epoch = _Epoch(self._loader, plan.indices[skipped:].numpy().astype(np.uint64))
                batches = stack.enter_context(closing(epoch))  # ends FFCV's thread if the epoch is abandoned
                first = next(batches)  # FFCV's thread sets the process's thread counts before its first batch
            for number in range(self.start_batch, len(self)):
                # Views of a ring buffer that FFCV overwrites: they have to be read, or copied by the host,
                # before the next batch is requested.
                pixels, labels = first if number == self.start_batch else next(batches)
                pixels = sent(pixels, self.device)
                if self.views is Views.ten_crop:
                    mirror = self.num_views == 10
                    images = ten_crop(pixels, mirror=mirror, keep_shape=self.keep_shape, **self.geometry)
                else:
                    rows = on_device.batch(number, self.batch_size)
                    images = augment(
                        pixels,
                        rows.offsets,
                        rows.flips,
                        colors=rows.colors,
                        keep_shape=self.keep_shape,  # of no effect on files, which are stored as squares
                        **self.geometry,
                    )
                yield (
                    images if self.channels_last else images.contiguous(),
                    sent(labels.flatten().clone(), self.device),
                )


class _Epoch(EpochIterator):
    """FFCV's iterator over a given order of samples. An error in its thread is raised here, not a hang."""

    error: Exception | None = None

    def run(self) -> None:
        if torch.cuda.is_available():  # a new thread is on GPU 0 and would create a context there
            torch.cuda.set_device(self.cuda_streams[0].device)
        try:
            super().run()
        except Exception as error:
            self.error = error
            self.output_queue.put(None)

    def close(self) -> None:
        """End the thread, which may be waiting for room in the queue of batches."""
        super().close()
        self.iter_ixes = iter(())
        with suppress(Empty):
            while True:
                self.output_queue.get_nowait()

    def __next__(self) -> tuple[Tensor, Tensor]:
        try:
            pixels, labels = super().__next__()
        except StopIteration:
            raise self.error or RuntimeError("FFCV ended the epoch too early") from None
        return pixels, labels
