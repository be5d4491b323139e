"""A signal stops whatever is under way, and is not taken for an error of what it interrupts."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from PIL import Image, ImageFile

from fastalex import train
from fastalex.config import Config, DataConfig
from fastalex.data import load_splits
from fastalex.data.decode import decode_image
from fastalex.distributed.processes import World
from fastalex.errors import ReportedError, StoppedError
from fastalex.runs.checkpoint import Checkpoint
from fastalex.runs.recorder import Recorder
from fastalex.runs.run import Run
from fastalex.runs.signals import SIGNALS, StopSignals
from tests.commands import outcome


def interrupted_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: signal.Signals) -> None:
    """A signal arrives whenever the library's function is called."""

    def with_signal(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(owner, name, with_signal)


def read_checkpoint(folder: Path) -> object:
    path = folder / "checkpoint.pt"
    torch.save({}, path)
    return Checkpoint.load(path)


def read_image(folder: Path) -> object:
    path = folder / "image.png"
    Image.new("RGB", (4, 4)).save(path)
    return decode_image(path)


def download(folder: Path) -> object:
    return load_splits(DataConfig("cifar10", root=str(folder / "data")), 0)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("owner", "name", "read"),
    [
        (zipfile.ZipFile, "testzip", read_checkpoint),
        (ImageFile.ImageFile, "load", read_image),
        (torchvision.datasets.CIFAR10, "download", download),
    ],
    ids=["checkpoint", "image", "download"],
)
def test_a_signal_is_not_taken_for_a_damaged_file(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    owner: Any,
    name: str,
    read: Callable[[Path], object],
    number: signal.Signals,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    interrupted_in(monkeypatch, owner, name, number)
    with StopSignals(), pytest.raises(StoppedError, match=f"stopped by {number.name}") as caught:
        read(tmp_path)
    assert caught.value.exit_status == 128 + number


@pytest.fixture
def in_a_terminal() -> Iterator[None]:
    """SIGINT is handled as in a terminal: what a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_a_terminal")
def test_ctrl_c_is_one_line_while_the_configuration_is_composed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_in(monkeypatch, ConfigLoaderImpl, "load_configuration", signal.SIGINT)
    ended = outcome(train.main, ["data=digits"], monkeypatch, capsys)
    assert ended == (130, "", "fastalex: error: stopped by SIGINT\n")


@pytest.mark.parametrize(("rank", "error"), [(0, ReportedError), (1, RuntimeError)])
def test_a_lost_rank_0_is_reported_although_torchrun_sends_a_signal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int, error: type[Exception]
) -> None:
    """Rank 0 says that a signal has stopped the run; if it is gone, the others say so."""

    def fit() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer [10.77.0.1]:40084")

    trainer: Any = SimpleNamespace(world=World(rank, 2))
    splits: Any = None
    with StopSignals() as signals:
        run = Run(Config(), splits, trainer, Recorder(tmp_path), signals, 0.0, {})
        monkeypatch.setattr(run, "_fit", fit)
        with pytest.raises(error):
            run.execute()
