"""Markdown: tables, and generated sections between two markers of a page."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_between(text: str, begin: str, end: str, content: str) -> str:
    """Return ``text`` with ``content`` on the lines between the first two marks.

    Raises:
        ValueError: if ``text`` lacks them.
    """
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"has no lines {begin!r} and {end!r}")
    return f"{before}{begin}\n{content}\n{end}{after}"
