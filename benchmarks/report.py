"""Measurements, the machine that they depend on, and the CSV files in `results/`.

Every `results/*.csv` but faults.csv has one format, which `read_measurements` reads, with one measurement per
line: first the columns that say what was measured, then the median, the 20th and the 80th percentile, then
derived figures, and from `hardware` on the machine and the versions. A file whose figures have one unit may
name it in the header (`median_ms`, `images_per_s`); the others have a column `unit`.
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastalex.files import replacing
from fastalex.runtime import cpu_name, versions

RESULTS = Path(__file__).parent / "results"
FAULTS_FILE = "faults.csv"  # in the same folder, but it counts tries
# Columns of median, 20th and 80th percentile in a file whose header names the unit.
UNIT_IN_HEADER = {"ms": ("median_ms", "p20_ms", "p80_ms"), "images/s": ("images_per_s", "p20", "p80")}


@dataclass(frozen=True)
class Measurement:
    """A figure with its spread: one line of a results file.

    ``measurement[column]`` is the value of any column.

    Attributes:
        subject: what was measured: values by column, as text if read from a file.
        unit: of the three figures.
        median: of the values.
        p20: their 20th percentile.
        p80: their 80th percentile.
        more: the columns that follow, by name: rounds, derived figures and, if read from a file, the machine,
            all as text.
    """

    subject: dict[str, Any]
    unit: str
    median: float
    p20: float
    p80: float
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: dict[str, Any], unit: str, values: Sequence[float], **derived: Any) -> Measurement:
        """Summarise values, one per round; the number of rounds comes before the derived figures."""
        return cls(subject, unit, *spread(values), {"rounds": len(values), **derived})

    @classmethod
    def of_times(cls, subject: dict[str, Any], seconds: Sequence[float], **derived: Any) -> Measurement:
        """Summarise times, one per round, in ms."""
        return cls.of(subject, "ms", [1e3 * value for value in seconds], **derived)

    @property
    def record(self) -> dict[str, Any]:
        """All columns, in order, with the unit in a column of its own."""
        figures = {"unit": self.unit, "median": self.median, "p20": self.p20, "p80": self.p80}
        return {**self.subject, **figures, **self.more}

    def __getitem__(self, column: str) -> Any:
        return self.record[column]

    @property
    def less_is_better(self) -> bool:
        return self.unit in ("s", "ms", "MB")


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    median, low, high = np.percentile(values, [50, 20, 80])
    return float(median), float(low), float(high)


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


def write_records(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file with the columns of the first record, replacing an existing file atomically."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def read_records(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(measurements: Sequence[Measurement], path: Path, device: str, unit: str | None = None) -> None:
    """Write a results file: measurements with the same columns, each with the machine.

    Args:
        measurements: at least one.
        path: replaced atomically if it exists.
        device: ``cpu`` or ``cuda``, whose name goes into the column `hardware`.
        unit: of all measurements, if the header is to name it: ``ms`` or ``images/s``.
    """
    about = machine(device)
    records = []
    for m in measurements:
        record = {**m.record, **about}
        if unit:
            figures = dict(zip(UNIT_IN_HEADER[unit], (m.median, m.p20, m.p80), strict=True))
            record = {**m.subject, **figures, **m.more, **about}
        records.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()})
    write_records(records, path)


def measurement_files(results: Path) -> list[Path]:
    """The files in a folder that :func:`read_measurements` reads, by name."""
    return sorted(path for path in results.glob("*.csv") if path.name != FAULTS_FILE)


def read_measurements(text: str) -> list[Measurement]:
    """The lines of a results file.

    Raises:
        ValueError: the text has another format.
    """
    reader = csv.DictReader(text.splitlines())
    names = list(reader.fieldnames or [])
    first = next((i for i, name in enumerate(names) if name.startswith("p20")), 0)
    if not first or "hardware" not in names or not names[first + 1].startswith("p80"):
        raise ValueError("no columns MEDIAN, p20, p80, hardware")
    subject = [name for name in names[: first - 1] if name != "unit"]
    median, p20, p80, *more = names[first - 1 :]
    unit = median.removeprefix("median_").replace("_per_", "/")
    try:
        return [
            Measurement(
                {name: record[name] for name in subject},
                record.get("unit", unit),
                float(record[median]),
                float(record[p20]),
                float(record[p80]),
                {name: record[name] for name in more},
            )
            for record in reader
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text, with the columns aligned at the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
