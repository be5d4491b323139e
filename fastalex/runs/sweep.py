"""The table and the picture of a sweep: one training for each combination of the values that were given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalex import plots
from fastalex.cli import Job
from fastalex.files import write_csv
from fastalex.runs.folder import METRICS, SUMMARY

TABLE, PICTURE = "sweep.csv", "sweep.png"
SEED = "seed"


def write_sweep(folder: Path, jobs: Sequence[Job]) -> None:
    """Write ``sweep.csv``, and ``sweep.png`` if errors were measured; neither before a run is finished.

    Args:
        folder: of the sweep.
        jobs: the runs so far, finished or not.

    Raises:
        OutputError: a file cannot be written.
    """
    figures = [_figures(job) for job in jobs]
    if not any(figures):
        return
    swept = _swept(jobs)
    rows = [
        {
            "run": job.number,
            **{key: job.overrides.get(key, "") for key in swept},
            **of_job,
            "folder": job.folder,
            "error": job.error,
        }
        for job, of_job in zip(jobs, figures, strict=True)
    ]
    columns = dict.fromkeys(["run", *swept, *(key for of_job in figures for key in of_job)])
    names = [*columns, "folder", "error"]
    write_csv(folder / TABLE, [names, *([row.get(name, "") for name in names] for row in rows)])
    _draw(folder / PICTURE, swept, rows, failed=sum(bool(job.error) for job in jobs))


def _swept(jobs: Sequence[Job]) -> list[str]:
    """Return the keys of which the runs have different values, the seed last."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    varied = [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]
    return sorted(varied, key=lambda key: key == SEED)


def _figures(job: Job) -> dict[str, Any]:
    """Return the columns of a finished run; nothing for another."""
    if job.error:  # its folder may hold an earlier run
        return {}
    try:
        summary = json.loads((job.folder / SUMMARY).read_text())
        last = json.loads((job.folder / METRICS).read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    best = summary.get("best_on_validation", {})
    views = {"single_crop": summary.get("single_crop", {}), "ten_crop": summary.get("ten_crop", {})}
    return {
        "validation_top1_error": last["validation_top1_error"],
        "best_validation_top1_error": best.get("validation_top1_error"),
        "best_epoch": best.get("epoch"),
        "train_loss": last["train_loss"],
        **{
            f"test_{name}_{error}": errors.get(error)
            for name, errors in views.items()
            for error in ("top1_error", "top5_error")
        },
        "epochs": summary["epochs"],
        "images_per_second": round(summary["images_per_second"], 1),
        "wall_seconds": round(summary["wall_seconds"], 1),
    }


def _draw(path: Path, swept: Sequence[str], rows: Sequence[Mapping[str, Any]], failed: int) -> None:
    """Draw the validation error against the first swept key, a line for each combination of the others.

    The test error is in the table and not drawn: who chooses a setting by the picture does not use it.
    """
    measured = [row for row in rows if row.get("validation_top1_error") is not None]
    if not measured or not swept:
        return
    key, *others = swept
    points: dict[str, dict[str, list[float]]] = {}
    for row in measured:
        line = ", ".join(f"{other}={row[other]}" for other in others if other != SEED)
        value = "all seeds" if key == SEED else row[key]
        points.setdefault(line, {}).setdefault(value, []).append(row["validation_top1_error"])
    note = f"without {failed} of {len(rows)} runs, which failed" if failed else ""
    plots.sweep(points, key, note, path)
