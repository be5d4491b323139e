"""GPU memory: an estimate of what training takes, and how much is left for decoded images."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from fastalex.config import Config
from fastalex.distributed.processes import ALONE, World
from fastalex.runtime import Runtime
from fastalex.training.outline import outline

# Peak memory of a step as a multiple of the tensors saved for backward: those tensors, and as much again for
# gradients, cuDNN workspaces and fragmentation.
PEAK = 2


def room_for_images(model: nn.Module, config: Config, runtime: Runtime, world: World = ALONE) -> int | None:
    """Return how many bytes decoded images may take on the device; collective.

    Args:
        model: the network to train, not yet on the device.
        config: the run's configuration.
        runtime: the device and dtype.
        world: the ranks that train together; all get the minimum over their GPUs.

    Returns:
        Free GPU memory minus :func:`training_bytes`, in bytes, possibly negative; None on a CPU, where
        decoded images are in memory already.
    """
    if runtime.device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(runtime.device)
    # Memory that PyTorch's allocator holds but does not use is free as well.
    free += torch.cuda.memory_reserved(runtime.device) - torch.cuda.memory_allocated(runtime.device)
    return world.min(free - training_bytes(model, config, runtime.dtype, world.size))


def training_bytes(model: nn.Module, config: Config, dtype: torch.dtype, processes: int = 1) -> int:
    """Estimate the bytes that training takes on each device.

    The sum of: the weights, their momentum and, with ``train.ema_decay``, their average; a second copy of
    these while a checkpoint is written; the gradients; and :data:`PEAK` times the tensors that a step on the
    largest batch saves for backward. These are measured by a forward pass on the meta device.

    Args:
        model: the network, in training mode.
        config: the run's configuration.
        dtype: of the activations.
        processes: the number of processes that share a batch.
    """
    tensors = chain(model.parameters(), model.buffers())
    copies = 2 * (3 if config.train.ema_decay else 2) + 1
    batch = -(-config.train.batch_size // (processes * config.train.accumulate))
    crop = max([config.data.crop, *(stage.crop for stage in config.train.stages)])
    kept = _kept_bytes(model, (batch, 3, crop, crop), dtype)
    return copies * sum(tensor.nbytes for tensor in tensors) + PEAK * kept


def _kept_bytes(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes that a forward pass saves for backward, without the weights."""
    network = outline(model, dtype)
    weights = {tensor.untyped_storage()._cdata for tensor in chain(network.parameters(), network.buffers())}
    # By address, so that views, and a tensor saved by two layers, count once.
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.empty(shape, dtype=dtype, device="meta"))
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
