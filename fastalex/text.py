"""Text that fits: names shortened in the middle, captions wrapped."""

from __future__ import annotations

import textwrap


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
