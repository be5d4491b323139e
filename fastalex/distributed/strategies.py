"""How a network is divided over processes: data parallel, or AlexNet's hybrid.

``ddp`` gives each process the whole network and a part of the batch; after the backward pass the gradients
are averaged. ``hybrid`` is that for the convolutions, which hold few weights and most of the arithmetic; of
the two hidden layers, which hold 94% of the weights, each process keeps a part of the units, and activations
travel in place of gradients: Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
2014, scheme (a).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce  # which backpropagates
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fastalex.config import Compression, DistributedConfig, Strategy
from fastalex.distributed.processes import World
from fastalex.errors import ConfigError
from fastalex.models.factored_linear import factored_layers


def divide(
    model: nn.Module, config: DistributedConfig, world: World, device: torch.device
) -> DistributedDataParallel:
    """Divide a network over the processes, and give it the first process's weights.

    Batch normalisation then takes its statistics over the whole batch.

    Args:
        model: on the device. It is changed: in the hybrid, its hidden layers' weights become DTensors.
        config: the strategy, and the precision in which gradients travel.
        world: more than one process.
        device: of this process.

    Returns:
        The network to train with. In its backward pass gradients become those of the mean over the whole
        batch, if each process's loss is the mean over its part.

    Raises:
        ConfigError: the hybrid of a network that has no such layers.
    """
    _synchronise_batch_norm(model, device)
    if config.strategy is Strategy.hybrid:
        _divide_hidden_layers(model, world, device)
    network = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    if config.compression is Compression.bf16:
        network.register_comm_hook(None, bf16_compress_hook)
    return network


def _divide_hidden_layers(model: nn.Module, world: World, device: torch.device) -> None:
    names = getattr(model, "hidden_layers", None)
    if names is None:
        raise ConfigError(
            "distributed.strategy=hybrid: divides AlexNet's two hidden layers, which this network does not "
            "have; use distributed.strategy=ddp"
        )
    first, second = names
    for name in names:  # all processes begin with the same weights, as DistributedDataParallel sees to
        for parameter in model.get_submodule(name).parameters():
            dist.broadcast(parameter.data, src=0)
    plan = {
        # Images are gathered from all processes; each computes its part of the units, then of the sums over
        # them, which are added up where the images came from.
        first: ColwiseParallel(input_layouts=Shard(0)),
        second: RowwiseParallel(output_layouts=Shard(0)),
    }
    # A group of their own: DTensor's caches refer to it for good, and its threads end with the process.
    group = cast(dist.ProcessGroup, dist.new_group(timeout=timedelta(seconds=world.timeout)))
    parallelize_module(model, DeviceMesh.from_group(group, device.type), plan)
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            # The gradient is summed over the processes' losses, each a mean over a part of the batch.
            parameter.register_hook(lambda gradient: gradient / world.size)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    )


def is_divided(model: nn.Module) -> bool:
    """Whether a process holds a part of the network only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(state: Any) -> Any:
    """Replace each divided tensor in nested dicts and lists by the whole one; collective."""
    if isinstance(state, DTensor):
        return state.full_tensor().detach()
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def scattered(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divide whole tensors as those of the same names are; collective."""
    return {
        name: distribute_tensor(value, other.device_mesh, other.placements)
        if isinstance(other := like.get(name), DTensor)
        else value
        for name, value in weights.items()
    }


def scatter_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Divide an optimizer's state, made whole by :func:`gathered`, as its parameters are; collective."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scattered_state = {
        index: scattered(values, dict.fromkeys(values, parameters[index]))
        if isinstance(parameters[index], DTensor)
        else values
        for index, values in state["state"].items()
    }
    return {**state, "state": scattered_state}


def clip_gradients(model: nn.Module, limit: float) -> None:
    """Scale the gradient down to a Euclidean norm of ``limit``; collective.

    That is of all the parameters' ``grad``, of which some may be divided, and of the layers' ``factors``.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    divided = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norm = nn.utils.get_total_norm(whole)
    if divided:
        rest = cast(DTensor, nn.utils.get_total_norm(divided))
        norm = torch.hypot(norm, rest.full_tensor())
    factored = [gradient for layer in factored_layers(model) if (gradient := layer.gradient)]
    for factors in factored:
        norm = torch.hypot(norm, factors.squared_norm().sqrt().to(norm.dtype))
    whole += [gradient.to_local() for gradient in divided]
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
    torch._foreach_mul_(whole, scale)
    for factors in factored:
        factors.scale = scale


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes; PyTorch's is for GPUs only.

    Each process must have as many images as the others.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        count = x.numel() // x.shape[1] * dist.get_world_size()
        values = x.float()
        mean = all_reduce(values.sum(dim=(0, 2, 3)), "sum", _everyone()) / count
        centred = values - mean.view(1, -1, 1, 1)
        # From the centred values: the difference of two large sums would lose its digits.
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3)), "sum", _everyone()) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def _synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Have each batch normalisation take its statistics over all processes."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.BatchNorm2d:
                continue
            if device.type == "cuda":
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            else:
                synchronised = CpuSyncBatchNorm(child.num_features, child.eps, child.momentum)
                synchronised.load_state_dict(child.state_dict())
                setattr(module, name, synchronised)
