"""The Triton kernels behind `augment`, in Triton's interpreter, against float64 PyTorch.

The functions `run*` run in the interpreter's process (see conftest). test_inspect.py checks registers, widths
of accesses and bytes moved for all Triton kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastalex.kernels import augment, augment_reference, ten_crop
from tests.kernels.augment_cases import DTYPES, MEAN, SHAPES, SHAPES_KEPT, STD, in_float64, sample

ERROR = 4e-6  # of fp32 arithmetic
ROWS = ("indices", "offsets", "flips", "colors")  # the arguments with a row for each crop
# The shapes of the other implementations without the large ones: a program takes milliseconds to interpret.
TRITON_SHAPES = [(32, 32, 64, 56), *(shape for shape in SHAPES if shape[3] < 50)]
HALVES = [(shape, torch.bfloat16) for shape in TRITON_SHAPES] + [((9, 7, 20, 12), torch.float16)]


def run(arguments: dict[str, Any], dtype: torch.dtype, views: int = 1) -> Tensor:
    from fastalex.kernels import augment_triton

    tensors = (arguments[name] for name in ("images", "indices", "offsets", "flips", "colors"))
    crop, mean, std = (arguments[name] for name in ("crop", "mean", "std"))
    geometry = arguments["resize"], arguments.get("keep_shape", False), crop
    out = augment_reference.empty_batch(len(arguments["indices"]) * views, crop, dtype, torch.device("cpu"))
    augment_triton.write(out, *tensors, views, *geometry, mean, std)
    return out


def run_every_other(arguments: dict[str, Any]) -> Tensor:
    rows = {name: arguments[name][::2] for name in ROWS}
    return run({**arguments, **rows}, torch.float32)


@pytest.mark.parametrize("shape", TRITON_SHAPES, ids=str)
def test_agrees_with_float64(interpreted: Any, shape: tuple[int, int, int, int]) -> None:
    arguments = sample(*shape, count=3)
    found = interpreted(run, arguments, torch.float32)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), in_float64(**arguments), rtol=0, atol=ERROR)


@pytest.mark.parametrize("shape", SHAPES_KEPT, ids=str)
def test_an_image_keeps_its_shape(interpreted: Any, shape: tuple[int, int, int, int]) -> None:
    arguments = {**sample(*shape, count=2), "keep_shape": True}
    found = interpreted(run, arguments, torch.float32)
    torch.testing.assert_close(found.double(), in_float64(**arguments), rtol=0, atol=ERROR)


@pytest.mark.parametrize("size", [8, 20], ids=["enlarging", "shrinking"])
def test_without_colors(interpreted: Any, size: int) -> None:
    arguments = {**sample(size, size, 16, 12, count=2), "colors": None}
    found = interpreted(run, arguments, torch.float32)
    torch.testing.assert_close(found.double(), in_float64(**arguments), rtol=0, atol=ERROR)


@pytest.mark.parametrize(("shape", "dtype"), HALVES, ids=str)
def test_rounds_to_nearest_even(
    interpreted: Any, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    arguments = sample(*shape, count=2)
    found = interpreted(run, arguments, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, interpreted(run, arguments, torch.float32).to(dtype))


def test_several_views_of_each_image(interpreted: Any) -> None:
    """Offsets and flips then have a row per view, the same for every image; colours have one per image."""
    arguments = sample(9, 7, 20, 12)
    arguments.update(indices=torch.tensor([6, 2]), colors=arguments["colors"][:2])
    found = interpreted(run, arguments, torch.float32, 5)
    rows = {"offsets": arguments["offsets"].repeat(2, 1), "flips": arguments["flips"].repeat(2)}
    rows |= {name: arguments[name].repeat_interleave(5, 0) for name in ("indices", "colors")}
    expected = in_float64(**{**arguments, **rows})
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ERROR)


@pytest.mark.parametrize("size", [8, 20], ids=["enlarging", "shrinking"])
def test_crops_out_of_range_are_nan_and_the_others_are_right(interpreted: Any, size: int) -> None:
    arguments = sample(size, size, 16, 12, count=6)
    indices, offsets = arguments["indices"], arguments["offsets"]
    indices[1], offsets[2, 0], offsets[3, 1], indices[4] = 7, 5, -1, -1
    found = interpreted(run, arguments, torch.float32)
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, True, True, True, False]
    good = torch.tensor([0, 5])
    rows = {name: arguments[name][good] for name in ROWS}
    torch.testing.assert_close(found[good].double(), in_float64(**{**arguments, **rows}), rtol=0, atol=ERROR)


def test_offsets_flips_and_indices_need_not_be_contiguous(interpreted: Any) -> None:
    arguments = sample(8, 8, 16, 12, count=4)
    for name in ROWS:
        arguments[name] = arguments[name].repeat_interleave(2, 0)
    found = interpreted(run_every_other, arguments)
    every_other = {name: arguments[name][::2] for name in ROWS}
    torch.testing.assert_close(found.double(), in_float64(**{**arguments, **every_other}), rtol=0, atol=ERROR)


def test_empty_batch(interpreted: Any) -> None:
    found = interpreted(run, sample(8, 8, 16, 12, count=0), torch.bfloat16)
    assert found.shape == (0, 3, 12, 12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64_on_a_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    arguments = sample(*shape)
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    found = augment(**on_gpu, dtype=dtype).cpu()
    assert found.is_contiguous(memory_format=torch.channels_last)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(found.double(), in_float64(**arguments), rtol=rounding, atol=ERROR)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES_KEPT, ids=str)
def test_an_image_keeps_its_shape_on_a_gpu(shape: tuple[int, int, int, int]) -> None:
    arguments = {**sample(*shape), "keep_shape": True}
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    found = augment(**on_gpu, dtype=torch.float32).cpu()
    torch.testing.assert_close(found.double(), in_float64(**arguments), rtol=0, atol=ERROR)


@pytest.mark.gpu
def test_ten_crop_agrees_on_gpu_and_cpu() -> None:
    images = sample(32, 32, 64, 56)["images"]
    options = {"resize": 64, "crop": 56, "mean": MEAN, "std": STD, "dtype": torch.float32}
    on_gpu, on_cpu = ten_crop(images.cuda(), **options), ten_crop(images, **options)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=ERROR)
