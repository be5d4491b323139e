"""The data sets: what is found, how it is split, and the errors when it cannot be used."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from fastalex.config import DataConfig, OnError
from fastalex.data import DataSplits, ImageSet, load_splits
from fastalex.data.cifar import CLASSES
from fastalex.data.decode import decode_image
from fastalex.data.folders import image_files
from fastalex.errors import ConfigError, DataError

CIFAR10_COPY = Path(__file__).parents[3] / "shared/data/cifar10"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


def load(name: str, root: Path | str = "nowhere", seed: int = 0, **options: object) -> DataSplits:
    return load_splits(DataConfig(name=name, root=str(root), **options), seed, progress=False)  # type: ignore[arg-type]


def refused(name: str, root: Path, *parts: str, **options: object) -> None:
    """Check that loading fails with one line that names data.root and its value and contains all parts."""
    with pytest.raises(DataError) as caught:
        load(name, root, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"data.root={root}", *parts):
        assert part in message


def write_tree(root: Path, classes: list[str] | tuple[str, ...], count: int, *, sizes: bool = False) -> None:
    """Write class folders of `count` images each; every image has its own colour."""
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            size = (5 + i % 3, 6) if sizes else (5, 6)
            colour = hashlib.sha256(f"{root.name}{name}{i}".encode()).digest()[:3]
            Image.new("RGB", size, tuple(colour)).save(root / name / f"{i:03}.png")


def identities(images: ImageSet) -> list[bytes]:
    return [images.image(i).tobytes() for i in range(len(images))]


def check_splits(splits: DataSplits, sizes: tuple[int, int, int]) -> None:
    """Check that the splits have these sizes, no common image, and every class in proportion."""
    parts = (splits.train, splits.validation, splits.test)
    assert tuple(map(len, parts)) == sizes
    everything = [image for part in parts for image in identities(part)]
    assert len(set(everything)) == len(everything)
    for part in parts:
        assert part.labels.dtype == np.int64
        counts = Counter(part.labels.tolist())
        assert set(counts) == set(range(len(splits.classes)))
        assert max(counts.values()) - min(counts.values()) <= 1


def same_images(a: ImageSet, b: ImageSet) -> bool:
    return identities(a) == identities(b) and np.array_equal(a.labels, b.labels)


# Data sets without files


def test_digits() -> None:
    splits = load("digits")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1149, 288, 360)
    assert splits.classes == tuple("0123456789")
    original = load_digits()
    label_of = {
        np.rint(image * 255 / 16).astype(np.uint8).tobytes(): label
        for image, label in zip(original.images, original.target, strict=True)
    }
    found = []
    for part in (splits.train, splits.validation, splits.test):
        assert part.pixels is not None
        assert part.pixels.shape[1:] == (8, 8, 3)
        assert (part.pixels == part.pixels[..., :1]).all()
        for image, label in zip(part.pixels[..., 0], part.labels, strict=True):
            assert label_of[image.tobytes()] == label
            found.append(image.tobytes())
        assert max(abs(np.bincount(part.labels) / len(part) - np.bincount(original.target) / 1797)) < 0.005
    assert sorted(found) == sorted(np.rint(x * 255 / 16).astype(np.uint8).tobytes() for x in original.images)


def test_seed_chooses_validation_and_never_test() -> None:
    one, again, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    assert same_images(one.validation, again.validation)
    assert not same_images(one.validation, other.validation)
    assert same_images(one.test, other.test)


def test_a_fraction_of_the_training_images() -> None:
    whole, part = load("digits", seed=1), load("digits", seed=1, train_fraction=0.2)
    assert len(part.train) == int(0.2 * 1149)
    assert set(identities(part.train)) < set(identities(whole.train))
    shares = [np.bincount(splits.train.labels) / len(splits.train) for splits in (part, whole)]
    assert abs(shares[0] - shares[1]).max() <= 1 / len(part.train)
    assert same_images(part.validation, whole.validation)
    assert same_images(part.test, whole.test)
    assert not same_images(part.train, load("digits", seed=2, train_fraction=0.2).train)
    with pytest.raises(DataError) as caught:
        load("digits", train_fraction=0.005)
    assert str(caught.value) == (
        "data.train_fraction=0.005: 1149 images cannot be split into 5 for training and 1144 to leave out "
        "with all 10 classes in both; add images, or change data.train_fraction"
    )


def test_synthetic() -> None:
    splits = load("synthetic", images=40, classes=7, resize=16, crop=16)
    assert splits.train.pixels is not None
    assert splits.train.pixels.shape == (40, 16, 16, 3)
    assert set(splits.train.labels.tolist()) == set(range(7)) == set(range(len(splits.classes)))
    assert not splits.is_measurable
    assert len(splits.validation)
    assert len(splits.test)
    assert same_images(splits.train, load("synthetic", images=40, classes=7, resize=16, seed=5).train)
    assert abs(splits.train.pixels.mean() - 127.5) < 5 * 73.9 / np.sqrt(splits.train.pixels.size)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"data.name=mnist is unknown"):
        load("mnist")


# Folders of classes


@pytest.mark.parametrize("sizes", [False, True])
def test_class_folders_alone(root: Path, sizes: bool) -> None:
    write_tree(root, ["cat", "dog", "eel"], 25, sizes=sizes)
    splits = load("imagefolder", root)
    check_splits(splits, (48, 12, 15))
    assert splits.classes == ("cat", "dog", "eel")
    assert (splits.train.paths is not None) == sizes
    other = load("imagefolder", root, seed=1)
    assert same_images(splits.test, other.test)
    assert not same_images(splits.validation, other.validation)
    for part in (splits.train, splits.validation, splits.test):
        for i in range(len(part)):
            name = splits.classes[part.labels[i]]
            files = (root / name).glob("*.png")
            assert any(np.array_equal(part.image(i), decode_image(file)) for file in files)


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [
        (("train",), (32, 8, 10)),
        (("train", "test"), (40, 10, 50)),
        (("train", "val"), (40, 10, 50)),
        (("train", "val", "test"), (50, 50, 50)),
        (("train", "valid", "test"), (50, 50, 50)),
        (("train", "validation"), (40, 10, 50)),
        (("Train", "VAL", "Test"), (50, 50, 50)),
    ],
)
def test_split_folders(root: Path, folders: tuple[str, ...], sizes: tuple[int, int, int]) -> None:
    for folder in folders:
        write_tree(root / folder, ["cat", "dog"], 25)
    splits = load("imagefolder", root)
    check_splits(splits, sizes)
    if len(folders) > 1:
        files = [path.read_bytes() for path in (root / folders[-1]).rglob("*.png")]
        assert len(files) == len(splits.test)
        given = {decode_image(path).tobytes() for path in (root / folders[-1]).rglob("*.png")}
        assert set(identities(splits.test)) == given


def test_an_unlabelled_test_folder_is_ignored(root: Path) -> None:
    for folder in ("train", "val"):
        write_tree(root / folder, ["cat", "dog"], 10)
    (root / "test").mkdir()
    Image.new("RGB", (5, 6)).save(root / "test" / "0.png")
    check_splits(load("imagefolder", root), (16, 4, 20))


def test_images_of_two_splits_without_classes_are_refused(root: Path) -> None:
    """As competitions publish them; otherwise train and test would be two classes."""
    for folder in ("train", "test"):
        write_tree(root, [folder], 10)
    refused("imagefolder", root, f"{root / 'train'} has no class folders; put the images of each class")


def test_folders_beside_train_that_are_not_used_are_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("train", "test"):
        write_tree(root / folder, ["cat", "dog"], 10)
    write_tree(root / "testing", ["cat"], 1)
    (root / "notes").mkdir()
    (root / "notes" / "a.txt").write_text("no image")
    load_splits(DataConfig("imagefolder", str(root)), 0, progress=True)
    warning = f"warning: data.root={root}: testing beside train: not used; splits are called train, val and"
    assert warning in capsys.readouterr().err


def test_a_link_to_a_folder_that_it_is_in_is_refused(root: Path) -> None:
    write_tree(root, ["cat", "dog"], 10)
    for target in (root / "cat", root, Path("..")):
        (root / "cat" / "again").symlink_to(target)
        with pytest.raises(
            DataError, match=r"again is a link to a folder that it is in, .*; remove the link"
        ):
            load("imagefolder", root)
        (root / "cat" / "again").unlink()
    (root / "cat" / "more").symlink_to(root / "dog")
    splits = load("imagefolder", root)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 30


def test_a_class_whose_name_cannot_be_printed(root: Path) -> None:
    write_tree(root, ["cat", "dog"], 10)
    (root / "dog").rename(root / os.fsdecode(b"caf\xe9"))
    refused("imagefolder", root, "caf\N{REPLACEMENT CHARACTER} has a name that is not UTF-8; rename it")


def test_a_class_called_train(root: Path) -> None:
    write_tree(root, ["plane", "train"], 10)
    assert load("imagefolder", root).classes == ("plane", "train")


def test_nested_files_count_and_hidden_files_do_not(root: Path) -> None:
    write_tree(root, ["cat", "dog"], 10)
    write_tree(root / "cat", ["indoors", ".thumbnails"], 5)
    write_tree(root, [".git"], 5)
    for junk in ("cat/.DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "README.md"):
        (root / junk).write_text("no image")
    splits = load("imagefolder", root)
    assert splits.classes == ("cat", "dog")
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 25


def test_files_that_are_not_images_are_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file is opened to find out what it is if its name says so."""
    write_tree(root / "train", ["cat", "dog"], 10)
    write_tree(root / "test", ["cat", "dog"], 10)
    (root / "train" / "cat" / "003.png").rename(root / "train" / "cat" / "noname")
    (root / "train" / "cat" / "004.png").rename(root / "train" / "cat" / "004.JPEG")
    opened = []
    real = Image.open

    def open_(path: Path, *args: Any, **options: Any) -> Image.Image:
        opened.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(Image, "open", open_)
    assert {Path(path).name for path in image_files(root)} == {
        "noname",
        "004.JPEG",
        *(f"{i:03}.png" for i in range(10)),
    }
    assert opened == [root / "train" / "cat" / "noname"]
    sizes = (16, 4, 20)
    check_splits(load_splits(DataConfig("imagefolder", str(root)), 0), sizes)
    assert "warning" not in capsys.readouterr().err

    (root / "train" / "cat" / "notes.txt").write_text("cats")
    line = f"fastalex: warning: data.root={root}: 1 file that is not an image is left out "
    line += f"({root / 'train' / 'cat' / 'notes.txt'})"
    check_splits(load_splits(DataConfig("imagefolder", str(root)), 0), sizes)
    assert line in capsys.readouterr().err.splitlines()
    (root / "test" / "dog" / "empty").touch()
    check_splits(load_splits(DataConfig("imagefolder", str(root)), 0), sizes)
    line = line.replace("1 file that is not an image is", "2 files that are not images are")
    assert f"{line[:-1]}, ...)" in capsys.readouterr().err.splitlines()
    load("imagefolder", root)
    assert not capsys.readouterr().err


