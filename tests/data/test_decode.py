"""Decoding of every kind of image file, compared with known pixels."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastalex.data.decode import DamagedImageError, check_image, decode_image
from fastalex.errors import DataError


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A smooth image, which JPEG preserves to within a few levels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 200 // height, x * 200 // width, np.full_like(x, 90)], axis=-1).astype(np.uint8)


def decode(path: Path, image: Image.Image, **options: object) -> np.ndarray:
    image.save(path, **options)
    pixels = decode_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert check_image(path) == pixels.shape[:2]
    return pixels


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff"])
@pytest.mark.parametrize("size", [(5, 7), (1, 50), (50, 1), (1, 1)])
def test_colour(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    pixels = noise(*size, 3)
    assert np.array_equal(decode(tmp_path / f"a.{suffix}", Image.fromarray(pixels)), pixels)


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1), (64, 200)])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(tmp_path: Path, size: tuple[int, int], progressive: bool) -> None:
    pixels = smooth(*size)
    found = decode(tmp_path / "a.jpg", Image.fromarray(pixels), quality=95, progressive=progressive)
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels).max() <= 12


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_grey_is_replicated(tmp_path: Path, suffix: str) -> None:
    grey = np.full((9, 8), 77, np.uint8)
    assert np.array_equal(decode(tmp_path / f"a.{suffix}", Image.fromarray(grey)), np.full((9, 8, 3), 77))


def test_one_bit(tmp_path: Path) -> None:
    bits = np.array([[True, False], [False, True]])
    found = decode(tmp_path / "a.png", Image.fromarray(bits))
    assert np.array_equal(found, np.repeat(bits[..., None] * 255, 3, axis=2))


def test_sixteen_bit_grey_keeps_the_high_byte(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 256, 0x1234, 65535]], np.uint16)
    expected = np.repeat([[[0], [0], [1], [0x12], [255]]], 3, axis=2)
    for suffix in ("png", "tiff"):
        assert np.array_equal(decode(tmp_path / f"a.{suffix}", Image.fromarray(grey)), expected)
    (tmp_path / "a.pgm").write_bytes(b"P5 5 1 65535\n" + grey.astype(">u2").tobytes())
    assert np.array_equal(decode_image(tmp_path / "a.pgm"), expected)


def test_sixteen_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    """A PNG of 48-bit RGB, which Pillow can read but not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = struct.pack(">B6H", 0, 0x12FF, 0x3400, 0x5680, 0xFFFF, 0x0000, 0x00FF)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    assert decode_image(path).tolist() == [[[0x12, 0x34, 0x56], [0xFF, 0x00, 0x00]]]


def test_alpha_is_dropped(tmp_path: Path) -> None:
    pixels = noise(6, 5, 4)
    pixels[..., 3] = np.arange(30).reshape(6, 5) * 8
    assert np.array_equal(decode(tmp_path / "a.png", Image.fromarray(pixels)), pixels[..., :3])
    grey = noise(6, 5, 2)
    assert np.array_equal(
        decode(tmp_path / "b.png", Image.fromarray(grey, "LA")), np.repeat(grey[..., :1], 3, axis=2)
    )


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([2, 0, 1])
    expected = [[[70, 80, 90], [10, 20, 30], [40, 50, 60]]]
    assert decode(tmp_path / "a.png", image).tolist() == expected
    assert decode(tmp_path / "b.png", image, transparency=b"\x00\x80\xff").tolist() == expected
    assert decode(tmp_path / "c.gif", image).tolist() == expected


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    inks = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    for ink, colour in inks.items():
        found = decode(tmp_path / f"a.{suffix}", Image.new("CMYK", (16, 16), ink), **options)
        assert np.abs(found.astype(int) - colour).max() <= (2 if suffix == "jpg" else 0)


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.transpose(1, 0, 2), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
@pytest.mark.parametrize("orientation", list(UPRIGHT))
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    pixels = smooth(48, 96)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(tmp_path / f"a.{suffix}", Image.fromarray(pixels), exif=exif)
    expected = UPRIGHT[orientation](pixels)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (12 if suffix == "jpg" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00nonsense", b"Exif\x00\x00MM\x00*\x00\x00\xff\xff", b"Exif\x00\x00"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unreadable_exif_is_upright(tmp_path: Path, exif: bytes) -> None:
    assert decode(tmp_path / "a.jpg", Image.fromarray(smooth(40, 60)), exif=exif).shape == (40, 60, 3)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_out_of_range_is_upright(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert decode(tmp_path / "a.jpg", Image.fromarray(smooth(40, 60)), exif=exif).shape == (40, 60, 3)


def test_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("#ff0000", "#00ff00")]
    found = decode(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert found.tolist() == [[[255, 0, 0]] * 4] * 4


@pytest.mark.parametrize("value", [np.zeros((2, 2), np.int32), np.zeros((2, 2), np.float32)])
def test_pixels_without_a_standard_range_are_refused(tmp_path: Path, value: np.ndarray) -> None:
    path = tmp_path / "a.tiff"
    Image.fromarray(value).save(path)
    for read in (decode_image, check_image):
        with pytest.raises(DamagedImageError, match="32 bits"):
            read(path)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(60, 80, 3)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_truncated(tmp_path: Path, kind: str, kept: float) -> None:
    path = tmp_path / "cut"
    data = encoded(kind)
    path.write_bytes(data[: int(len(data) * kept)])
    for read in (decode_image, check_image):
        with pytest.raises(DamagedImageError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        assert "data.on_error=skip" in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"hello\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xff\xd8\xff"]
)
def test_not_an_image(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for read in (decode_image, check_image):
        with pytest.raises(DamagedImageError, match="not an image"):
            read(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "WEBP"])
def test_any_bytes_give_pixels_or_a_data_error(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(1)
    whole = np.frombuffer(encoded(kind), np.uint8)
    path = tmp_path / "fuzzed"
    for _ in range(60):
        data = whole.copy()
        # Mostly in the header, where every byte matters.
        places = rng.integers(0, min(len(data), rng.choice([64, 700, len(data)])), rng.integers(1, 8))
        data[places] = rng.integers(0, 256, len(places))
        path.write_bytes(data.tobytes())
        with suppress(DataError):
            height, width = check_image(path)
            assert min(height, width) >= 1
            pixels = decode_image(path)
            assert (pixels.dtype, pixels.shape) == (np.uint8, (height, width, 3))


def test_an_unreadable_file_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, reason in ((tmp_path / "missing.jpg", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DataError, match=reason) as caught:
            decode_image(path)
        assert not isinstance(caught.value, DamagedImageError)

    def refuse(*_: object, **__: object) -> None:  # chmod would not do: tests may run as root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match=r"a.jpg cannot be read: Permission denied") as caught:
        decode_image("a.jpg")
    assert not isinstance(caught.value, DamagedImageError)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = tmp_path / "a.png"
    Image.fromarray(noise(6, 5, 3)).save(path)
    with pytest.raises(DamagedImageError, match="bomb"):
        decode_image(path)


def test_the_error_can_be_pickled() -> None:
    error = DamagedImageError("a.jpg", "cut")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.reason) == (str(error), "a.jpg", "cut")
