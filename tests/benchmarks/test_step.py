"""The benchmark of the training step, on a few images: what it measures, not how fast it is."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.images import generate
from benchmarks.parts import PARTS
from benchmarks.step import StepBench, ratio
from benchmarks.turns import RoundRunner

ROUNDS = 1


def test_ratio_is_taken_within_the_rounds() -> None:
    assert ratio([2, 40, 6], [1, 10, 3]) == 2  # of the medians it would be 2, of the means more
    assert ratio([2, 40, 60], [1, 10, 30]) == 2
    assert ratio([1.0], None) is None


@pytest.mark.slow
def test_two_programs_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = generate(tmp_path / "images", train=5, test=2)
    with closing(StepBench(root, ROUNDS, 4, ("reference", "fastalex"), toy=True)) as bench:
        bench.training(RoundRunner())
        bench.evaluation(RoundRunner())
        bench.parts(RoundRunner())
    found = {(m["measurement"], m["program"], m["part"]): m for m in bench.measurements}
    programs = ("reference", "fastalex")
    assert set(found) == {
        *((name, program, "") for name in ("training", "ten-crop evaluation") for program in programs),
        *(("peak memory", program, "") for program in programs),
        *(("hardware", limit, "") for limit in ("matrix product", "copy")),
        *(("step by part", program, part) for program in programs for part in PARTS),
    }
    assert all(math.isfinite(m.median) and m.p20 <= m.median <= m.p80 for m in bench.measurements)
    for program in programs:
        shares = [found["step by part", program, part]["share_of_step"] for part in PARTS]
        assert sum(shares) == pytest.approx(1, abs=0.1)  # a median of each share
        assert found["step by part", program, "convolutions"].median > 0
        # 58 million parameters, their gradients and their momentum in fp32, at least.
        assert found["peak memory", program, ""].median > 3 * 4 * 58.3
        training = found["training", program, ""]
        assert training["rounds"] == ROUNDS
        # An image is 6.576 GFLOP, by the sum over the layers.
        assert training["gflop_per_s"] == pytest.approx(6.576 * training.median, rel=1e-3)
    assert found["training", "reference", ""]["times_reference"] == 1
    assert found["training", "reference", ""]["times_stock"] is None
