"""The image files that a path names: an image, a folder of them, or a text file of their paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from fastalex.data.decode import is_image
from fastalex.data.folders import image_files
from fastalex.errors import DataError


class ImagePaths:
    """The image files that a path names, in order: sized and iterable, without a list of them in memory.

    Of a folder, these are the files that have the name of an image or the first bytes of one, in the order of
    :func:`fastalex.data.folders.image_files`. A text file has a path on each line; relative ones are relative
    to the current folder, and empty lines are left out.

    Args:
        source: an image, a folder or a text file in UTF-8.
        key: the configuration key that named it, for error messages.

    Raises:
        DataError: there is no such path, it cannot be read, or it names no file.
    """

    def __init__(self, source: Path | str, key: str = "images") -> None:
        self._source = Path(source).expanduser()
        self._where = f"{key}={source}"
        if not self._source.exists():
            raise DataError(f"{self._where}: there is no such image, folder or text file of paths")
        self._is_list = self._source.is_file() and not is_image(self._source)
        if self._is_list and not self._is_text():
            raise DataError(f"{self._where}: is neither an image nor a text file of paths")
        if not len(self):
            problem = "the text file names no image" if self._is_list else "the folder holds no image"
            raise DataError(f"{self._where}: {problem}; give an image or a folder of images")

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Path]:
        """Yield the files.

        Raises:
            DataError: the folder or the text file cannot be read.
        """
        if self._source.is_dir():
            yield from filter(is_image, map(Path, image_files(self._source)))
        elif self._is_list:
            yield from self._lines()
        else:
            yield self._source

    def _lines(self) -> Iterator[Path]:
        try:
            with self._source.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
                for line in lines:
                    if line.strip():
                        yield Path(line.rstrip("\r\n"))
        except OSError as error:
            raise DataError(f"{self._where}: cannot be read: {error.strerror}") from None

    def _is_text(self) -> bool:
        try:
            with self._source.open("rb") as file:
                return b"\0" not in file.read(1 << 13)
        except OSError as error:
            raise DataError(f"{self._where}: cannot be read: {error.strerror}") from None


def printable(path: Path) -> str:
    """Return a path as text that can be encoded, with a mark for each byte of it that is no UTF-8."""
    return os.fsencode(path).decode(errors="replace")
