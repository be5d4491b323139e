"""Momentum SGD on a weight from the factors of its gradient, on NVIDIA GPUs, in Triton.

(`lrn_triton` explains Triton and how these files are built.)

**What it saves.** Plain PyTorch multiplies the gradient out into memory (2 bytes a weight in bf16), casts it
to fp32 (2 read, 4 written), reads it for clipping (4, and 8 to scale it), updates weight and momentum (12
read, 8 written), and in the next step casts the weight to bf16 (4 read, 2 written): 46 bytes a weight. Here
each program multiplies one tile of the gradient, keeps it in registers and applies it: weight and momentum
read and written in fp32, and a copy in bf16 written, 18 bytes a weight. The factors of 128 images, 3.4 MB for
AlexNet's first hidden layer, are read from the L2 cache.

**The grid.** A program owns a tile of TILE x TILE weights and needs 128 bytes of each factor for each image
and tile edge. Programs that run at the same time should need the same factors, so the grid walks through the
weight in groups of GROUP rows of tiles: any 128 programs in a row lie on about 16 x 8 tiles, and the memory
delivers the factors of those 24 tile edges once.

**The product** is the tensor cores', with fp32 accumulation: the gradient is rounded nowhere. In fp32 it is
TF32, as PyTorch's products are in fastalex on a GPU.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (Triton's values have no types that mypy knows)

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from . import factored_sgd_reference as reference
from ._triton_launch import SIZES, KernelCase, Launch, cdiv

_TILE, _IMAGES, _GROUP, _WARPS, _STAGES = 64, 64, 16, 8, 2
WAVE = 128  # programs that run at the same time, at least: two on each of 64 multiprocessors


@triton.jit(do_not_specialize=SIZES)
def _step_kernel(
    output_pointer,
    input_pointer,
    weight_pointer,
    velocity_pointer,
    copy_pointer,
    rate_pointer,
    scale_pointer,
    skip_pointer,
    batch,
    n_out,
    n_in,
    momentum,
    weight_decay,
    TILE: tl.constexpr,
    IMAGES: tl.constexpr,
    GROUP: tl.constexpr,
):
    down = tl.cdiv(n_out, TILE)
    across = tl.cdiv(n_in, TILE)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP  # the group's first row of tiles
    height = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    rows = (first + within % height) * TILE + tl.arange(0, TILE)
    columns = within // height * TILE + tl.arange(0, TILE)

    gradient = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, batch, IMAGES):
        images = start + tl.arange(0, IMAGES)
        exists = (images < batch)[:, None]
        output = tl.load(
            output_pointer + images[:, None] * n_out + rows[None, :],
            mask=exists & (rows < n_out)[None, :],
            other=0.0,
        )
        input = tl.load(
            input_pointer + images[:, None] * n_in + columns[None, :],
            mask=exists & (columns < n_in)[None, :],
            other=0.0,
        )
        gradient = tl.dot(tl.trans(output), input, gradient)
    if scale_pointer is not None:
        gradient *= tl.load(scale_pointer)

    if skip_pointer is not None:
        n_out = tl.where(tl.load(skip_pointer) == 0, n_out, 0)  # no row is inside
    inside = (rows < n_out)[:, None] & (columns < n_in)[None, :]
    at = rows[:, None] * n_in + columns[None, :]
    weight = tl.load(weight_pointer + at, mask=inside, other=0.0)
    gradient += weight_decay * weight
    if velocity_pointer is not None:
        gradient += momentum * tl.load(velocity_pointer + at, mask=inside, other=0.0)
        tl.store(velocity_pointer + at, gradient, mask=inside)
    weight -= tl.load(rate_pointer) * gradient
    tl.store(weight_pointer + at, weight, mask=inside)
    if copy_pointer is not None:
        tl.store(copy_pointer + at, weight.to(copy_pointer.dtype.element_ty), mask=inside)


def takes(weight: Tensor) -> bool:
    """Whether the kernel updates this weight: fp32, with offsets of 32 bits."""
    return weight.dtype == torch.float32 and 0 < weight.numel() < 2**31


def _launch(
    weight: Tensor,
    velocity: Tensor | None,
    copy: Tensor | None,
    output: Tensor,
    input: Tensor,
    rate: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> Launch:
    n_out, n_in = weight.shape
    arguments: dict[str, Tensor | int | float | bool | None] = {
        "output_pointer": output,
        "input_pointer": input,
        "weight_pointer": weight,
        "velocity_pointer": velocity,
        "copy_pointer": copy,
        "rate_pointer": rate,
        "scale_pointer": scale,
        "skip_pointer": skip,
        "batch": len(output),
        "n_out": n_out,
        "n_in": n_in,
        "momentum": float(momentum),
        "weight_decay": float(weight_decay),
        "TILE": _TILE,
        "IMAGES": _IMAGES,
        "GROUP": _GROUP,
    }
    return Launch(_step_kernel, cdiv(n_out, _TILE) * cdiv(n_in, _TILE), arguments, _WARPS, stages=_STAGES)


def factored_sgd(
    weight: Tensor,
    velocity: Tensor | None,
    copy: Tensor | None,
    output: Tensor,
    input: Tensor,
    pooling: Tensor | None,
    rate: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> None:
    """As `fastalex.kernels.factored_sgd`, for what `takes` says."""
    # (G.T @ X) P is G.T @ (X P): the input is small, the gradient is not.
    input = reference.upsampled(input, pooling).contiguous()
    rate = rate.to(weight.device, torch.float32)
    _launch(
        weight, velocity, copy, output.contiguous(), input, rate, scale, skip, momentum, weight_decay
    ).run()


def inspect_cases(quick: bool = False) -> list[KernelCase]:
    """For `inspect`: AlexNet's second hidden layer and 128 images, or a part of the layer if `batch` is 1.

    That part is counted in seconds, so `quick` changes nothing.
    """

    def launch(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
        width = 1024 if batch == 1 else 4096

        def tensor(*shape: int) -> Tensor:  # of noise: a GPU multiplies zeros faster
            return torch.empty(shape, device=device) if device.type == "meta" else torch.randn(shape)

        weight = tensor(width, width)
        return _launch(
            weight,
            tensor(width, width),
            None if dtype == torch.float32 else torch.zeros_like(weight, dtype=dtype),
            tensor(128, width).to(dtype),
            tensor(128, width).to(dtype),
            tensor(1),
            tensor(1),
            torch.zeros_like(weight[0, :1]),
            momentum=0.9,
            weight_decay=5e-4,
        )

    def eager(dtype: torch.dtype, batch: int) -> Callable[[], object]:
        with FakeTensorMode():  # PyTorch's fused step does not take meta tensors
            weight, gradient, scale = torch.empty(1024, 1024), torch.empty(1024, 1024), torch.empty(1)
            factors = torch.empty(128, 1024, dtype=dtype), torch.empty(128, 1024, dtype=dtype)
        weight.grad = gradient
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
        optimizer.step()  # creates the velocity

        def run() -> object:
            product = (factors[0].t() @ factors[1]).float()
            torch.linalg.vector_norm(product)
            weight.grad = product.mul_(scale)
            optimizer.step()
            return weight.to(dtype)

        return run

    return [
        KernelCase(
            "factored_sgd",
            launch,
            writes=("copy_pointer",),
            updates=("weight_pointer", "velocity_pointer"),
            elements="weight_pointer",
            step_elements=4096 * (9216 + 4096),
            traffic_limit=1.05,
            wave=WAVE,
            vector_loads=1,
            vector_stores=1,
            eager=eager,
        )
    ]
