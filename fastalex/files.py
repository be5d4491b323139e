"""Files that are whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastalex.errors import OutputError


@contextmanager
def replacing(
    path: Path, before: Callable[[], None] = lambda: None, *, durable: bool = True
) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; on success it takes the place of ``path``.

    The file is flushed to the disk before it is renamed, and the folder after, so that a crash at any moment
    leaves the old file or the new one. If the block raises, the temporary file is removed.

    Args:
        path: of the file.
        before: called when the new file is whole and on the disk, and the old one still in its place.
        durable: flush as said. Without, a crash of the machine may cost the file, that of a process may not;
            and nobody waits for the disk.

    Raises:
        OutputError: if the file cannot be written; ``path`` is then as it was.
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
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are their owner's alone
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
    """Replace a text file as a whole, as :func:`replacing` does it."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_partial(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left; nobody may be writing now."""
    for path in folder.glob(".*.partial-*"):
        path.unlink(missing_ok=True)


def remove_empty(folder: Path, keep: Collection[Path] = ()) -> None:
    """Remove a folder and those above it, as far as they are empty.

    Args:
        folder: to begin with.
        keep: resolved paths; there it ends, as it does at the current folder.
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
