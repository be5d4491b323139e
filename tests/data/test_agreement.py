"""The four loaders agree with each other and with float64: the same pixels, the same epochs.

Tolerances are in grey levels, 0..255. If a loader resizes in floating point, a batch differs from float64 by
rounding; if it rounds the resized image to uint8 (torchvision, and FFCV for files), by at most one level.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as F

from fastalex.config import Color, DataConfig, Fit, Flip, LoaderConfig
from fastalex.data import ImageSet, Loader, Views
from fastalex.data.sampling import center_offset
from tests.runtimes import loader_on

FLOAT_TOLERANCE = 2e-3  # for float32 sums over the many taps of a strong reduction
UINT8_TOLERANCE = 1.0 + FLOAT_TOLERANCE


def array_tolerance(name: str) -> float:
    """The tolerance for decoded images."""
    return UINT8_TOLERANCE if name == "torchvision" else FLOAT_TOLERANCE


def _is_installed(package: str) -> bool:
    """Return whether a package is installed; its parent, such as `nvidia`, may be missing or a namespace."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


PACKAGES = {"dali": "nvidia.dali", "ffcv": "ffcv"}
LOADERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name in PACKAGES and not _is_installed(PACKAGES[name]),
            reason=f"{PACKAGES.get(name)} is not installed: .ci/install-loaders PYTHON",
        ),
    )
    for name in ("torchvision", "resident", "dali", "ffcv")
]
pytestmark = [pytest.mark.parametrize("name", LOADERS)]


def build(
    name: str, images: ImageSet, views: Views = Views.random, *, data: DataConfig, **options: object
) -> Loader:
    settings = {"batch_size": 8, "seed": 5, **options}
    return loader_on(images, data, LoaderConfig(name=name, workers=0), views=views, **settings)  # type: ignore[arg-type]


def config(**options: object) -> DataConfig:
    return DataConfig(name="test", **{"resize": 40, "crop": 32, "std": [0.5, 1.0, 0.25], **options})  # type: ignore[arg-type]


