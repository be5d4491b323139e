"""The committed runs in ``results/``: where they lie, and how others take their place."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from fastalex.errors import ConfigError, OutputError
from fastalex.files import replacing

FILES = ("config.yaml", "losses.png", "metrics.jsonl", "summary.json")  # of a run; its weights are too large
CHECKOUT = Path(__file__).parents[2]


def find(named: str | None) -> Path | None:
    """Return the folder of the committed runs; None where fastalex is installed without one.

    Args:
        named: the folder; None for ``results/`` of the checkout that fastalex runs from.

    Raises:
        ConfigError: there is no such folder.
    """
    if named is None:
        results = CHECKOUT / "results"
        return results if (results / "reproduction.json").is_file() else None
    if not Path(named).is_dir():
        raise ConfigError(
            f"results={named}: is not a folder; leave it out to compare with results/ of fastalex"
        )
    return Path(named)


def check_publishable(results: Path | None) -> Path:
    """Return the folder if runs can be published in it.

    Raises:
        ConfigError: there is no folder, or it is in no git checkout.
    """
    remedy = "run it in a git checkout of fastalex, or name the folder of the committed runs with results="
    if results is None:
        raise ConfigError(f"publish=true: there is no results/ beside {CHECKOUT / 'fastalex'}; {remedy}")
    if not any((folder / ".git").exists() for folder in results.resolve().parents):
        raise ConfigError(
            f"publish=true: {results} is in no git checkout, so nothing would be kept; {remedy}"
        )
    return results


def replace_runs(runs: Iterable[tuple[Path, Path]]) -> None:
    """Copy the small files of finished runs over those of the committed ones.

    Args:
        runs: the folder of each run, and the folder it is copied to.

    Raises:
        OutputError: a file is missing or cannot be written; without one of them, nothing is copied.
    """
    runs = list(runs)
    missing = [run / name for run, _ in runs for name in FILES if not (run / name).is_file()]
    if missing:
        raise OutputError(
            f"{missing[0]}: is missing, so nothing is published; restore it, or train the row again"
        )
    for run, target in runs:
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{target}: cannot be made ({error.strerror})") from error
        for name in FILES:
            with replacing(target / name) as temporary:
                shutil.copyfile(run / name, temporary)
