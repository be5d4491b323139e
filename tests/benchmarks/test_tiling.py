"""The phase that times the kernels with several launch configurations, without a GPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.card import tiling
from benchmarks.card.phases import PHASES
from benchmarks.card.place import Place
from benchmarks.card.tiling import POOL_BACKWARD, POOL_FORWARD, described, launches
from benchmarks.report import RESULTS
from fastalex.kernels import lrn_triton
from fastalex.kernels._triton_launch import Launch


def test_a_rehearsal_describes_every_launch(tmp_path: Path) -> None:
    before = dict(vars(lrn_triton))
    tiling.measure(tmp_path, 1, timed=False)
    assert dict(vars(lrn_triton)) == before
    rows = json.loads((tmp_path / "tiling.json").read_text())["rows"]
    assert {row["microseconds"] for row in rows} == {None}
    # The bytes per image, as the interpreter counted them.
    inspected = json.loads((RESULTS / "kernels_inspect.json").read_text())["traffic"]
    floors = {(row["kernel"], row["dtype"]): row["floor"] for row in inspected if "lrn" in row["kernel"]}
    of_lrn = [row for row in rows if row["shape"] == "1x55x55x96"]
    assert {row["bytes"] - floors[row["kernel"], row["dtype"]] for row in of_lrn} == {0}
    in_use = {(row["kernel"], row["dtype"]) for row in rows[:24]}
    assert in_use == {(row["kernel"], row["dtype"]) for row in inspected if row["dtype"] != "float16"}
    cuts = Counter((row["kernel"], row["shape"]) for row in rows[24:])
    assert cuts[POOL_FORWARD, "1x27x27x256"] == cuts[POOL_FORWARD, "1x55x55x96"] == 15
    assert cuts[POOL_BACKWARD, "1x27x27x256"] == cuts[POOL_BACKWARD, "1x55x55x96"] == 36


def test_every_configuration_has_a_lane_for_each_strip() -> None:
    for name, launch in launches(2, "meta"):
        if "pool" in name:
            row = described(name, launch)
            assert row.rows is not None
            _, height, _, channels = map(int, row.shape.split("x"))
            across = (height - 3) // 2 + 1 if "forward" in name else (height + 1) // 2
            lanes = 2 * -(-across // row.rows) * across * channels // 8
            assert 0 <= launch.programs * row.block - lanes < row.block
            assert row.warps * 32 == row.block
            assert launch.arguments["rows"] == row.rows


def test_each_time_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = list(launches(1, "meta"))[:3]
    monkeypatch.setattr(tiling, "launches", lambda batch, device: iter(few))
    times = iter([25e-6, 50e-6])
    monkeypatch.setattr(
        tiling, "seconds_of", lambda call: [next(times)]
    )  # the third call raises StopIteration
    with pytest.raises(StopIteration):
        tiling.measure(tmp_path, 1, timed=True)
    rows = json.loads((tmp_path / "tiling.json").read_text())["rows"]
    assert [(row["kernel"], row["microseconds"]) for row in rows] == [
        (few[0][0], pytest.approx(25)),
        (few[1][0], pytest.approx(50)),
    ]


def test_workers_divide_the_kernels_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(launches(1, "meta"))
    names = {id(launch): name for name, launch in every}
    compiled: list[tuple[Any, ...]] = []

    def run(launch: Launch) -> None:
        x = next(iter(launch.tensors.values()))
        cut = (launch.arguments.get("BLOCK"), launch.warps, launch.maxnreg)
        dtypes = tuple(tensor.dtype for tensor in launch.tensors.values())
        compiled.append((names[id(launch)], launch.arguments.get("C"), x.shape[1:3], dtypes, cut))

    monkeypatch.setattr(tiling, "launches", lambda batch, device: iter(every))
    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for worker in range(3):
        tiling.compile_some(worker, 3)
    # 24 in use; 3 forward and 9 backward at two shapes, of which one each at 55x55 is also in use.
    assert len(compiled) == len(set(compiled)) == 24 + 2 * (3 + 9) - 2


def test_tiling_is_a_phase(tmp_path: Path) -> None:
    ((*_, module, folder, _, toy),) = PHASES["tiling"].commands(Place(tmp_path, tmp_path, toy=True))
    assert (module, folder, toy) == ("benchmarks.card.tiling", str(tmp_path), "--toy")
