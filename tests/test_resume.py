"""A run that is interrupted anywhere and resumed ends as an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

from fastalex import train
from fastalex.config import (
    CheckpointConfig,
    DataConfig,
    Flip,
    LoaderConfig,
    OnWriteError,
    Optimizer,
    Precision,
    RuntimeConfig,
    Schedule,
    Stage,
    TrainConfig,
)
from fastalex.config.plain import as_argument
from fastalex.data import CutMixLoader, Loader, StagedLoader, Views, load_splits
from fastalex.errors import CheckpointError, OutputError
from fastalex.models import load_weights
from fastalex.runs.checkpoint import Checkpoint, read_weights
from fastalex.runs.checkpoint_writer import CheckpointWriter, OutputPolicy, load_newest
from fastalex.runs.folder import RunLock
from fastalex.runtime import choose_runtime
from fastalex.training.epoch import Epoch
from fastalex.training.trainer import StopTraining, Trainer
from tests.commands import outcome
from tests.runtimes import loader_on

pytestmark = pytest.mark.usefixtures("tiny_network")
QUICK = [
    "data=digits",
    "model=mobilenet_v3_small",
    "model.name=tiny",  # of tests/tiny.py
    "data.resize=36",
    "data.crop=32",
    "train.epochs=3",
    "runtime.precision=fp32",
]
STEPS = 24  # of such a run
TIMES = {
    "images_per_second",
    "input_wait_fraction",
    "flops_per_second",
    "flops_utilization",
    "warmup_seconds",
    "seconds",
}
DATA = DataConfig("digits", resize=20, crop=16, flip=Flip.alternate)
RECIPES = {
    "one cycle": TrainConfig(epochs=3, batch_size=230, lr=0.1),
    "plateau": TrainConfig(epochs=9, batch_size=230, lr=0.5, schedule=Schedule.plateau, patience=0),
    "average, accumulation, clipping, smoothing": TrainConfig(
        epochs=4, batch_size=230, ema_decay=0.9, accumulate=2, clip_norm=1.0, label_smoothing=0.1
    ),
    "CutMix": TrainConfig(epochs=3, batch_size=230, lr=0.1, cutmix=0.5),
    "frozen layers and a rate of the last one": TrainConfig(
        epochs=3, batch_size=230, freeze=["0", "1"], head_lr=0.2, ema_decay=0.9, accumulate=2
    ),
    "Muon": TrainConfig(epochs=3, batch_size=230, optimizer=Optimizer.muon, ema_decay=0.9),
    "stages": TrainConfig(epochs=3, batch_size=230, stages=[Stage(2, 16, 12)]),
    "stages with rates": TrainConfig(
        epochs=3, batch_size=230, lr=0.05, stages=[Stage(1, 16, 12, lr=0.1), Stage(1, 18, 14)]
    ),
}


def a_trainer(config: TrainConfig, **options: Any) -> Trainer:
    """A small network with all that has a state: batch normalisation, dropout, momentum."""
    torch.manual_seed(0)
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32))
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(72, 10),
    )
    splits = load_splits(DATA, 0)
    shapes = [*((s.resize, s.crop) for s in config.stages), (DATA.resize, DATA.crop)]
    loaders = [
        loader_on(
            splits.train,
            DataConfig("digits", resize=resize, crop=crop, flip=DATA.flip),
            LoaderConfig("resident"),
            views=Views.random,
            batch_size=config.batch_size,
        )
        for resize, crop in shapes
    ]
    validation = loader_on(
        splits.validation, DATA, LoaderConfig("resident"), views=Views.center, batch_size=100
    )
    training: Loader = StagedLoader(loaders, [stage.epochs for stage in config.stages])
    if config.cutmix:
        training = CutMixLoader(training, len(splits.classes), config.cutmix)
    return Trainer(runtime.place(model), config, training, validation, runtime, **options)


def finish(trainer: Trainer, epochs: list[Epoch] | None = None) -> list[Epoch]:
    epochs = [] if epochs is None else epochs
    while not trainer.finished:
        epochs.append(trainer.run_epoch())
    return epochs


def figures(epoch: Epoch) -> dict[str, Any]:
    return {name: value for name, value in asdict(epoch).items() if name not in TIMES}


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    weights = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    weights |= {f"average.{name}": tensor for name, tensor in (trainer.averaged_weights() or {}).items()}
    trained = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    for index, parameter in enumerate(trained):
        weights[f"momentum.{index}"] = trainer.optimizer.state[parameter]["momentum_buffer"]
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_going_on_from_any_step_ends_at_the_same_bits(recipe: str, tmp_path: Path) -> None:
    config = RECIPES[recipe]
    whole = a_trainer(config)
    expected = finish(whole)
    steps = expected[-1].step
    per_epoch = steps // len(expected)
    if recipe == "plateau":
        assert len({epoch.learning_rate for epoch in expected}) > 1
    for stop in sorted({1, 2, per_epoch, per_epoch + 3, steps // 2, steps - 1, steps}):
        first = a_trainer(config)
        first.should_stop = lambda stop=stop, first=first: first.step >= stop
        epochs: list[Epoch] = []
        with pytest.raises(StopTraining):
            finish(first, epochs)
        path = tmp_path / f"{stop}.pt"
        Checkpoint({}, [], first.model.state_dict(), first.state_dict(), first.averaged_weights()).save(path)

        second = a_trainer(config)
        torch.randn(100)  # what the second process did with its generator does not matter
        content = torch.load(path, weights_only=True)
        load_weights(second.model, content["model"])
        second.load_state_dict(content["training"], content["average"])
        epochs += finish(second)
        assert [figures(epoch) for epoch in epochs] == [figures(epoch) for epoch in expected]
        found, wanted = state(second), state(whole)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), f"{name}, interrupted after step {stop}"
        # Three processes' worth of samples are counted as one run's.
        assert second.spent.images <= whole.spent.images + config.batch_size * steps
        assert second.images_per_second > 0


def test_a_validation_can_be_interrupted_and_done_again() -> None:
    config = RECIPES["one cycle"]
    expected = a_trainer(config).run_epoch()
    first = a_trainer(config)
    asked = []

    def stop() -> bool:
        asked.append(first.step)
        return len(asked) == len(first.train_loader) + 2  # after the second batch of the validation

    first.should_stop = stop
    with pytest.raises(StopTraining):
        first.run_epoch()
    assert first.model.training is False or first.epoch == 0
    second = a_trainer(config)
    load_weights(second.model, first.model.state_dict())
    second.load_state_dict(first.state_dict(), None)
    assert figures(second.run_epoch()) == figures(expected)


def test_a_state_of_another_recipe_is_refused() -> None:
    trainer = a_trainer(RECIPES["one cycle"])
    for damaged in ({}, {**trainer.state_dict(), "optimizer": {"state": {}, "param_groups": []}}):
        with pytest.raises(CheckpointError, match="does not fit this run"):
            a_trainer(RECIPES["one cycle"]).load_state_dict(damaged, None)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Train in an empty folder; return the exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, str, str]:
        return outcome(train.main, overrides, monkeypatch, capsys)

    return run


def signalled_at(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int) -> None:
    """Send this process a signal within the first step after so many."""
    take_step = Trainer._step

    def with_signal(self: Trainer, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.step == step:
            os.kill(os.getpid(), number)
        return take_step(self, *batch)

    monkeypatch.setattr(Trainer, "_step", with_signal)


@pytest.mark.parametrize(
    "path", ["/tmp/my run (1)", "it's", 'the "best"', "a=b,c", "ends with \\", '\\"', "~/run", "rün"]
)
def test_a_path_is_quoted_for_the_shell_and_hydra(path: str) -> None:
    (argument,) = shlex.split(as_argument("resume", path))
    assert OverridesParser.create().parse_override(argument).value() == path


def test_a_plain_path_is_not_quoted() -> None:
    assert as_argument("resume", "/tmp/2026-01-02/03-04-05_1") == "resume=/tmp/2026-01-02/03-04-05_1"


def test_what_a_stopped_run_says_resumes_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        signalled_at(patch, signal.SIGTERM, 2)
        _, _, err = command(*QUICK, 'hydra.run.dir="my run (1)"')
    status, out, _ = command(*shlex.split(err.splitlines()[-1].rpartition("resume with ")[2]))
    assert status == 0
    assert "from step 3" in out


def metrics(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_a_signal_ends_the_run_in_good_order_and_resume_finishes_it(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*QUICK, "hydra.run.dir=whole")[0] == 0
    with monkeypatch.context() as patch:
        signalled_at(patch, signal.SIGTERM, 12)
        status, _, err = command(*QUICK)
    assert status == 128 + signal.SIGTERM
    (folder,) = Path("outputs").glob("*/*")
    message = err.splitlines()[-1]
    assert message.startswith("fastalex: error: stopped by SIGTERM; step 13 is saved, resume with resume=")
    assert message.endswith(str(folder))
    assert Checkpoint.load(folder / "checkpoint.pt").step == 13
    # Further lines, as of a crash later than the checkpoint, are taken back.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2}\n')

    status, _, err = command("resume=auto", "train.lr=3")
    assert status == 2
    assert re.search(
        r"error: train.lr=3.0: the run in \S+ has train.lr=0.02, and a resumed run keeps it", err
    )

    with monkeypatch.context() as patch:
        signalled_at(patch, signal.SIGINT, 15)
        status, out, _ = command("resume=auto", "log_every=3")  # which may be changed
    assert status == 128 + signal.SIGINT
    assert "from step 13" in out
    status, out, _ = command("resume=auto", "data=digits", "train.lr=0.02")  # which is what it has
    assert status == 0
    assert "from step 16" in out

    assert metrics(str(folder)) == metrics("whole")
    for name in ("model.safetensors", "best.safetensors"):
        ours, theirs = (read_weights(Path(path, name))[0] for path in (folder, "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (json.loads(Path(path, "summary.json").read_text()) for path in (folder, "whole"))
    for key in ("ten_crop", "single_crop", "best_on_validation", "steps", "epochs"):
        assert ours[key] == theirs[key]
    assert len(list(Path("outputs").glob("*/*"))) == 1  # the resuming processes left no folders
    # There is nothing left to resume.
    status, out, _ = command(*QUICK, "train.epochs=1", "resume=auto", "hydra.run.dir=new")
    assert status == 0
    assert "starting a new one" in out


def test_resume_takes_a_run_a_checkpoint_or_says_why_not(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signalled_at(patch, signal.SIGTERM, 6)
        status = command(*QUICK, "checkpoint.every_steps=2", "checkpoint.keep=3", "hydra.run.dir=run")[0]
    assert status == 143
    assert sorted(path.name for path in Path("run").glob("*.pt")) == [
        "checkpoint-000004.pt",
        "checkpoint-000006.pt",
        "checkpoint.pt",
    ]
    for overrides, message in (
        (["resume=nowhere"], r"resume=nowhere: there is no such run or checkpoint"),
        (["resume=run/none.pt"], r"resume=run/none.pt: there is no such run or checkpoint"),
        (["resume=run", "hydra.run.dir=b"], r"hydra.run.dir=\S+: a resumed run stays in its folder"),
        (["resume=run", "model=resnet18"], r"model.name=resnet18: .* has model.name=tiny"),
        (["resume=run", "model=alexnet"], r"model.name=alexnet: .* has model.name=tiny"),
        (["resume=run", "recipe=study"], r"data.flip=both: .* has data.flip=none"),
        (["resume=run", "--config-name=row/alexnet"], r"model.name=alexnet: .* has model.name=tiny"),
        (["resume=run", "--config-name=row/mobilenet_v3_small"], r"=\S+: .*; leave out what sets it"),
        (["resume=run", "data=cifar10"], r"data.name=cifar10: .* has data.name=digits"),
        (["resume=run", "seed=7"], r"seed=7: .* has seed=0"),
        (["resume=run/checkpoint.pt", "train={lr:0.5}"], r"train.lr=0.5: .* has train.lr=0.0"),
        (["hydra.run.dir=run", *QUICK], r"already holds a run; name another folder, or resume it with"),
    ):
        status, out, err = command(*overrides)
        assert status == 2, overrides
        assert "resuming" not in out
        assert re.search(message, err.splitlines()[-1]), err
    assert sorted(path.name for path in Path().iterdir()) == ["run"]
    lock = RunLock.take(Path("run"))
    assert lock is not None
    for overrides in (["resume=run"], ["resume=auto", "hydra.run.dir=run"]):
        status, _, err = command(*overrides)
        assert status == 2
        assert "another process is at work on" in err
    lock.release()
    status, out, _ = command("resume=run/checkpoint-000004.pt")
    assert status == 0
    assert "from step 4" in out
    assert json.loads(Path("run/summary.json").read_text())["steps"] == STEPS
    status, _, err = command("resume=run")
    assert status == 2
    assert "that run is finished" in err
    status, _, err = command("resume=run/checkpoint.pt")  # its newest, with which nothing is left to do
    assert status == 2
    assert "that run is finished" in err
    assert Path("run/model.safetensors").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_its_folder(command: Command) -> None:
    Path("run/tensorboard").mkdir(parents=True)
    status, out, _ = command(*QUICK, "train.epochs=1", "resume=auto", "hydra.run.dir=run")
    assert status == 0
    assert "starting a new one" in out
    assert Path("run/summary.json").exists()


def a_checkpoint(step: int) -> Checkpoint:
    return Checkpoint({"model": {}}, ["a"], {"w": torch.full((1000,), float(step))}, {"step": step})


def a_writer(folder: Path, keep: int = 2, on_error: OnWriteError = OnWriteError.stop) -> CheckpointWriter:
    return CheckpointWriter(folder, CheckpointConfig(keep=keep), OutputPolicy(on_error))


def steps_in(folder: Path) -> list[int]:
    return sorted(Checkpoint.load(path).step for path in folder.glob("*.pt"))


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_few_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    writer = a_writer(tmp_path, keep)
    for step in (3, 5, 5, 8, 13, 21):
        writer.save(a_checkpoint(step))
    writer.close()
    assert steps_in(tmp_path) == [3, 5, 8, 13, 21][-keep:]
    assert Checkpoint.load(tmp_path / "checkpoint.pt").step == 21


def test_a_save_copies_the_state(tmp_path: Path) -> None:
    writer = a_writer(tmp_path)
    live = a_checkpoint(1)
    writer.save(live)
    live.model["w"].zero_()
    writer.close()
    assert torch.equal(Checkpoint.load(tmp_path / "checkpoint.pt").model["w"], torch.ones(1000))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = a_writer(tmp_path, 3)
    for step in (1, 2, 3):
        writer.save(a_checkpoint(step))
    writer.close()
    assert load_newest(tmp_path)[1].name == "checkpoint.pt"
    os.truncate(tmp_path / "checkpoint.pt", 500)
    checkpoint, path = load_newest(tmp_path)
    assert (checkpoint.step, path.name) == (2, "checkpoint-000002.pt")
    content = bytearray(path.read_bytes())
    position = content.index(torch.full((4,), 2.0).numpy().tobytes())
    content[position + 400] ^= 1  # a bit of a weight
    path.write_bytes(content)
    assert load_newest(tmp_path)[0].step == 1
    assert load_newest(path)[0].step == 1
    warnings = capsys.readouterr().err.splitlines()
    assert warnings[-1] == f"fastalex: warning: resuming from {tmp_path}/checkpoint-000001.pt instead"
    assert f"fastalex: warning: checkpoint={path}: is damaged or cut short" in warnings[-2]
    os.truncate(tmp_path / "checkpoint-000001.pt", 0)
    with pytest.raises(CheckpointError, match=r"every checkpoint there is damaged; the first: \S+=\S+/ch"):
        load_newest(tmp_path)
    assert load_newest(tmp_path.parent) is None


@pytest.mark.parametrize("on_error", OnWriteError)
def test_a_write_that_fails_is_reported_on_the_next_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on_error: OnWriteError,
) -> None:
    writer = a_writer(tmp_path, on_error=on_error)
    writer.save(a_checkpoint(1))
    writer.wait()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    message = "No space left on device.: the checkpoint of step 2 is lost, that of step 1 stays"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        writer.save(a_checkpoint(2))
        writer._thread.submit(int).result()  # until the write has ended
        if on_error is OnWriteError.stop:
            with pytest.raises(OutputError, match=message):
                writer.check()
        else:
            writer.check()
            assert re.search(f"warning: .*{message}.*; training continues", capsys.readouterr().err)
    assert steps_in(tmp_path) == [1]
    writer.save(a_checkpoint(3))
    writer.close()
    assert steps_in(tmp_path) == [1, 3]
    assert not list(tmp_path.glob(".*"))
