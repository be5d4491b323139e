"""SGD from a gradient's factors, by each implementation, against torch.optim.SGD in float64."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastalex.kernels.factored_sgd import factored_sgd
from fastalex.kernels.factored_sgd_reference import ROWS, gradient_rows

# (images, out, in): tiles and blocks of rows that are complete and not, odd numbers, one image, one weight
SHAPES = [(64, 64, 128), (1, 65, 70), (70, ROWS + 7, 33), (3, 1, 1), (129, 96, 66)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RATE, MOMENTUM, DECAY, SCALE = 0.05, 0.9, 0.01, 0.3


def sample(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    images, n_out, n_in = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    return {
        "weight": random(n_out, n_in),
        "velocity": random(n_out, n_in),
        "output": random(images, n_out).to(dtype),
        "input": random(images, n_in).to(dtype),
    }


def expected(
    tensors: dict[str, Tensor], scale: float = SCALE, momentum: float = MOMENTUM
) -> dict[str, Tensor]:
    """The step of torch.optim.SGD in float64, and the magnitude of the terms that it adds."""
    weight, velocity, output, input = (tensors[name].double() for name in tensors)
    parameter = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=RATE, momentum=momentum, weight_decay=DECAY)
    if momentum:
        optimizer.state[parameter]["momentum_buffer"] = velocity.clone()
    parameter.grad = scale * output.t() @ input
    optimizer.step()
    terms = abs(scale) * output.abs().t() @ input.abs() + momentum * velocity.abs() + DECAY * weight.abs()
    return {
        "weight": parameter.detach(),
        "velocity": optimizer.state[parameter].get("momentum_buffer", velocity),
        "terms": terms,
        "size": weight.abs() + RATE * terms,
    }


def step(tensors: dict[str, Tensor], implementation: str, **options: Any) -> dict[str, Tensor]:
    """Take the step on copies, by the operator or by the module of an implementation; return them."""
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    given: dict[str, Any] = {
        "momentum": MOMENTUM,
        "weight_decay": DECAY,
        "scale": torch.tensor(SCALE),
    } | options
    given = {"velocity": found["velocity"], "rate": torch.tensor(RATE), **given}
    if "copy" in given:
        given["copy"] = given["copy"].clone()
    if implementation == "operator":
        factored_sgd(found["weight"], output=found["output"], input=found["input"], **given)
    else:
        module = import_module(f"fastalex.kernels.factored_sgd_{implementation}")
        given = {"pooling": None, "scale": None, "skip": None, "copy": None, **given}
        module.factored_sgd(found["weight"], output=found["output"], input=found["input"], **given)
    return found | {name: value for name, value in given.items() if name == "copy"}


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], images: int) -> None:
    """The products are exact in fp32 or nearly so; a sum of n terms errs by n - 1 roundings of its terms."""
    rounding = 2**-24 * (images + 4)
    for name, size in (("velocity", "terms"), ("weight", "size")):
        assert found[name].dtype == torch.float32
        assert ((found[name].double() - wanted[name]).abs() <= rounding * wanted[size]).all(), name


@pytest.fixture(params=["operator", "reference", "triton"])
def take(request: pytest.FixtureRequest) -> Any:
    """`step` by the operator, which runs Numba's kernel if there is no copy, or by another implementation."""
    if request.param != "triton":
        return lambda tensors, **options: step(tensors, request.param, **options)
    interpreted = request.getfixturevalue("interpreted")
    return lambda tensors, **options: interpreted(step_interpreted, tensors, options)


