"""``loader=dali``: NVIDIA DALI decodes, resizes, crops, flips and normalises, on the CPU or on the GPU.

One pipeline definition serves both devices and both kinds of data set: files, which DALI decodes (on a GPU
with its "mixed" decoder), and decoded arrays. Images, crops and flips come from the epoch's plan through an
external source, so that DALI draws no random numbers and yields what every other loader yields.

Two differences between DALI and the other loaders are corrected here:

- Where DALI shrinks an image, the antialiasing filter at the outermost rows and columns extends beyond the
  image. torchvision omits those taps and divides by the sum of the rest; DALI repeats the edge pixel instead
  (a difference of up to 16 grey levels). See :func:`_resize_as_torchvision`.
- By default DALI upsamples JPEG chroma by replication; Pillow and most other decoders interpolate.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastalex.data.decode import decode_image
from fastalex.data.imageset import ImageSet
from fastalex.data.loader import PlannedLoader, Views
from fastalex.data.sampling import EpochPlan, center_offset
from fastalex.data.workers import num_workers
from fastalex.errors import DataError, MissingDependencyError

try:
    from nvidia.dali import fn, math, pipeline_def, types
except ImportError as error:
    raise MissingDependencyError(
        'loader=dali needs NVIDIA DALI, which is not installed: pip install "fastalex[dali]" '
        '(on CUDA 13: "fastalex[dali-cuda13]")'
    ) from error

DECODED_BY_DALI = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # signatures of JPEG and PNG files
PREFETCH = 2  # batches that DALI computes ahead
READ_AHEAD = 2  # batches whose files are read ahead of DALI

_BILINEAR = {"interp_type": types.INTERP_LINEAR, "antialias": True, "dtype": types.FLOAT}


class Edges(Enum):
    """Which crops contain outermost rows or columns, where DALI's own resize differs from torchvision's."""

    none = "none"
    some = "some"  # depends on the sample's offsets
    all = "all"


class DaliLoader(PlannedLoader):
    """Loader of a DALI pipeline's batches; :class:`fastalex.data.loader.Loader` is its interface.

    Batches are views of DALI's output buffers (through DLPack, without a copy), except in bfloat16, which
    DALI does not support: it then writes float32 and torch casts. A buffer lives as long as its tensor.

    DALI decodes JPEG and PNG files. On the CPU the pixels equal those of
    :func:`fastalex.data.decode.decode_image` (within one grey level for CMYK and 16-bit files), on a GPU
    nearly so. Files of other formats are decoded by that function.

    The arguments are those of :func:`fastalex.data.build_loader`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._edges = self._exact_edges()
        outputs = 1 if self.views is Views.ten_crop else 6 if self._edges is Edges.some else 5
        margin = self.data.resize - self.data.crop
        self._threads = max(1, num_workers(self.loader))
        self._source = _Source(self.images, margin, self.data.mean, self.batch_size, self._threads, outputs)
        self._pipeline: Any = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan()
        self._rewind()
        self._source.start(plan, self.start_batch)
        # The whole epoch at once, because the host waits for such a copy.
        labels = torch.from_numpy(self.images.labels)[plan.indices].to(self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        for number in range(self.start_batch, len(self)):
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
            try:
                (output,) = self._pipeline.run(stream)
            except Exception as error:
                self._pipeline = None  # a DALI pipeline cannot be used after an error
                if isinstance(error, RuntimeError):
                    raise _explain(error, self.images, plan.indices[rows]) from error
                raise
            batch = torch.from_dlpack(output.as_tensor()).flatten(0, -4)
            if self.channels_last:
                batch = batch.permute(0, 3, 1, 2)
            yield batch.to(self.dtype), labels[rows]

    def _exact_edges(self) -> Edges:
        pixels, margin = self.images.pixels, self.data.resize - self.data.crop
        if pixels is not None:
            sides = pixels.shape[1:3]
            if (min(sides) if self.keep_shape else max(sides)) <= self.data.resize:
                return Edges.none  # enlarged images agree with torchvision's bit for bit
        if self.views is Views.center and margin >= 2:
            return Edges.none
        return Edges.some if self.views is Views.random and margin > 0 else Edges.all

    def _rewind(self) -> None:
        """Prepare the pipeline for an epoch; the one before may have been abandoned."""
        self._source.stop()
        try:
            while self._pipeline is not None:  # discard the batches that were computed ahead
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # a damaged image in a discarded batch
            self._pipeline = None
        if self._pipeline is None:
            self._pipeline = self.build_pipeline(
                self.device.index or 0 if self.device.type == "cuda" else None
            )

    def build_pipeline(self, device_id: int | None, *, gpu: bool | None = None) -> Any:
        """Build the DALI pipeline of this loader.

        Args:
            device_id: index of the GPU it runs on; None for the CPU.
            gpu: whether to use GPU operators; None: if there is a ``device_id``. A graph of GPU operators
                without a device cannot run, but can be built and serialised, which tests do.
        """
        return _pipeline(
            self._source,
            gpu=(device_id is not None) if gpu is None else gpu,
            encoded=self.images.pixels is None,
            resize=self.data.resize,
            crop=self.data.crop,
            keep_shape=self.keep_shape,
            edges=self._edges,
            views=self.num_views,
            mean=[255 * value for value in self.data.mean],
            std=[255 * value for value in self.data.std],
            dtype=types.FLOAT16 if self.dtype is torch.float16 else types.FLOAT,
            layout="HWC" if self.channels_last else "CHW",
            batch_size=self.batch_size,
            num_threads=self._threads,
            device_id=device_id,
            prefetch_queue_depth=PREFETCH,
        )


@pipeline_def(enable_conditionals=True)
def _pipeline(
    source: Any,
    *,
    gpu: bool,
    encoded: bool,
    resize: int,
    crop: int,
    keep_shape: bool,
    edges: Edges,
    views: int,
    mean: list[float],
    std: list[float],
    dtype: Any,
    layout: str,
) -> Any:
    """Define the graph of one sample.

    The output is (crop, crop, 3) if ``layout`` is HWC and (3, crop, crop) if it is CHW, with one more axis in
    front for several views.
    """
    images, *rest = fn.external_source(
        source=source,
        num_outputs=source.num_outputs,
        dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.FLOAT, types.BOOL][
            : source.num_outputs
        ],
        ndim=[1 if encoded else 3, 0, 0, 0, 1, 0][: source.num_outputs],
        layout=["" if encoded else "HWC", "", "", "", "", ""][: source.num_outputs],
    )
    if encoded:
        images = fn.decoders.image(
            images, device="mixed" if gpu else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True
        )
    elif gpu:
        images = images.gpu()

    shape = images.shape(dtype=types.INT32)[0:2]
    if keep_shape:
        start, end = _centre_square(shape, resize)
    else:
        start, end = fn.zeros(shape=[2], dtype=types.FLOAT), fn.cast(shape, dtype=types.FLOAT)
    if edges is Edges.none:
        resized = _resize_part(images, start, end, resize, resize)
    elif edges is Edges.all:
        resized = _resize_as_torchvision(images, start, end, resize)
    else:
        touched = rest[4]
        if touched:  # DALI evaluates this per sample; the exact resize is slower
            resized = _resize_as_torchvision(images, start, end, resize)
        else:
            resized = _resize_part(images, start, end, resize, resize)

    # A crop's position is a fraction of the margin, which DALI rounds to a pixel.
    def cut(x: Any, y: Any, mirror: Any, mean: Any) -> Any:
        return fn.crop_mirror_normalize(
            resized,
            crop=(crop, crop),
            crop_pos_x=x,
            crop_pos_y=y,
            mirror=mirror,
            mean=mean,
            std=std,
            dtype=dtype,
            output_layout=layout,
        )

    if views == 1:
        return cut(*rest[:4])
    corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]  # x, y; the order of torchvision's FiveCrop
    middle = center_offset(resize, crop) / max(1, resize - crop)
    places = [*corners, (middle, middle)]
    cuts = [cut(x, y, 0, mean) for x, y in places]
    # TenCrop mirrors the image and then crops: its left crops are from the right side of the original.
    cuts += [cut(1.0 - x, y, 1, mean) for x, y in places[: views - 5]]
    return fn.stack(*cuts)


