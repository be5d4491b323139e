"""Writes docs/benchmarks.md, its pictures, the README's table and what docs/gpu.md says of cards.

python -m benchmarks.docs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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

`make bench` measures what is on this page for machines like yours, with bf16 or without. `python -m
benchmarks.docs` writes the page from the files in [`benchmarks/results/`](../benchmarks/results/), and
`make bench-compare` sets a new run against the committed one. No figure here is typed in.

Programs and kernels that are compared take turns within one run. Figures are medians over the turns; the
range beside one is from the 20th to the 80th percentile.
"""


class ResultsError(Exception):
    """A file of results is missing, or is none."""


def read(results: Path, name: str) -> list[Measurement]:
    """The measurements in a file; none if there is no such file."""
    path = results / name
    try:
        return read_measurements(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise ResultsError(f"{path} is not a file of results: {error}") from error


def page(results: Path) -> str:
    """The page as Markdown.

    Raises:
        ResultsError: there is nothing to show.
    """
    kinds: list[tuple[str, Callable[[list[Measurement], str], list[str]]]] = [
        ("step", sections.step),
        ("lrn", sections.lrn),
        ("augment", sections.augment),
        ("loaders", sections.loaders),
        ("folded_conv", sections.folded),
        ("folded_block", sections.block),
        ("winograd", sections.winograd),
        ("pooled_linear", sections.pooled),
        ("factored_sgd", sections.factored),
    ]
    written = []
    for device in KINDS:
        for name, section in kinds:
            measurements = read(results, f"{name}_{device}.csv")
            if measurements:
                written += [*section(measurements, device), sections.machine(measurements), ""]
            profile = results / f"profile_{device}.txt"
            if name == "step" and profile.exists():
                written += sections.profile(profile.read_text())
    if not written:
        raise ResultsError(f"no {results}/*_cpu.csv, *_cpu_fp32.csv or *_cuda.csv; make bench writes them")
    return "\n".join([INTRODUCTION, *written]).rstrip() + "\n"


def draw(results: Path) -> None:
    """The pictures, beside the files."""
    for device, dtype in KINDS.items():
        step, kernels = read(results, f"step_{device}.csv"), read(results, f"lrn_{device}.csv")
        if step:
            charts.step_parts(step, results / f"step_parts_{device}.png")
            charts.roofline(step, kernels, dtype, results / f"roofline_{device}.png")


def readme(text: str, results: Path) -> str:
    """The README with the table of what was measured between its marks.

    Raises:
        ValueError: it lacks them.
    """
    steps = {device: read(results, f"step_{device}.csv") for device in KINDS}
    measured = {device: step for device, step in steps.items() if step}
    return replace_between(text, BEGIN, END, "\n".join(sections.summary(measured))) if measured else text


def gpu(text: str, results: Path) -> str:
    """docs/gpu.md with what was measured on cards between its marks.

    Raises:
        ValueError: it lacks them.
    """
    measured = cards.section(results)
    return replace_between(text, BEGIN, END, f"\n{measured}\n") if measured else text


def main(arguments: list[str] | None = None) -> None:
    """Write docs/benchmarks.md, its pictures, the README's table and a part of docs/gpu.md from the files in
    benchmarks/results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.docs", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file to write")
    parser.add_argument("--readme", type=Path, default=README, help="the file to write a table into")
    parser.add_argument("--gpu", type=Path, default=GPU, help="the file to write what cards did into")
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