def test_a_class_folder_of_other_files(root: Path) -> None:
    write_tree(root, ["cat", "dog"], 10)
    (root / "eel").mkdir()
    (root / "eel" / "1.heic").write_text("another format")
    refused(
        "imagefolder",
        root,
        f"{root / 'eel'} holds no images but other files, such as {root}/eel/1.heic; fill",
    )


def test_root_errors(root: Path) -> None:
    for name in ("imagefolder", "tiny_imagenet"):
        refused(name, root, "does not exist", "data=digits")
        root.mkdir()
        refused(name, root, "is empty")
        root.rmdir()
        root.touch()
        refused(name, root, "is not a folder")
        root.unlink()


def test_a_folder_without_classes(root: Path) -> None:
    write_tree(root, ["cat"], 10)
    refused("imagefolder", root, "1 class folder;")
    write_tree(root / "images", ["a", "b"], 3)
    refused("imagefolder", root / "cat", "0 class folders")


def test_an_empty_class_folder(root: Path) -> None:
    write_tree(root, ["cat", "dog"], 10)
    (root / "eel" / "deeper").mkdir(parents=True)
    refused("imagefolder", root, str(root / "eel"), "holds no images")


def test_classes_must_agree(root: Path) -> None:
    write_tree(root / "train", ["cat", "dog"], 10)
    write_tree(root / "test", ["cat", "dog", "eel"], 10)
    refused("imagefolder", root, str(root / "test"), "unexpected", "'eel'")
    shutil.rmtree(root / "test" / "eel")
    shutil.rmtree(root / "test" / "dog")
    refused("imagefolder", root, str(root / "test"), "no folder", "'dog'")


