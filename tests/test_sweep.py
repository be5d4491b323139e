"""The table and the picture of a sweep, and what TensorBoard is told of a run's settings."""

from __future__ import annotations

import csv
import json
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fastalex import plots, train
from fastalex.errors import OutputError, StoppedError
from fastalex.runs import launch, sweep
from fastalex.runs.sweep import Job, write_sweep
from fastalex.training import flops
from tests import tiny
from tests.commands import exit_status

TINY = [
    "data=digits",
    "model=mobilenet_v3_small",
    "model.name=tiny",
    "data.resize=36",
    "data.crop=32",
    "train.epochs=1",
    "train.batch_size=256",
    "runtime.precision=fp32",
    "runtime.threads=1",
]


def a_sweep(patch: pytest.MonkeyPatch, *overrides: str) -> int:
    patch.setitem(flops.MATMUL_SIZE, "cpu", 64)
    tiny.register()
    return exit_status(train.main, ["-m", *TINY, *overrides], patch)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over three rates and two seeds, of which the last rate is refused."""
    folder = tmp_path_factory.mktemp("sweep") / "all"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        assert a_sweep(patch, "train.lr=0.01,0.1,-1", "seed=3,4", f"hydra.sweep.dir={folder}") == 2
    return folder


def test_a_second_sweep_in_the_same_folder_reports_its_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert a_sweep(monkeypatch, "train.lr=0.01,0.1", "hydra.sweep.dir=all") == 0
    assert a_sweep(monkeypatch, "train.lr=0.2,-1", "hydra.sweep.dir=all") == 2
    good, refused = table(tmp_path / "all")
    assert [(row["train.lr"], Path(row["folder"]).name) for row in (good, refused)] == [
        ("0.2", "0-2"),
        ("-1", "1"),
    ]
    summary = json.loads((tmp_path / "all/0-2/summary.json").read_text())
    assert float(good["test_ten_crop_top1_error"]) == summary["ten_crop"]["top1_error"]
    assert "train.lr" in refused["error"]
    assert refused["test_ten_crop_top1_error"] == ""


def test_the_table_has_each_run_and_its_figures(swept: Path) -> None:
    rows = table(swept)
    assert [(row["run"], row["train.lr"], row["seed"]) for row in rows] == [
        ("0", "0.01", "3"),
        ("1", "0.01", "4"),
        ("2", "0.1", "3"),
        ("3", "0.1", "4"),
        ("4", "-1", "3"),
        ("5", "-1", "4"),
    ]
    for row in rows[:4]:
        run = swept / row["run"]
        summary = json.loads((run / "summary.json").read_text())
        epoch = json.loads((run / "metrics.jsonl").read_text())
        assert float(row["validation_top1_error"]) == epoch["validation_top1_error"]
        assert float(row["test_ten_crop_top1_error"]) == summary["ten_crop"]["top1_error"]
        assert float(row["test_single_crop_top5_error"]) == summary["single_crop"]["top5_error"]
        assert (Path(row["folder"]).resolve(), row["error"]) == (run, "")
        assert "data.resize" not in row  # which all runs have
    for row in rows[4:]:
        assert row["validation_top1_error"] == row["epochs"] == ""
        assert row["error"] == "train.lr=-1: must be greater than 0"
    with Image.open(swept / "sweep.png") as image:
        assert image.width > 600


def test_the_picture_has_means_and_spreads_over_seeds(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    rows = table(swept)
    jobs = [
        Job(
            int(row["run"]),
            {"train.lr": row["train.lr"], "seed": row["seed"]},
            Path(row["folder"]),
            row["error"],
        )
        for row in rows
    ]
    write_sweep(tmp_path, jobs)
    (axes,) = figures[0].axes
    ((line, _, (bars,)),) = axes.containers
    for place, lr in enumerate(("0.01", "0.1")):
        errors = [float(row["validation_top1_error"]) for row in rows if row["train.lr"] == lr]
        assert len(errors) == 2
        assert line.get_xydata()[place] == pytest.approx([float(lr), statistics.mean(errors)])
        ends = sorted(bars.get_segments()[place][:, 1])
        assert (ends[1] - ends[0]) / 2 == pytest.approx(statistics.stdev(errors))
    assert axes.get_xlabel() == "train.lr"
    assert axes.get_xscale() == "log"
    assert "without 2 of 6 runs, which failed" in axes.get_title()


def test_other_swept_values_are_lines_and_names_are_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.sweep({"a=1": {"x": [0.1], "$y": [0.2]}, "a=2": {"$y": [0.4]}}, "model", "", tmp_path / "x.png")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a=1", "a=2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "$y"]
    assert axes.get_title() == "Validation error of the final weights"


def test_a_sweep_over_seeds_alone_is_one_mean(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "sweep", lambda *arguments: drawn.append(arguments))
    monkeypatch.setattr(sweep, "write_csv", lambda *arguments: None)
    write_sweep(swept, [Job(number, {"seed": str(number)}, swept / str(number)) for number in (0, 1)])
    errors = [float(row["validation_top1_error"]) for row in table(swept)[:2]]
    assert drawn[0][:2] == ({"": {"all seeds": errors}}, "seed")


def test_a_sweep_that_is_stopped_has_the_table_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[int] = []
    original = launch.train

    def train_once(*arguments: Any, **named: Any) -> Any:
        if runs:
            raise StoppedError("stopped by SIGTERM", signal.SIGTERM)
        runs.append(0)
        return original(*arguments, **named)

    monkeypatch.setattr(launch, "train", train_once)
    assert a_sweep(monkeypatch, "train.lr=0.01,0.02,0.03", "hydra.sweep.dir=all") == 143
    assert [(row["train.lr"], row["error"]) for row in table(Path("all"))] == [
        ("0.01", ""),
        ("0.02", "was stopped"),
    ]


def test_a_table_that_cannot_be_written_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(path: Path, text: str) -> None:
        raise OutputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(sweep, "write_csv", full)
    synthetic = ["data=synthetic", "data.images=512", "hydra.sweep.dir=all"]
    assert a_sweep(monkeypatch, *synthetic, "seed=0,1") == 0
    assert len(list(Path("all").rglob("summary.json"))) == 2
    assert capsys.readouterr().err.count("fastalex: warning: all/sweep.csv: cannot be written") == 2


def test_tensorboard_has_the_settings_and_figures_of_the_run_itself(swept: Path) -> None:
    folder = swept / "2" / "tensorboard"
    assert not [path for path in folder.rglob("*") if path.is_dir()]
    events = EventAccumulator(str(folder))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["train.lr"].number_value == 0.1
    assert settings["model.name"].string_value == "tiny"
    assert settings["runtime.winograd"].string_value == "True"
    summary = json.loads((swept / "2" / "summary.json").read_text())
    (figure,) = events.Scalars("hparams/test top-1 error, ten_crop")
    assert figure.value == pytest.approx(summary["ten_crop"]["top1_error"])
    assert figure.step == summary["steps"]
    assert {"hparams/validation top-1 error", "hparams/images per second"} <= set(events.Tags()["scalars"])
