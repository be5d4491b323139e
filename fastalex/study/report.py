"""Statistics over the runs of the rows, and the tables and figures of the reproduction."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastalex import plots
from fastalex.files import write_text
from fastalex.markdown import replace_between, table
from fastalex.study import claims
from fastalex.study.results import NOT_RUN, FinishedRun, load_run
from fastalex.study.rows import CLAIMS, ROWS, Row

BEGIN, END = "<!-- reproduction: begin -->", "<!-- reproduction: end -->"


def collect(results: Path, quick: bool) -> dict[str, Any]:
    """Gather the figures of all rows, as ``reproduction.json`` holds them."""
    rows: dict[str, Any] = {}
    for name, row in ROWS.items():
        runs = [run for seed in row.seeds if (run := load_run(results, name, seed))]
        rows[name] = {
            "title": f"{ROWS[row.base].title}, {row.title}" if row.base else row.title,
            "command": f"python -m fastalex.train --config-name=row/{name}",
            "published": dict(zip(("top1_error", "top5_error"), row.published, strict=True))
            if row.published
            else None,
            "status": "complete" if len(runs) == len(row.seeds) else "partial" if runs else NOT_RUN,
            "runs": [_record(run, row, results) for run in runs],
        }
        if runs:
            rows[name]["statistics"] = {key: _statistics(rows[name]["runs"], key) for key in FIGURES}
    return {"budget": "quick" if quick else "full", "rows": rows}


# The figures of a run that a table shows.
FIGURES = (
    "ten_crop_top1_error",
    "ten_crop_top5_error",
    "single_crop_top1_error",
    "single_crop_top5_error",
    "best_ten_crop_top1_error",
    "best_ten_crop_top5_error",
    "best_single_crop_top1_error",
    "best_single_crop_top5_error",
)


def _record(run: FinishedRun, row: Row, results: Path) -> dict[str, Any]:
    best = run.summary["best_on_validation"]
    record: dict[str, Any] = {}
    for prefix, source in (("", run.summary), ("best_", best)):
        for crops in ("ten_crop", "single_crop"):
            for errors in ("top1_error", "top5_error"):
                record[f"{prefix}{crops}_{errors}"] = source[crops][errors]
    return record | {
        "seed": run.config["seed"],
        "folder": run.folder.relative_to(results).as_posix(),
        "data": run.summary["data"],
        "test_images": run.summary["ten_crop"]["images"],
        "crops": run.crops,
        "epochs": run.summary["epochs"],
        "best_epoch": best["epoch"],
        "training_top1_errors": [epoch["train_top1_error"] for epoch in run.epochs],
        "validation_top1_error": run.epochs[-1]["validation_top1_error"],
        "best_validation_top1_error": best["validation_top1_error"],
        "epochs_to_published_error": run.epochs_to(row.published[0]) if row.published else None,
        "images_seen": run.images_seen,
        "wall_seconds": run.summary["wall_seconds"],
        "images_per_second": run.summary["images_per_second"],
        "parameters": run.summary["parameters"],
        "hardware": run.summary["hardware"],
        "runtime": run.summary["runtime"],
        "versions": run.summary["versions"],
    }


def _statistics(records: Sequence[dict[str, Any]], key: str) -> dict[str, float | None]:
    values = [record[key] for record in records]
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def write(results: Path, quick: bool, readme: Path | None) -> dict[str, Any]:
    """Write ``reproduction.json``, ``reproduction.md``, the loss figures and the README's table.

    Args:
        results: the folder of the rows' runs.
        quick: whether they are of the quick budget; everything written then says so.
        readme: a file with the two markers, between which the table goes; others are left alone.

    Returns:
        The content of ``reproduction.json``.
    """
    content = collect(results, quick)
    results.mkdir(parents=True, exist_ok=True)
    write_text(results / "reproduction.json", json.dumps(content, indent=2) + "\n")
    write_text(results / "reproduction.md", markdown(content))
    claims.write(results, content["rows"])
    for name, row in ROWS.items():
        run = load_run(results, name, row.seeds[0]) if row.figure else None
        if run:
            title = f"{row.title} on {run.summary['data']}" + (", quick budget" if quick else "")
            plots.loss_curves(run.epochs, title, results / row.figure)
    if readme is not None and readme.is_file():
        text = readme.read_text(encoding="utf-8")
        with suppress(ValueError):  # it has no marks
            text = replace_between(text, BEGIN, END, summary_table(content))
            write_text(readme, text)
    return content


def summary_table(content: dict[str, Any]) -> str:
    """Return the README's table: the study's errors beside ours."""
    rows = []
    for name, entry in content["rows"].items():
        if ROWS[name].group != CLAIMS and (entry["published"] or entry["runs"]):
            first = entry["runs"][0] if entry["runs"] else {}
            rows.append(
                [
                    entry["title"],
                    _published(entry),
                    _figures(entry, "ten_crop"),
                    _figures(entry, "single_crop"),
                    _crops(first),
                    str(first.get("epochs", "")),
                ]
            )
    heads = ["network", "the study, ten-crop", "fastalex, ten-crop", "single crop", "crop", "epochs"]
    caption = f"*Top-1 / top-5 test error of the final weights{_data(content)}.*"
    return f"{table(heads, rows)}\n\n{caption}"


def markdown(content: dict[str, Any]) -> str:
    """Return ``reproduction.md``."""
    quick = content["budget"] == "quick"
    parts = ["# Reproduction" + (", quick budget" if quick else "")]
    if quick:
        parts.append(
            "**These runs prove the path, not the rows: each is a few epochs on scikit-learn's digits. "
            "No figure here says anything about CIFAR-10.**"
        )
    parts.append(
        "Written by `python -m fastalex.reproduce"
        + (" budget=quick" if quick else "")
        + "` from the runs in "
        f"this folder. Errors{_data(content)} are shares of the test images, top-1 / top-5, of the final "
        "weights; rows of several seeds give the mean and, after ±, the standard deviation. A row's settings "
        "are fixed before its run, by the training and validation errors of earlier ones; where their test "
        "errors had been seen by then, `docs/recipe.md` says so."
    )
    rows = {name: row for name, row in content["rows"].items() if row["runs"] or not ROWS[name].group}
    errors, costs = [], []
    for name, entry in rows.items():
        label = f"{entry['title']} (`{name}`)"
        best_epochs = ", ".join(str(run["best_epoch"]) for run in entry["runs"])
        errors.append(
            [
                label,
                _published(entry),
                *(_figures(entry, crops) for crops in ("ten_crop", "single_crop")),
                best_epochs,
                *(_figures(entry, crops) for crops in ("best_ten_crop", "best_single_crop")),
            ]
        )
        for run in entry["runs"]:
            costs.append(
                [
                    f"`{run['folder']}`",
                    _crops(run),
                    str(run["epochs"]),
                    f"{run['images_seen']:,}",
                    _reached(entry, run),
                    _duration(run["wall_seconds"]),
                    f"{run['images_per_second']:,.1f}",
                    f"{run['parameters']:,}",
                    str(run["seed"]),
                    run["runtime"],
                ]
            )
    heads = ["row", "the study, ten-crop", "ten-crop", "single crop"]
    heads += ["best on validation: epoch", "its ten-crop", "its single crop"]
    parts += ["## Errors", table(heads, errors)]
    heads = ["run", "crop", "epochs", "images seen", "epochs to the study's error, on validation"]
    heads += ["wall time", "images/s", "parameters", "generator seed", "hardware"]
    parts += ["## What they took", table(heads, costs) if costs else "No row has been run."]
    if claims.examined(content["rows"]):
        parts += ["## The claims", "What differences between rows say of the paper: [claims.md](claims.md)."]
    figures = [row for name, row in ROWS.items() if row.figure and content["rows"][name]["runs"]]
    if figures:
        parts.append("## Losses")
        parts += [f"![{row.title}]({row.figure})" for row in figures]
    parts.append("## To run a row again")
    parts.append("\n".join(f"- {entry['title']}: `{entry['command']}`" for entry in rows.values()))
    return "\n\n".join(parts) + "\n"


def _published(entry: dict[str, Any]) -> str:
    published = entry["published"]
    return f"{published['top1_error']:.4f} / {published['top5_error']:.4f}" if published else ""


def _data(content: dict[str, Any]) -> str:
    """On which images: what the runs call their data."""
    names = dict.fromkeys(run["data"] for entry in content["rows"].values() for run in entry["runs"])
    return f" on {' and '.join(names)}" if names else ""


def _crops(run: dict[str, Any]) -> str:
    return ", ".join(map(str, run.get("crops", [])))


def _figures(entry: dict[str, Any], crops: str) -> str:
    if not entry["runs"]:
        return NOT_RUN
    parts = []
    for errors in ("top1_error", "top5_error"):
        figures = entry["statistics"][f"{crops}_{errors}"]
        deviation = figures["standard_deviation"]
        parts.append(f"{figures['mean']:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}"))
    count = len(entry["runs"])
    missing = f" ({count} seed{'s' * (count > 1)} only)" if entry["status"] == "partial" else ""
    return " / ".join(parts) + missing


def _reached(entry: dict[str, Any], run: dict[str, Any]) -> str:
    if entry["published"] is None:
        return ""
    return str(run["epochs_to_published_error"] or "not reached")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
