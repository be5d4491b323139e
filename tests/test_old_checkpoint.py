"""A checkpoint that an older version wrote still loads, resumes, and is evaluated.

``files/checkpoint_v1.pt`` is of format 1, written by the version before the package was laid out in rooms
(commit 9843695): the network of ``tiny.py`` in its third epoch on the digits, with averaged weights and
accumulation.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastalex import train
from fastalex.config import Color, Fit
from fastalex.models import MODELS
from fastalex.runs.checkpoint import FORMAT, Checkpoint
from fastalex.runs.weights import open_weights
from tests import tiny

FILE = Path(__file__).parent / "files" / "checkpoint_v1.pt"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    tiny.register()
    yield
    del MODELS["tiny"]


def test_it_holds_the_weights_and_the_configuration() -> None:
    checkpoint = Checkpoint.load(FILE)
    assert torch.load(FILE, weights_only=True)["format"] == FORMAT
    assert checkpoint.step == 20
    config = checkpoint.restore_config()
    assert (config.model.name, config.data.name, config.train.ema_decay) == ("tiny", "digits", 0.9)
    assert (config.data.fit, config.data.color) == (Fit.square, Color.none)  # which it does not mention
    network = open_weights(FILE).model()
    assert checkpoint.average is not None
    for name, value in network.state_dict().items():
        assert torch.equal(value, checkpoint.average[name])


def test_it_resumes_to_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    run.mkdir()
    shutil.copy(FILE, run / "checkpoint.pt")
    monkeypatch.setattr(sys, "argv", ["train", "resume=run"])
    train.main()
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (3, 24)
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before = Checkpoint.load(FILE).training["history"]
    assert epochs[:2] == before
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
