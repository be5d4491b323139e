"""Resize, crop, flip, shift the colour and normalise on the GPU, in one launch and one pass over the output.

The resulting batch is some hundred times the size of its images (32 pixels enlarged to 256), so what counts
is how it is stored: each lane owns eight neighbouring numbers of an output row, 128 bits in bf16, and the
source, a few kilobytes an image, is read through the caches.

**Enlarging.** Several output rows lie between two neighbouring source rows, and all of them mix the same two
rows. So a program owns the gap between two source rows: it resizes both to the output's width, once, in
registers, and then walks down the output rows in the gap with one multiplication and one store a vector.
Gap g lies between source rows g - 1 and g; gaps 0 and `height` are the borders, where both rows are the same.

    source row g - 1  ----------------   above: BLOCK x 8 numbers in registers
                      output row y0      above + f(y0) * (below - above)
                      output row y0 + 1  above + f(y0 + 1) * (below - above)
                      ...
    source row g      ----------------   below

**Shrinking**, on either axis, is torchvision's antialiasing: every output pixel is a weighted mean of all
source pixels under a triangle. A program owns ROWS output rows and sums over source rows and columns. This
kernel is simple, not fast: the source is larger than the output then, and decoding it costs far more.

**Coordinates** are whole numbers. In units of 1 / (2 * resize) source pixels the centre of output pixel i is
(2 i + 1) * size and that of source pixel j is (2 j + 1) * resize. So the gap that an output pixel is in, its
position there and the triangle's weights are exact, and every pixel is in exactly one gap.

An index or an offset out of range fills its output with NaN and reads nothing outside the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import augment_reference as reference
from ._triton_launch import SIZES, KernelCase, Launch, cdiv


@triton.jit
def _sample(
    index_pointer, offset_pointer, flip_pointer, n, image_count, LIMIT: tl.constexpr, VIEWS: tl.constexpr
):
    """Image, top, left and flip of output n, and 0; where they are out of range, zeros, the flip and NaN."""
    view = n
    if VIEWS > 1:
        view = n % VIEWS
    index = tl.load(index_pointer + n // VIEWS)
    top = tl.load(offset_pointer + 2 * view)
    left = tl.load(offset_pointer + 2 * view + 1)
    flip = tl.load(flip_pointer + view) != 0
    valid = (index >= 0) & (index < image_count) & (top >= 0) & (top <= LIMIT) & (left >= 0) & (left <= LIMIT)
    poison = tl.where(valid, 0.0, float("nan"))
    return tl.where(valid, index, 0), tl.where(valid, top, 0), tl.where(valid, left, 0), flip, poison


@triton.jit
def _shifted(shift, scale, color_pointer, n, CHANNEL: tl.constexpr, VIEWS: tl.constexpr):
    """A channel's shift with the colour of output n's image, where there are colours."""
    if color_pointer is not None:
        shift += 255 * scale * tl.load(color_pointer + 3 * (n // VIEWS) + CHANNEL)
    return shift


@triton.jit
def _vectors(block, left, flip, CROP: tl.constexpr, BLOCK: tl.constexpr):
    """For BLOCK x 8 neighbouring numbers of an output row: their position in it, their channel, their column
    in the resized image, and whether they exist."""
    element = (block * BLOCK + tl.arange(0, BLOCK))[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = element // 3
    column = left + tl.where(flip, CROP - 1 - x, x)
    return element, element - 3 * x, column, element < 3 * CROP


@triton.jit
def _pick(channel, red, green, blue):
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit(do_not_specialize=SIZES)
def _enlarge_kernel(
    image_pointer,
    index_pointer,
    offset_pointer,
    flip_pointer,
    color_pointer,
    out_pointer,
    image_count,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIZED_HEIGHT: tl.constexpr,
    RESIZED_WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    LIMIT: tl.constexpr,
    CROP: tl.constexpr,
    VIEWS: tl.constexpr,
    GAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ROW: tl.constexpr = 3 * CROP
    SPAN_Y: tl.constexpr = 2 * RESIZED_HEIGHT  # a source pixel, in units of coordinates
    SPAN_X: tl.constexpr = 2 * RESIZED_WIDTH
    BLOCKS: tl.constexpr = (ROW + 8 * BLOCK - 1) // (8 * BLOCK)
    program = tl.program_id(0)
    block = program % BLOCKS
    n = program // (BLOCKS * GAPS)
    index, top, left, flip, poison = _sample(
        index_pointer, offset_pointer, flip_pointer, n, image_count, LIMIT, VIEWS
    )
    top += TOP
    left += LEFT

    # Row y is in gap ((2 y + 1) * HEIGHT + RESIZED_HEIGHT) // SPAN_Y; the crop begins in the first of its
    # GAPS gaps.
    gap = ((2 * top + 1) * HEIGHT + RESIZED_HEIGHT) // SPAN_Y + program // BLOCKS % GAPS
    first = (tl.maximum((2 * gap - 1) * RESIZED_HEIGHT - HEIGHT, 0) + 2 * HEIGHT - 1) // (2 * HEIGHT)
    stop = ((2 * gap + 1) * RESIZED_HEIGHT + HEIGHT - 1) // (2 * HEIGHT)
    first = tl.maximum(first, top)
    stop = tl.minimum(stop, top + CROP)

    element, channel, column, mask = _vectors(block, left, flip, CROP, BLOCK)
    place = (2 * column + 1) * WIDTH + RESIZED_WIDTH
    right = place // SPAN_X
    weight = (place - right * SPAN_X).to(tl.float32) * (1.0 / SPAN_X)
    before = 3 * tl.maximum(right - 1, 0) + channel
    after = 3 * tl.minimum(right, WIDTH - 1) + channel
    scale = _pick(channel, red_scale, green_scale, blue_scale)
    red_shift = _shifted(red_shift, red_scale, color_pointer, n, 0, VIEWS)
    green_shift = _shifted(green_shift, green_scale, color_pointer, n, 1, VIEWS)
    blue_shift = _shifted(blue_shift, blue_scale, color_pointer, n, 2, VIEWS)
    shift = _pick(channel, red_shift, green_shift, blue_shift) + poison

    image_pointer += index * (HEIGHT * WIDTH * 3)
    row_pointer = image_pointer + tl.minimum(tl.maximum(gap - 1, 0), HEIGHT - 1) * (WIDTH * 3)
    needed = mask & (first < stop)
    a = tl.load(row_pointer + before, mask=needed, other=0).to(tl.float32)
    b = tl.load(row_pointer + after, mask=needed, other=0).to(tl.float32)
    above = (a + weight * (b - a)) * scale + shift
    row_pointer = image_pointer + tl.minimum(gap, HEIGHT - 1) * (WIDTH * 3)
    a = tl.load(row_pointer + before, mask=needed, other=0).to(tl.float32)
    b = tl.load(row_pointer + after, mask=needed, other=0).to(tl.float32)
    below = (a + weight * (b - a)) * scale + shift

    out_pointer += n.to(tl.int64) * (CROP * ROW)
    for y in range(first, stop):
        fraction = ((2 * y + 1) * HEIGHT + RESIZED_HEIGHT - gap * SPAN_Y).to(tl.float32) * (1.0 / SPAN_Y)
        value = above + fraction * (below - above)
        tl.store(out_pointer + (y - top) * ROW + element, value.to(out_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _first_tap(center, reach, resize: tl.constexpr):
    """The first source pixel whose centre is less than `reach` from `center`."""
    beyond = center - reach - resize
    return tl.where(beyond < 0, 0, beyond // (2 * resize) + 1)


@triton.jit(do_not_specialize=SIZES)
def _shrink_kernel(
    image_pointer,
    index_pointer,
    offset_pointer,
    flip_pointer,
    color_pointer,
    out_pointer,
    image_count,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIZED_HEIGHT: tl.constexpr,
    RESIZED_WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    LIMIT: tl.constexpr,
    CROP: tl.constexpr,
    VIEWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    ROW: tl.constexpr = 3 * CROP
    REACH_Y: tl.constexpr = 2 * max(HEIGHT, RESIZED_HEIGHT)  # half the triangle's base, in coordinates' units
    REACH_X: tl.constexpr = 2 * max(WIDTH, RESIZED_WIDTH)
    TAPS_X: tl.constexpr = (REACH_X + RESIZED_WIDTH - 1) // RESIZED_WIDTH
    BLOCKS: tl.constexpr = (ROW + 8 * BLOCK - 1) // (8 * BLOCK)
    STRIPS: tl.constexpr = (CROP + ROWS - 1) // ROWS
    program = tl.program_id(0)
    block = program % BLOCKS
    strip = program // BLOCKS % STRIPS
    n = program // (BLOCKS * STRIPS)
    index, top, left, flip, poison = _sample(
        index_pointer, offset_pointer, flip_pointer, n, image_count, LIMIT, VIEWS
    )
    top += TOP
    left += LEFT
    element, channel, column, mask = _vectors(block, left, flip, CROP, BLOCK)
    scale = _pick(channel, red_scale, green_scale, blue_scale)
    red_shift = _shifted(red_shift, red_scale, color_pointer, n, 0, VIEWS)
    green_shift = _shifted(green_shift, green_scale, color_pointer, n, 1, VIEWS)
    blue_shift = _shifted(blue_shift, blue_scale, color_pointer, n, 2, VIEWS)
    shift = _pick(channel, red_shift, green_shift, blue_shift) + poison

    center_x = (2 * column + 1) * WIDTH
    first_x = _first_tap(center_x, REACH_X, RESIZED_WIDTH)
    image_pointer += index * (HEIGHT * WIDTH * 3)
    out_pointer += n.to(tl.int64) * (CROP * ROW)
    for y in range(strip * ROWS, tl.minimum(strip * ROWS + ROWS, CROP)):
        center_y = (2 * (top + y) + 1) * HEIGHT
        first_y = _first_tap(center_y, REACH_Y, RESIZED_HEIGHT)
        stop_y = tl.minimum((center_y + REACH_Y + RESIZED_HEIGHT - 1) // (2 * RESIZED_HEIGHT), HEIGHT)
        total = tl.zeros((BLOCK, 8), tl.float32)
        sum_x = tl.zeros((BLOCK, 8), tl.float32)
        sum_y = 0.0
        for source_y in range(first_y, stop_y):
            sum_y += (REACH_Y - tl.abs((2 * source_y + 1) * RESIZED_HEIGHT - center_y)).to(tl.float32)
        for tap in range(TAPS_X):
            source_x = first_x + tap
            inside = mask & (source_x < WIDTH)
            weight_x = tl.maximum(REACH_X - tl.abs((2 * source_x + 1) * RESIZED_WIDTH - center_x), 0)
            weight_x = tl.where(inside, weight_x.to(tl.float32), 0.0)
            sum_x += weight_x
            for source_y in range(first_y, stop_y):
                weight_y = (REACH_Y - tl.abs((2 * source_y + 1) * RESIZED_HEIGHT - center_y)).to(tl.float32)
                address = image_pointer + (source_y * WIDTH + source_x) * 3 + channel
                total += weight_x * (weight_y / sum_y) * tl.load(address, mask=inside, other=0).to(tl.float32)
        value = total / tl.where(mask, sum_x, 1.0) * scale + shift
        tl.store(out_pointer + y * ROW + element, value.to(out_pointer.dtype.element_ty), mask=mask)


# The fastest tried on an H200 in bf16: a row of AlexNet's input is 84 vectors, three programs of 32.
_BLOCK, _WARPS = 32, 1
_ROWS = 8  # output rows of a program that shrinks


def _launch(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    colors: Tensor | None,
    out: Tensor,
    views: int,
    resize: int,
    keep_shape: bool,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Launch:
    image_count, height, width = images.shape[:3]
    count, row = len(out), 3 * crop
    frame = reference.frame(height, width, resize, keep_shape)
    arguments: dict[str, Tensor | int | float | bool | None] = {
        "image_pointer": images,
        "index_pointer": indices,
        "offset_pointer": offsets,
        "flip_pointer": flips,
        "color_pointer": colors,
        "out_pointer": out,
        "image_count": image_count,
        "HEIGHT": height,
        "WIDTH": width,
        "RESIZED_HEIGHT": frame.height,
        "RESIZED_WIDTH": frame.width,
        "TOP": frame.top,
        "LEFT": frame.left,
        "LIMIT": resize - crop,
        "CROP": crop,
        "VIEWS": views,
        "BLOCK": _BLOCK,
    }
    for color, m, s in zip(("red", "green", "blue"), mean, std, strict=True):
        arguments[f"{color}_scale"] = 1 / (255 * s)
        arguments[f"{color}_shift"] = -m / s
    programs = cdiv(row, 8 * _BLOCK) * count
    if height > frame.height or width > frame.width:
        return Launch(_shrink_kernel, programs * cdiv(crop, _ROWS), {**arguments, "ROWS": _ROWS}, _WARPS)
    # The number of gaps, at most, from the first row of a crop to the last, both included.
    gaps = (crop - 1) * height // frame.height + 2
    return Launch(_enlarge_kernel, programs * gaps, {**arguments, "GAPS": gaps}, _WARPS)


def write(
    out: Tensor,
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    colors: Tensor | None,
    views: int,
    resize: int,
    keep_shape: bool,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write what `augment_reference.augment` returns to `out`, on a GPU.

    A crop whose index or offset is out of range is NaN.
    """
    if len(out) > 0:
        rows = indices.contiguous(), offsets.contiguous(), flips.contiguous()
        colors = None if colors is None else colors.contiguous()
        _launch(images, *rows, colors, out, views, resize, keep_shape, crop, mean, std).run()


