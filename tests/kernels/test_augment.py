"""`augment` and `ten_crop` against float64 PyTorch and against torchvision."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.transforms import v2

from fastalex.kernels import augment, augment_reference, ten_crop
from fastalex.kernels.augment import ten_crop_views
from tests.kernels.augment_cases import (
    DTYPES,
    MEAN,
    SHAPES,
    SHAPES_KEPT,
    STD,
    TORCH_ERROR,
    in_float64,
    sample,
)


def reference(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    *,
    indices: Tensor,
    colors: Tensor | None,
    keep_shape: bool = False,
    **options: Any,
) -> Tensor:
    options["keep_shape"] = keep_shape
    return augment_reference.augment(images, indices, offsets, flips, colors, 1, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("implementation", "error"),
    # Both compute in fp32; PyTorch computes coordinates in fp32 too, which costs it some accuracy.
    [pytest.param(augment, 4e-6, id="numba"), pytest.param(reference, TORCH_ERROR, id="reference")],
)
def test_agrees_with_float64(
    implementation: Callable[..., Tensor],
    error: float,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> None:
    arguments = sample(*shape)
    found = implementation(**arguments, dtype=dtype)
    expected = in_float64(**arguments)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    # Rounding to the dtype is off by half a unit in the last place.
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps / 2, atol=error)


@pytest.mark.parametrize("shape", SHAPES_KEPT, ids=str)
@pytest.mark.parametrize("implementation", [augment, reference], ids=["numba", "reference"])
def test_an_image_keeps_its_shape(
    implementation: Callable[..., Tensor], shape: tuple[int, int, int, int]
) -> None:
    arguments = {**sample(*shape), "keep_shape": True}
    found = implementation(**arguments, dtype=torch.float32)
    torch.testing.assert_close(found.double(), in_float64(**arguments), rtol=0, atol=TORCH_ERROR)
    if shape[0] == shape[1]:
        assert torch.equal(found, implementation(**{**arguments, "keep_shape": False}, dtype=torch.float32))


@pytest.mark.parametrize("shape", [(32, 32, 64, 56), (37, 50, 25, 22)], ids=str)
def test_no_colors_are_colors_of_zero(shape: tuple[int, int, int, int]) -> None:
    arguments = sample(*shape)
    zeros = {**arguments, "colors": torch.zeros_like(arguments["colors"])}
    found = augment(**{**arguments, "colors": None}, dtype=torch.float32)
    assert torch.equal(found, augment(**zeros, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounds_to_nearest_even(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    arguments = sample(*shape)
    exact = augment(**arguments, dtype=torch.float32)
    assert torch.equal(augment(**arguments, dtype=dtype), exact.to(dtype))


@pytest.mark.parametrize("shape", [(32, 32, 256, 224), (37, 50, 25, 22)], ids=str)
def test_agrees_with_torchvision(shape: tuple[int, int, int, int]) -> None:
    arguments = sample(*shape)
    resize, crop = shape[2:]
    resized = v2.Resize((resize, resize))(arguments["images"].permute(0, 3, 1, 2).float())
    expected = []
    for index, (top, left), flip, color in zip(
        *(arguments[name] for name in ("indices", "offsets", "flips", "colors")), strict=True
    ):
        view = v2.functional.crop(resized[index], int(top), int(left), crop, crop)
        view = v2.functional.horizontal_flip(view) if flip else view
        expected.append(v2.functional.normalize(view / 255 + color[:, None, None], MEAN, STD))
    found = augment(**arguments, dtype=torch.float32)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=TORCH_ERROR)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crops_are_slices_of_the_whole_image_and_flips_mirror_them(shape: tuple[int, int, int, int]) -> None:
    arguments = sample(*shape)
    crop = arguments["crop"]
    whole = augment(**whole_images(arguments), dtype=torch.float32)
    found = augment(**arguments, dtype=torch.float32)
    for i, (top, left) in enumerate(arguments["offsets"].tolist()):
        piece = whole[i, :, top : top + crop, left : left + crop]
        assert torch.equal(found[i], piece.flip(-1) if arguments["flips"][i] else piece)


def whole_images(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same images, not cropped."""
    offsets, flips = torch.zeros_like(arguments["offsets"]), torch.zeros_like(arguments["flips"])
    return {**arguments, "offsets": offsets, "flips": flips, "crop": arguments["resize"]}


def test_indices_gather() -> None:
    arguments = sample(20, 37, 40, 29)
    gathered = {**arguments, "images": arguments["images"][arguments["indices"]], "indices": None}
    assert torch.equal(augment(**arguments, dtype=torch.float32), augment(**gathered, dtype=torch.float32))


@pytest.mark.parametrize("images", [0, 7])
def test_empty_batch(images: int) -> None:
    arguments = sample(8, 8, 16, 12, count=0) if images == 0 else sample(8, 8, 16, 12)
    arguments = {
        **arguments,
        "images": arguments["images"][:images],
        "offsets": arguments["offsets"][:0],
        "flips": arguments["flips"][:0],
        "indices": arguments["indices"][:0],
        "colors": arguments["colors"][:0],
    }
    assert augment(**arguments, dtype=torch.bfloat16).shape == (0, 3, 12, 12)
    options = {name: arguments[name] for name in ("resize", "crop", "mean", "std", "indices")}
    assert ten_crop(arguments["images"], **options, dtype=torch.bfloat16).shape == (0, 3, 12, 12)


