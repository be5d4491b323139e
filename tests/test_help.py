"""What ``--help`` offers, beside the files that there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastalex import cli

CONFIGS = Path(cli.__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("module", "groups"),
    [
        ("fastalex.train", {"data", "loader", "model", "recipe"}),
        ("fastalex.diagnose", {"data", "loader", "model", "recipe"}),
        ("fastalex.data.write_beton", {"data"}),
        ("fastalex.evaluate", set()),
        ("fastalex.predict", set()),
        ("fastalex.export", set()),
        ("fastalex.reproduce", set()),
    ],
)
def test_it_lists_the_choices_that_there_are(module: str, groups: set[str]) -> None:
    run = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    before, _, keys = run.stdout.partition("Every key, to be set by key=value:")
    assert keys.strip()
    assert "schema" not in run.stdout
    listed = dict(line.split(": ", 1) for line in before.splitlines() if ": " in line)
    files = {name: sorted(file.stem for file in (CONFIGS / name).glob("*.yaml")) for name in groups}
    assert {name: choices.split(", ") for name, choices in listed.items()} == files


@pytest.mark.parametrize("argument", ["--help", "train.epoch=3"])
def test_it_does_not_wait_for_pytorch(argument: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fastalex.train", argument]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "fastalex.cli" in imported
    assert not imported & {"torch", "numpy"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("recipe=seed", "recipe=study"),
        ("recipe=fast,seed", "recipe=fast,study"),
        ("rows=alexnet,alexnet_seed_recipe", "rows=alexnet,alexnet_study_recipe"),
        ("--config-name=row/alexnet_seed_recipe", "--config-name=row/alexnet_study_recipe"),
    ],
)
def test_an_old_name_still_works_with_a_warning(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._renamed(old) == new
    assert capsys.readouterr().err == f"fastalex: warning: {old} is now called {new}\n"


@pytest.mark.parametrize("argument", ["seed=1", "recipe=study", "hydra.run.dir=results/alexnet_seed_recipe"])
def test_other_arguments_are_left_alone(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._renamed(argument) == argument
    assert capsys.readouterr().err == ""