def test_ambiguous_splits(root: Path) -> None:
    for folder in ("train", "val", "valid"):
        write_tree(root / folder, ["cat", "dog"], 10)
    refused("imagefolder", root, "both val and valid")
    shutil.rmtree(root / "train")
    refused("imagefolder", root, "no train folder")


@pytest.mark.parametrize(
    ("beside", "found", "needed"),
    [
        ((), "1 image", "one for training, one for validation and one for testing"),
        ((), "2 images", "one for training, one for validation and one for testing"),
        (("test",), "1 image", "one for training and one for validation"),
        (("val",), "1 image", "one for training and one for validation"),
    ],
)
def test_too_few_images_to_split(root: Path, beside: tuple[str, ...], found: str, needed: str) -> None:
    write_tree(root / "train", ["cat", "dog"], 20)
    write_tree(root / "train", ["eel"], int(found[0]))
    for folder in beside:
        write_tree(root / folder, ["cat", "dog", "eel"], 1)
    problem = f"class 'eel' has {found} to split; each class needs at least {needed}: "
    refused("imagefolder", root, problem + "add images of it, or remove the class")
    write_tree(root / "train", ["eel"], 3 - len(beside))
    load("imagefolder", root)


def test_one_image_for_each_part_is_enough(root: Path) -> None:
    write_tree(root, ["cat", "dog"], 20)
    for folder in ("train", "val", "test"):
        write_tree(root / "whole" / folder, ["cat", "dog"], 1)
    check_splits(load("imagefolder", root / "whole"), (2, 2, 2))