def step_interpreted(tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    return step(tensors, "triton", **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_that_of_sgd(take: Any, shape: tuple[int, int, int]) -> None:
    tensors = sample(shape, torch.float32)
    check(take(tensors), expected(tensors), shape[0])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_factors_give_an_unrounded_gradient_and_a_rounded_copy(
    take: Any, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    tensors = sample((70, 65, 72), dtype)
    with_copy = take(tensors, copy=torch.zeros(65, 72, dtype=dtype))
    assert torch.equal(with_copy["copy"], with_copy["weight"].to(dtype))
    for found in (take(tensors), with_copy):
        if "triton" in request.node.name:
            check(found, expected(tensors), 70)
            continue
        # PyTorch's product rounds the gradient to the factors' dtype
        wanted, rounding = expected(tensors), torch.finfo(dtype).eps
        error = (found["velocity"] - wanted["velocity"]).abs()
        assert (
            error
            <= rounding * SCALE * (tensors["output"].double().t() @ tensors["input"].double()).abs()
            + 80 * 2**-24 * wanted["terms"]
        ).all()


def test_without_momentum_and_scale(take: Any) -> None:
    tensors = sample((5, 66, 31), torch.float32)
    found = take(tensors, momentum=0.0, velocity=None, scale=None)
    wanted = expected(tensors, scale=1.0, momentum=0.0)
    assert torch.equal(found["velocity"], tensors["velocity"])
    error = (found["weight"].double() - wanted["weight"]).abs()
    assert (error <= 10 * 2**-24 * wanted["size"]).all()


def test_a_skipped_step_changes_nothing(take: Any) -> None:
    tensors = sample((9, 65, 40), torch.float16)
    tensors["output"][3] = torch.inf
    copy = torch.ones(65, 40, dtype=torch.float16)
    found = take(tensors, skip=torch.tensor(1.0), copy=copy)
    for name, before in tensors.items():
        assert torch.equal(found[name], before)
    assert torch.equal(found["copy"], copy)
    taken = take(sample((9, 65, 40), torch.float16), skip=torch.tensor(0.0), copy=copy)
    assert not torch.equal(taken["copy"], copy)


@pytest.mark.parametrize("image", [1, 2, 3])
def test_a_pooled_weight(take: Any, image: int) -> None:
    """The gradient of the whole weight from an input of fewer pixels, as autograd computes it."""
    channels, size, units, images = 3, 6, 10, 4
    tensors = sample((images, units, channels * size**2), torch.float32)
    pixels = torch.randn(images, channels, image, image, generator=torch.Generator().manual_seed(1))
    pooling = F.adaptive_avg_pool2d(torch.eye(image**2).view(-1, 1, image, image), size).flatten(1)
    narrow = {**tensors, "input": pixels.flatten(1)}
    whole = {**tensors, "input": F.adaptive_avg_pool2d(pixels.double(), size).flatten(1)}
    wanted = expected(whole)
    # A row of the pooling matrix adds to 1, so that it enlarges no rounding, but each pixel is rounded first.
    check(take(narrow, pooling=pooling), wanted, images + 2 * image**2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape: tuple[int, int, int]) -> None:
    """In bf16, whose products are exact: in fp32 the tensor cores round the factors to TF32."""
    tensors = sample(shape, torch.bfloat16)
    there = {name: tensor.cuda() for name, tensor in tensors.items()}
    copy = torch.zeros(shape[1:], dtype=torch.bfloat16, device="cuda")
    options = {"rate": torch.tensor(RATE).cuda(), "scale": torch.tensor(SCALE).cuda(), "copy": copy}
    found = {name: tensor.cpu() for name, tensor in step(there, "operator", **options).items()}
    check(found, expected(tensors), shape[0])
    assert torch.equal(found["copy"], found["weight"].bfloat16())


def test_rows_of_the_gradient() -> None:
    tensors = sample((7, 20, 9), torch.float64)
    rows = gradient_rows(tensors["output"], tensors["input"], None, 3, 11)
    torch.testing.assert_close(rows, (tensors["output"].t() @ tensors["input"])[3:11])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(5, 8)}, r"factors \(7, 20\) and \(5, 8\) do not fit a weight of \(20, 9\)"),
        ({"output": torch.zeros(7, 20).half()}, "factors of two dtypes, torch.float16 and torch.float32"),
        ({"velocity": None}, "momentum=0.9 needs a velocity"),
        ({"copy": torch.zeros(9, 20).t()}, r"copy must be contiguous and \(20, 9\)"),
        ({"velocity": torch.zeros(20, 9).bfloat16()}, "velocity must be torch.float32, got torch.bfloat16"),
        (
            {"output": torch.zeros(7, 20).double(), "input": torch.zeros(7, 9).double()},
            "factors of torch.float64 for a weight of torch.float32",
        ),
        ({"velocity": torch.zeros(20, 9, device="meta")}, "tensors on cpu and meta"),
        (
            {"input": torch.zeros(7, 2), "pooling": torch.zeros(4, 18)},  # two values are no whole channel
            r"factors \(7, 20\) and \(7, 2\) do not fit",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    tensors = sample((7, 20, 9), torch.float32) | changes
    with pytest.raises(ValueError, match=message):
        factored_sgd(**tensors, rate=torch.tensor(0.1), momentum=0.9, weight_decay=0.0)


def test_the_operator_passes_pytorchs_checks() -> None:
    tensors = sample((7, 20, 9), torch.float32)
    arguments = (
        tensors["weight"],
        tensors["velocity"],
        torch.zeros(20, 9),
        tensors["output"],
        tensors["input"],
    )
    numbers = (torch.tensor(RATE), torch.tensor(SCALE), None, MOMENTUM, DECAY)
    torch.library.opcheck(torch.ops.fastalex.factored_sgd, (*arguments, None, *numbers))
