"""Charts: those of docs/benchmarks.md, and the bars of the LRN kernels."""

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
from benchmarks.report import Measurement, machine
from fastalex.files import replacing

PART_COLOURS = dict(
    zip(PARTS, ("tab:blue", "tab:cyan", "tab:red", "tab:green", "tab:purple", "tab:gray"), strict=True)
)
IMPLEMENTATION_COLOURS = {"eager": "tab:gray", "torch.compile": "tab:orange", "fastalex": "tab:blue"}

# Operations per element, from the formulas: PyTorch's FLOP counter leaves elementwise arithmetic out.
# Forward 12: ReLU, square, 4 sums, alpha and k, x^-0.75 as two roots and a product, times x. Backward 22: the
# same up to x^-0.75, its product with the gradient, 3 for the ratio, 4 sums, 2 products, difference, mask.
LRN_OPERATIONS = 12 + 22


class Point(NamedTuple):
    """A point of the roofline chart: intensity in FLOP per byte, rate in GFLOP/s."""

    label: str
    intensity: float
    gflop_per_s: float
    marker: str


def step_parts(step: Sequence[Measurement], path: Path) -> None:
    """Draw a step's time by part, in ms and as shares, with one bar each for fastalex and the reference."""
    records = {(m["program"], m["part"]): m for m in step}
    programs = [program for program in ("fastalex", "reference") if (program, PARTS[0]) in records]
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("median", "share_of_step"), strict=True):
        left = [0.0 for _ in programs]
        for part in PARTS:
            widths = [float(records[program, part][column]) for program in programs]
            bars = axes.barh(programs, widths, left=left, color=PART_COLOURS[part], label=part)
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
    """Both programs' whole steps, fastalex's convolutions and matrix products, and its LRN kernels.

    The kernels were measured in another run: their fraction of that run's copy bandwidth is applied to the
    copy bandwidth of this one.
    """
    points = []
    counts = {"reference": totals(reference_step()), "fastalex": totals(fast_step(dtype))}
    for m in step:
        program, part = m["program"], m["part"]
        if m["measurement"] == "training" and program in counts:
            flops, moved = (sum(column) for column in zip(*counts[program].values(), strict=True))
            points.append(Point(f"{program}: step", flops / moved, float(m["gflop_per_s"]), "*"))
        if program == "fastalex" and part in (CONVOLUTIONS, PRODUCTS):
            flops, moved = counts[program][part]
            rate = flops / m.median / 1e6
            points.append(Point(f"fastalex: {part}", flops / moved, rate, "s"))
    _, copy = limits(step)
    for m in kernels:
        ours = m["implementation"].startswith("fastalex, ") and m["dtype"] == ARITHMETIC[dtype]
        if ours and m["direction"] == "forward + backward":
            elements = math.prod(map(int, m["shape"].split("x")))
            intensity = LRN_OPERATIONS * elements / int(m["bytes"])
            rate = intensity * float(m["fraction_of_copy"]) * copy
            points.append(Point(f"{m['function']}, {m['shape']}", intensity, rate, "o"))
    return points


def limits(step: Sequence[Measurement]) -> tuple[float, float]:
    """The measured limits of the machine: matrix products in GFLOP/s, copies in GB/s."""
    best = {m["program"]: m.median for m in step if m["measurement"] == "hardware"}
    return best["matrix product"], best["copy"]


def roofline(
    step: Sequence[Measurement], kernels: Sequence[Measurement], dtype: torch.dtype, path: Path
) -> None:
    """Draw the machine's limits and what was reached (Williams et al., "Roofline", 2009)."""
    product, copy = limits(step)
    points = roofline_points(step, kernels, dtype)
    ridge, end = product / copy, 3 * max(point.intensity for point in points)
    highest = max(product, *(point.gflop_per_s for point in points))  # Winograd's may lie above the limit
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


def lrn(measurements: Sequence[Measurement], path: Path, device: str) -> None:
    """Draw the LRN kernels' times, forward + backward, on a log scale: one panel per function and shape."""
    both = [m for m in measurements if m["direction"] == "forward + backward"]
    panels = list(dict.fromkeys((m["function"], m["shape"]) for m in both))
    about = machine(device)
    bars = len(both) / len(panels)
    height = 1.6 + (0.7 + 0.2 * bars) * ((len(panels) + 1) // 2)
    figure = Figure(figsize=(14, height), layout="constrained")
    for axes, (function, shape) in zip(figure.subplots(-(-len(panels) // 2), 2).flat, panels, strict=False):
        shown = [m for m in both if (m["function"], m["shape"]) == (function, shape)][::-1]
        names = [m["implementation"] for m in shown]
        colours = [IMPLEMENTATION_COLOURS[name.split(",")[0].split(" relu")[0]] for name in names]
        labels = [f"{name}, {m['dtype']}" for name, m in zip(names, shown, strict=True)]
        medians = [m.median for m in shown]
        axes.barh(labels, medians, color=colours)
        errors = [[m.median - m.p20 for m in shown], [m.p80 - m.median for m in shown]]
        axes.errorbar(medians, range(len(shown)), xerr=errors, fmt="none", ecolor="black", lw=1)
        for position, m in enumerate(shown):
            note = f" {m.median:,.0f} ms" if m.median >= 100 else f" {m.median:.1f} ms"
            if m["implementation"] != "eager":
                note += f" ({m['times_faster_than_eager']:.1f}x)"
            axes.text(m.p80 * 1.05, position, note, va="center", fontsize=8)
        axes.set(title=f"{function}, {shape}", xscale="log", xlabel="ms, forward + backward (log scale)")
        axes.set_xlim(min(medians) / 2, max(m.p80 for m in shown) * 10)
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(
        f"LRN on {about['hardware']}, {about['threads']} threads, PyTorch {about['torch']}, {about['date']}; "
        "median, lines from the 20th to the 80th percentile,\n"
        "in brackets: how many times faster than eager fp32",
        fontsize=10,
    )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
