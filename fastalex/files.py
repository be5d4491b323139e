"""Atomic writing of files, and removal of partial files and empty folders."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastalex.errors import OutputError


@contextmanager
def replacing(
    path: Path, before: Callable[[], None] = lambda: None, *, durable: bool = True
) -> Iterator[Path]:
    """Context that yields a temporary path to write to, and on success renames it to ``path``.

    The file is flushed to disk before the rename and the folder after it, so that a crash at any moment
    leaves either the old file or the new one. If the block raises, the temporary file is removed.

    Args:
        path: of the file.
        before: called between the flush and the rename.
        durable: flush to disk. If False, nothing waits for the disk, and the file survives a crash of the
            process, but perhaps not of the machine.

    Raises:
        OutputError: the file cannot be written; ``path`` is unchanged.
    """
    try:
        descriptor, name = tempfile.mkstemp(
            prefix=f".{path.name}.partial-", suffix=path.suffix, dir=path.parent
        )
        os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error
    temporary = Path(name)
    try:
        yield temporary
        if durable:
            _flush(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private to their owner
        before()
        temporary.replace(path)
        if durable and os.name == "posix":
            _flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file atomically, in UTF-8.

    Args:
        path: of the file.
        text: the new content.
        durable: as in :func:`replacing`.

    Raises:
        OutputError: the file cannot be written; ``path`` is unchanged.
    """
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows, of which the first has the columns' names, atomically as CSV; None is an empty cell.

    Args:
        path: of the file.
        rows: the cells of each row.

    Raises:
        OutputError: the file cannot be written; ``path`` is unchanged.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def remove_partial(folder: Path) -> None:
    """Remove temporary files of :func:`replacing` left by killed processes.

    Args:
        folder: the folder to clean; no process may be writing to it.
    """
    for path in folder.glob(".*.partial-*"):
        path.unlink(missing_ok=True)


def remove_empty(folder: Path, keep: Collection[Path] = ()) -> None:
    """Remove a folder and then its parents, until one is not empty.

    Args:
        folder: the innermost folder.
        keep: resolved paths of folders to keep, with all their parents; the current folder is kept as well.
    """
    for candidate in (folder, *folder.parents):
        if candidate.resolve() in (Path.cwd(), *keep):
            return
        try:
            candidate.rmdir()
        except OSError:  # not empty
            return


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
