"""The principal components of colours, against closed forms, NumPy and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from fastalex.config import Color, DataConfig
from fastalex.data import ImageSet, color
from fastalex.data.color import components, principal_components, steps
from fastalex.errors import DataError


def photographs(count: int = 30, seed: int = 0) -> ImageSet:
    """Images whose pixels have correlated channels, each image around a colour of its own."""
    rng = np.random.default_rng(seed)
    mixing = np.array([[40, 0, 0], [30, 12, 0], [25, -8, 5]])
    pixels = rng.normal(size=(count, 9, 7, 3)) @ mixing.T + rng.normal(128, 20, (count, 1, 1, 3))
    return ImageSet(np.zeros(count, np.int64), pixels=pixels.round().clip(0, 255).astype(np.uint8))


def saved(images: ImageSet, folder: Path) -> ImageSet:
    assert images.pixels is not None
    paths = tuple(folder / f"{i}.png" for i in range(len(images)))
    for path, pixels in zip(paths, images.pixels, strict=True):
        Image.fromarray(pixels).save(path)
    return ImageSet(images.labels, paths=paths)


def test_two_colours_have_the_line_through_them() -> None:
    """Half of the pixels at c + v and half at c - v: the covariance is v v^T."""
    v = np.array([40, 20, -10])
    c = np.array([100, 90, 80])
    pixels = np.array([c + v, c - v], np.uint8).reshape(1, 1, 2, 3)
    values, vectors = principal_components(ImageSet(np.zeros(1, np.int64), pixels=pixels))
    length = np.linalg.norm(v)
    np.testing.assert_allclose(values, [(length / 255) ** 2, 0, 0], atol=1e-15)
    np.testing.assert_allclose(vectors[0], v / length, atol=1e-12)


def test_agrees_with_scikit_learn_and_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    images = photographs()
    assert images.pixels is not None
    pixels = images.pixels.reshape(-1, 3) / 255
    monkeypatch.setattr(color, "_DECODED_CHUNK", 7)  # parts of unequal size
    values, vectors = principal_components(images)
    pca = PCA(3).fit(pixels)
    # scikit-learn divides by n - 1.
    np.testing.assert_allclose(values, pca.explained_variance_ * (len(pixels) - 1) / len(pixels), rtol=1e-10)
    np.testing.assert_allclose(np.abs(np.sum(vectors * pca.components_, axis=1)), 1, atol=1e-10)
    covariance = np.cov(pixels.T, bias=True)
    np.testing.assert_allclose(vectors.T * values @ vectors, covariance, rtol=0, atol=1e-12)
    assert np.all(np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], 1) > 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_files_give_what_their_pixels_give(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(color, "available_cores", lambda: processes)
    monkeypatch.setattr(color, "_CHUNK", 7)
    images = photographs()
    for found, wanted in zip(
        principal_components(saved(images, tmp_path)), principal_components(images), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_images_of_any_size_count_equally(tmp_path: Path) -> None:
    for i, (grey, side) in enumerate([(0, 1), (255, 40)]):
        Image.new("RGB", (side, side), (grey, grey, grey)).save(tmp_path / f"{i}.png")
    images = ImageSet(np.zeros(2, np.int64), paths=(tmp_path / "0.png", tmp_path / "1.png"))
    values, vectors = principal_components(images)
    np.testing.assert_allclose(values, [3 / 4, 0, 0], atol=1e-12)  # each channel: 0 or 1, as often
    np.testing.assert_allclose(vectors[0], 3**-0.5)


def test_of_many_files_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = saved(photographs(), tmp_path)
    monkeypatch.setattr(color, "SAMPLE", 4)
    found = principal_components(images)
    monkeypatch.setattr(color, "SAMPLE", 30)
    wanted = principal_components(images.select(np.array([0, 10, 19, 29])))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    images = saved(photographs(4), tmp_path)
    assert images.paths is not None
    images.paths[2].write_bytes(images.paths[2].read_bytes()[:60])
    with pytest.raises(DataError, match=r"2\.png is not a whole image"):
        principal_components(images)


def test_components_are_computed_where_they_are_needed_and_absent() -> None:
    images, other = photographs(), photographs(seed=1)
    assert components(DataConfig("test"), images) == ([], [])
    values, vectors = components(DataConfig("test", color=Color.pca), images)
    data = DataConfig("test", color=Color.pca, color_eigenvalues=values, color_eigenvectors=vectors)
    assert components(data, other) == (values, vectors)
    assert components(DataConfig("test", color=Color.pca), other) != (values, vectors)
    np.testing.assert_allclose(steps(data), np.diag(values) @ vectors)
    assert steps(DataConfig("test", color_eigenvalues=values, color_eigenvectors=vectors)) == []