def inspect_cases(quick: bool = False) -> list[KernelCase]:
    """For `inspect`: an image of CIFAR-10 enlarged, ten views of it, a photograph shrunk, and the paper's."""
    enlarged = 256, 224
    shrunk = (128, 112) if quick else enlarged
    photograph = (188, 250) if quick else (375, 500)

    def tensors(
        batch: int, source: tuple[int, int], places: int, views: int, colored: bool, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        rows = torch.arange(batch if views == 1 else views, device=device)
        images = torch.zeros((batch, *source, 3), dtype=torch.uint8, device=device)
        offsets = torch.stack([rows * 7 % places, rows * 13 % places], dim=1).int()
        colors = torch.zeros((batch, 3), device=device) if colored else None
        return images, torch.arange(batch, device=device), offsets, rows % 2 == 1, colors

    def case(
        name: str,
        source: tuple[int, int],
        target: tuple[int, int],
        views: int,
        traffic_limit: float,
        *,
        paper: bool = False,
    ) -> KernelCase:
        resize, crop = target
        # The paper keeps the shape of images, and shifts colours.
        geometry = resize, paper, crop, [0.5] * 3, [1.0] * 3
        places = resize - crop + 1  # of a crop, down and across

        def launch(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
            out = torch.zeros((batch * views, 3, crop, crop), dtype=dtype, device=device)
            out = out.contiguous(memory_format=torch.channels_last)
            return _launch(*tensors(batch, source, places, views, paper, device), out, views, *geometry)

        def eager(dtype: torch.dtype, batch: int) -> Callable[[], object]:
            arguments = tensors(batch, source, places, views, paper, torch.device("meta"))
            return lambda: reference.augment(*arguments, views, *geometry, dtype)

        return KernelCase(
            name,
            launch,
            writes=("out_pointer",),
            elements="out_pointer",
            traffic_limit=traffic_limit,
            vector_loads=0,  # the source is bytes, gathered through the caches
            vector_stores=1,
            eager=eager,
        )

    return [
        # A program's 512 bytes of a row seldom begin where a sector does: two programs write that sector.
        case("augment", (32, 32), enlarged, 1, 1.1),
        case("ten_crop", (32, 32), enlarged, 10, 1.1),
        # Neighbouring programs both read the source rows that lie under the triangles of both.
        case("augment_shrink", photograph, shrunk, 1, 1.25),
        case("augment_paper", (32, 32), enlarged, 1, 1.1, paper=True),
        case("augment_shrink_paper", photograph, shrunk, 1, 1.25, paper=True),
    ]
