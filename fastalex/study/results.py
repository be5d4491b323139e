"""Finished runs, as they are read from their folders."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastalex.config.plain import load_config
from fastalex.errors import OutputError
from fastalex.study.rows import run_folder

NOT_RUN = "not run"


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        folder: of the run.
        summary: ``summary.json``.
        epochs: the lines of ``metrics.jsonl``.
        config: ``config.yaml``.
    """

    folder: Path
    summary: dict[str, Any] = field(repr=False)
    epochs: list[dict[str, Any]] = field(repr=False)
    config: dict[str, Any] = field(repr=False)

    @property
    def images_seen(self) -> int:
        return int(self.summary["steps"] * self.config["train"]["batch_size"])

    @property
    def crops(self) -> list[int]:
        """The crops that it was trained at, one after another; the last is what it was tested at."""
        stages = self.config["train"]["stages"]
        return list(dict.fromkeys([*(stage["crop"] for stage in stages), self.config["data"]["crop"]]))

    def epochs_to(self, error: float) -> int | None:
        """Return the first epoch after which the validation error is at most this; None if there is none."""
        for epoch in self.epochs:
            if epoch["validation_top1_error"] is not None and epoch["validation_top1_error"] <= error:
                return int(epoch["epoch"])
        return None


def load_run(results: Path, name: str, seed: int) -> FinishedRun | None:
    """Read a row's finished run; None where there is none, or one that is not finished."""
    return read_run(run_folder(results, name, seed))


def read_run(folder: Path) -> FinishedRun | None:
    """Read a finished run; None where there is none, or one that is not finished.

    Raises:
        OutputError: if its files cannot be read, or lack the errors of the weights best on validation.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        epochs = [json.loads(line) for line in lines]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder}: its files are damaged ({error}); move the folder away") from error
    if "best_on_validation" not in summary:
        raise OutputError(
            f"{folder}: summary.json has no best_on_validation: the run was not validated, or had lost its "
            "best.safetensors by its end; move the folder away and run it again"
        )
    return FinishedRun(folder, summary, epochs, load_config(folder))