def test_offsets_flips_and_indices_need_not_be_contiguous() -> None:
    arguments = sample(8, 8, 16, 12, count=6)
    every_other = {
        name: value[::2] if name in ("offsets", "flips", "indices", "colors") else value
        for name, value in arguments.items()
    }
    expected = augment(**arguments, dtype=torch.float32)[::2]
    assert torch.equal(augment(**every_other, dtype=torch.float32), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads: int) -> None:
    arguments = sample(32, 32, 64, 56)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = augment(**arguments, dtype=torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, augment(**arguments, dtype=torch.bfloat16))


def test_two_python_threads_at_once() -> None:
    arguments = sample(32, 32, 64, 56)
    expected = augment(**arguments, dtype=torch.float32)
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(augment, **arguments, dtype=torch.float32) for _ in range(20)]
        assert all(torch.equal(result.result(), expected) for result in results)


# --- ten-crop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_shape", [False, True])
@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize(
    "shape", [(20, 37, 40, 32), (20, 37, 40, 29), (37, 50, 25, 22), (8, 8, 8, 8)], ids=str
)
def test_ten_crop_has_the_views_and_order_of_torchvision(
    shape: tuple[int, int, int, int], mirror: bool, keep_shape: bool
) -> None:
    arguments = sample(*shape)
    resize, crop = shape[2:]
    images, indices = arguments["images"], arguments["indices"]
    planes = images.permute(0, 3, 1, 2).float()
    if keep_shape:
        resized = v2.CenterCrop(resize)(v2.Resize(resize)(planes))
    else:
        resized = v2.Resize((resize, resize))(planes)
    cut = v2.TenCrop(crop) if mirror else v2.FiveCrop(crop)
    views = [view for index in indices for view in cut(resized[index])]
    expected = v2.functional.normalize(torch.stack(views) / 255, MEAN, STD)
    found = ten_crop(
        images,
        indices=indices,
        mirror=mirror,
        keep_shape=keep_shape,
        resize=resize,
        crop=crop,
        mean=MEAN,
        std=STD,
        dtype=torch.float32,
    )
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=TORCH_ERROR)


def test_flipping_all_ten_crops_again_does_not_change_predictions() -> None:
    """The original code classifies twenty views, the ten crops and their mirror images: ten views, twice."""
    images = torch.randint(256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    options = {"resize": 64, "crop": 56, "mean": MEAN, "std": STD, "dtype": torch.float32}
    ten = ten_crop(images, **options).unflatten(0, (3, 10))  # type: ignore[arg-type]
    for view in ten.flip(-1).flatten(0, 1):
        assert any(torch.equal(view, other) for other in ten.flatten(0, 1))

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 7, stride=3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 17 * 17, 5),
    )
    with torch.no_grad():
        once = network(ten.flatten(0, 1)).softmax(1).unflatten(0, (3, 10))
        again = network(ten.flip(-1).flatten(0, 1)).softmax(1).unflatten(0, (3, 10))
    assert not torch.allclose(once[:, :5].mean(1), once.mean(1), atol=1e-4)  # mirror images do matter
    torch.testing.assert_close(torch.cat([once, again], dim=1).mean(1), once.mean(1))


# --- as a PyTorch operator --------------------------------------------------------------------------------


def operands(
    views: int, count: int = 3, dtype: torch.dtype = torch.bfloat16, keep_shape: bool = False
) -> tuple[Any, ...]:
    arguments = sample(8, 9, 16, 12, count=count if views == 1 else views)
    indices = torch.arange(count)
    rows = arguments["offsets"], arguments["flips"]
    colors = arguments["colors"][:count] if views == 1 else None
    return arguments["images"], indices, *rows, colors, views, 16, keep_shape, 12, MEAN, STD, dtype


@pytest.mark.parametrize(("views", "count"), [(1, 3), (1, 1), (1, 0), (10, 2)])
def test_opcheck(views: int, count: int) -> None:
    arguments = operands(views, count, keep_shape=views > 1)
    torch.library.opcheck(torch.ops.fastalex.augment.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    arguments = sample(8, 9, 16, 12)
    network = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def loss() -> Tensor:
        crops = augment(**arguments, dtype=torch.float32)
        views = ten_crop(arguments["images"], resize=16, crop=12, mean=MEAN, std=STD, dtype=torch.float32)
        return network(crops).square().mean() + network(views).square().mean()

    (expected,) = torch.autograd.grad(loss(), network.weight)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(), network.weight)
    torch.testing.assert_close(found, expected)


def test_compiles_without_graph_breaks_for_any_mean() -> None:
    arguments = {name: each for name, each in sample(8, 9, 16, 12).items() if name != "mean"}

    def crops(mean: float) -> Tensor:
        return augment(**arguments, mean=[mean, mean, mean], dtype=torch.float32)

    compiled = torch.compile(crops, fullgraph=True, backend="aot_eager")
    for mean in (0.5, 0.25, 0.125):  # from the second value on, the compiler makes it a variable
        assert torch.equal(compiled(mean), crops(mean))


