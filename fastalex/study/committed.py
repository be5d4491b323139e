"""The committed runs in ``results/``: where they lie, and how others take their place."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from omegaconf import OmegaConf

from fastalex.config import DataConfig
from fastalex.errors import ConfigError, OutputError
from fastalex.files import replacing, write_text
from fastalex.study.rows import ROWS, run_folder

CONFIG = "config.yaml"
FILES = (CONFIG, "metrics.jsonl", "summary.json")  # of a run; its weights are too large
PLOT = "losses.png"  # not of the rows of a group, whose runs are too many
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


def replace_runs(results: Path, runs: Iterable[tuple[str, int, Path]]) -> None:
    """Copy the small files of finished runs over those of the committed ones, without the images' folder.

    Args:
        results: the folder of the committed runs.
        runs: row, seed and folder of each run.

    Raises:
        OutputError: a file is missing or cannot be written; without one of them, nothing is copied.
    """
    copies = [
        (folder / file, run_folder(results, name, seed) / file)
        for name, seed, folder in runs
        for file in (FILES if ROWS[name].group else (*FILES, PLOT))
    ]
    missing = [file for file, _ in copies if not file.is_file()]
    if missing:
        raise OutputError(
            f"{missing[0]}: is missing, so nothing is published; restore it, or train the row again"
        )
    for file, target in copies:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{target.parent}: cannot be made ({error.strerror})") from error
        if file.name == CONFIG:
            content = OmegaConf.load(file)
            OmegaConf.update(content, "data.root", DataConfig.root)  # a folder of the maintainer's machine
            write_text(target, OmegaConf.to_yaml(content))
            continue
        with replacing(target) as temporary:
            shutil.copyfile(file, temporary)
