"""The benchmark of the training step, on a few images, where only what it writes down matters."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import step
from benchmarks.images import generate
from benchmarks.parts import PARTS
from benchmarks.step import Bench, ratio
from benchmarks.turns import Rounds

ROUNDS = 1


def test_ratio_is_taken_within_the_rounds() -> None:
    assert ratio([2, 40, 6], [1, 10, 3]) == 2  # of the medians it would be 2, of the means more
    assert ratio([2, 40, 60], [1, 10, 30]) == 2
    assert ratio([1.0], None) is None


@pytest.mark.slow
def test_two_programs_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("STEPS", "BATCHES"):  # the shortest turns
        monkeypatch.setattr(step, name, dict.fromkeys(getattr(step, name), 1))
    monkeypatch.setattr(step, "WARM_UP", 1)
    root = generate(tmp_path / "images", train=5, test=2)
    bench = Bench(root, ROUNDS, batch_size=4, programs=("reference", "fastalex"))
    try:
        bench.training(Rounds())
        bench.evaluation(Rounds())
        bench.parts(Rounds())
    finally:
        bench.close()
    rows = {(row.measurement, row.program, row.part): row for row in bench.rows}
    programs = ("reference", "fastalex")
    assert set(rows) == {
        *((name, program, "") for name in ("training", "ten-crop evaluation") for program in programs),
        *(("peak memory", program, "") for program in programs),
        *(("hardware", limit, "") for limit in ("matrix product", "copy")),
        *(("step by part", program, part) for program in programs for part in PARTS),
    }
    assert all(math.isfinite(row.median) and row.p20 <= row.median <= row.p80 for row in bench.rows)
    for program in programs:
        assert sum(rows["step by part", program, part].share_of_step or 0 for part in PARTS) == pytest.approx(
            1,
            abs=0.1,  # a median of each share
        )
        assert rows["step by part", program, "convolutions"].median > 0
        # 58 million parameters, their gradients and their momentum in fp32, at least.
        assert rows["peak memory", program, ""].median > 3 * 4 * 58.3
        training = rows["training", program, ""]
        assert training.rounds == ROUNDS
        # An image is 6.576 GFLOP, by the sum over the layers.
        assert training.gflop_per_s == pytest.approx(6.576 * training.median, rel=1e-3)
    assert rows["training", "reference", ""].times_reference == 1
    assert rows["training", "reference", ""].times_stock is None
