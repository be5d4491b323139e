"""A card's memory: what of it images may take beside a training."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn

from fastalex.config import Config
from fastalex.distributed.processes import ALONE, World
from fastalex.runtime import Runtime

# What a step takes at its worst, in what its forward pass keeps for the backward one: that itself, and as
# much again for gradients, cuDNN's work space and blocks that do not fit each other.
PEAK = 2


def room_for_images(model: nn.Module, config: Config, runtime: Runtime, world: World = ALONE) -> int | None:
    """Return the bytes that decoded images may take on the device; collective.

    Args:
        model: that is to be trained, not on the device yet.
        config: of the run: how large its batches are.
        runtime: the device and the arithmetic.
        world: the processes that train together. All get the same number, that of the card with least room.

    Returns:
        What is free of a card's memory less what training will take, which may be below zero; None for a CPU,
        where decoded images are in memory already.
    """
    if runtime.device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(runtime.device)
    # What this process has claimed and does not use is free as well.
    free += torch.cuda.memory_reserved(runtime.device) - torch.cuda.memory_allocated(runtime.device)
    return world.min(free - training_bytes(model, config, runtime.dtype, world.size))


def training_bytes(model: nn.Module, config: Config, dtype: torch.dtype, processes: int = 1) -> int:
    """Estimate the bytes that training takes on a device, or on each of several; nothing is computed.

    That is the weights with their momentum and perhaps their average, as much again while a checkpoint is
    copied, their gradients, and what a step keeps of the largest batch, by a forward pass on the meta device.

    Args:
        model: in the mode that it trains in.
        config: of the run.
        dtype: of activations.
        processes: that share a batch.
    """
    tensors = chain(model.parameters(), model.buffers())
    copies = 2 * (3 if config.train.ema_decay else 2) + 1
    batch = -(-config.train.batch_size // (processes * config.train.accumulate))
    crop = max([config.data.crop, *(stage.crop for stage in config.train.stages)])
    kept = _kept_bytes(model, (batch, 3, crop, crop), dtype)
    return copies * sum(tensor.nbytes for tensor in tensors) + PEAK * kept


def _kept_bytes(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of all that a forward pass keeps for the backward one, but for the weights."""
    network = copy.deepcopy(model).to("meta", dtype)
    weights = {tensor.untyped_storage()._cdata for tensor in chain(network.parameters(), network.buffers())}
    kept: dict[
        int, torch.UntypedStorage
    ] = {}  # by their addresses: views, and what two layers keep, count once

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.empty(shape, dtype=dtype, device="meta"))
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
