"""Text that can be printed and fits: names shortened in the middle, captions wrapped, columns aligned."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path


def printable(path: Path | str) -> str:
    """Return a path as text that can be encoded, with a mark for each byte of it that is no UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def shortened(text: str, width: int) -> str:
    """Return text of at most ``width`` characters, with a mark where its middle was left out.

    The names of many classes begin alike or end alike, so both ends stay.
    """
    if len(text) <= width:
        return text
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - head - 1) :]}"


def wrapped(text: str, width: int, lines: int) -> str:
    """Return text on at most ``lines`` lines of at most ``width`` characters, shortened if it is longer."""
    found = textwrap.wrap(text, width)
    if len(found) > lines:
        found = textwrap.wrap(shortened(text, width * lines), width)
    if len(found) > lines:  # the words do not fill the lines
        short = shortened(text, width * lines)
        found = [short[i : i + width] for i in range(0, len(short), width)]
    return "\n".join(found)


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return rows as lines of a text table, two spaces between columns.

    Args:
        rows: the cells of each row, of equal number.
        right: columns that are aligned to the right, by number from 0.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
