"""The progress bar: one for each part of a training."""

from __future__ import annotations

import re

import pytest

from fastalex.runs.progress import ProgressBar

PARTS = [("32x32", 4), ("64x64", 3), ("96x96", 2)]


@pytest.mark.parametrize(
    ("taken", "shown"),
    [
        (0, [("32x32", 0), ("32x32", 4), ("64x64", 0), ("64x64", 3), ("96x96", 0), ("96x96", 2)]),
        (3, [("32x32", 3), ("32x32", 4), ("64x64", 0), ("64x64", 3), ("96x96", 0), ("96x96", 2)]),
        (4, [("64x64", 0), ("64x64", 3), ("96x96", 0), ("96x96", 2)]),
        (8, [("96x96", 1), ("96x96", 2)]),
        (9, [("96x96", 2)]),  # nothing is left to do
    ],
)
def test_each_part_begins_where_the_last_ends(
    taken: int, shown: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is that of a file, to which a bar is written when it begins and when it ends."""
    bar = ProgressBar(PARTS, taken)
    for _ in range(9 - taken):
        bar.update()
    bar.close()
    found = re.findall(r"(\w+): +\d+%.*?(\d+)/\d+ \[", capsys.readouterr().err)
    assert list(dict.fromkeys((size, int(step)) for size, step in found)) == shown
