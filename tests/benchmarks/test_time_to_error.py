"""Time to an error, from made-up runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import machine
from benchmarks.time_to_error import main


def made_up_run(folder: Path, validation: list[float], startup_seconds: float = 1.0) -> Path:
    folder.mkdir()
    best = {"validation_top1_error": min(validation)}
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "hardware": "a processor",
                "epochs": len(validation),
                "best_on_validation": best,
                "startup_seconds": startup_seconds,
            }
        )
    )
    lines = [
        json.dumps(
            {
                "epoch": i + 1,
                "step": 10 * (i + 1),
                "seconds": 100.0 + i,
                "warmup_seconds": 3.0 - 3 * min(i, 1),
                "validation_top1_error": error,
            }
        )
        for i, error in enumerate(validation)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text("train: {batch_size: 128}\n")
    return folder


def steps_file(path: Path, rate: float) -> Path:
    record = {
        "measurement": "training",
        "program": "reference",
        "part": "",
        "batch": "128",
        "unit": "images/s",
        "median": str(rate),
        "p20": "1",
        "p80": "2",
        "rounds": "3",
        **machine("cpu"),
        "hardware": "a processor",
    }
    other = record | {"program": "fastalex", "median": "999"}
    lines = [",".join(record), *(",".join(f'"{v}"' for v in line.values()) for line in (other, record))]
    path.write_text("\n".join(lines) + "\n")
    return path


def results(tmp_path: Path, run: Path, study: Path, steps: Path, error: float) -> list[dict]:
    out = tmp_path / "out.json"
    arguments = [f"--error={error}", f"--study={study}", f"--steps={steps}", f"--out={out}"]
    assert main([str(run), *arguments]) == 0
    content = json.loads(out.read_text())
    assert content["validation_error"] == error
    return content["programs"]


def test_measured_and_extrapolated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_up_run(tmp_path / "run", [0.5, 0.2, 0.1], startup_seconds=7.0)
    study = made_up_run(tmp_path / "study", [0.6, 0.5, 0.4, 0.2, 0.1])
    fast, reference = results(tmp_path, run, study, steps_file(tmp_path / "steps.csv", 16.0), 0.2)
    assert fast["kind"] == "measured"
    assert (fast["epochs"], fast["images"]) == (2, 20 * 128)
    assert fast["training_seconds"] == 100 + 101
    assert (fast["startup_seconds"], fast["warmup_seconds"], fast["seconds"]) == (7, 3, 208)
    assert reference["kind"] == "extrapolated"
    assert (reference["epochs"], reference["images"]) == (4, 40 * 128)
    assert reference["seconds"] == pytest.approx(40 * 128 / 16)
    out = capsys.readouterr().out
    assert "extrapolated" in out
    assert f"{320 / 208:.1f} times as long" in out
    assert "of two machines" not in out


def test_missing_measurements_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_up_run(tmp_path / "run", [0.5, 0.2])
    nowhere = tmp_path / "nowhere"
    fast, reference = results(tmp_path, run, nowhere, nowhere, 0.2)
    assert fast["kind"] == "measured"
    assert fast["note"] == ""
    assert reference["kind"] == "not measured"
    assert reference["seconds"] is None
    assert "make bench" in reference["note"]
    assert "rows=alexnet_study_recipe" in reference["note"]
    fast, reference = results(tmp_path, run, run, nowhere, 0.1)
    assert fast["kind"] == reference["kind"] == "not measured"
    assert "0.1000 was not reached" in fast["note"]
    assert reference["seconds"] is None
    assert "make bench" in reference["note"]
    fast, reference = results(tmp_path, run, run, steps_file(tmp_path / "steps.csv", 16.0), 0.1)
    assert fast["kind"] == "not measured"
    assert "had not reached 0.1000 by then" in reference["note"]
    assert "times as long" not in capsys.readouterr().out


def test_a_recipe_that_ended_above_the_error_bounds_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made_up_run(tmp_path / "run", [0.5, 0.2])
    study = made_up_run(tmp_path / "study", [0.6, 0.4, 0.3])
    _, reference = results(tmp_path, run, study, steps_file(tmp_path / "steps.csv", 16.0), 0.2)
    assert reference["kind"] == "extrapolated lower bound"
    assert (reference["epochs"], reference["images"]) == (3, 30 * 128)
    assert reference["seconds"] == pytest.approx(30 * 128 / 16)
    assert "had not reached 0.2000 by then" in reference["note"]
    # 240 s to 202 s: 1.19, of which a bound is rounded down
    assert "more than 1.1 times as long" in capsys.readouterr().out


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main([str(tmp_path / "nowhere"), f"--out={out}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere: holds no finished run" in line
    assert not out.exists()
