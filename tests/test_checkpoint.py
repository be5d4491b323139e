"""Checkpoints come back as they were saved, or are refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastalex.config import (
    AlexNetConfig,
    Config,
    DataConfig,
    LoaderConfig,
    ModelConfig,
    Norm,
    Schedule,
    TrainConfig,
)
from fastalex.config.plain import plain
from fastalex.errors import CheckpointError
from fastalex.models import create_model, load_weights
from fastalex.runs.checkpoint import Checkpoint, save_weights
from fastalex.runs.weights import open_weights

CLASSES = ["cat", "dog", "eel"]


def a_config() -> Config:
    return Config(
        model=ModelConfig(name="mobilenet_v3_small"),
        data=DataConfig(name="digits", resize=40, crop=32),
        loader=LoaderConfig(name="torchvision"),
        train=TrainConfig(epochs=2, schedule=Schedule.plateau),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model("mobilenet_v3_small", 3)
    path = tmp_path / "checkpoint.pt"
    Checkpoint(plain(a_config()), CLASSES, model.state_dict(), {"epoch": 2}).save(path)
    return path


def test_comes_back_as_it_was(saved: Path) -> None:
    checkpoint = Checkpoint.load(saved)
    assert checkpoint.restore_config() == a_config()
    assert checkpoint.classes == CLASSES
    assert checkpoint.training == {"epoch": 2}
    torch.manual_seed(0)
    expected = create_model("mobilenet_v3_small", 3).state_dict()
    restored = open_weights(saved).model().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in expected.items())
    assert [p.name for p in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_alexnet_options_come_back() -> None:
    config = a_config()
    config.model = AlexNetConfig(groups=2, norm=Norm.batch, dropout=0.25)
    assert Checkpoint(plain(config), CLASSES, {}, {}).restore_config() == config


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    os.truncate(saved, int(saved.stat().st_size * share))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: is damaged or cut short"):
        Checkpoint.load(saved)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        Checkpoint.load(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="there is no such file"):
        Checkpoint.load(tmp_path)
    other = tmp_path / "other.pt"
    torch.save({"state_dict": {}}, other)
    with pytest.raises(CheckpointError, match="was not written by this version of fastalex"):
        Checkpoint.load(other)
    other.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint.load(other)


class _Exploit:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "config": _Exploit()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(_Exploit()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError):
            Checkpoint.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_another_architecture_is_refused() -> None:
    alexnet = create_model("alexnet", 3)
    with pytest.raises(
        CheckpointError, match=r"another architecture: conv1\.weight is \(64, 3, 7, 7\) there"
    ):
        load_weights(alexnet, create_model("resnet18", 3).state_dict())
    with pytest.raises(CheckpointError, match=r"norm_pool1\.\S+ is absent there"):
        load_weights(create_model("alexnet", 3, norm="batch"), alexnet.state_dict())
    with pytest.raises(CheckpointError, match=r"fc8\.weight is \(4, 4096\) there and \(3, 4096\)"):
        load_weights(alexnet, create_model("alexnet", 4).state_dict())


def test_a_configuration_of_another_version_is_refused() -> None:
    content = plain(a_config()) | {"quantum": True}
    with pytest.raises(CheckpointError, match=r"another version.*quantum"):
        Checkpoint(content, CLASSES, {}, {}).restore_config()


def test_safetensors_hold_the_weights_and_what_rebuilds_them(tmp_path: Path) -> None:
    model = create_model("mobilenet_v3_small", 3).to(memory_format=torch.channels_last)
    save_weights(model.state_dict(), tmp_path / "model.safetensors", plain(a_config()), CLASSES)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        content = json.loads(file.metadata()["fastalex"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert content.pop("crc32") > 0
    assert content == {"config": plain(a_config()), "classes": CLASSES}
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_a_folder_means_its_final_weights_and_a_file_is_enough_alone(saved: Path, tmp_path: Path) -> None:
    model = create_model("mobilenet_v3_small", 3)
    assert open_weights(saved.parent).source == saved
    final = saved.parent / "model.safetensors"
    save_weights(model.state_dict(), final, plain(a_config()), CLASSES)
    assert open_weights(saved.parent).source == final
    moved = final.rename(tmp_path / "alone.safetensors")
    alone = open_weights(moved)
    assert (alone.config, alone.classes) == (a_config(), CLASSES)
    restored = alone.model().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_without_a_checksum_still_open(tmp_path: Path) -> None:
    state = create_model("mobilenet_v3_small", 3).state_dict()
    facts = json.dumps({"config": plain(a_config()), "classes": CLASSES})
    save_file(state, tmp_path / "old.safetensors", metadata={"fastalex": facts})
    assert open_weights(tmp_path / "old.safetensors").classes == CLASSES


def test_weights_of_an_unknown_network_are_refused(tmp_path: Path) -> None:
    config = a_config()
    config.model.name = "mine"
    save_weights({}, tmp_path / "w.safetensors", plain(config), CLASSES)
    with pytest.raises(
        CheckpointError, match=r"weights=\S+w.safetensors: its network cannot be built: .*mine"
    ):
        open_weights(tmp_path / "w.safetensors").model()
