"""A user's runs beside the study's figures and the committed runs, with intervals of the differences."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalex.files import write_csv, write_text
from fastalex.markdown import table
from fastalex.study.intervals import Difference, Sample, difference
from fastalex.study.results import NOT_RUN
from fastalex.study.rows import ROWS
from fastalex.text import aligned

REPRODUCED = "reproduced"
HIGHER, LOWER = "error higher than ours", "error lower than ours"
NO_COMMITTED = "nothing to compare with"
KEYS = ("top1_error", "top5_error")

METHOD = (
    "*Difference* is yours less ours, in brackets its 95% interval; *reproduced* means that the interval "
    "of the top-1 error contains 0. The interval adds in quadrature (MOVER: Zou and Donner, 2008) Wilson's "
    "95% intervals of the two errors for the number of test images and, where yours or ours has several "
    "seeds, the 95% bound of Student's t for the standard deviation pooled over both. With one run each it "
    "is Newcombe's interval, and the spread from seed to seed is not known and not in it. Yours and ours "
    "count as tests on different images. Where the images are the same, an interval for pairs would be "
    "narrower, but it needs the predictions for each image."
)


@dataclass(frozen=True)
class Comparison:
    """A row of the comparison; each mapping is by the keys :data:`KEYS`.

    Attributes:
        row: name of the row.
        title: what the row is.
        study: the study's errors; empty where it has none.
        ours: the errors of the committed runs; empty where there are none.
        theirs: the errors of the user's runs; empty where none is complete.
        seeds: the user's complete runs, of how many the row has: ``"1 of 2"``.
        differences: theirs less ours, where there are both.
    """

    row: str
    title: str
    study: Mapping[str, float]
    ours: Mapping[str, Sample]
    theirs: Mapping[str, Sample]
    seeds: str
    differences: Mapping[str, Difference]

    @property
    def verdict(self) -> str:
        """What the interval of the top-1 error says."""
        if not self.theirs:
            return NOT_RUN
        if not self.differences:
            return NO_COMMITTED
        top1 = self.differences["top1_error"]
        return HIGHER if top1.low > 0 else LOWER if top1.high < 0 else REPRODUCED


def compare(
    theirs: Mapping[str, Any], ours: Mapping[str, Any] | None, requested: Collection[str]
) -> list[Comparison]:
    """Compare the rows that the user has runs of, and those requested now.

    Args:
        theirs: what :func:`fastalex.study.report.collect` returns for the user's folder.
        ours: the same for the committed runs; None to compare with nothing.
        requested: names of rows.
    """
    comparisons = []
    for name, entry in theirs["rows"].items():
        if not entry["runs"] and name not in requested:
            continue
        mine = _samples(entry["runs"])
        committed = _samples(ours["rows"][name]["runs"]) if ours else {}
        comparisons.append(
            Comparison(
                name,
                entry["title"],
                entry["published"] or {},
                committed,
                mine,
                f"{len(entry['runs'])} of {len(ROWS[name].seeds)}",
                {key: difference(mine[key], committed[key]) for key in KEYS if mine and committed},
            )
        )
    return comparisons


def _samples(records: Sequence[Mapping[str, Any]]) -> dict[str, Sample]:
    if not records:
        return {}
    images = min(record["test_images"] for record in records)
    return {key: Sample([record[f"ten_crop_{key}"] for record in records], images) for key in KEYS}


def note(theirs: Mapping[str, Any], ours: Mapping[str, Any] | None, *, quick: bool) -> str:
    """Say what makes the comparison unequal, or impossible; empty if nothing does.

    Args:
        theirs: as in :func:`compare`.
        ours: as in :func:`compare`.
        quick: whether the user's runs are of the quick budget.
    """
    if quick:
        return (
            "**These runs prove the path, not the rows: each is a few epochs on scikit-learn's digits. "
            "Nothing is compared.**"
        )
    if ours is None:
        return "There are no committed runs here: fastalex was installed without its `results/`."
    names = [
        {run["data"] for entry in content["rows"].values() for run in entry["runs"]}
        for content in (theirs, ours)
    ]
    if all(names) and names[0] != names[1]:
        yours, committed = (" and ".join(sorted(each)) for each in names)
        return f"Yours were tested on {yours}, ours on {committed}."
    return ""


def write(folder: Path, comparisons: Sequence[Comparison], remark: str) -> None:
    """Write ``comparison.md`` and ``comparison.csv``.

    Args:
        folder: of the user's runs.
        comparisons: a row each.
        remark: what else a reader has to know, in Markdown; may be empty.
    """
    heads = [
        "row",
        "the study",
        "ours",
        "yours",
        "seeds",
        "difference, top-1",
        "difference, top-5",
        "verdict",
    ]
    lines = [
        [
            f"{each.title} (`{each.row}`)",
            _pair({key: f"{value:.4f}" for key, value in each.study.items()}),
            _pair(each.ours),
            _pair(each.theirs),
            each.seeds,
            *(str(each.differences.get(key, "")) for key in KEYS),
            each.verdict,
        ]
        for each in comparisons
    ]
    text = (
        "Written by `python -m fastalex.reproduce`. Top-1 / top-5 test errors of the final weights, ten-"
        "crop: the study's, ours (the runs committed in `results/`) and yours (the runs in this folder), "
        "as mean and, after ±, standard deviation where there are several seeds."
    )
    parts = ["# Your runs beside ours", *([remark] if remark else []), text, table(heads, lines), METHOD]
    write_text(folder / "comparison.md", "\n\n".join(parts) + "\n")
    write_csv(folder / "comparison.csv", _csv_rows(comparisons))


def _pair(values: Mapping[str, object]) -> str:
    return " / ".join(str(values[key]) for key in KEYS) if values else ""


def _csv_rows(comparisons: Sequence[Comparison]) -> Iterator[list[object]]:
    """A line per row and kind of error; cells of what there is not are empty."""
    columns = ["row", "error", "study"]
    columns += [f"{whose}_{what}" for whose in ("ours", "yours") for what in ("mean", "deviation", "seeds")]
    yield [*columns, "difference", "low", "high", "verdict"]
    for each in comparisons:
        for key in KEYS:
            cells: list[object] = [each.row, key, each.study.get(key, "")]
            for sample in (each.ours.get(key), each.theirs.get(key)):
                cells += _statistics(sample) if sample else ["", "", 0]
            found = each.differences.get(key)
            cells += [_rounded(found.value), _rounded(found.low), _rounded(found.high)] if found else [""] * 3
            yield [*cells, each.verdict]


def _statistics(sample: Sample) -> list[object]:
    deviation = _rounded(statistics.stdev(sample.errors)) if len(sample.errors) > 1 else ""
    return [_rounded(sample.mean), deviation, len(sample.errors)]


def _rounded(error: float) -> str:
    """To a hundredth of an image in 10,000."""
    return f"{error:.6f}"


def printed(comparisons: Sequence[Comparison]) -> str:
    """Return the top-1 errors as a table for a terminal."""
    lines = [
        ["top-1 error, ten-crop", "the study", "ours", "yours", "difference and 95% interval", "verdict"]
    ]
    for each in comparisons:
        study = each.study.get("top1_error")
        lines.append(
            [
                each.row,
                "" if study is None else f"{study:.4f}",
                *(str(side.get("top1_error", "")) for side in (each.ours, each.theirs)),
                str(each.differences.get("top1_error", "")),
                each.verdict,
            ]
        )
    return aligned(lines)
