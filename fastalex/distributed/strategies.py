"""How ranks share the training of a network: data parallelism, or AlexNet's hybrid.

With ``ddp`` each rank has the whole network and a share of the batch; gradients are averaged after the
backward pass. ``hybrid`` does the same for the convolutions, which have few weights and most of the
arithmetic. The two hidden layers, which have 94% of the weights, are sharded: each rank has a share of their
units, and ranks exchange activations instead of gradients (Krizhevsky, "One weird trick for parallelizing
convolutional neural networks", 2014, scheme (a)).
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


def parallelize(
    model: nn.Module, config: DistributedConfig, world: World, device: torch.device
) -> DistributedDataParallel:
    """Prepare a network for training on several ranks, and broadcast rank 0's weights; collective.

    Batch normalisation then computes its statistics over the whole batch.

    Args:
        model: the network, on the device. It is modified: with the hybrid, the hidden layers' weights become
            DTensors.
        config: the strategy, and the compression of gradients.
        world: the ranks; more than one.
        device: this rank's device.

    Returns:
        The network to train with. If each rank's loss is the mean over its share of the batch, the backward
        pass gives the gradients of the mean over the whole batch.

    Raises:
        ConfigError: ``hybrid`` for a network without AlexNet's hidden layers.
    """
    check_strategy(model, config.strategy)
    _synchronise_batch_norm(model, device)
    if config.strategy is Strategy.hybrid:
        _shard_hidden_layers(model, world, device)
    network = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    if config.compression is Compression.bf16:
        network.register_comm_hook(None, bf16_compress_hook)
    return network


def check_strategy(model: nn.Module, strategy: Strategy) -> None:
    """Refuse the hybrid of a network that has no hidden layers to divide, or nothing else to train.

    Raises:
        ConfigError: saying what to use instead.
    """
    if strategy is not Strategy.hybrid:
        return
    hidden: tuple[str, ...] | None = getattr(model, "hidden_layers", None)
    if hidden is None:
        raise ConfigError(
            "distributed.strategy=hybrid: divides AlexNet's two hidden layers, which this network does not "
            "have; use distributed.strategy=ddp"
        )
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    if trained <= set(hidden):  # DistributedDataParallel takes no network without gradients of its own
        raise ConfigError(
            f"distributed.strategy=hybrid: averages the gradients of the layers other than "
            f"{' and '.join(hidden)}, and train.freeze freezes all of those; leave one out of it, or use "
            "distributed.strategy=ddp"
        )


def _shard_hidden_layers(model: nn.Module, world: World, device: torch.device) -> None:
    names: tuple[str, str] = model.hidden_layers  # type: ignore[assignment]
    first, second = names
    for name in names:  # DistributedDataParallel broadcasts the others, but is told to ignore DTensors
        for parameter in model.get_submodule(name).parameters():
            dist.broadcast(parameter.data, src=0)
    plan = {
        # The first layer gathers all ranks' images and computes this rank's units. The second computes
        # partial sums over those units, which are reduced and scattered back to the images' ranks.
        first: ColwiseParallel(input_layouts=Shard(0)),
        second: RowwiseParallel(output_layouts=Shard(0)),
    }
    # A group of its own: DTensor's caches refer to it forever, so its threads run until the process ends.
    group = cast(dist.ProcessGroup, dist.new_group(timeout=timedelta(seconds=world.timeout)))
    parallelize_module(model, DeviceMesh.from_group(group, device.type), plan)
    for name in names:
        for parameter in filter(lambda p: p.requires_grad, model.get_submodule(name).parameters()):
            # The gradient is summed over the ranks' mean losses; divide to get that of the batch's mean.
            parameter.register_hook(lambda gradient: gradient / world.size)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the network's parameters are sharded over ranks.

    Args:
        model: the network.
    """
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(state: Any) -> Any:
    """Replace each sharded tensor by the complete one; collective.

    Args:
        state: nested dicts and lists, such as a state dict.
    """
    if isinstance(state, DTensor):
        return state.full_tensor().detach()
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def scattered(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard complete tensors; collective.

    Args:
        weights: complete tensors by name.
        like: tensors by name; those that are sharded say how to shard the weights of the same names.
    """
    return {
        name: distribute_tensor(value, other.device_mesh, other.placements)
        if isinstance(other := like.get(name), DTensor)
        else value
        for name, value in weights.items()
    }


def scatter_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard an optimizer's state like its parameters; collective.

    Args:
        state: the optimizer's state dict after :func:`gathered`.
        optimizer: the optimizer that will load the state.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scattered_state = {
        index: scattered(values, dict.fromkeys(values, parameters[index]))
        if isinstance(parameters[index], DTensor)
        else values
        for index, values in state["state"].items()
    }
    return {**state, "state": scattered_state}


def clip_gradients(model: nn.Module, limit: float, loss_scale: Tensor | None = None) -> None:
    """Scale the gradient down to a Euclidean norm of at most ``limit``; collective.

    The norm covers ``grad`` of all parameters, sharded or not, and the gradients that layers keep as factors.

    Args:
        model: the network; its gradients are scaled in place.
        limit: the largest norm allowed.
        loss_scale: what a gradient scaler has multiplied the loss by and ``grad`` divided by, fp32 ``()``;
            the factors still have to be. None means 1.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norm = nn.utils.get_total_norm(local)
    if sharded:
        sharded_norm = cast(DTensor, nn.utils.get_total_norm(sharded))
        norm = torch.hypot(norm, sharded_norm.full_tensor())
    factored = [gradient for layer in factored_layers(model) if (gradient := layer.gradient)]
    for factors in factored:
        factored_norm = factors.squared_norm().sqrt().to(norm.dtype)
        norm = torch.hypot(norm, factored_norm if loss_scale is None else factored_norm / loss_scale)
    local += [gradient.to_local() for gradient in sharded]
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as in torch.nn.utils.clip_grad_norm_
    torch._foreach_mul_(local, scale)
    for factors in factored:
        factors.scale = scale if loss_scale is None else scale / loss_scale


def _world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over all ranks' batches on a CPU; PyTorch's SyncBatchNorm is for GPUs only.

    All ranks must have the same number of images.

    Shape:
        input and output ``(N, C, H, W)``, of the same dtype; statistics are fp32, or float64 if the input is.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        count = x.numel() // x.shape[1] * dist.get_world_size()
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = all_reduce(values.sum(dim=(0, 2, 3)), "sum", _world_group()) / count
        centred = values - mean.view(1, -1, 1, 1)
        # From centred values: the difference of two large sums, E[x^2] - E[x]^2, would lose its digits.
        variance = all_reduce(centred.square().sum(dim=(0, 2, 3)), "sum", _world_group()) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def _is_frozen(layer: nn.Module) -> bool:
    """Whether a layer has parameters and none is trained: a batch normalisation then keeps its statistics."""
    trained = [parameter.requires_grad for parameter in layer.parameters()]
    return bool(trained) and not any(trained)


def _synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace each batch normalisation by one whose statistics cover all ranks."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.BatchNorm2d or _is_frozen(child):
                continue
            if device.type == "cuda":
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            else:
                options = child.num_features, child.eps, child.momentum
                synchronised = CpuSyncBatchNorm(*options, dtype=child.weight.dtype)
                synchronised.load_state_dict(child.state_dict())
                setattr(module, name, synchronised)
