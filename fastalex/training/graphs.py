"""A whole training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

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
    tensors that stay where they are: a batch is copied to the place of the recorded one.

    Args:
        step: the step.
        recorder: records it.
    """

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step = step
        self._recorder = recorder
        self._seen: dict[object, int] = {}  # steps by shape
        self._recorded: dict[object, tuple[Tensor, Tensor, Tensor, Callable[[], None]]] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take a step; return its loss, ``()``, which the next step may overwrite.

        Args:
            images: ``(B, 3, crop, crop)`` on the device.
            labels: int64 ``(B,)`` or fp32 ``(B, classes)`` on the device.
        """
        key = images.shape, labels.shape, labels.dtype
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= WARMUP_STEPS:
            return self._recorder.warm_up(lambda: self._step(images, labels))
        if key not in self._recorded:
            place = images.clone(), labels.clone()  # clone() keeps the memory format
            self._recorded[key] = *place, *self._recorder.record(lambda: self._step(*place))
        its_images, its_labels, loss, repeat = self._recorded[key]
        its_images.copy_(images)
        its_labels.copy_(labels)
        repeat()
        return loss


class CudaRecorder:
    """Records CUDA graphs.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

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
        with torch.cuda.graph(graph, stream=self._stream):
            result = run()
        return result, graph.replay