def numbered(count: int, size: tuple[int, int] = (32, 32)) -> ImageSet:
    """Images of noise; each image's label is its index."""
    rng = np.random.default_rng(count)
    return ImageSet(np.arange(count), pixels=rng.integers(0, 256, (count, *size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Files of many sizes and kinds: colour, grey, CMYK, EXIF-rotated, one pixel wide or high, PNG, BMP."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    sizes = [
        (60, 90),
        (90, 61),
        (24, 30),
        (1, 50),
        (50, 1),
        (1, 1),
        (41, 40),
        (200, 35),
        (40, 40),
        (10, 1000),
    ]
    paths = []
    for size in sizes:
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        rotated = Image.Exif()
        rotated[0x0112] = 6
        for kind, options in (
            ("colour.jpg", {}),
            ("rotated.jpg", {"exif": rotated.tobytes()}),
            ("xmp.jpg", {"xmp": b'<rdf:Description tiff:Orientation="6"/>'}),
            ("progressive.jpg", {"progressive": True, "subsampling": 0}),
            ("grey.jpg", {}),
            ("cmyk.jpg", {}),
            ("plain.png", {}),
            ("alpha.png", {}),
            ("plain.bmp", {}),
        ):
            mode = {"grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}.get(kind.split(".")[0], "RGB")
            paths.append(folder / f"{size[0]}x{size[1]}-{kind}")
            image.convert(mode).save(paths[-1], **options)
    return ImageSet(np.arange(len(paths)), paths=tuple(paths))


def square(image: np.ndarray, data: DataConfig) -> Tensor:
    """What crops are cut from, float64 (3, resize, resize)."""
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    if data.fit is Fit.shorter_side:
        return F.center_crop(F.resize(planes, [data.resize], antialias=True), [data.resize] * 2)[0]
    return interpolate(planes, (data.resize, data.resize), mode="bilinear", antialias=True)[0]


def expected(whole: Tensor, data: DataConfig, top: int, left: int, flip: bool) -> Tensor:
    """One crop of a square, normalised, float64 (3, crop, crop)."""
    crop = whole[:, top : top + data.crop, left : left + data.crop]
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (data.mean, data.std))
    return ((crop.flip(-1) if flip else crop) / 255 - mean) / std


def views_of(image: np.ndarray, data: DataConfig, views: Views, row: tuple[int, int, bool]) -> Tensor:
    """The views that a loader must yield for one image, float64 (V, 3, crop, crop)."""
    whole = square(image, data)
    if views is not Views.ten_crop:
        return expected(whole, data, *row)[None]
    far, middle = data.resize - data.crop, center_offset(data.resize, data.crop)
    places = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    # torchvision's TenCrop: five crops of the image, then the same five of its mirror image.
    mirrored = [] if data.flip is Flip.none else [whole.flip(-1)]
    return torch.stack(
        [expected(source, data, *place, False) for source in [whole, *mirrored] for place in places]
    )


def largest_error(loader: Loader, images: ImageSet, data: DataConfig, views: Views) -> float:
    """The largest difference from float64 in one epoch, in grey levels."""
    plan = loader.plan()  # type: ignore[attr-defined]
    std = torch.tensor(data.std, dtype=torch.float64)[:, None, None]
    largest, row = 0.0, 0
    for batch, labels in loader:
        for label, found in zip(labels.tolist(), batch.unflatten(0, (len(labels), -1)).double(), strict=True):
            assert label == plan.indices[row]
            place = (*plan.offsets[row].tolist(), bool(plan.flips[row]))
            wanted = views_of(images.image(label), data, views, place)
            if plan.colors is not None:
                wanted += plan.colors[row].double()[:, None, None] / std
            difference = (found - wanted) * std * 255
            largest = max(largest, float(difference.abs().max()))
            row += 1
    assert row == loader.num_samples
    return largest


@pytest.mark.parametrize("views", list(Views), ids=lambda views: views.value)
@pytest.mark.parametrize("size", [(32, 32), (40, 40), (31, 47), (90, 57), (200, 120)], ids=str)
def test_pixels_of_arrays(name: str, size: tuple[int, int], views: Views) -> None:
    images, data = numbered(19, size), config()
    loader = build(name, images, views, data=data)
    assert largest_error(loader, images, data, views) < array_tolerance(name)


def test_centre_crops_in_training(name: str) -> None:
    """``largest_error`` cuts where the plan says; the centre is at (40 - 32) / 2."""
    images, data = numbered(19), config(random_crop=False)
    loader = build(name, images, data=data)
    assert (loader.plan().offsets == 4).all()  # type: ignore[attr-defined]
    assert largest_error(loader, images, data, Views.random) < array_tolerance(name)


@pytest.mark.parametrize("views", list(Views), ids=lambda views: views.value)
@pytest.mark.parametrize("size", [(31, 47), (90, 57), (40, 40), (10, 1000)], ids=str)
def test_pixels_of_arrays_that_keep_their_shape(name: str, size: tuple[int, int], views: Views) -> None:
    images, data = numbered(9, size), config(fit=Fit.shorter_side)
    loader = build(name, images, views, data=data)
    assert largest_error(loader, images, data, views) < array_tolerance(name)


@pytest.mark.parametrize("fit", list(Fit), ids=lambda fit: fit.value)
@pytest.mark.parametrize("views", list(Views), ids=lambda views: views.value)
@pytest.mark.parametrize("crop", [32, 40])
def test_pixels_of_photographs(name: str, photographs: ImageSet, views: Views, crop: int, fit: Fit) -> None:
    if name == "resident":
        pytest.skip("resident holds images of one size only: loader=auto leaves files to torchvision")
    data = config(crop=crop, fit=fit)
    loader = build(name, photographs, views, data=data)
    # DALI's own CMYK conversion may round differently before the resize.
    assert largest_error(loader, photographs, data, views) < UINT8_TOLERANCE


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_photograph_is_upright_before_its_shorter_side_is_found(
    name: str, orientation: int, tmp_path: Path
) -> None:
    if name == "resident":
        pytest.skip("resident holds images of one size only: loader=auto leaves files to torchvision")
    exif = Image.Exif()
    exif[0x0112] = orientation
    rows = np.linspace(0, 255, 90)[:, None, None]  # a gradient: another part of the image is of another grey
    Image.fromarray(np.broadcast_to(rows, (90, 45, 3)).astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert upright.shape == (45, 90, 3)
    data = config(fit=Fit.shorter_side, crop=40)
    images = ImageSet(np.zeros(1, np.int64), paths=(tmp_path / "a.jpg",))
    ((found, _),) = build(name, images, Views.center, data=data)
    difference = found[0] - expected(square(upright, data), data, 0, 0, flip=False)
    assert (difference * torch.tensor(data.std)[:, None, None] * 255).abs().max() < UINT8_TOLERANCE


@pytest.mark.parametrize("flip", [Flip.none, Flip.both], ids=lambda flip: flip.value)
def test_flips_as_configured(name: str, flip: Flip) -> None:
    images, data = numbered(9), config(flip=flip)
    for views in (Views.random, Views.ten_crop):
        loader = build(name, images, views, data=data, batch_size=3)
        assert largest_error(loader, images, data, views) < array_tolerance(name)


@pytest.mark.parametrize("fit", list(Fit), ids=lambda fit: fit.value)
def test_colours_are_shifted_as_the_plan_says(name: str, fit: Fit) -> None:
    images, data = numbered(24, (31, 47)), config(fit=fit, color=Color.pca)
    loader = build(name, images, data=data)
    shifts = loader.plan().colors  # type: ignore[attr-defined]
    assert shifts.shape == (24, 3)
    assert shifts.abs().max() * 255 > 2 * UINT8_TOLERANCE  # or leaving them out would pass
    assert largest_error(loader, images, data, Views.random) < array_tolerance(name)
    for views in (Views.center, Views.ten_crop):
        assert largest_error(build(name, images, views, data=data), images, data, views) < array_tolerance(
            name
        )


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batches_have_the_requested_layout_and_dtype(
    name: str, dtype: torch.dtype, channels_last: bool
) -> None:
    images, data = numbered(8), config()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for views in Views:
        exact = build(name, images, views, data=data)
        loader = build(name, images, views, data=data, dtype=dtype, channels_last=channels_last)
        for (batch, labels), (reference, _) in zip(loader, exact, strict=True):
            assert batch.shape[1:] == (3, 32, 32)
            assert batch.dtype == dtype
            assert batch.is_contiguous(memory_format=layout)
            assert labels.dtype == torch.int64
            torch.testing.assert_close(batch, reference.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def epoch_labels(loader: Loader, epoch: int = 0, start_batch: int = 0) -> list[int]:
    loader.set_epoch(epoch, start_batch)
    return [label for _, labels in loader for label in labels.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_visits_each_image_once(name: str, world_size: int) -> None:
    images, data = numbered(50), config()
    loaders = [
        build(name, images, data=data, batch_size=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    batches = 50 // (4 * world_size)
    for epoch in range(2):
        parts = [epoch_labels(loader, epoch) for loader in loaders]
        assert [len(part) for part in parts] == [batches * 4] * world_size  # whole batches, the same number
        visited = Counter(label for part in parts for label in part)
        assert max(visited.values()) == 1
    assert [loader.num_samples for loader in loaders] == [batches * 4] * world_size
    assert [len(loader) for loader in loaders] == [batches] * world_size


def test_training_on_whole_batches_drops_no_image(name: str) -> None:
    loader = build(name, numbered(24), data=config())
    assert sorted(epoch_labels(loader)) == list(range(24))


def test_flip_both_visits_each_image_twice(name: str) -> None:
    loader = build(name, numbered(12), data=config(flip=Flip.both))
    assert Counter(epoch_labels(loader)) == Counter(dict.fromkeys(range(12), 2))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("views", [Views.center, Views.ten_crop], ids=lambda views: views.value)
def test_evaluation_sees_each_image_once_over_all_ranks(name: str, views: Views, world_size: int) -> None:
    images, data = numbered(20), config()
    seen: list[int] = []
    for rank in range(world_size):
        loader = build(name, images, views, data=data, batch_size=6, rank=rank, world_size=world_size)
        part = epoch_labels(loader)
        assert len(part) == loader.num_samples
        assert len(loader) == -(-len(part) // 6)
        seen += part
    assert sorted(seen) == list(range(20))


def test_seed_and_epoch_decide_the_order(name: str) -> None:
    images, data = numbered(24), config()
    loader = build(name, images, data=data)
    first, second = epoch_labels(loader, 0), epoch_labels(loader, 1)
    assert first != second
    assert epoch_labels(loader, 0) == first  # epochs can be repeated
    assert epoch_labels(build(name, images, data=data), 1) == second
    assert epoch_labels(build(name, images, data=data, seed=6), 0) != first


def test_an_epoch_resumes_in_its_middle(name: str) -> None:
    loader = build(name, numbered(40), data=config(color=Color.pca))
    loader.set_epoch(3)
    whole = [(images.clone(), labels.clone()) for images, labels in loader]
    for start in (2, 5):
        loader.set_epoch(3, start)
        rest = list(loader)
        assert len(rest) == 5 - start
        for (images, labels), (expected_images, expected_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(labels, expected_labels)
            assert torch.equal(images, expected_images)


def test_an_abandoned_epoch_does_not_spoil_the_next(name: str) -> None:
    images, data = numbered(40), config()
    loader = build(name, images, data=data)
    for taken in (1, 3):
        batches = iter(loader)
        for _ in range(taken):
            next(batches)
    del batches
    assert largest_error(loader, images, data, Views.random) < UINT8_TOLERANCE


def test_later_batches_do_not_overwrite_earlier_ones(name: str) -> None:
    loader = build(name, numbered(80), data=config())
    kept = [(images, labels, images.clone(), labels.clone()) for images, labels in loader]
    kept += [(images, labels, images.clone(), labels.clone()) for images, labels in loader]
    for images, labels, images_then, labels_then in kept:
        assert torch.equal(images, images_then)
        assert torch.equal(labels, labels_then)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_over_fifty_epochs(name: str) -> None:
    loader = build(name, numbered(32), data=config(resize=120, crop=112))
    batch_bytes = 8 * 3 * 112 * 112 * 4

    def run(epochs: Iterator[int]) -> None:
        for epoch in epochs:
            loader.set_epoch(epoch)
            for _ in loader:
                pass

    run(iter(range(10)))
    gc.collect()
    before = resident_bytes()
    run(iter(range(10, 50)))
    gc.collect()
    # A leak of one batch per epoch would be 40 batches.
    assert resident_bytes() - before < 20 * batch_bytes
