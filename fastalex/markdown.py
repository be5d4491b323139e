"""Markdown: tables, and generated sections between two markers of a page."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers_right: bool = False) -> str:
    """Return a table, without a newline at its end.

    Args:
        heads: cells of the first line.
        rows: cells of the other lines, as many as ``heads``.
        numbers_right: right-align every column but the first whose cells are empty or start with a digit.
    """
    rules = ["---"] * len(heads)
    if numbers_right:
        for i in range(1, len(heads)):
            if all(row[i][0].isdigit() for row in rows if row[i]):
                rules[i] = "---:"
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rules, *rows])


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
