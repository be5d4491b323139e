"""Files of predictions, one row an image: CSV, JSON lines or Parquet, by the name's ending."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from fastalex.errors import ConfigError, MissingDependencyError, OutputError
from fastalex.files import replacing
from fastalex.text import printable

COLUMNS = ("path", "class_1", "probability_1")  # the first; every file has them
Row = list[str | float]  # the path, then class and probability by turns
Write = Callable[[Sequence[Row]], None]


def prediction_file(path: Path, top: int) -> AbstractContextManager[Write]:
    """Return a context that writes rows, as they come, to a file which is whole or absent.

    The columns are ``path``, ``class_1``, ``probability_1``, ``class_2`` and so on. If the block raises, a
    file that was there before stays as it was.

    Args:
        path: of the file; it ends with .csv, .jsonl or .parquet.
        top: number of classes in a row.

    Returns:
        The context; its value writes rows to the file.

    Raises:
        ConfigError: the name has another ending.
        MissingDependencyError: Parquet without pyarrow.
        OutputError: the file exists and holds no predictions; in the context, it cannot be written.
    """
    columns = list(COLUMNS)
    for rank in range(2, top + 1):
        columns += [f"class_{rank}", f"probability_{rank}"]
    formats = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in formats:
        raise ConfigError(f"output={path}: ends with none of {', '.join(formats)}")
    if path.suffix.lower() == ".parquet":
        _pyarrow(f"output={path}")
    if not _may_be_replaced(path):
        raise OutputError(f"output={path}: exists and holds no predictions; choose another name")
    return formats[path.suffix.lower()](path, columns)


def _may_be_replaced(path: Path) -> bool:
    """Whether a file is of predictions, is empty or does not exist."""
    if not path.is_file() or path.stat().st_size == 0:
        return True
    if path.suffix.lower() == ".parquet":
        pyarrow, parquet = _pyarrow(f"output={path}")
        try:
            return tuple(parquet.read_schema(path).names[: len(COLUMNS)]) == COLUMNS
        except pyarrow.ArrowException:
            return False
    begins = {".csv": ",".join(COLUMNS), ".jsonl": f'{{"{COLUMNS[0]}": '}[path.suffix.lower()].encode()
    with path.open("rb") as file:
        return file.read(len(begins)) == begins


@contextmanager
def _csv(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    # A name that is no UTF-8 keeps its bytes.
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        yield lambda rows: writer.writerows(
            [f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row] for row in rows
        )


@contextmanager
def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield lambda rows: file.writelines(
            json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows
        )


@contextmanager
def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Write]:
    pyarrow, parquet = _pyarrow(f"output={path}")
    types = {"path": pyarrow.string(), "class": pyarrow.string(), "probability": pyarrow.float32()}
    schema = pyarrow.schema([(name, types[name.split("_")[0]]) for name in columns])
    waiting: list[Row] = []  # a row group of a batch would make a large file of headers

    with replacing(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:

        def write(rows: Sequence[Row], least: int = 1 << 14) -> None:
            waiting.extend([printable(Path(str(row[0]))), *row[1:]] for row in rows)
            if len(waiting) >= least:
                cells = zip(*waiting, strict=True)
                arrays = [pyarrow.array(cell, field.type) for cell, field in zip(cells, schema, strict=True)]
                writer.write_table(pyarrow.table(arrays, schema=schema))
                waiting.clear()

        yield write
        write([], 1)


def _pyarrow(where: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{where}: Parquet needs pyarrow: pip install pyarrow, or choose .csv"
        ) from error
    return pyarrow, parquet
