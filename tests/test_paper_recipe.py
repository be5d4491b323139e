"""``recipe=paper`` on photographs: what it sets, and what a run and its resumption keep of it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastalex import evaluate, train
from fastalex.config import Color, DataConfig, Fit, Flip, Optimizer, Schedule
from fastalex.config.plain import from_plain, load_config
from fastalex.data import color, load_splits
from fastalex.data.color import principal_components
from fastalex.runs.checkpoint import read_weights
from fastalex.training.trainer import Trainer

QUICK = [
    "recipe=paper",
    "data=imagefolder",
    "data.resize=36",
    "data.crop=32",
    "model=mobilenet_v3_small",
    "train.epochs=2",
    "train.batch_size=8",
    "loader.workers=0",
    "runtime.precision=fp32",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Photographs of two classes, high and wide, in ImageNet's layout, and a finished run on them."""
    folder = tmp_path_factory.mktemp("paper")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 6)):
        for label, hue in (("cat", (190, 110, 60)), ("dog", (60, 110, 190))):
            (folder / "images" / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(hue, 30, (40 + 5 * i, 70, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "images" / part / label / f"{i}.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        command(patch, "hydra.run.dir=whole")
        yield folder


def command(patch: pytest.MonkeyPatch, *overrides: str) -> None:
    patch.setattr(sys, "argv", ["fastalex", *QUICK, "data.root=images", *overrides])
    train.main()


def test_it_is_what_the_paper_describes(folder: Path) -> None:
    config = from_plain(load_config(folder / "whole"))
    data, recipe = config.data, config.train
    assert (data.fit, data.color, data.flip) == (Fit.shorter_side, Color.pca, Flip.random)
    assert (recipe.optimizer, recipe.schedule) == (Optimizer.sgd, Schedule.plateau)
    assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.01, 0.9, 0.0005)
    assert recipe.clip_norm == recipe.cutmix == recipe.label_smoothing == recipe.ema_decay == 0
    summary = json.loads((folder / "whole" / "summary.json").read_text())
    assert summary["ten_crop"]["views"] == 10


def test_the_run_keeps_the_components_of_its_training_images(folder: Path) -> None:
    config = from_plain(load_config(folder / "whole"))
    images = load_splits(DataConfig("imagefolder", root="images"), 0, progress=False).train
    values, vectors = principal_components(images)
    assert values[0] > values[2] > 0
    assert config.data.color_eigenvalues == values.tolist()
    assert config.data.color_eigenvectors == vectors.tolist()


def test_its_evaluation_repeats_the_figures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fastalex", "checkpoint=whole/checkpoint.pt"])
    evaluate.main()
    summary, evaluation = (
        json.loads((folder / "whole" / f"{name}.json").read_text()) for name in ("summary", "evaluation")
    )
    for figures in ("single_crop", "ten_crop"):
        assert evaluation[figures] == summary[figures]


def test_a_resumed_run_keeps_the_components_and_ends_with_the_same_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = Trainer._step

    def with_signal(self: Trainer, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.step == 5:  # of eight, in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", with_signal)
        with pytest.raises(SystemExit):
            command(patch, "hydra.run.dir=parts")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the components are computed again")

    monkeypatch.setattr(color, "principal_components", fail)
    command(monkeypatch, "hydra.run.dir=parts", "resume=auto")
    ours, theirs = (read_weights(folder / name / "model.safetensors")[0] for name in ("parts", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
