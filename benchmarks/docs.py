"""Writes docs/benchmarks.md, its pictures, the README's table and the results of GPUs in docs/gpu.md.

python -m benchmarks.docs
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import charts, sections
from benchmarks.card import page as cards
from benchmarks.hardware import KINDS
from benchmarks.report import RESULTS, Measurement, read_measurements
from fastalex.errors import OutputError
from fastalex.files import write_text
from fastalex.markdown import replace_between

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
README = Path(__file__).parents[1] / "README.md"
GPU = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- python -m benchmarks.docs writes this -->", "<!-- to here -->"

INTRODUCTION = """# Benchmarks

`make bench` measures what is on this page for machines like yours: CPUs whose vector units compute in bf16,
those that have matrix units for it besides (AMX, of newer Intel Xeons), and those without bf16. `python -m
benchmarks.docs` writes the page from the files in [`benchmarks/results/`](../benchmarks/results/), and
`make bench-compare` sets a new run against the committed one. No figure here is typed in.

Programs and kernels that are compared take turns within one run. Figures are medians over the turns; the
range beside one is from the 20th to the 80th percentile.
"""


class ResultsError(Exception):
    """There are no results, or a file has another format."""


def read(results: Path, name: str) -> list[Measurement]:
    """The measurements in a file; none if there is no such file."""
    path = results / name
    try:
        return read_measurements(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise ResultsError(f"{path} is not a file of results: {error}") from error


def page(results: Path) -> str:
    """The text of docs/benchmarks.md.

    Raises:
        ResultsError: there are no results, or a file has another format.
    """
    written = []
    for kind in KINDS:
        step = read(results, f"step_{kind}.csv")
        if step:
            written += [*sections.step(step, kind), sections.machine_line(step), ""]
        profile = results / f"profile_{kind}.txt"
        if profile.exists():
            written += sections.profile(profile.read_text())
        for section in sections.SECTIONS:
            measurements = read(results, f"{section.file}_{kind}.csv")
            if measurements:
                written += [*section.lines(measurements, kind), sections.machine_line(measurements), ""]
    if not written:
        raise ResultsError(
            f"no {results}/*_KIND.csv, where KIND is one of {', '.join(KINDS)}; make bench writes them"
        )
    return "\n".join([INTRODUCTION, *written]).rstrip() + "\n"


def draw(results: Path) -> None:
    """Draw the pictures of docs/benchmarks.md into the folder of the results."""
    for kind, dtype in KINDS.items():
        step, kernels = read(results, f"step_{kind}.csv"), read(results, f"lrn_{kind}.csv")
        if step:
            charts.step_parts(step, results / f"step_parts_{kind}.png")
            charts.roofline(step, kernels, dtype, results / f"roofline_{kind}.png")


def readme(text: str, results: Path) -> str:
    """The text of README.md with the table of training speeds between its marks.

    Raises:
        ValueError: the text lacks the marks.
    """
    steps = {kind: read(results, f"step_{kind}.csv") for kind in KINDS}
    measured = {kind: step for kind, step in steps.items() if step}
    return replace_between(text, BEGIN, END, sections.summary(measured)) if measured else text


def gpu(text: str, results: Path) -> str:
    """The text of docs/gpu.md with the results of all GPUs between its marks.

    Raises:
        ValueError: the text lacks the marks.
    """
    measured = cards.section(results)
    return replace_between(text, BEGIN, END, f"\n{measured}\n") if measured else text


def main(arguments: list[str] | None = None) -> None:
    """Write docs/benchmarks.md, its pictures, the README's table and a part of docs/gpu.md from the files in
    benchmarks/results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.docs", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of results")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file to write")
    parser.add_argument("--readme", type=Path, default=README, help="the file to write a table into")
    parser.add_argument("--gpu", type=Path, default=GPU, help="the file to write the results of GPUs into")
    args = parser.parse_args(arguments)
    changed = args.readme
    try:
        text = page(args.results)
        with_table = readme(args.readme.read_text(encoding="utf-8"), args.results)
        changed = args.gpu
        with_cards = gpu(args.gpu.read_text(encoding="utf-8"), args.results)
        draw(args.results)
        write_text(args.page, text)
        write_text(args.readme, with_table)
        write_text(args.gpu, with_cards)
    except (ResultsError, OutputError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {changed}: {error}\n")
    print(f"wrote {args.page}, {args.readme} and {args.gpu}")


if __name__ == "__main__":
    main()