def test_too_few_images_for_a_fraction_of_them(root: Path) -> None:
    write_tree(root / "train", ["cat", "dog"], 4)
    write_tree(root / "train", ["eel"], 2)
    write_tree(root / "test", ["cat", "dog", "eel"], 1)
    with pytest.raises(DataError) as caught:
        load("imagefolder", root, train_fraction=0.5, validation_fraction=0.3)
    problem = "data.train_fraction=0.5: class 'eel' has 1 image to split; each class needs at least "
    assert str(caught.value).startswith(f"{problem}one for training and one to leave out: ")


def test_a_class_of_which_none_is_in_the_test_set(root: Path) -> None:
    """A fifth is rounded down; no key changes it."""
    write_tree(root, [f"class{i}" for i in range(9)], 14)
    write_tree(root, ["eel"], 3)
    problem = (
        "class 'eel' has 3 of the 129 images to split, in proportion too few for one of the 26 for testing; "
    )
    with pytest.raises(DataError) as caught:
        load("imagefolder", root)
    message = str(caught.value)
    assert message == f"data.root={root}: {problem}add images of it, or remove the class"


def test_more_classes_than_validation_images(root: Path) -> None:
    for folder in ("train", "test"):
        write_tree(root / folder, [f"class{i}" for i in range(5)], 3)
    refused("imagefolder", root, "into 12 for training and 3 for validation with all 5 classes in both")


