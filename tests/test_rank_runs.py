"""Under each option that adds a collective, two ranks finish a run, and what they record is one process's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastalex.distributed.processes import ALONE
from tests import rank_runs
from tests.test_distributed import torchrun

ENDING = [name for name in rank_runs.OPTIONS if name != rank_runs.DIVERGES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two ranks, beside their images."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(30):
            pixels = (level + rng.integers(-50, 50, (16, 16, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    torchrun(rank_runs.__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What the runs returned on each rank."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ENDING)
def test_rank_0_alone_writes_and_reports(name: str, folder: Path, ranks: list[dict[str, Any]]) -> None:
    zero, one = (rank[name] for rank in ranks)
    written = json.loads((folder / name / "summary.json").read_text())
    assert zero == written
    assert 0 <= zero["top1_error"] <= 1
    assert (folder / name / "checkpoint.pt").is_file()
    assert one == {}
    assert not (folder / "other").exists()


@pytest.mark.parametrize("name", [name for name in ENDING if name != "CutMix"])
def test_the_losses_are_those_of_one_process(name: str, folder: Path, tmp_path: Path) -> None:
    rank_runs.run(name, folder / "images", tmp_path, ALONE)
    ours, alone = (
        [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
        for runs in (folder / name, tmp_path / name)
    )
    assert len(ours) == len(alone) == 2
    # Sums are added up in another order; gradients in bf16 have eight bits.
    tolerance = 2e-2 if name == "compressed gradients" else 1e-4
    for key in ("train_loss", "validation_loss", "learning_rate"):
        assert [epoch[key] for epoch in ours] == pytest.approx([epoch[key] for epoch in alone], rel=tolerance)


def test_a_divergence_ends_both_ranks(ranks: list[dict[str, Any]]) -> None:
    zero, one = (rank[rank_runs.DIVERGES] for rank in ranks)
    assert zero == {"error": "DivergedError", "status": 1}
    assert one == {"error": "ReportedError", "status": 1}
