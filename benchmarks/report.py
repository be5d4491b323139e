"""What benchmarks write down: percentiles, the machine, a CSV file; for kernels a table and a bar chart too.

All files in `results/*.csv` but faults.csv have one format, which `read_measurements` reads. A line is a
measurement: first the columns that say of what, then the median, its 20th and its 80th percentile, then what
follows from them, and from `hardware` on the machine and the versions. The median's column is named for its
unit, or there is a column `unit`.
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fastalex.files import replacing
from fastalex.runs.folder import versions
from fastalex.runtime import cpu_name

RESULTS = Path(__file__).parent / "results"
FAULTS_FILE = "faults.csv"  # there too, but counts tries
COLOURS = {"eager": "tab:gray", "torch.compile": "tab:orange", "fastalex": "tab:blue"}


@dataclass(frozen=True)
class Row:
    """One implementation's time for one pass; times in ms, bandwidth in GB/s of the bytes that must move.

    `bytes` counts every input once and every output once, whatever the implementation really moves, so
    rows of one pass and dtype compare; `fraction_of_copy` is that bandwidth over a copy's in the same run.
    """

    function: str
    shape: str
    dtype: str
    implementation: str
    direction: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    bytes: int
    gb_per_s: float
    fraction_of_copy: float
    times_faster_than_eager: float | None  # eager fp32; None for a copy, which eager has no equal of


@dataclass(frozen=True)
class Measurement:
    """A line of a file of results.

    Attributes:
        of: what was measured: the columns before the median, but for `unit`.
        unit: of the three figures.
        record: all columns by name, as text.
    """

    of: tuple[str, ...]
    unit: str
    median: float
    p20: float
    p80: float
    record: dict[str, str]

    @property
    def less_is_better(self) -> bool:
        return self.unit in ("s", "ms", "MB")


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    median, low, high = np.percentile(values, [50, 20, 80])
    return float(median), float(low), float(high)


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms."""
    median, low, high = spread(seconds)
    return 1e3 * median, 1e3 * low, 1e3 * high


def machine(device: str) -> dict[str, str]:
    """The hardware and the versions that a figure depends on."""
    cpu = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"  # many processors share one name
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    return {
        "hardware": name,
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "date": date.today().isoformat(),
        **versions(),
    }


def write_csv(rows: Sequence[Any], path: Path, device: str) -> None:
    """Write the rows, dataclasses of one kind, each with the machine, replacing the file at once."""
    about = machine(device)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        records = [{**asdict(row), **about} for row in rows]
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        for record in records:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()})


def measurement_files(results: Path) -> list[Path]:
    """The files in a folder that :func:`read_measurements` reads, by name."""
    return sorted(path for path in results.glob("*.csv") if path.name != FAULTS_FILE)


def read_measurements(text: str) -> list[Measurement]:
    """The lines of a file that `write_csv` wrote.

    Raises:
        ValueError: the text is of another format.
    """
    reader = csv.DictReader(text.splitlines())
    names = list(reader.fieldnames or [])
    first = next((i for i, name in enumerate(names) if name.startswith("p20")), 0)
    if not first or "hardware" not in names or not names[first + 1].startswith("p80"):
        raise ValueError("no columns MEDIAN, p20, p80, hardware")
    of = [name for name in names[: first - 1] if name != "unit"]
    unit = names[first - 1].removeprefix("median_").replace("_per_", "/")
    try:
        return [
            Measurement(
                tuple(record[name] for name in of),
                record.get("unit", unit),
                float(record[names[first - 1]]),
                float(record[names[first]]),
                float(record[names[first + 1]]),
                record,
            )
            for record in reader
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    heads = ["function", "shape", "dtype", "implementation", "pass", "median ms", "p20", "p80"]
    heads += ["GB/s", "of copy", "vs eager"]
    lines = [
        [
            *(row.function, row.shape, row.dtype, row.implementation, row.direction),
            *(f"{value:.2f}" for value in (row.median_ms, row.p20_ms, row.p80_ms)),
            *(
                f"{row.gb_per_s:.2f}",
                f"{row.fraction_of_copy:.2f}",
                f"{row.times_faster_than_eager:.1f}x" if row.times_faster_than_eager else "",
            ),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *lines]
    )


def draw(rows: Sequence[Row], path: Path, device: str) -> None:
    """One panel a function and shape: forward + backward of each implementation and dtype, log scale."""
    both = [row for row in rows if row.direction == "forward + backward"]
    panels = list(dict.fromkeys((row.function, row.shape) for row in both))
    about = machine(device)
    bars = len(both) / len(panels)
    height = 1.6 + (0.7 + 0.2 * bars) * ((len(panels) + 1) // 2)
    figure = Figure(figsize=(14, height), layout="constrained")
    for axes, (function, shape) in zip(figure.subplots(-(-len(panels) // 2), 2).flat, panels, strict=False):
        shown = [row for row in both if (row.function, row.shape) == (function, shape)]
        shown = [row for row in shown if row.implementation != "copy"][::-1]
        colours = [COLOURS[row.implementation.split(",")[0].split(" relu")[0]] for row in shown]
        labels = [f"{row.implementation}, {row.dtype}" for row in shown]
        axes.barh(labels, [row.median_ms for row in shown], color=colours)
        errors = [[r.median_ms - r.p20_ms for r in shown], [r.p80_ms - r.median_ms for r in shown]]
        axes.errorbar(
            [r.median_ms for r in shown], range(len(shown)), xerr=errors, fmt="none", ecolor="black", lw=1
        )
        for position, row in enumerate(shown):
            note = f" {row.median_ms:,.0f} ms" if row.median_ms >= 100 else f" {row.median_ms:.1f} ms"
            if row.implementation != "eager":
                note += f" ({row.times_faster_than_eager:.1f}x)"
            axes.text(row.p80_ms * 1.05, position, note, va="center", fontsize=8)
        axes.set(title=f"{function}, {shape}", xscale="log", xlabel="ms, forward + backward (log scale)")
        axes.set_xlim(min(r.median_ms for r in shown) / 2, max(r.p80_ms for r in shown) * 10)
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(
        f"LRN on {about['hardware']}, {about['threads']} threads, PyTorch {about['torch']}, {about['date']}; "
        "median, lines from the 20th to the 80th percentile,\n"
        "in brackets: how many times faster than eager fp32",
        fontsize=10,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