@pytest.mark.parametrize(("fraction", "part"), [(0.1, "11 for validation"), (0.95, "5 for training")])
def test_a_class_too_small_for_both_parts(root: Path, fraction: float, part: str) -> None:
    """In proportion, one part would have none of the class's two images."""
    write_tree(root / "train", ["cat"], 100)
    write_tree(root / "train", ["eel"], 2)
    write_tree(root / "test", ["cat", "eel"], 1)
    problem = "class 'eel' has 2 of the 102 images to split, in proportion too few for one of the "
    remedy = f"{part}; add images of it, or remove the class, or change data.validation_fraction"
    refused("imagefolder", root, problem + remedy, validation_fraction=fraction)


@pytest.mark.parametrize("sizes", [False, True])
def test_damaged_files(root: Path, sizes: bool) -> None:
    write_tree(root, ["cat", "dog"], 20, sizes=sizes)
    whole = (root / "dog" / "003.png").read_bytes()
    (root / "cat" / "007.png").write_text("no image")
    (root / "dog" / "003.png").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):  # first from the files, then from the cache
        refused("imagefolder", root, str(root / "cat" / "007.png"), "and 1 more", "data.on_error=skip")
    splits = load("imagefolder", root, on_error=OnError.skip)
    assert splits.skipped == 2
    parts = (splits.train, splits.validation, splits.test)
    assert sum(map(len, parts)) == 38
    everything = [image for part in parts for image in identities(part)]
    expected = [
        decode_image(path).tobytes()
        for path in root.rglob("*.png")
        if path not in (root / "cat" / "007.png", root / "dog" / "003.png")
    ]
    assert sorted(everything) == sorted(expected)


def test_a_link_to_a_file_that_does_not_exist_is_damaged(root: Path) -> None:
    write_tree(root, ["cat", "dog"], 20)
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    problem = "gone.png is not a whole image (a link to a file that does not exist)"
    refused("imagefolder", root, problem, "data.on_error=skip")
    for _ in range(2):  # first from the files, then from the cache
        assert load("imagefolder", root, on_error=OnError.skip).skipped == 1
    shutil.copy(root / "cat" / "000.png", root / "nowhere.png")
    assert load("imagefolder", root).skipped == 0


def test_a_class_of_damaged_files_only(root: Path) -> None:
    write_tree(root, ["cat", "dog"], 20)
    for path in (root / "dog").iterdir():
        path.write_text("no image")
    refused("imagefolder", root, "every image of class 'dog'", on_error=OnError.skip)


def test_an_unreadable_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(root, ["cat", "dog"], 5)

    def refuse(*_: object) -> None:  # chmod would not do: tests may run as root
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"images cannot be read: Permission denied"):
        load("imagefolder", root)


# Tiny ImageNet


def write_tiny_imagenet(root: Path, wnids: tuple[str, ...] = ("n01", "n02"), count: int = 10) -> None:
    for wnid in wnids:
        write_tree(root / "train" / wnid, ["images"], count)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0.png\t0\t0\t1\t1\n")
    write_tree(root / "val", ["images"], count)
    lines = [f"{i:03}.png\t{wnids[i % len(wnids)]}\t0\t0\t62\t62\n" for i in range(count)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    write_tree(root / "test", ["images"], 2)
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn99\tfish, any\n")


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(root: Path, below: str) -> None:
    write_tiny_imagenet(root / below)
    splits = load("tiny_imagenet", root)
    assert splits.classes == ("goldfish", "bullfrog")
    assert tuple(map(len, (splits.train, splits.validation, splits.test))) == (16, 4, 10)
    assert splits.test.labels.tolist() == [0, 1] * 5
    expected = [decode_image(root / below / "val" / "images" / f"{i:03}.png").tobytes() for i in range(10)]
    assert identities(splits.test) == expected


def test_tiny_imagenet_without_distinct_words(root: Path) -> None:
    write_tiny_imagenet(root)
    (root / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane, machine\n")
    assert load("tiny_imagenet", root).classes == ("n01", "n02")
    (root / "words.txt").unlink()
    assert load("tiny_imagenet", root).classes == ("n01", "n02")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("000.png\tn77\t0\t0\t1\t1", ("line 3", "'n77'")),
        ("999.png\tn01\t0\t0\t1\t1", ("line 3", "999.png", "missing")),
        ("000.png n01", ("line 3", "FILE<tab>CLASS")),
    ],
)
def test_tiny_imagenet_annotations(root: Path, line: str, parts: tuple[str, ...]) -> None:
    write_tiny_imagenet(root)
    (root / "val" / "val_annotations.txt").write_text(f"000.png\tn01\n001.png\tn02\n{line}\n")
    refused("tiny_imagenet", root, *parts)


