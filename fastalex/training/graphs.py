"""A whole training step as one CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastalex.kernels import LazyBatch

# Steps of a shape that run before it is recorded. They compile kernels, let cuDNN try its algorithms, and
# allocate what lasts, none of which can be recorded.
WARMUP_STEPS = 3

# Takes images and labels, and returns the loss; changes weights and sums in place.
Step = Callable[[Tensor, Tensor], Tensor]


class Recorder(Protocol):
    """Records the work that a function puts on the device."""

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """Do a function's work in the way in which it will be recorded; return its result."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record a function's work without doing it.

        Returns:
            The function's result, whose content is there after each call of the second value, and a function
            that does the work.
        """


class StepGraphs:
    """A training step that is recorded once for each shape of its batch, and repeated for later batches.

    A graph repeats the same kernels on the same addresses. So the step may read nothing that changes but
    tensors that stay where they are: all batches of a shape are written to the same place. A lazy batch is
    materialized there, which saves the copy.

    Args:
        step: the step.
        recorder: records it.
    """

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step = step
        self._recorder = recorder
        self._seen: dict[object, int] = {}  # steps by shape
        self._places: dict[object, tuple[Tensor, Tensor]] = {}
        self._recorded: dict[object, tuple[Tensor, Callable[[], None]]] = {}

    def __call__(self, images: Tensor | LazyBatch, labels: Tensor) -> Tensor:
        """Take a step; return its loss, ``()``, which the next step may overwrite.

        Args:
            images: ``(B, 3, crop, crop)`` on the device, or a lazy batch.
            labels: int64 ``(B,)`` or fp32 ``(B, classes)`` on the device.
        """
        key = images.shape, labels.shape, labels.dtype
        place = self._placed(key, images, labels)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= WARMUP_STEPS:
            return self._recorder.warm_up(lambda: self._step(*place))
        if key not in self._recorded:
            self._recorded[key] = self._recorder.record(lambda: self._step(*place))
        loss, repeat = self._recorded[key]
        repeat()
        return loss

    def _placed(self, key: object, images: Tensor | LazyBatch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Write a batch to the place of its shape; return the tensors there."""
        if key not in self._places:
            first = images.materialize() if isinstance(images, LazyBatch) else images.clone()
            self._places[key] = first, labels.clone()  # clone() keeps the memory format
            return self._places[key]
        its_images, its_labels = self._places[key]
        if isinstance(images, LazyBatch):
            images.materialize(out=its_images)
        else:
            its_images.copy_(images)
        its_labels.copy_(labels)
        return its_images, its_labels


class CudaRecorder:
    """Records CUDA graphs.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        # One for all graphs: they run one after another, so each may use the memory of another's activations.
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        """Do a function's work; see :class:`Recorder`."""
        # Not on the default stream: autograd remembers streams, and a graph may not wait for that one.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        return result

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record a function's work as a CUDA graph; see :class:`Recorder`."""
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a graph that was dropped earlier must not be freed during the recording
        # Of this thread only: a loader's threads may allocate memory meanwhile, which could end it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
        return result, graph.replay
