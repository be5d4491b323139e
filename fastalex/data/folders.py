"""Folders of image files: class folders with or without splits, and Tiny ImageNet's layout.

Each class is a folder; its images are all files below it that :func:`fastalex.data.decode.is_image` takes for
one, by their names or else by their first bytes. Names that begin with a dot and the files of file managers
(Thumbs.db, desktop.ini) are ignored; other files are left out with a warning. A damaged image is an error, or
with ``data.on_error=skip`` is skipped and counted. Classes are numbered in the order of their names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastalex.config import DataConfig, OnError
from fastalex.data.cache import read_files
from fastalex.data.decode import image_extensions, is_image
from fastalex.data.imageset import DataSplits, ImageSet
from fastalex.data.splits import TEST_FRACTION, check_counts, split
from fastalex.errors import DataError
from fastalex.text import printable

_IGNORED = {"thumbs.db", "desktop.ini"}
# The names of the folders of each split, in small letters.
_SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}


@dataclass
class LabelledFiles:
    """The files of one split and their labels.

    Attributes:
        paths: the files. Strings, which take half the time and less memory than Path objects.
        labels: the class of each file.
        left_out: files beside them that are not images.
    """

    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def find_root(config: DataConfig) -> Path:
    """Return ``data.root`` as a path.

    Args:
        config: holds ``data.root``; the data set's name is for the error message.

    Raises:
        DataError: it does not exist, is not a folder or is empty.
    """
    root = Path(config.root).expanduser()
    remedy = f"set data.root to the folder that holds the images of data={config.name}, or use data=digits"
    if not root.exists():
        raise DataError(f"data.root={config.root} does not exist; {remedy}")
    if not root.is_dir():
        raise DataError(f"data.root={config.root} is not a folder; {remedy}")
    if not _entries(root):
        raise DataError(f"data.root={config.root} is empty; {remedy}")
    return root


def load_imagefolder(config: DataConfig, seed: int, *, progress: bool) -> DataSplits:
    """Load class folders, ``root/CLASS/*`` or ``root/{train,val,test}/CLASS/*``.

    ==================  ============================================================================
    folders in root     how they are used
    ==================  ============================================================================
    CLASS               a fifth of each class is the test set, the same for every seed
    train, test         each as its split
    train, val          val is the test set, because published results are usually on val
    train, val, test    each as its split
    train               its class folders as CLASS
    ==================  ============================================================================

    Without a validation set of its own, ``data.validation_fraction`` of the training images is drawn by
    ``seed``. val may also be called valid or validation, and all of these names may have capitals. A test
    folder without class folders, as competitions publish it, has no labels and is ignored. Other folders
    beside train are ignored with a warning.

    The arguments are those of :func:`fastalex.data.datasets.load_splits`.

    Raises:
        DataError: folders or files are missing, damaged or too few.
    """
    root = find_root(config)
    folders = _split_folders(root, config)
    if not folders:
        found = {"train": root}
    elif not subfolders(folders["train"]):
        if len(folders) > 1:
            raise DataError(
                f"data.root={config.root}: {folders['train']} has no class folders; put the images of each "
                "class into a folder of its own there"
            )
        found = {"train": root}  # a class of that name
    else:
        if progress:
            _warn_of_ignored([sub for sub in subfolders(root) if sub not in folders.values()], config)
        found = dict(folders)
        if "test" in found and not subfolders(found["test"]):
            del found["test"]
        if "test" not in found and "validation" in found:
            found["test"] = found.pop("validation")

    classes = class_names(found["train"], config)
    parts = {name: scan_classes(folder, classes, config) for name, folder in found.items()}
    images, skipped = read_parts(root, parts, classes, config, progress=progress)
    what = f"data.root={config.root}"
    drawn = {"validation": "for validation", "test": "for testing"}
    uses = ["for training", *(use for part, use in drawn.items() if part not in images)]
    check_counts(images["train"], uses, classes=classes, what=what)
    if "test" not in images:
        images["train"], images["test"] = split(
            images["train"], TEST_FRACTION, 0, classes=classes, what=what, use=drawn["test"], key=None
        )
    if "validation" not in images:
        images["train"], images["validation"] = split(
            images["train"], config.validation_fraction, seed, classes=classes, what=what
        )
    return DataSplits(images["train"], images["validation"], images["test"], classes, skipped)


def _split_folders(root: Path, config: DataConfig) -> dict[str, Path]:
    """Return the folders in ``root`` that are named like splits, by the split.

    Raises:
        DataError: there are some but none for training, or two of one split.
    """
    inside = subfolders(root)
    named = {
        part: [folder for folder in inside if folder.name.lower() in names] for part, names in _SPLITS.items()
    }
    others = sorted(folder.name for folders in named.values() for folder in folders)
    if others and not named["train"]:
        raise DataError(f"data.root={config.root} has {', '.join(others)} but no train folder; add it")
    for folders in named.values():
        if len(folders) > 1:
            both = " and ".join(folder.name for folder in folders)
            raise DataError(f"data.root={config.root} has both {both}; keep one of them")
    return {part: folders[0] for part, folders in named.items() if folders}


def load_tiny_imagenet(config: DataConfig, seed: int, *, progress: bool) -> DataSplits:
    """Load Tiny ImageNet as published: ``train/WNID/images``, ``val/images``, ``val/val_annotations.txt``.

    The labels of its test images are not public. So val is the test set, as in published results, and the
    validation images are drawn from train. Class names are from ``words.txt``, if it exists.

    The arguments are those of :func:`fastalex.data.datasets.load_splits`.

    Raises:
        DataError: folders or files are missing, damaged or too few.
    """
    root = find_root(config)
    if (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    for part in ("train", "val/images", "val/val_annotations.txt"):
        if not (root / part).exists():
            raise DataError(
                f"data.root={config.root}: {root / part} is missing; set data.root to Tiny ImageNet as "
                "published, or use data=imagefolder for class folders"
            )
    wnids = class_names(root / "train", config)
    train = LabelledFiles()
    for label, wnid in enumerate(wnids):
        folder = root / "train" / wnid / "images"
        files = list(image_files(folder, train.left_out)) if folder.is_dir() else []
        if not files:
            raise DataError(
                f"data.root={config.root}: {folder} holds no images; add them or remove class {wnid}"
            )
        train.paths += files
        train.labels += [label] * len(files)
    parts = {"train": train, "test": _annotated_files(root / "val", wnids, config)}
    images, skipped = read_parts(root, parts, wnids, config, progress=progress)
    what = f"data.root={config.root}"
    images["train"], images["validation"] = split(
        images["train"], config.validation_fraction, seed, classes=wnids, what=what
    )
    names = _class_words(root / "words.txt", wnids)
    return DataSplits(images["train"], images["validation"], images["test"], names, skipped)


def class_names(folder: Path, config: DataConfig) -> tuple[str, ...]:
    """Return the names of the class folders, sorted.

    Args:
        folder: the folder that holds the class folders.
        config: its ``root`` is for the error message.

    Raises:
        DataError: there are fewer than two, or a name cannot be printed.
    """
    names = tuple(sub.name for sub in subfolders(folder))
    for name in names:
        if printable(name) != name:
            raise DataError(
                f"data.root={config.root}: class folder {printable(folder / name)} has a name that is not "
                "UTF-8; rename it"
            )
    if len(names) < 2:
        raise DataError(
            f"data.root={config.root}: {folder} has {len(names)} class folder{'s' * (len(names) != 1)}; "
            "put the images of each class into a folder of its own, at least two classes"
        )
    return names


def scan_classes(folder: Path, classes: tuple[str, ...], config: DataConfig) -> LabelledFiles:
    """Return the files in the class folders of one split.

    Args:
        folder: the folder that holds the class folders.
        classes: names of the classes, in the order of the labels.
        config: its ``root`` is for the error message.

    Raises:
        DataError: the class folders are not exactly ``classes``, or one has no files.
    """
    found = {sub.name for sub in subfolders(folder)}
    if found != set(classes):
        name = min(found ^ set(classes))
        problem = "an unexpected class folder" if name in found else "no folder for class"
        remedy = "every split needs the same classes"
        if config.name != "imagefolder":
            remedy = f"data={config.name} has classes of its own; use data=imagefolder for other images"
        raise DataError(f"data.root={config.root}: {folder} has {problem} {name!r}; {remedy}")
    files = LabelledFiles()
    for label, name in enumerate(classes):
        others: list[str] = []
        paths = list(image_files(folder / name, others))
        if not paths:
            instead = f" but other files, such as {others[0]}" if others else ""
            raise DataError(
                f"data.root={config.root}: class folder {folder / name} holds no images{instead}; "
                "fill or remove it"
            )
        files.left_out += others
        files.paths += paths
        files.labels += [label] * len(paths)
    return files


def read_parts(
    root: Path,
    parts: dict[str, LabelledFiles],
    classes: tuple[str, ...],
    config: DataConfig,
    *,
    progress: bool,
) -> tuple[dict[str, ImageSet], int]:
    """Read the files of all splits through the cache, and warn of those that were left out.

    Args:
        root: the folder that holds all files.
        parts: the files of each split, by the split's name.
        classes: names of the classes, in the order of the labels.
        config: says whether damaged files are skipped.
        progress: show a progress bar while files are read, and warnings.

    Returns:
        The images of each split by its name, and the number of files skipped.

    Raises:
        DataError: a file is damaged and ``data.on_error`` is not ``skip``, or a class has no whole images.
    """
    if progress:
        _warn_of_left_out([path for part in parts.values() for path in part.left_out], config)
    paths = [path for part in parts.values() for path in part.paths]
    contents = read_files(root, paths, progress=progress)
    if contents.damaged and config.on_error is not OnError.skip:
        first, reason = next(iter(contents.damaged.items()))
        more = f" and {len(contents.damaged) - 1} more" if len(contents.damaged) > 1 else ""
        raise DataError(
            f"data.root={config.root}: {paths[first]} is not a whole image ({reason}){more}; "
            "replace or remove it, or set data.on_error=skip"
        )
    whole = np.ones(len(paths), bool)
    whole[list(contents.damaged)] = False
    images = {}
    start = 0
    for name, part in parts.items():
        rows = start + np.flatnonzero(whole[start : start + len(part.paths)])
        labels = np.array(part.labels, np.int64)[rows - start]
        start += len(part.paths)
        missing = set(range(len(classes))) - set(labels.tolist())
        if missing:
            absent = missing - set(part.labels)
            images_of = f"image of class {classes[min(absent or missing)]!r} for {name}"
            problem = (
                f"there is no {images_of}; add some"
                if absent
                else f"every {images_of} is damaged; replace them"
            )
            raise DataError(f"data.root={config.root}: {problem} or remove the class")
        if contents.pixels is not None:
            images[name] = ImageSet(labels, pixels=contents.pixels[rows])
        else:
            images[name] = ImageSet(labels, paths=tuple(paths[i] for i in rows))
    return images, len(contents.damaged)


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name, without hidden ones.

    Raises:
        DataError: the folder cannot be read.
    """
    return [entry for entry in _entries(folder) if entry.is_dir()]


def image_files(folder: Path, others: list[str] | None = None) -> Iterator[str]:
    """Yield the paths of all images below a folder, whole or damaged, sorted folder by folder.

    Symbolic links are followed. Hidden files, hidden folders and file managers' files are ignored.

    Args:
        folder: the folder.
        others: a list that receives the paths of the files that are not images.

    Raises:
        DataError: a folder cannot be read, or a link leads to a folder that it is in.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}")

    extensions = image_extensions()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = os.path.join(parent, "")  # noqa: PTH118
        for name in folders:
            _check_link(here + name, folder)
        for name in sorted(names):
            lower = name.lower()
            if name.startswith(".") or lower in _IGNORED:
                continue
            # is_image alone would take longer than the listing
            if lower.endswith(extensions) or is_image(Path(here + name)):
                yield here + name
            elif others is not None:
                others.append(here + name)


def _check_link(path: str, top: Path) -> None:
    """Refuse a link to a folder that it is in, whose images would be found again and again.

    Args:
        path: a folder or a link to one.
        top: the folder that the search began with.
    """
    if not os.path.islink(path):  # noqa: PTH114
        return
    target = Path(path)
    for parent in target.parents:
        if target.samefile(parent):
            raise DataError(
                f"{printable(path)} is a link to a folder that it is in, {printable(parent)}; remove the link"
            )
        if parent == top:
            return


def _warn_of_ignored(folders: Sequence[Path], config: DataConfig) -> None:
    """Name the folders beside train that hold images, by their names, and are not used."""
    names = [printable(folder.name) for folder in folders if _has_image_names(folder)]
    if names:
        print(
            f"fastalex: warning: data.root={config.root}: {', '.join(names)} beside train: not used; splits "
            "are called train, val and test",
            file=sys.stderr,
        )


def _has_image_names(folder: Path) -> bool:
    """Whether a file below a folder is named like an image; no file is opened, and no link followed."""
    extensions = image_extensions()
    return any(name.lower().endswith(extensions) for _, _, names in os.walk(folder) for name in names)


def _warn_of_left_out(files: list[str], config: DataConfig) -> None:
    if files:
        count = (
            "1 file that is not an image is"
            if len(files) == 1
            else f"{len(files):,} files that are not images are"
        )
        more = ", ..." if len(files) > 1 else ""
        print(
            f"fastalex: warning: data.root={config.root}: {count} left out ({files[0]}{more})",
            file=sys.stderr,
        )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None


def _annotated_files(val: Path, wnids: tuple[str, ...], config: DataConfig) -> LabelledFiles:
    """Return the images of ``val`` with their classes from ``val_annotations.txt``."""
    annotations = val / "val_annotations.txt"
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    files = LabelledFiles()
    for number, line in enumerate(_read_lines(annotations), 1):
        where = f"data.root={config.root}: {annotations} line {number}"
        fields = line.split("\t")
        if len(fields) < 2:
            raise DataError(f"{where} is not FILE<tab>CLASS<tab>...; restore the published file")
        name, wnid = fields[:2]
        if wnid not in label_of:
            raise DataError(
                f"{where} gives {name} the class {wnid!r}, which has no folder in train; correct it"
            )
        path = val / "images" / name
        if not path.is_file():
            raise DataError(f"{where} names {path}, which is missing; restore it or remove the line")
        files.paths.append(str(path))
        files.labels.append(label_of[wnid])
    return files


def _class_words(words: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first word for each class, or the wnids if there is no ``words.txt`` or words repeat."""
    if not words.is_file():
        return wnids
    word_of = dict(line.split("\t", 1) for line in _read_lines(words) if "\t" in line)
    names = tuple(word_of.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
    return names if len(set(names)) == len(names) else wnids


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a text file; restore the published one") from None