def _centre_square(shape: Any, size: int) -> tuple[Any, Any]:
    """Return where in an image the square of :func:`fastalex.kernels.augment_reference.frame` is.

    Resizing this part alone takes no more memory for a long, thin image than for another.

    Args:
        shape: int32 (2,), height and width of the image, in pixels.
        size: side of the square, in pixels of the resized image.

    Returns:
        float (2,) each, top and left, and bottom and right, in pixels of the image.
    """
    resized = size * shape // math.min(shape[0], shape[1])
    half = (resized - size) // 2
    is_odd, half_is_odd = resized - size - 2 * half, half - 2 * (half // 2)
    first = fn.cast(half + is_odd * half_is_odd, dtype=types.FLOAT)  # half a pixel is rounded to even
    return first * shape / resized, (first + size) * shape / resized


def _resize_as_torchvision(images: Any, start: Any, end: Any, size: int) -> Any:
    """Resize a part to size x size, as :func:`_resize_part`, but with torchvision's treatment of the edges.

    In a frame of zeros around the image, the filter's taps outside the image add nothing. Resizing ones in
    the same frame gives the sum of the taps inside; dividing by it gives torchvision's result. The filter is
    separable, so that a column and a row of ones suffice.
    """
    shape = images.shape(dtype=types.INT32)
    height, width, one = shape[0:1], shape[1:2], types.Constant([1], dtype=types.INT32)
    nothing, whole = fn.zeros(shape=[1], dtype=types.FLOAT), fn.ones(shape=[1], dtype=types.FLOAT)
    column = fn.full(np.float32(1), shape=fn.cat(height, one, one))
    row = fn.full(np.float32(1), shape=fn.cat(one, width, one))
    column, row = _framed(fn.reshape(column, layout="HWC"), 0), _framed(fn.reshape(row, layout="HWC"), 1)
    (top, left), (bottom, right) = ((place[0:1] + 1, place[1:2] + 1) for place in (start, end))
    weights = _resize_part(column, fn.cat(top, nothing), fn.cat(bottom, whole), size, 1)
    weights *= _resize_part(row, fn.cat(nothing, left), fn.cat(whole, right), 1, size)
    pixels = _resize_part(_framed(_framed(images, 0), 1), start + 1, end + 1, size, size)
    return pixels / (weights.gpu() if images.device == "gpu" else weights)


def _framed(image: Any, axis: int) -> Any:
    """Add a line of zeros at both ends of an axis of an (H, W, C) image."""
    zeros = fn.zeros_like(image[0:1] if axis == 0 else image[:, 0:1])
    return fn.cat(zeros, image, zeros, axis=axis)


def _resize_part(image: Any, start: Any, end: Any, height: int, width: int) -> Any:
    """Resize the part from start to end, float (2,) in pixels; the filter also reads the pixels around it."""
    return fn.resize(
        image,
        roi_start=start,
        roi_end=end,
        resize_y=height,
        resize_x=width,
        **_BILINEAR,
    )


class _Source:
    """The pipeline's external source: images, crop positions and flips of each batch of the plan.

    Args:
        images: the split.
        margin: resize - crop, in pixels.
        mean: three numbers, for pixels in 0..1.
        batch_size: images per batch.
        threads: number of threads that read files.
        num_outputs: number of outputs that the pipeline uses, of: images, left and top as fractions of the
            margin, flip, the mean less the colour, for pixels in 0..255, and whether the crop contains an
            outermost row or column.
    """

    def __init__(
        self,
        images: ImageSet,
        margin: int,
        mean: Sequence[float],
        batch_size: int,
        threads: int,
        num_outputs: int,
    ) -> None:
        self.num_outputs = num_outputs
        self._images = images
        self._margin = margin
        self._mean = np.array(mean)
        self._batch_size = batch_size
        self._threads = threads
        self._batches: Iterator[tuple[Any, ...]] = iter(())

    def start(self, plan: EpochPlan, first_batch: int) -> None:
        self._batches = self._epoch(plan, first_batch)

    def stop(self) -> None:
        self._batches = iter(())

    def __call__(self) -> tuple[Any, ...]:
        return next(self._batches)  # StopIteration tells DALI that the epoch is over

    def _epoch(self, plan: EpochPlan, first_batch: int) -> Iterator[tuple[Any, ...]]:
        for rows, pixels in self._read(plan, first_batch):
            top, left = rows.offsets.numpy().T.astype(np.float32)
            fraction_per_pixel = np.float32(1 / max(1, self._margin))
            colors = np.zeros((len(rows), 3)) if rows.colors is None else rows.colors.numpy()
            on_edge = (np.minimum(top, left) == 0) | (np.maximum(top, left) == self._margin)
            yield (
                pixels,
                left * fraction_per_pixel,
                top * fraction_per_pixel,
                rows.flips.numpy().astype(np.int32),
                (255 * (self._mean - colors)).astype(np.float32),
                on_edge,
            )[: self.num_outputs]

    def _read(
        self, plan: EpochPlan, first_batch: int
    ) -> Iterator[tuple[EpochPlan, NDArray[np.uint8] | list[NDArray[np.uint8]]]]:
        """Yield each batch's rows of the plan and its images; threads read files ahead."""
        pixels, paths = self._images.pixels, self._images.paths
        batches = range(first_batch, -(-len(plan) // self._batch_size))
        all_rows = (plan.batch(number, self._batch_size) for number in batches)
        if pixels is not None:
            yield from ((rows, pixels[rows.indices.numpy()]) for rows in all_rows)
            return
        assert paths is not None
        with ThreadPoolExecutor(self._threads) as pool:
            coming = (
                (rows, pool.map(_encoded, [paths[i] for i in rows.indices.tolist()])) for rows in all_rows
            )
            ahead = deque(islice(coming, READ_AHEAD))
            while ahead:
                rows, files = ahead.popleft()
                ahead.extend(islice(coming, 1))
                yield rows, list(files)


# What turns an image in XMP, which Pillow applies where EXIF has no orientation, and DALI does not.
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(=\"|>)[2-8]")


def _encoded(path: Path | str) -> NDArray[np.uint8]:
    """Return the bytes of a file that DALI decodes as we do; of another, its pixels as a PPM file's bytes."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not data.startswith(DECODED_BY_DALI) or _XMP_ORIENTATION.search(data):
        pixels = decode_image(path)
        data = b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
    return np.frombuffer(data, np.uint8)


def _explain(error: RuntimeError, images: ImageSet, indices: Tensor) -> Exception:
    """Return an error that names the file that DALI could not decode, which DALI's own error does not."""
    if images.paths is None:
        return error
    paths = [images.paths[i] for i in indices.tolist()]
    for path in paths:
        try:
            decode_image(path)
        except DataError as found:
            return found
    reason = " ".join(str(error).split("encountered:")[-1].split("Current pipeline")[0].split())
    return DataError(
        f"NVIDIA DALI cannot decode one of {len(paths)} files, which Pillow can ({reason}): {paths[0]} to "
        f"{paths[-1]}; use loader=torchvision for this data set"
    )
