"""One training step: forward pass, loss, backward pass and update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from fastalex.config import Graph, TrainConfig
from fastalex.distributed import strategies
from fastalex.kernels import LazyBatch
from fastalex.runtime import Runtime
from fastalex.training.epoch import Sums
from fastalex.training.factored_sgd import FactoredSGD
from fastalex.training.graphs import CudaRecorder, Recorder, StepGraphs
from fastalex.training.taps import Taps


class TrainingStep:
    """Takes training steps, each with one update of the weights.

    Args:
        model: the network, on the runtime's device.
        network: what a step calls: ``parallel`` or else ``model``, compiled or not.
        optimizer: updates the network's parameters.
        config: the recipe.
        runtime: the device, dtype and memory format.
        template: the network on the meta device, before it was parallelized.
        parallel: the network as several ranks train it; None for one rank.

    Attributes:
        scaler: scales the loss; does nothing unless the runtime needs that.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        runtime: Runtime,
        *,
        template: nn.Module,
        parallel: DistributedDataParallel | None,
    ) -> None:
        self._model = model
        self._parallel = parallel
        self._network = network
        self._optimizer = optimizer
        self._config = config
        self._runtime = runtime
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.needs_loss_scaling)
        # Several ranks, and other optimizers, need the gradient itself.
        is_factored = runtime.factored and parallel is None and isinstance(optimizer, FactoredSGD)
        # A CPU casts a weight as fast as it reads it, so that a copy would only take memory.
        copies = runtime.device.type == "cuda"
        self._taps = Taps(model, template, runtime, copies=copies) if is_factored else None
        self._graphs: StepGraphs | None = None
        if runtime.graph is Graph.step:
            self.record(CudaRecorder(runtime.device))

    @cached_property
    def sums(self) -> Sums:
        """The sums of the current epoch, to which each step adds; at the same addresses in all epochs."""
        return Sums.zeros(self._runtime.device)

    def record(self, recorder: Recorder) -> None:
        """Take all later steps by recording one for each shape of batch and repeating it.

        Args:
            recorder: records a step.
        """
        self._graphs = StepGraphs(self._update, recorder)
        device = self._runtime.device
        self._rates = [torch.zeros((), device=device) for _ in self._optimizer.param_groups]

    def __call__(self, images: Tensor | LazyBatch, labels: Tensor) -> Tensor:
        """Take a step; return its loss, fp32 ``()`` on the device.

        Args:
            images: ``(B, 3, crop, crop)`` in the runtime's dtype, or a lazy batch.
            labels: int64 ``(B,)``, or fp32 ``(B, classes)``.
        """
        if self._graphs is None:
            return self._update(images, labels)
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self._taps:
            self._taps.of(images.shape)  # makes copies of weights anew if something else changed these
        return self._graphs(images, labels).clone()

    def _update(self, images: Tensor | LazyBatch, labels: Tensor) -> Tensor:
        """Update the weights, and add to the epoch's sums; return the loss, fp32 ``()``.

        A CUDA graph may repeat this without running its Python code: whatever changes from step to step has
        to be a tensor.
        """
        chunks: Sequence[Tensor | LazyBatch] = images.chunk(self._config.accumulate)
        parts = []
        for number, part in enumerate(zip(chunks, labels.chunk(self._config.accumulate), strict=True), 1):
            with nullcontext() if number == len(chunks) else self._no_sync():
                parts.append(self._backward(*part, len(labels)))
        with record_function("optimizer"):
            if self._config.clip_norm:
                self.scaler.unscale_(self._optimizer)  # clip by the norm of the unscaled gradient
                strategies.clip_gradients(self._model, self._config.clip_norm, self._loss_scale())
            with self._rates_on_device():
                self.scaler.step(self._optimizer)
            self.scaler.update()
            self._optimizer.zero_grad()
        losses, logits = zip(*parts, strict=True)
        loss = torch.stack(losses).sum()
        classes = labels if labels.dim() == 1 else labels.argmax(dim=1)
        self.sums.loss.add_(loss)
        self.sums.wrong.add_((torch.cat(logits).argmax(dim=1) != classes).sum())
        return loss

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Context in which a recorded step reads its rates from tensors, filled before each step."""
        if self._graphs is None:
            yield
            return
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for rate, group in zip(self._rates, groups, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for number, group in zip(rates, groups, strict=True):
                group["lr"] = number

    def _loss_scale(self) -> Tensor | None:
        """Return the scaler's factor of the loss, ``()`` on the device; None without scaling."""
        if not self.scaler.is_enabled():
            return None
        factor: Tensor = self.scaler.scale(torch.ones((), device=self._runtime.device))
        return factor

    def _no_sync(self) -> AbstractContextManager[None]:
        """Context in which backward passes accumulate gradients without averaging them over ranks."""
        return self._parallel.no_sync() if self._parallel is not None else nullcontext()

    def _backward(self, images: Tensor | LazyBatch, labels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Run the forward and backward pass over a part of a batch, and accumulate its gradients.

        Args:
            images: ``(N, 3, crop, crop)`` in the runtime's dtype, or a lazy batch.
            labels: int64 ``(N,)``, or fp32 ``(N, classes)``.
            batch: number of images in the whole batch.

        Returns:
            The part's share of the batch's loss, fp32 ``()``, and its logits ``(N, classes)``, both detached.
        """
        taps = self._taps.of(images.shape) if self._taps else []
        with record_function("forward"), self._runtime.autocast():
            logits, inputs = self._network(images, taps) if taps else (self._network(images), [])
            # Without autocast, cross-entropy of bf16 logits would be computed with eight bits.
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(wide, labels, label_smoothing=self._config.label_smoothing)
            loss = loss * (len(labels) / batch)  # by its size: the last part may be smaller
        with record_function("backward"):
            self.scaler.scale(loss).backward()
        if self._taps:
            self._taps.collect(taps, inputs)
        return loss.detach(), logits.detach()
