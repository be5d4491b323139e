"""What a run draws and writes, it draws and writes beside the training; at the end all of it is there."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastalex import plots, train
from fastalex.config import Config, DataConfig, LoaderConfig, ModelConfig
from fastalex.errors import DivergedError, OutputError
from fastalex.runs import background, checkpoint_writer, run
from fastalex.runs import folder as run_folder
from fastalex.runs.checkpoint import Checkpoint, read_weights
from fastalex.runs.checkpoint_writer import CheckpointWriter
from fastalex.runs.folder import RunFolder
from fastalex.training.epoch import Epoch
from fastalex.training.trainer import Trainer
from tests.commands import outcome

pytestmark = pytest.mark.usefixtures("tiny_network")
RUN = [
    "data=digits",
    "model=resnet18",  # a group without options
    "model.name=tiny",
    "data.resize=36",
    "data.crop=32",
    "runtime.precision=fp32",
    "hydra.run.dir=run",
]
STEPS, BATCH = 8, 128  # of an epoch
PATIENCE = 300.0  # seconds after which what was to come is not coming, and a test fails that would hang

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Train in an empty folder; return the exit status and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, str]:
        status, _, err = outcome(train.main, [*RUN, *overrides], monkeypatch, capsys)
        return status, err

    return run


class Blocked:
    """Work that lasts until it is released."""

    def __init__(self) -> None:
        self._begun, self.released = threading.Event(), threading.Event()

    @property
    def under_way(self) -> bool:
        return self._begun.wait(PATIENCE) and not self.released.is_set()

    def __call__(self) -> None:
        assert threading.current_thread() is not threading.main_thread(), "training waits for this"
        self._begun.set()
        assert self.released.wait(PATIENCE), "training waits for this"


class Epochs:
    """What is done when an epoch, counted from 1, begins and ends, and what each came to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on_begin: Callable[[int], None] = lambda number: None
        self.on_end: Callable[[int], None] = lambda number: None
        self.errors: Sequence[float] = ()  # of the validations, in place of what they found
        self.weights: list[dict[str, torch.Tensor]] = []
        run_epoch = Trainer.run_epoch

        def watched(trainer: Trainer) -> Epoch:
            number = len(self.weights) + 1
            self.on_begin(number)
            epoch = run_epoch(trainer)
            self.weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
            self.on_end(number)
            return replace(epoch, validation_top1_error=self.errors[number - 1]) if self.errors else epoch

        monkeypatch.setattr(Trainer, "run_epoch", watched)


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> Epochs:
    return Epochs(monkeypatch)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many epochs each drawing has."""
    drawn: list[int] = []
    monkeypatch.setattr(plots, "losses", lambda epochs, path: drawn.append(len(epochs)))
    return drawn


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The checkpoints that are written, with their steps, and the best weights, with their epochs."""
    written: list[tuple[str, int]] = []
    save, save_weights = Checkpoint.save, checkpoint_writer.save_weights

    def save_and_note(checkpoint: Checkpoint, path: Path, *arguments: Any, **options: Any) -> None:
        save(checkpoint, path, *arguments, **options)
        written.append(("checkpoint", checkpoint.step))

    def save_weights_and_note(weights: Any, path: Path, *arguments: Any, **facts: Any) -> None:
        save_weights(weights, path, *arguments, **facts)
        written.append((path.stem, facts["epoch"]))

    monkeypatch.setattr(Checkpoint, "save", save_and_note)
    monkeypatch.setattr(checkpoint_writer, "save_weights", save_weights_and_note)
    return written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, in seconds, for what is done from time to time: it stands still by itself."""
    now = [0.0]
    monkeypatch.setattr(background, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def assert_best_is_of(epoch: int, epochs: Epochs) -> None:
    weights, facts = read_weights(Path("run/best.safetensors"))
    assert (facts["epoch"], facts["validation_top1_error"]) == (epoch, min(epochs.errors))
    expected = epochs.weights[epoch - 1]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_epochs_go_by_while_one_is_drawn_and_then_the_newest_is(
    command: Command, epochs: Epochs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "DRAW_EVERY", 0.0, raising=False)
    drawing = Blocked()
    drawn, seen = [], []

    def draw(epochs: Sequence[Epoch], path: Path) -> None:
        if not drawn:
            drawing()
        drawn.append(len(epochs))

    def on_begin(number: int) -> None:
        if number > 1:
            seen.append(drawing.under_way)
        if number == 4:
            drawing.released.set()

    monkeypatch.setattr(plots, "losses", draw)
    epochs.on_begin = on_begin
    status, err = command("train.epochs=4")
    assert status == 0, err
    assert seen == [True, True, True]
    assert drawn == [1, 4]


def test_epochs_go_by_while_one_is_written_and_then_the_newest_is_and_the_best(
    command: Command, epochs: Epochs, written: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = Blocked()
    save, snapshot = Checkpoint.save, Checkpoint.snapshot
    copied, seen = [], []

    def save_slowly(checkpoint: Checkpoint, *arguments: Any, **options: Any) -> None:
        if not written:
            writing()
        save(checkpoint, *arguments, **options)

    def copy(checkpoint: Checkpoint, device: str | None = None) -> Checkpoint:
        copied.append(checkpoint.step)
        return snapshot(checkpoint, device)

    def on_end(number: int) -> None:
        seen.append(writing.under_way)
        if number == 4:
            writing.released.set()

    monkeypatch.setattr(Checkpoint, "save", save_slowly)
    monkeypatch.setattr(Checkpoint, "snapshot", copy)
    epochs.errors = (0.9, 0.5, 0.7, 0.6)
    epochs.on_end = on_end
    status, err = command("train.epochs=4", "checkpoint.every_seconds=0")
    assert status == 0, err
    assert seen == [True] * 4
    assert copied == [1, 4 * STEPS]
    assert written == [("checkpoint", 1), ("best", 2), ("checkpoint", 4 * STEPS)]
    assert_best_is_of(2, epochs)


def test_a_short_run_is_drawn_and_written_once_and_its_summary_says_where_the_time_went(
    command: Command, epochs: Epochs, written: list[tuple[str, int]], drawn: list[int], clock: list[float]
) -> None:
    epochs.errors = (0.9, 0.5, 0.7)
    status, err = command("train.epochs=3")
    assert status == 0, err
    assert written == [("best", 2), ("checkpoint", 3 * STEPS)]
    assert drawn == [3]
    assert_best_is_of(2, epochs)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["best_on_validation"]["epoch"] == 2
    parts = ("startup", "warmup", "training", "validation", "between_epochs", "closing")
    seconds = [summary[f"{part}_seconds"] for part in parts]
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(summary["wall_seconds"], rel=0.1)
    warmup = 3  # steps
    images = (3 * STEPS - warmup) * BATCH
    assert summary["images_per_second"] * summary["training_seconds"] == pytest.approx(images)


def test_the_time_between_epochs_is_told_from_that_of_the_epochs(
    command: Command, epochs: Epochs, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    record = RunFolder.epoch

    def record_slowly(folder: RunFolder, epoch: Epoch) -> None:
        record(folder, epoch)
        now[0] += 3.0

    def on_end(number: int) -> None:
        now[0] += 100.0

    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(RunFolder, "epoch", record_slowly)
    epochs.on_end = on_end
    status, err = command("train.epochs=2", "data=synthetic", "data.images=256")
    assert status == 0, err
    assert json.loads(Path("run/summary.json").read_text())["between_epochs_seconds"] == 6.0


def test_a_run_is_saved_every_so_many_seconds_in_the_middle_of_an_epoch_too(
    command: Command,
    epochs: Epochs,
    written: list[tuple[str, int]],
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_step, save = Trainer._step, CheckpointWriter.save

    def step(trainer: Trainer, *batch: Any) -> Any:
        clock[0] += 1
        return take_step(trainer, *batch)

    def save_and_wait(writer: CheckpointWriter, *arguments: Any) -> None:
        save(writer, *arguments)
        writer.wait()

    def on_end(number: int) -> None:
        clock[0] += 7  # of a validation

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(CheckpointWriter, "save", save_and_wait)
    epochs.on_end = on_end
    status, err = command("train.epochs=2", "checkpoint.every_seconds=5")
    assert status == 0, err
    assert [number for name, number in written if name == "checkpoint"] == [5, 8, 13, 16]


def test_a_checkpoint_finds_the_best_weights_of_its_epochs_on_the_disk(
    command: Command, epochs: Epochs, written: list[tuple[str, int]], clock: list[float]
) -> None:
    epochs.errors = (0.9, 0.5)
    status, err = command("train.epochs=2", "checkpoint.every_steps=12")
    assert status == 0, err
    assert written == [("best", 1), ("checkpoint", 12), ("best", 2), ("checkpoint", 16)]


def test_a_run_that_is_stopped_is_drawn_and_saved(
    command: Command, epochs: Epochs, written: list[tuple[str, int]], drawn: list[int], clock: list[float]
) -> None:
    def on_begin(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    epochs.errors = (0.5, 0.9)
    epochs.on_begin = on_begin
    status, err = command("train.epochs=4")
    assert status == 128 + signal.SIGTERM
    assert f"step {2 * STEPS + 1} is saved" in err
    assert written == [("best", 1), ("checkpoint", 2 * STEPS + 1)]
    assert drawn == [2]
    assert_best_is_of(1, epochs)


def test_a_run_that_diverges_leaves_its_epochs_and_its_best_weights(
    command: Command, epochs: Epochs, written: list[tuple[str, int]], drawn: list[int], clock: list[float]
) -> None:
    def on_begin(number: int) -> None:
        if number == 3:
            raise DivergedError("the loss became nan")

    epochs.errors = (0.5, 0.9)
    epochs.on_begin = on_begin
    status, err = command("train.epochs=4")
    assert status == 1
    assert "the loss became nan; no checkpoint was written" in err
    assert written == [("best", 1)]
    assert drawn == [2]
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2
    assert_best_is_of(1, epochs)


def an_epoch(number: int) -> Epoch:
    return Epoch(number, number, 1.0, 0.5, None, None, None, 0.1, 1.0, 0.0, 1.0, None, 0.0, 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    config = Config(ModelConfig("resnet18"), DataConfig("digits"), LoaderConfig("resident"))
    return RunFolder.new(tmp_path / "run", True, config)


def test_epochs_are_drawn_every_so_many_seconds(
    clock: list[float], drawn: list[int], folder: RunFolder
) -> None:
    for number in range(1, 6):
        clock[0] += 0.6 * run_folder.DRAW_EVERY
        folder.epoch(an_epoch(number))
        folder._drawing.wait()
        assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == number
    folder.finish()
    folder.finish()  # there is nothing new to draw
    folder.close()
    assert drawn == [2, 4, 5]


def test_a_drawing_that_fails_is_reported_and_the_last_one_made_all_the_same(
    monkeypatch: pytest.MonkeyPatch, folder: RunFolder
) -> None:
    def fail(epochs: Sequence[Epoch], path: Path) -> None:
        raise OutputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(folder._drawing, "_every_seconds", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(plots, "losses", fail)
        folder.epoch(an_epoch(1))
        folder._drawing._thread.submit(int).result()  # until the drawing has ended
        with pytest.raises(OutputError, match=r"losses\.png: cannot be written"):
            folder.epoch(an_epoch(2))
        folder.epoch(an_epoch(3))
        with pytest.raises(OutputError, match=r"losses\.png: cannot be written"):
            folder.finish()
        folder.epoch(an_epoch(4))
        folder._drawing._thread.submit(int).result()
    folder.finish()  # there is room again
    folder.close()
    assert (folder.path / "losses.png").is_file()
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 4
