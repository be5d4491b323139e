"""The benchmark of several processes, on a few images: what it measures, not how fast it is."""

from __future__ import annotations

import math
import sys
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import ranks
from benchmarks.images import generate
from benchmarks.turns import RoundRunner
from fastalex.models import count_parameters, create_model


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads byte counts that only Linux has")
def test_one_process_and_two_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ranks, "STEPS", 1)
    monkeypatch.setattr(ranks, "WARM_UP", 1)
    root = generate(tmp_path / "images", train=5, test=2)
    overrides = ("data.resize=72", "data.crop=64")
    with closing(ranks.RanksBench(root, 1, 4, ("one process", "ddp"), overrides)) as bench:
        bench.training(RoundRunner())
    one, two, sent = bench.measurements
    assert [m["program"] for m in bench.measurements] == ["one process", "ddp", "ddp"]
    assert math.isfinite(one.median)
    assert one["times_one_process"] == 1
    assert two["times_one_process"] == pytest.approx(two.median / one.median)
    # Each of two processes sends the other every gradient once; the rest is headers and other traffic.
    gradients = 4 * count_parameters(create_model("alexnet")) / 1e6
    assert gradients <= sent.median < 1.1 * gradients
    assert sent["computed"] == pytest.approx(gradients)