def test_tracing_leaves_no_fake_tensor_in_the_cache() -> None:
    images = sample(8, 8, 16, 12)["images"]

    def views(images: Tensor) -> Tensor:
        return ten_crop(images, resize=16, crop=12, mean=MEAN, std=STD, dtype=torch.float32)

    ten_crop_views.cache_clear()
    traced = make_fx(views, tracing_mode="fake")(images)
    expected = views(images)
    assert torch.equal(traced(images), expected)


def test_is_channels_last() -> None:
    for count in (1, 2):
        found = augment(**sample(8, 8, 16, 12, count=count + 2), dtype=torch.float32)
        assert found.stride() == (3 * 12 * 12, 1, 3 * 12, 3)


@pytest.mark.parametrize("keep_shape", [False, True])
def test_the_result_is_written_to_a_given_tensor(keep_shape: bool) -> None:
    arguments = {**sample(8, 9, 16, 12), "dtype": torch.bfloat16, "keep_shape": keep_shape}
    expected = augment(**arguments)
    around = torch.full((len(expected) + 2, 3, 12, 12), 7.0).bfloat16()
    around = around.contiguous(memory_format=torch.channels_last)
    assert augment(**arguments, out=around[1:-1]).data_ptr() == around[1:-1].data_ptr()
    assert torch.equal(around[1:-1], expected)
    assert (around[:: len(around) - 1] == 7).all()


# --- bad arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(7, 8, 8, 3)}, r"images must be uint8 \(N, H, W, 3\), got torch.float32"),
        ({"images": torch.zeros(7, 3, 8, 8, dtype=torch.uint8)}, r"got torch.uint8 \(7, 3, 8, 8\)"),
        ({"images": torch.zeros(7, 3, 8, 8, dtype=torch.uint8).permute(0, 2, 3, 1)}, "contiguous"),
        ({"images": torch.zeros(7, 0, 8, 3, dtype=torch.uint8)}, "at least one pixel"),
        ({"images": torch.zeros(0, 8, 8, 3, dtype=torch.uint8)}, "5 indices into no images"),
        ({"crop": 17}, "crop=17 with resize=16"),
        ({"crop": 0}, "crop=0"),
        ({"resize": 2**26, "images": torch.zeros(1, 8, 8, 3, dtype=torch.uint8)}, "too large"),
        ({"images": torch.zeros(1, 27000, 27000, 3, dtype=torch.uint8, device="meta")}, "too large"),
        ({"resize": 2**15, "crop": 2**15}, "crops of 32768, are too large"),
        ({"offsets": torch.zeros(5, 2)}, r"offsets must be torch.int32 \(5, 2\) on cpu, got torch.float32"),
        ({"offsets": torch.zeros(4, 2, dtype=torch.int32)}, r"got torch.int32 \(4, 2\)"),
        ({"offsets": torch.full((5, 2), 5, dtype=torch.int32)}, r"offsets must be in 0 .. 4, got 5 .. 5"),
        ({"offsets": torch.full((5, 2), -1, dtype=torch.int32)}, r"got -1 .. -1"),
        ({"flips": torch.zeros(5)}, r"flips must be torch.bool \(5,\)"),
        ({"flips": torch.zeros(5, dtype=torch.bool, device="meta")}, "on cpu, got .* on meta"),
        ({"colors": torch.zeros(5)}, r"colors must be torch.float32 \(5, 3\) on cpu"),
        ({"colors": torch.zeros(5, 3).double()}, r"got torch.float64 \(5, 3\)"),
        (
            {"indices": torch.zeros(5, dtype=torch.int32)},
            r"indices must be int64 \(B,\) on cpu, got torch.int32",
        ),
        ({"indices": torch.tensor([0, 1, 2, 3, 7])}, "indices must be in 0 .. 6, got 0 .. 7"),
        ({"indices": torch.tensor([0, 1, 2, 3, -1])}, "got -1 .. 3"),
        ({"mean": [0.5]}, r"mean must be three finite numbers, got \[0.5\]"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be three positive numbers"),
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"out": torch.zeros(5, 3, 12, 12)}, "out must be channels-last"),
        ({"out": torch.zeros(4, 3, 12, 12)}, r"out must be torch.float32 \(5, 3, 12, 12\) on cpu"),
        ({"out": torch.zeros(5, 3, 12, 12).double()}, "got torch.float64"),
        ({"out": torch.zeros(5, 3, 12, 12, device="meta")}, "on meta"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {**sample(8, 8, 16, 12), "dtype": torch.float32, **change}
    with pytest.raises(ValueError, match=f"^augment: .*{message}"):
        augment(**arguments)
    shared = {"images", "indices", "resize", "crop", "mean", "std", "dtype"}
    if shared & set(change):
        images, *_ = (arguments.pop(name) for name in ("images", "offsets", "flips", "colors"))
        with pytest.raises(ValueError, match=message):
            ten_crop(images, **arguments)
