"""The pictures of docs/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from benchmarks.counts import totals
from benchmarks.expected import fast_step, reference_step
from benchmarks.hardware import ARITHMETIC
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
    """A bar each for reference and fastalex: the milliseconds of a step by part, and the shares of it."""
    records = {(m.record["program"], m.record["part"]): m.record for m in step}
    programs = [program for program in ("fastalex", "reference") if (program, PARTS[0]) in records]
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("median", "share_of_step"), strict=True):
        left = [0.0 for _ in programs]
        for part in PARTS:
            widths = [float(records[program, part][column]) for program in programs]
            bars = axes.barh(programs, widths, left=left, color=COLOURS[part], label=part)
            if column == "share_of_step":
                notes = [f"{width:.0%}" if width > 0.03 else "" for width in widths]
                axes.bar_label(bars, notes, label_type="center", color="white", fontsize=8)
            left = [end + width for end, width in zip(left, widths, strict=True)]
    panels[0].set(xlabel="ms a step")
    panels[0].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panels[1].set(xlabel="share of the step", xlim=(0, 1))
    panels[1].xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(PARTS),
        fontsize=8,
        frameon=False,
    )
    _save(figure, path)


def roofline_points(
    step: Sequence[Measurement], kernels: Sequence[Measurement], dtype: torch.dtype
) -> list[Point]:
    """The whole step of both programs, fastalex's convolutions and matrix products, and its LRN kernels.

    The kernels were measured in another run: they stand at their share of that run's copy.
    """
    points = []
    counts = {"reference": totals(reference_step()), "fastalex": totals(fast_step(dtype))}
    for record in (m.record for m in step):
        program, part = record["program"], record["part"]
        if record["measurement"] == "training" and program in counts:
            flops, moved = (sum(column) for column in zip(*counts[program].values(), strict=True))
            points.append(Point(f"{program}: step", flops / moved, float(record["gflop_per_s"]), "*"))
        if program == "fastalex" and part in (CONVOLUTIONS, PRODUCTS):
            flops, moved = counts[program][part]
            rate = flops / float(record["median"]) / 1e6
            points.append(Point(f"fastalex: {part}", flops / moved, rate, "s"))
    _, copy = limits(step)
    for record in (m.record for m in kernels):
        ours = record["implementation"].startswith("fastalex, ") and record["dtype"] == ARITHMETIC[dtype]
        if ours and record["direction"] == "forward + backward":
            elements = math.prod(map(int, record["shape"].split("x")))
            intensity = LRN_OPERATIONS * elements / int(record["bytes"])
            rate = intensity * float(record["fraction_of_copy"]) * copy
            points.append(Point(f"{record['function']}, {record['shape']}", intensity, rate, "o"))
    return points


def limits(step: Sequence[Measurement]) -> tuple[float, float]:
    """What the machine did: matrix products, GFLOP/s; copies, GB/s."""
    best = {m.record["program"]: m.median for m in step if m.record["measurement"] == "hardware"}
    return best["matrix product"], best["copy"]


def roofline(
    step: Sequence[Measurement], kernels: Sequence[Measurement], dtype: torch.dtype, path: Path
) -> None:
    """What bandwidth and arithmetic allow, and what is (Williams et al., "Roofline", 2009)."""
    product, copy = limits(step)
    points = roofline_points(step, kernels, dtype)
    ridge, end = product / copy, 3 * max(point.intensity for point in points)
    highest = max(product, *(point.gflop_per_s for point in points))  # Winograd's lie above the limit
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([1, ridge, end], [copy, product, product], color="black")
    for text, x, y in ((f"copy: {copy:.1f} GB/s", 1, copy), (f"{product:,.0f} GFLOP/s", ridge, product)):
        axes.annotate(text, (x, y), xytext=(0, 8), textcoords="offset points", ha="right", fontsize=9)
    for point in points:
        axes.plot(point.intensity, point.gflop_per_s, point.marker, ms=8, ls="none", label=point.label)
    axes.set(xscale="log", yscale="log", xlim=(0.3, end), ylim=(copy / 3, 2 * highest))
    axes.set(xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    axes.set_title("Two measured limits, a copy and a matrix product, and how close to them")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right", fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
