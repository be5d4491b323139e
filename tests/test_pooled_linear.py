"""The layer that pools its weight instead of its input, compared with the two layers it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastalex.models.pooled_linear import PooledLinear
from tests.tolerances import assert_near, unit_roundoff

BATCH, CHANNELS, SIZE, UNITS = 3, 5, 6, 7

# Enlarged from one pixel, by integer and other factors, from rectangles; unchanged; reduced.
IMAGES = [(1, 1), (2, 2), (3, 3), (1, 3), (4, 2), (4, 4), (6, 6), (1, 6), (9, 11)]


def pooled_then_linear(layer: PooledLinear) -> nn.Sequential:
    """The same function as two PyTorch layers, with a copy of the weights."""
    linear = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
    linear.load_state_dict(layer.state_dict())
    return nn.Sequential(nn.AdaptiveAvgPool2d(SIZE), nn.Flatten(), linear)


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_equals_pooling_and_a_linear_layer(
    image: tuple[int, int], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    layer = PooledLinear(CHANNELS, SIZE, UNITS).double()
    plain = pooled_then_linear(layer)
    x = torch.randn(BATCH, CHANNELS, *image, dtype=torch.float64).to(memory_format=memory_format)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    out, expected = layer(inputs[0]), plain(inputs[1])
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.weight.grad, plain[2].weight.grad)
    torch.testing.assert_close(layer.bias.grad, plain[2].bias.grad)


def test_the_weight_is_pooled_in_its_own_precision() -> None:
    """Also under autocast: the pooled weight is rounded once, for the product."""
    torch.manual_seed(0)
    layer = PooledLinear(CHANNELS, SIZE, UNITS)
    x = torch.randn(BATCH, CHANNELS, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # Each of the four pixels corresponds to a 3x3 block of the weight.
    weight = layer.weight.view(UNITS, CHANNELS, 2, 3, 2, 3).sum((3, 5)).flatten(1)
    rounded = nn.functional.linear(x.flatten(1).bfloat16(), weight.bfloat16(), layer.bias.bfloat16())
    # Another order of the pooling's sums may round a weight to the next number.
    assert_near(out, rounded.double(), 2 * unit_roundoff(torch.bfloat16))
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("image", "products"), [((2, 2), 4), ((6, 6), 36), ((8, 8), 36)], ids=str)
def test_number_of_multiplications(image: tuple[int, int], products: int) -> None:
    """Enlarging the input would add multiplications; the weight is pooled only if that saves many."""
    batch = 1000
    layer = PooledLinear(CHANNELS, SIZE, UNITS)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(batch, CHANNELS, *image))
    batched = 2 * batch * CHANNELS * products * UNITS
    pooling = 2 * UNITS * CHANNELS * SIZE**2 * image[0] * image[1] if products < SIZE**2 else 0
    assert counter.get_total_flops() == batched + pooling


def test_the_state_dict_is_that_of_a_linear_layer() -> None:
    shapes = [
        {name: tensor.shape for name, tensor in layer.state_dict().items()}
        for layer in (PooledLinear(CHANNELS, SIZE, UNITS), nn.Linear(CHANNELS * SIZE**2, UNITS))
    ]
    assert shapes[0] == shapes[1]
