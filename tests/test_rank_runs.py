"""Under each option that adds a collective, two ranks complete a run and record what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalex.data import load_splits
from fastalex.distributed.processes import ALONE
from fastalex.runs.checkpoint import read_weights
from fastalex.runs.weights import open_weights
from fastalex.training.evaluation import evaluate_model
from tests import rank_runs
from tests.processes import torchrun
from tests.tolerances import NOISE, SAFETY, unit_roundoff

COMPLETING = [name for name in rank_runs.OPTIONS if name not in (rank_runs.DIVERGES, rank_runs.PROFILED)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the images and the runs of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    rank_runs.make_images(folder / "images")
    torchrun(rank_runs.__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """How the runs ended, by rank."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", COMPLETING)
def test_only_rank_0_writes_and_reports(name: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    assert [rank[name]["folder"] for rank in ranks] == [str(folder / name), str(folder / "other" / name)]
    written = json.loads((folder / name / "summary.json").read_text())
    assert 0 <= written["top1_error"] <= 1
    assert (folder / name / "checkpoint.pt").is_file()
    assert not (folder / "other").exists()


@pytest.mark.parametrize("name", [name for name in COMPLETING if name != "CutMix"])
def test_losses_match_one_process(name: str, folder: Path, tmp_path: Path) -> None:
    rank_runs.run(name, folder / "images", tmp_path, ALONE)
    two_ranks, one = (
        [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
        for runs in (folder / name, tmp_path / name)
    )
    assert len(two_ranks) == len(one) == 2
    # Compressed, each rank's gradient is rounded to bf16, and their sum. Otherwise only sums differ in order.
    rounding = 3 * unit_roundoff(torch.bfloat16) if name == "compressed gradients" else SAFETY * NOISE
    for key in ("train_loss", "validation_loss", "learning_rate"):
        expected = [epoch[key] for epoch in one]
        assert [epoch[key] for epoch in two_ranks] == pytest.approx(expected, rel=rounding)


@pytest.mark.parametrize("name", ["hybrid", "initial weights and frozen layers"])
def test_all_ranks_evaluate_the_best_network(name: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    """It is that of the first epoch, so that it is evaluated beside the final one; here by one process."""
    best = json.loads((folder / name / "summary.json").read_text())["best_on_validation"]
    assert best["epoch"] == 1
    assert [rank["evaluations"][name] for rank in ranks] == [2, 2]
    rank_runs.register()
    trained = open_weights(str(folder / name / "best.safetensors"))
    splits = load_splits(trained.config.data, trained.config.seed, progress=False)
    runtime = trained.runtime("cpu")
    alone = evaluate_model(runtime.place(trained.model()), splits.test, trained.config, runtime).as_dict()
    for crops in ("single_crop", "ten_crop"):
        assert best[crops] == pytest.approx(alone[crops], abs=1e-4)  # sums differ in order


def test_a_hybrid_run_resumes_by_the_command_line(folder: Path, ranks: list[dict[str, Any]]) -> None:
    """From the middle of its second epoch, to the same bits."""
    assert [rank["resumed"]["status"] for rank in ranks] == [0, 0]
    found, expected = (read_weights(folder / n / "model.safetensors")[0] for n in ("hybrid again", "hybrid"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert (folder / "hybrid again" / "summary.json").stat().st_mtime_ns > (
        folder / "hybrid" / "summary.json"
    ).stat().st_mtime_ns


def test_rank_0_writes_its_trace(folder: Path) -> None:
    """The collectives are in it. The other ranks take the same steps, or rank 0 would wait for them."""
    assert not (folder / "other").exists()
    names = {
        event["name"] for event in json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    }
    assert {"input", "forward", "backward", "optimizer"} <= names
    assert any("allreduce" in name or "all_reduce" in name for name in names)
    assert "rank 0 of 2" in (folder / "profile" / "profile.txt").read_text()


def test_divergence_ends_both_ranks(ranks: list[dict[str, Any]]) -> None:
    zero, one = (rank[rank_runs.DIVERGES] for rank in ranks)
    assert zero == {"error": "DivergedError", "status": 1}
    assert one == {"error": "ReportedError", "status": 1}
