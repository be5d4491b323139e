"""The image files that a path names: an image, a folder of them, or a text file of their paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from fastalex.data.decode import is_image
from fastalex.data.folders import image_files
from fastalex.errors import DataError
from fastalex.text import printable


class ImagePaths:
    """The image files that a path names, in order: sized and iterable, without a list of them in memory.

    Of a folder, these are its :func:`fastalex.data.folders.image_files`. A text file has a path on each line;
    relative ones are relative to the current folder, and empty lines are left out. A pipe is read as a text
    file, once, into memory.

    Args:
        source: an image, a folder, a text file in UTF-8 or a pipe.
        key: the configuration key that named it, for error messages.
        missing_ok: whether the text may name files that do not exist.

    Raises:
        DataError: there is no such path, it cannot be read, it names no file, or one that does not exist.
    """

    def __init__(self, source: Path | str, key: str = "images", *, missing_ok: bool = False) -> None:
        self._source = Path(source).expanduser()
        self._where = f"{key}={source}"
        if not self._source.exists():
            raise DataError(f"{self._where}: there is no such image, folder or text file of paths")
        self._piped: bytes | None = None
        if self._source.is_fifo():
            with self._opened() as file:
                self._piped = file.read()
        is_file = self._source.is_file()
        self._is_list = self._piped is not None or (is_file and not is_image(self._source))
        if not (self._is_text() if self._is_list else is_file or self._source.is_dir()):
            raise DataError(f"{self._where}: is neither an image nor a text file of paths")
        if not len(self):
            problem = "the text names no image" if self._is_list else "the folder holds no image"
            raise DataError(f"{self._where}: {problem}; give an image or a folder of images")
        if self._is_list and not missing_ok:
            self._check_lines()

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
            yield from map(Path, image_files(self._source))
        elif self._is_list:
            yield from (path for _, path in self._lines())
        else:
            yield self._source

    def _check_lines(self) -> None:
        """Check that the files of the text exist, so that a wrong line is found before any image is read."""
        for number, path in self._lines():
            try:
                path.stat()
            except (OSError, ValueError) as error:  # ValueError: of a zero byte
                problem = f"cannot be read: {getattr(error, 'strerror', error)}"
                if isinstance(error, FileNotFoundError):
                    relative = "" if path.is_absolute() else "; paths are relative to the current folder"
                    problem = f"does not exist{relative}"
                raise DataError(f"{self._where}, line {number}: {printable(path)} {problem}") from None

    def _lines(self) -> Iterator[tuple[int, Path]]:
        """Yield the number and the path of each line that is not empty."""
        with self._opened() as file:
            lines = TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, Path(line.rstrip("\r\n"))

    def _is_text(self) -> bool:
        with self._opened() as file:
            return b"\0" not in file.read(1 << 13)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with BytesIO(self._piped) if self._piped is not None else self._source.open("rb") as file:
                yield file
        except OSError as error:
            raise DataError(f"{self._where}: cannot be read: {error.strerror}") from None
