"""The pictures of docs/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.counts import totals
from benchmarks.expected import fast_step, reference_step
from benchmarks.parts import CONVOLUTIONS, PARTS, PRODUCTS
from benchmarks.report import Measurement
from fastalex.files import replacing

COLOURS = dict(
    zip(PARTS, ("tab:blue", "tab:cyan", "tab:red", "tab:green", "tab:purple", "tab:gray"), strict=True)
)

# Forward and backward, an element, from the formulas; the counter of FLOPs leaves elementwise arithmetic out.
# Forward 12: ReLU, square, 4 sums, alpha and k, x^-0.75 as two roots and a product, times x. Backward 22: the
# same up to x^-0.75, its product with the gradient, 3 for the ratio, 4 sums, 2 products, difference, mask.
LRN_OPERATIONS = 12 + 22


class Point(NamedTuple):
    """A place on the roofline: FLOP per byte, GFLOP/s."""

    label: str
    intensity: float
    gflop_per_s: float
    marker: str


def step_parts(step: Sequence[Measurement], path: Path) -> None:
    """A bar each for reference and fastalex: the milliseconds of the step, by part."""
    shown = [m.record for m in step if m.record["measurement"] == "step by part"]
    programs = list(dict.fromkeys(record["program"] for record in shown))[::-1]
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(programs, 0.0)
    for part in PARTS:
        records = [r for program in programs for r in shown if (r["program"], r["part"]) == (program, part)]
        widths = [float(record["median"]) for record in records]
        bars = axes.barh(programs, widths, left=list(left.values()), color=COLOURS[part], label=part)
        notes = [
            f"{float(r['share_of_step']):.0%}" if float(r["share_of_step"]) > 0.04 else "" for r in records
        ]
        axes.bar_label(bars, notes, label_type="center", color="white", fontsize=8)
        for program, width in zip(programs, widths, strict=True):
            left[program] += width
    axes.set(xlabel="ms a step; in the bars: share of the step", title="Where a training step's time goes")
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=8, frameon=False)
    _save(figure, path)


def roofline_points(step: Sequence[Measurement], kernels: Sequence[Measurement]) -> list[Point]:
    """The whole step of both programs, fastalex's convolutions and matrix products, and its LRN kernels."""
    points = []
    counts = {"reference": totals(reference_step()), "fastalex": totals(fast_step())}
    for record in (m.record for m in step):
        program, part = record["program"], record["part"]
        if record["measurement"] == "training" and program in counts:
            flops, moved = (sum(column) for column in zip(*counts[program].values(), strict=True))
            points.append(Point(f"{program}: step", flops / moved, float(record["gflop_per_s"]), "*"))
        if program == "fastalex" and part in (CONVOLUTIONS, PRODUCTS):
            flops, moved = counts[program][part]
            points.append(Point(part, flops / moved, flops / float(record["median"]) / 1e6, "s"))
    for record in (m.record for m in kernels):
        ours = record["implementation"].startswith("fastalex, ") and record["dtype"] == "bf16"
        if ours and record["direction"] == "forward + backward":
            elements = math.prod(map(int, record["shape"].split("x")))
            intensity = LRN_OPERATIONS * elements / int(record["bytes"])
            label = f"{record['function']}, {record['shape']}"
            points.append(Point(label, intensity, intensity * float(record["gb_per_s"]), "o"))
    return points


def roofline(step: Sequence[Measurement], kernels: Sequence[Measurement], path: Path) -> None:
    """What bandwidth and arithmetic allow, and what is (Williams et al., "Roofline", 2009)."""
    limits = {m.record["program"]: m.median for m in step if m.record["measurement"] == "hardware"}
    product, copy = limits["matrix product"], limits["copy"]
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    ridge = product / copy
    axes.plot([1, ridge, 20 * ridge], [copy, product, product], color="black")
    axes.annotate(f"copy: {copy:.1f} GB/s", (1.3, 1.5 * copy), rotation=30, fontsize=9)
    axes.annotate(f"matrix product: {product:,.0f} GFLOP/s", (1.5 * ridge, 1.1 * product), fontsize=9)
    for point in roofline_points(step, kernels):
        axes.plot(point.intensity, point.gflop_per_s, point.marker, ms=8, label=point.label)
    _logarithmic(axes)
    axes.legend(loc="lower right", fontsize=8)
    _save(figure, path)


def _logarithmic(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    axes.set_title("Roofline: two measured limits, and how close to them")
    axes.grid(alpha=0.3, which="both")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
