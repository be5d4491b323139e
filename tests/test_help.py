"""What ``--help`` offers, beside the files that there are."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastalex import cli, train
from fastalex.config import Config
from fastalex.config.meanings import with_meanings
from tests.commands import outcome

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
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_it_lists_the_choices_that_there_are(
    module: str, groups: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as end:  # in this process, which need not import PyTorch again
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0
    text = capsys.readouterr().out
    before, _, keys = text.partition("Every key, to be set by key=value:")
    assert keys.strip()
    assert "schema" not in text
    listed = dict(line.split(": ", 1) for line in before.splitlines() if ": " in line)
    files = {name: sorted(file.stem for file in (CONFIGS / name).glob("*.yaml")) for name in groups}
    assert {name: choices.split(", ") for name, choices in listed.items()} == files


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["--version"], "Hydra 1."),
        (["--hydra-help"], "--multirun"),
        (["--cfg", "job", "seed=5"], "seed: 5"),
        (["-c", "job", "-cn", "row/alexnet_bn"], "norm: batch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_flags_of_hydra_work(
    arguments: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = outcome(train.main, arguments, monkeypatch, capsys)
    assert (status, err) == (0, "")
    assert printed in out


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


@pytest.mark.parametrize("module", ["fastalex.train", "fastalex.evaluate", "fastalex.reproduce"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_it_says_what_each_key_means(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__")
    text = capsys.readouterr().out.partition("Every key, to be set by key=value:")[2]
    values = [line for line in text.splitlines() if re.fullmatch(r" *\w+: .+", line)]
    assert values
    assert [line for line in values if "  # " not in line] == []
    if module == "fastalex.train":
        lists = [line for line in text.splitlines() if re.match(r"  (mean|std):", line)]
        assert [line.partition("  # ")[0] for line in lists] == ["  mean:", "  std:"]
        assert all(line.partition("  # ")[2] for line in lists)
        # Of AlexNet only:
        assert "  overlapping_pool: true  # windows of 3x3 with stride 2; false: 2x2\n" in text
        assert re.search(r"\n  optimizer: muon  # .*: sgd, muon or lars\n", text)
        assert re.search(r"\n  progressive_resizing: 0.33  # share of the epochs", text)  # in a line above
        assert yaml.safe_load(text)["train"]["epochs"] == 12


def test_a_key_has_the_meaning_of_its_section() -> None:
    """``epochs``, ``on_error`` and ``root`` mean something else in each section that has them."""
    text = with_meanings("data:\n  on_error: fail\ncheckpoint:\n  on_error: stop\n", Config)
    assert text.splitlines() == [
        "data:",
        "  on_error: fail  # what happens at a damaged image: fail or skip",
        "checkpoint:",
        "  on_error: stop  # what happens when one cannot be written: stop or warn",
    ]
