"""Which part of a training step an operator belongs to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from benchmarks.parts import (
    CONVOLUTIONS,
    INPUT,
    LRN,
    OPTIMIZER,
    OTHER,
    PARTS,
    PRODUCTS,
    part_of,
    profile_step,
)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mkldnn_convolution", "aten::_convolution", "aten::conv2d", "forward"], CONVOLUTIONS),
        (["aten::copy_", "aten::convolution_backward", "ConvolutionBackward0", "backward"], CONVOLUTIONS),
        (["aten::copy_", "aten::_to_copy", "aten::to", "aten::conv2d"], OTHER),  # autocast's casts
        (["aten::mm", "AddmmBackward0"], PRODUCTS),
        (["aten::mm", "fastalex::winograd_conv2d", "forward"], CONVOLUTIONS),
        (["fastalex::lrn_max_pool", "forward"], LRN),
        (["aten::mm", "fastalex::conv_block", "forward"], CONVOLUTIONS),
        (["aten::copy_", "aten::to", "fastalex::conv_block_backward", "backward"], CONVOLUTIONS),
        (["fastalex::lrn_max_pool_backward", "fastalex::conv_block_backward", "backward"], LRN),
        (["aten::pow", "forward"], LRN),
        (["aten::mul", "MulBackward0"], LRN),
        (["aten::mul", "aten::dropout"], OTHER),
        (["aten::add_", "Optimizer.step#SGD.step"], OPTIMIZER),
        (["aten::mul_", "optimizer"], OPTIMIZER),
        (["aten::mm", "aten::matmul", "Optimizer.step#FactoredSGD.step", "optimizer"], PRODUCTS),
        (["fastalex::augment", "input"], INPUT),
        (["sm90_xmma_fprop_implicit_gemm_bf16"], CONVOLUTIONS),
        (["_relu_lrn_pool_kernel"], LRN),
        (["aten::empty"], OTHER),
    ],
)
def test_part_of(names: list[str], part: str) -> None:
    assert part_of(names) == part


def step_of(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        optimizer.zero_grad()
        with record_function("input"):
            batch = images.clone()
        model(batch).sum().backward()
        optimizer.step()

    step()
    return step


def test_a_network_without_convolutions_has_no_time_in_them() -> None:
    seconds = profile_step(step_of(nn.Linear(400, 400), torch.randn(400, 400)))
    assert tuple(seconds) == PARTS
    assert seconds[CONVOLUTIONS] == seconds[LRN] == 0
    assert min(seconds[PRODUCTS], seconds[INPUT], seconds[OPTIMIZER], seconds[OTHER]) > 0


def test_eager_normalisation_is_found_forward_and_backward() -> None:
    """Under a 1x1 convolution of 3 channels nearly all of the time is LocalResponseNorm's."""
    images = torch.randn(8, 3, 64, 64)
    model = nn.Sequential(nn.Conv2d(3, 96, 1), nn.ReLU(), nn.LocalResponseNorm(5))
    seconds = profile_step(step_of(model, images))
    operators = sum(seconds.values()) - seconds[OTHER]  # which is also whatever the machine did meanwhile
    assert seconds[LRN] > operators / 2
    assert seconds[CONVOLUTIONS] > 0