@pytest.mark.parametrize("missing", ["train", "val/images", "val/val_annotations.txt"])
def test_tiny_imagenet_incomplete(root: Path, missing: str) -> None:
    write_tiny_imagenet(root)
    (root / missing).rename(root.parent / "elsewhere")
    refused("tiny_imagenet", root, str(root / missing), "is missing")


def test_tiny_imagenet_class_without_annotations(root: Path) -> None:
    write_tiny_imagenet(root)
    (root / "val" / "val_annotations.txt").write_text("000.png\tn01\n001.png\tn01\n")
    refused("tiny_imagenet", root, "there is no image of class 'n02' for test")


def test_tiny_imagenet_empty_class(root: Path) -> None:
    write_tiny_imagenet(root)
    shutil.rmtree(root / "train" / "n02" / "images")
    refused("tiny_imagenet", root, str(root / "train" / "n02" / "images"), "holds no images")


# CIFAR-10


@pytest.mark.parametrize("sizes", [False, True])
def test_cifar10_tree(root: Path, sizes: bool) -> None:
    for part in ("train", "test"):
        write_tree(root / part, CLASSES, 10, sizes=sizes)
    splits = load("cifar10", root)
    check_splits(splits, (80, 20, 100))
    assert splits.classes == CLASSES


def test_cifar10_tree_errors(root: Path) -> None:
    write_tree(root / "train", CLASSES, 5)
    refused("cifar10", root, "no test folder")
    write_tree(root / "test", (*CLASSES, "zebra"), 5)
    refused("cifar10", root, "unexpected", "'zebra'", "use data=imagefolder for other images")
    shutil.rmtree(root / "test" / "zebra")
    shutil.rmtree(root / "test" / "ship")
    refused("cifar10", root, "no folder", "'ship'")


class _Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def write_pickles(folder: Path, labels: Callable[[int], int] = lambda i: i % 10) -> dict[str, str]:
    """Write CIFAR-10's files with 20 images each; return their MD5 by name."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        batch = {"data": data, "labels": [labels(i) for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def publish(monkeypatch: pytest.MonkeyPatch, md5: dict[str, str]) -> None:
    """Make torchvision accept files with these MD5 as the published ones."""
    train = [[name, value] for name, value in sorted(md5.items()) if name.startswith("data_batch")]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})


@pytest.mark.parametrize("below", ["cifar-10-batches-py", ""])
def test_cifar10_pickles(root: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    """data.root holds the folder of the pickles, or is that folder."""
    publish(monkeypatch, write_pickles(root / below))
    splits = load("cifar10", root)
    check_splits(splits, (80, 20, 20))
    assert splits.classes == CLASSES
    batch = pickle.loads((root / below / "test_batch").read_bytes())
    planes = batch["data"].reshape(20, 3, 32, 32)
    assert splits.test.pixels is not None
    assert np.array_equal(splits.test.pixels.transpose(0, 3, 1, 2), planes)
    assert splits.test.labels.tolist() == batch["labels"]


def test_a_changed_pickle_is_never_opened(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / "cifar-10-batches-py"
    publish(monkeypatch, write_pickles(folder))
    for name in ("data_batch_3", "test_batch", "batches.meta"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
        refused("cifar10", root, str(folder / name), "not the published file")
        (folder / name).unlink()
        refused("cifar10", root, str(folder / name), "is missing")
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(_Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_out_of_range(root: Path, monkeypatch: pytest.MonkeyPatch, label: int) -> None:
    folder = root / "cifar-10-batches-py"
    publish(monkeypatch, write_pickles(folder, lambda i: label if i == 13 else i % 10))
    refused("cifar10", root, f"image 13 has label {label}", "0 to 9")


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An archive on a local server, which torchvision accepts as the published one."""
    publish(monkeypatch, write_pickles(tmp_path / "packed" / "cifar-10-batches-py"))
    archive = tmp_path / "served" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "packed" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        Thread(target=server.serve_forever, daemon=True).start()
        yield archive
        server.shutdown()


