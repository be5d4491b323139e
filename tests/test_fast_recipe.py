"""``recipe=fast``, the default: what it sets, and the sizes that its progressive resizing trains at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastalex import train
from fastalex.config import Config, DataConfig, LoaderConfig, ModelConfig, Stage, TrainConfig
from fastalex.config.plain import load_config
from fastalex.runs.setup import resize_progressively
from tests.commands import outcome


@pytest.mark.parametrize(
    ("settings", "model", "sizes", "stages"),
    [
        ({"epochs": 12}, "alexnet", (256, 224), [Stage(4, 128, 112, cutmix=0.0)]),
        ({"epochs": 30}, "alexnet", (256, 224), [Stage(10, 128, 112, cutmix=0.0)]),
        ({"epochs": 2}, "resnet18", (73, 65), [Stage(1, 36, 32, cutmix=0.0)]),  # the halves, rounded down
        ({"epochs": 1}, "alexnet", (256, 224), []),
        ({"epochs": 12, "progressive_resizing": 0.04}, "alexnet", (256, 224), []),
        (
            {"epochs": 3, "progressive_resizing": 0.99},
            "alexnet",
            (256, 224),
            [Stage(2, 128, 112, cutmix=0.0)],
        ),
        ({"epochs": 12, "progressive_resizing": 0.0}, "alexnet", (256, 224), []),
        ({"epochs": 12}, "alexnet", (144, 126), [Stage(4, 72, 63, cutmix=0.0)]),
        ({"epochs": 12}, "alexnet", (144, 125), []),  # AlexNet needs 63 pixels
        ({"epochs": 9, "stages": [Stage(2, 200, 190)]}, "alexnet", (256, 224), [Stage(2, 200, 190)]),
    ],
)
def test_the_first_epochs_are_at_half_the_size(
    settings: dict[str, Any], model: str, sizes: tuple[int, int], stages: list[Stage]
) -> None:
    data = DataConfig("synthetic", resize=sizes[0], crop=sizes[1])
    recipe = TrainConfig(**{"progressive_resizing": 0.33, **settings})
    config = Config(ModelConfig(model), data, LoaderConfig("auto"), recipe)
    resize_progressively(config)
    assert config.train.stages == stages
    resize_progressively(config)  # as a resumed run does
    assert config.train.stages == stages


def test_a_profile_is_of_the_size_that_is_asked_for() -> None:
    recipe = TrainConfig(epochs=12, progressive_resizing=0.33)
    config = Config(
        ModelConfig("alexnet"), DataConfig("synthetic"), LoaderConfig("auto"), recipe, profile=True
    )
    resize_progressively(config)
    assert config.train.stages == []


@pytest.mark.usefixtures("tiny_network")
def test_a_run_trains_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default recipe, but for the number of epochs, on a network that takes a crop of 32 pixels."""
    monkeypatch.chdir(tmp_path)
    settings = ["data=digits", "model=mobilenet_v3_small", "model.name=tiny", "train.epochs=3"]
    status, out, _ = outcome(train.main, [*settings, "hydra.run.dir=run"], monkeypatch, capsys)
    assert status == 0
    assert "32x32 crops of 36x36 for 1 epoch, then 64x64 crops of 72x72" in out
    recipe = load_config(Path("run"))["train"]
    assert recipe["stages"] == [{"epochs": 1, "resize": 36, "crop": 32, "lr": None, "cutmix": 0.0}]
    assert (recipe["optimizer"], recipe["cutmix"], recipe["label_smoothing"]) == ("muon", 0.5, 0.1)
    assert json.loads(Path("run/summary.json").read_text())["epochs"] == 3
