"""Under each option that adds a collective, two ranks complete a run and record what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastalex.distributed.processes import ALONE
from tests import rank_runs
from tests.processes import torchrun

COMPLETING = [name for name in rank_runs.OPTIONS if name != rank_runs.DIVERGES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the images and the runs of two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    rank_runs.make_images(folder / "images")
    torchrun(rank_runs.__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """The return values of the runs, by rank."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", COMPLETING)
def test_only_rank_0_writes_and_reports(name: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    zero, one = (rank[name] for rank in ranks)
    written = json.loads((folder / name / "summary.json").read_text())
    assert zero == written
    assert 0 <= zero["top1_error"] <= 1
    assert (folder / name / "checkpoint.pt").is_file()
    assert one == {}
    assert not (folder / "other").exists()


@pytest.mark.parametrize("name", [name for name in COMPLETING if name != "CutMix"])
def test_losses_match_one_process(name: str, folder: Path, tmp_path: Path) -> None:
    rank_runs.run(name, folder / "images", tmp_path, ALONE)
    two_ranks, one = (
        [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
        for runs in (folder / name, tmp_path / name)
    )
    assert len(two_ranks) == len(one) == 2
    # Sums differ in order; bf16 gradients have eight bits.
    tolerance = 2e-2 if name == "compressed gradients" else 1e-4
    for key in ("train_loss", "validation_loss", "learning_rate"):
        expected = [epoch[key] for epoch in one]
        assert [epoch[key] for epoch in two_ranks] == pytest.approx(expected, rel=tolerance)


def test_divergence_ends_both_ranks(ranks: list[dict[str, Any]]) -> None:
    zero, one = (rank[rank_runs.DIVERGES] for rank in ranks)
    assert zero == {"error": "DivergedError", "status": 1}
    assert one == {"error": "ReportedError", "status": 1}