@pytest.mark.parametrize("there", [False, True])
def test_download(archive: Path, root: Path, there: bool) -> None:
    root = root / "a" / "b"
    if there:
        (root / ".cifar10-left").mkdir(parents=True)  # from a killed download
    check_splits(load("cifar10", root), (80, 20, 20))
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
    archive.unlink()
    check_splits(load("cifar10", root), (80, 20, 20))


def test_nothing_is_downloaded_among_images_of_ones_own(archive: Path, root: Path) -> None:
    write_tree(root, ["cat", "dog"], 2)
    before = sorted(root.rglob("*"))
    refused("cifar10", root, "holds folders of images but no CIFAR-10", "set data=imagefolder to train on")
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("fault", ["not there", "cut short", "no archive", "other content"])
@pytest.mark.parametrize("there", [False, True])
def test_a_failed_download_leaves_nothing(
    tmp_path: Path, archive: Path, root: Path, monkeypatch: pytest.MonkeyPatch, fault: str, there: bool
) -> None:
    if fault == "not there":
        archive.unlink()
    elif fault == "cut short":
        archive.write_bytes(archive.read_bytes()[:1000])
    elif fault == "no archive":
        archive.write_text("<html>moved</html>")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    else:
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "0" * 32]])
    if there:
        root.mkdir()
        (root / "notes.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    refused("cifar10", root / "deeper", CIFAR10.url, "cifar-10-batches-py", "data=digits")
    assert sorted(tmp_path.rglob("*")) == before


def test_download_forbidden(root: Path) -> None:
    refused("cifar10", root, "data.download=false", "data=digits", download=False)
    assert not root.exists()


def test_root_is_a_file(root: Path) -> None:
    root.touch()
    refused("cifar10", root, "data=digits")


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10_COPY.is_dir(), reason="../shared/data/cifar10 is absent")
def test_the_cifar10_copy() -> None:
    splits = load("cifar10", CIFAR10_COPY)
    for part, size in ((splits.train, 40_000), (splits.validation, 10_000), (splits.test, 10_000)):
        assert part.pixels is not None
        assert part.pixels.shape == (size, 32, 32, 3)
        assert np.bincount(part.labels).tolist() == [size // 10] * 10
    first = sorted((CIFAR10_COPY / "test" / "airplane").iterdir())[0]
    assert np.array_equal(splits.test.image(0), decode_image(first))


# Image sets


def test_an_image_set_has_one_source() -> None:
    labels, pixels = np.zeros(2, np.int64), np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="either"):
        ImageSet(labels)
    with pytest.raises(ValueError, match="either"):
        ImageSet(labels, pixels=pixels, paths=(Path("a"), Path("b")))
    with pytest.raises(ValueError, match="2 for 1"):
        ImageSet(labels, pixels=pixels[:1])


def test_select() -> None:
    pixels = np.arange(4 * 3, dtype=np.uint8).reshape(4, 1, 1, 3)
    whole = ImageSet(np.arange(4), pixels=pixels)
    part = whole.select(np.array([3, 1]))
    assert part.labels.tolist() == [3, 1]
    assert part.image(0).tolist() == [[[9, 10, 11]]]
    files = ImageSet(np.arange(3), paths=(Path("a"), Path("b"), Path("c"))).select(np.array([2]))
    assert files.paths == (Path("c"),)
