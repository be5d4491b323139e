"""The commands end to end: what a run writes, what an evaluation repeats, and how bad input ends."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastalex import evaluate, plots, train
from fastalex.commands import evaluate as evaluating
from fastalex.config import Config, DataConfig, LoaderConfig, ModelConfig, RuntimeConfig
from fastalex.data import CutMixLoader
from fastalex.data.resident import ResidentLoader
from fastalex.errors import OutputError, StoppedError
from fastalex.models import MODELS
from fastalex.runs import checkpoint_writer, launch, setup
from fastalex.runs.checkpoint import read_weights, save_weights
from fastalex.runs.folder import RunFolder
from fastalex.runtime import choose_runtime
from fastalex.training import trainer
from tests import ranks
from tests.commands import outcome
from tests.compiling import Compiler

pytestmark = pytest.mark.usefixtures("tiny_network")

# On images that come with scikit-learn.
QUICK = [
    "data=digits",
    "model=mobilenet_v3_small",
    "data.resize=36",
    "data.crop=32",
    "train.epochs=2",
    "runtime.precision=fp32",
]
TINY = [*QUICK, "model.name=tiny"]  # where a run takes steps, and the network does not matter

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in an empty folder; return its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[], None], *overrides: str) -> tuple[int, str, str]:
        return outcome(main, overrides, monkeypatch, capsys)

    return run


@pytest.fixture(scope="module")
def finished(tiny_network: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch, (folder.parent / "out").open("w") as out:
        patch.setattr(sys, "argv", ["fastalex", *TINY, "checkpoint.every_steps=8", f"hydra.run.dir={folder}"])
        patch.setattr(sys, "stdout", out)
        train.main()
    return folder, (folder.parent / "out").read_text()


def test_a_run_writes_what_the_readme_lists(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors",
        "checkpoint-000008.pt",
        "checkpoint.pt",
        "config.yaml",
        "losses.png",
        "metrics.jsonl",
        "model.safetensors",
        "summary.json",
        "tensorboard",
    ]
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert all(epoch["train_loss"] > 0 and epoch["learning_rate"] > 0 for epoch in epochs)
    with Image.open(folder / "losses.png") as image:
        assert image.width > 600


def test_the_summary_adds_up(finished: tuple[Path, str]) -> None:
    folder, out = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["epochs"] == 2
    assert summary["steps"] == 2 * (summary["train_images"] // 128)
    assert summary["train_images"] + summary["validation_images"] + summary["ten_crop"]["images"] == 1797
    assert summary["top1_error"] == summary["ten_crop"]["top1_error"]
    assert summary["ten_crop"]["views"] == 5  # digits are never mirrored
    assert 0 <= summary["top5_error"] <= summary["top1_error"] <= 1
    assert summary["images_per_second"] > 0
    assert 0 <= summary["input_wait_fraction"] < 1
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = min(epoch["validation_top1_error"] for epoch in epochs)
    assert summary["best_on_validation"]["validation_top1_error"] == best
    assert f"{summary['single_crop']['top1_error']:.4f}" in out
    assert str(folder) in out


def test_tensorboard_has_the_curves_and_one_picture_of_the_inputs(finished: tuple[Path, str]) -> None:
    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    assert {"loss/validation", "error/validation top-1", "learning rate", "images per second"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Images("augmented inputs")] == [0]


def test_evaluation_repeats_the_figures_and_draws(finished: tuple[Path, str], command: Command) -> None:
    folder, _ = finished
    status, out, _ = command(evaluate.main, f"checkpoint={folder / 'checkpoint.pt'}")
    assert status == 0
    summary = json.loads((folder / "summary.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["single_crop"] == summary["single_crop"]
    assert evaluation["ten_crop"] == summary["ten_crop"]
    assert f"{summary['top1_error']:.4f}" in out
    status, _, err = command(
        evaluate.main,
        f"checkpoint={folder / 'checkpoint.pt'}",
        "runtime.device=cpu",
        "runtime.precision=fp16",
        "output=elsewhere",
    )
    assert status == 2
    assert "runtime.precision=fp16: is for GPUs; on a CPU use bf16 or fp32" in err
    assert not Path("elsewhere").exists()
    for name in ("confusion_matrix.png", "mistakes.png"):
        with Image.open(folder / name) as image:
            assert np.asarray(image.convert("L")).std() > 5
        (folder / name).unlink()
    with (folder / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [str(digit) for digit in range(10)]
    images = sum(int(row["images"]) for row in rows)
    for kind in ("top1_error", "top5_error"):
        mean = sum(int(row["images"]) * float(row[kind]) for row in rows) / images
        assert mean == pytest.approx(summary["ten_crop"][kind], abs=1e-5)  # six digits of each
    assert re.search(r"^most confused: true +predicted +images +of the class$", out, re.MULTILINE)
    for name in ("evaluation.json", "per_class.csv"):
        (folder / name).unlink()


def test_an_evaluation_is_written_to_another_folder(finished: tuple[Path, str], command: Command) -> None:
    """Whether that is possible is known before the network is evaluated."""
    folder, _ = finished
    before = set(folder.iterdir())
    status, out, _ = command(evaluate.main, f"weights={folder}", "output=a/new/folder")
    assert status == 0
    assert set(folder.iterdir()) == before
    names = {"evaluation.json", "per_class.csv", "confusion_matrix.png", "mistakes.png"}
    assert {path.name for path in Path("a/new/folder").iterdir()} == names
    assert "are in a/new/folder" in out
    Path("file").touch()
    status, out, err = command(evaluate.main, f"weights={folder}", "output=file/folder")
    assert status == 2
    assert "top-1" not in out
    assert "file/folder: nothing can be written to it (Not a directory); name another with" in err


def test_the_same_seed_gives_the_same_run(finished: tuple[Path, str], command: Command) -> None:
    folder, _ = finished
    command(train.main, *TINY, "hydra.run.dir=again")
    first, again = (json.loads((path / "summary.json").read_text()) for path in (folder, Path("again")))
    assert first["ten_crop"] == again["ten_crop"]
    command(train.main, *TINY, "hydra.run.dir=other", "seed=1")
    other = json.loads((Path("other") / "summary.json").read_text())
    assert other["ten_crop"]["loss"] != first["ten_crop"]["loss"]


def test_alexnet_takes_batches_that_are_mixed_and_ones_that_are_not_made(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "narrow_alexnet", ranks.narrow_alexnet)
    root = image_tree(Path("images"))
    few = ["data=imagefolder", f"data.root={root}", "train.batch_size=2", "train.epochs=1"]
    fold = ["model=resnet18", "model.name=narrow_alexnet", "data.resize=64", "data.crop=63"]
    status, _, err = command(train.main, *QUICK, *few, *fold, "train.cutmix=0.5", "hydra.run.dir=mixed")
    assert (status, err.count("fastalex: error")) == (0, 0)


def test_a_stage_may_have_a_share_of_its_own(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, float]] = []

    class Spy(CutMixLoader):
        def __init__(self, loader: ResidentLoader, classes: int, share: float) -> None:
            made.append((loader.data.resize, share))
            super().__init__(loader, classes, share)

    monkeypatch.setattr(setup, "CutMixLoader", Spy)
    stages = [
        "{epochs: 1, resize: 33, crop: 32, cutmix: 0}",
        "{epochs: 1, resize: 34, crop: 32}",
        "{epochs: 1, resize: 35, crop: 32, cutmix: 1}",
    ]
    stopped = ["train.epochs=4", f"train.stages=[{', '.join(stages)}]", "profile=true"]
    assert command(train.main, *TINY, *stopped, "train.cutmix=0.25")[0] == 0
    assert made == [(34, 0.25), (35, 1.0), (36, 0.25)]


def test_a_run_with_everything_switched_on_can_be_repeated_by_its_evaluation(command: Command) -> None:
    status, out, err = command(
        train.main,
        *TINY,
        "train.ema_decay=0.9",
        "train.label_smoothing=0.1",
        "train.cutmix=0.5",
        "train.accumulate=2",
        "train.stages=[{epochs: 1, resize: 36, crop: 32}]",
        "data.resize=54",
        "data.crop=48",
        "data.flip=alternate",
        "hydra.run.dir=run",
    )
    assert status == 0
    assert re.search(r"\d+ GFLOP/s \(\d+%\)", out)
    bars = re.findall(r"(\w+): 100%.* (\d+)/\2 ", err)
    assert [size for size, _ in bars] == ["32x32", "48x48"]
    assert command(evaluate.main, "checkpoint=run/checkpoint.pt")[0] == 0
    summary, evaluation = (
        json.loads(Path(f"run/{name}.json").read_text()) for name in ("summary", "evaluation")
    )
    assert evaluation["ten_crop"] == summary["ten_crop"]
    assert summary["flops_utilization"] > 0
    assert sum(int(steps) for _, steps in bars) == summary["steps"]


def test_a_profile_names_the_parts_of_the_loop_and_the_operators(command: Command) -> None:
    status, out, _ = command(train.main, *TINY, "profile=true", "hydra.run.dir=run")
    assert status == 0
    assert not Path("run/summary.json").exists()
    assert Path("run/profile.txt").read_text().split("\n", 2)[2] in out
    events = json.loads(Path("run/trace.json").read_text())["traceEvents"]
    steps = sum(event["name"].startswith("ProfilerStep") for event in events)
    for part in ("input", "forward", "backward", "optimizer"):
        # The last step ends with a look for a batch that does not exist.
        assert steps <= sum(event["name"] == part for event in events) <= 2 * steps
        assert re.search(rf"^{part} +\d+\.\d\d +\d+\.\d%$", out, re.MULTILINE)
    shares = re.findall(r"(\d+\.\d)%  +\d+\.\d$|others +\S+ +(\d+\.\d)%", out, re.MULTILINE)
    assert sum(float(a or b) for a, b in shares) == pytest.approx(100, abs=1.5)


def test_no_run_writes_into_anothers_folder(command: Command, tmp_path: Path) -> None:
    quick = [*TINY, "data=synthetic", "data.images=256", "train.epochs=1"]
    assert command(train.main, *quick, "hydra.run.dir=run")[0] == 0
    before = Path("run/summary.json").read_text()
    status, _, err = command(train.main, *quick, "hydra.run.dir=run")
    assert status == 2
    assert "already holds a run" in err
    assert Path("run/summary.json").read_text() == before
    # Nor does it read the images first, which may take long.
    _, _, err = command(train.main, *quick, "hydra.run.dir=run", "data=imagefolder", "data.root=nowhere")
    assert "already holds a run" in err
    # Hydra hands two runs of the same second the same path.
    config = Config(ModelConfig("resnet18"), DataConfig("digits"), LoaderConfig("resident"))
    folders = [RunFolder.new(tmp_path / "second", False, config).path.name for _ in range(3)]
    assert folders == ["second", "second-2", "second-3"]


def test_synthetic_data_reports_throughput_and_no_error(command: Command) -> None:
    status, out, _ = command(
        train.main, *TINY, "data=synthetic", "data.images=256", "train.epochs=1", "hydra.run.dir=run"
    )
    assert status == 0
    assert "an error would mean nothing" in out
    summary = json.loads(Path("run/summary.json").read_text())
    assert not any("error" in key for key in summary)
    assert "best_on_validation" not in summary
    status, _, err = command(evaluate.main, "checkpoint=run/checkpoint.pt")
    assert status == 2
    assert "synthetic" in err


def image_tree(root: Path, per_class: int = 10) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def test_damaged_images_are_skipped_and_counted_on_request(command: Command) -> None:
    root = image_tree(Path("images"))
    damaged = root / "cat" / "3.png"
    os.truncate(damaged, damaged.stat().st_size // 2)
    overrides = [*TINY, "data=imagefolder", f"data.root={root}", "train.batch_size=4", "train.epochs=1"]
    status, _, err = command(train.main, *overrides)
    assert status == 2
    assert "cat/3.png" in err
    assert "data.on_error=skip" in err
    assert not Path("outputs").exists()
    status, out, _ = command(train.main, *overrides, "data.on_error=skip", "hydra.run.dir=run")
    assert status == 0
    assert "1 damaged image skipped" in out
    assert json.loads(Path("run/summary.json").read_text())["skipped_images"] == 1


def test_weights_that_could_not_be_kept_are_left_out_at_the_end(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint_writer.save_weights

    def fails_for_the_best(weights: dict[str, torch.Tensor], path: Path, *args: Any, **facts: Any) -> None:
        if path.name == "best.safetensors":
            raise OutputError(f"{path}: cannot be written (No space left on device)")
        save(weights, path, *args, **facts)

    monkeypatch.setattr(checkpoint_writer, "save_weights", fails_for_the_best)
    status, _, err = command(train.main, *TINY, "checkpoint.on_error=warn", "hydra.run.dir=run")
    assert status == 0, err
    assert "run/best.safetensors: cannot be written (No space left on device)" in err
    assert "run/best.safetensors: is missing or damaged; its errors are left out" in err
    summary = json.loads(Path("run/summary.json").read_text())
    assert "best_on_validation" not in summary
    assert summary["epochs"] == 2
    assert 0 <= summary["ten_crop"]["top1_error"] <= 1


def test_divergence_stops_the_run_and_says_where(command: Command) -> None:
    status, _, err = command(train.main, *TINY, "train.lr=1e30", "log_every=1", "hydra.run.dir=run")
    assert status == 1
    message = err.splitlines()[-1]
    assert "the loss became" in message
    assert "at step" in message
    assert "learning rate" in message
    assert "no checkpoint was written" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lrr=1"], r"train.lrr"),
        (["quantum=1"], r"quantum"),
        (["+model.quantum=1"], r"model.quantum=1: there is no such key"),
        (["data=imagenet"], r"data=imagenet: there is no such choice; choose from cifar10, digits"),
        (["model=vgg"], r"model=vgg: there is no such choice; choose from alexnet"),
        (["data=0"], r"Config group override must be a string"),
        (["train.lr=${oc.env:HOME}"], r"train.lr=\S+: must be a number$"),
        (["seed=18446744073709551616"], r"seed=18446744073709551616: must be at least 0 and below 2\*\*63"),
        (["runtime.threads=1099511627776"], r"runtime.threads=1\S+: must be at least 0 and below 4096"),
        (["distributed.timeout=inf"], r"distributed.timeout=inf: must be a finite number"),
        (
            ["profile=true", "train.epochs=1"],
            r"train.epochs=1: profile=true takes 10 steps, and the run has 8; raise train.epochs",
        ),
        (
            ["train.stages=[{epochs: 1, resize: 36, crop: 16}]"],
            r"train.stages\[0\].crop=16: mobilenet_v3_small needs a crop of at least 32",
        ),
        (["checkpoint.keep=0"], r"checkpoint.keep=0: must be at least 1"),
        (["checkpoint.every_seconds=nan"], r"checkpoint.every_seconds=nan: must be a finite number"),
        (["checkpoint.every_steps=-1"], r"checkpoint.every_steps=-1: must be at least 0"),
        (["resume=nowhere"], r"resume=nowhere: there is no such run or checkpoint"),
        (["recipe=slow"], r"recipe=slow: there is no such choice; choose from fast, one_cycle, paper, study"),
        (["train.lr"], r"train.lr: is not of the form key=value"),
        (["train lr=1"], r"train lr=1: is not of the form key=value"),
        (["data.root=my images (1)"], r"""quote it: 'data.root="my images \(1\)"'"""),
        (["data=synthetic", "data.images=1000000000000"], r"data.images=1000000000000: so many"),
        (["data.std=[nan,1,1]"], r"data.std=\[nan, 1.0, 1.0\]: each needs three numbers"),
        (["data.color_eigenvalues=[1,2]"], r"data.color_eigenvalues=\[1.0, 2.0\] .*: need three numbers"),
        (["data.color_eigenvectors=[[1.0,0.0,0.0]]"], r"data.color_eigenvectors=\[\[1.0, 0.0, 0.0\]\]: need"),
        (["data.fit=longer_side"], r"data.fit: invalid value 'longer_side', expected one of"),
        (["data.mean=[inf,0,0]"], r"data.mean=\[inf, 0.0, 0.0\] .*: each needs three numbers"),
        (["model=resnet18", "train.batch_size=1"], r"train.batch_size: resnet18 gets one image at a time"),
        (
            ["train.batch_size=4", "train.accumulate=4"],
            r"train.batch_size: mobilenet_v3_small gets one image at a time",
        ),
        (["train.lr=fast"], r"train.lr=fast: must be a number$"),
        (["train.epochs=1.5"], r"train.epochs=1.5: must be a whole number$"),
        (["data.download=maybe"], r"data.download=maybe: must be true or false$"),
        (["train.freeze=conv1"], r"train.freeze: takes a list: train.freeze=\[conv1\]$"),
        (["train.stages={epochs: 1}"], r"train.stages: takes a list: train.stages=\[...\]$"),
        (["runtime.precision=bf17"], r"runtime.precision: invalid value 'bf17', expected one of"),
        (["train.epochs=0"], r"train.epochs=0: must be at least 1"),
        (["train.batch_size=-1"], r"train.batch_size=-1: must be at least 1"),
        (["train.accumulate=5"], r"train.accumulate=5: does not divide train.batch_size=128"),
        (["train.label_smoothing=1"], r"train.label_smoothing=1: must be at least 0 and below 1"),
        (["train.cutmix=1.5"], r"train.cutmix=1.5: a share of the batches, so from 0 to 1"),
        (
            ["train.stages=[{epochs: 1, resize: 36, crop: 32, cutmix: -1}]"],
            r"train.stages\[0\].cutmix=-1: a share of the batches",
        ),
        (["train.muon_lr=0"], r"train.muon_lr=0: must be greater than 0"),
        (["train.muon_weight_decay=-1"], r"train.muon_weight_decay=-1: must be at least 0"),
        (["train.ema_decay=1"], r"train.ema_decay=1: must be at least 0 and below 1"),
        (
            ["train.stages=[{epochs: 2, resize: 36, crop: 32}]"],
            r"train.stages: take 2 of train.epochs=2 and leave none at data.crop=32",
        ),
        (
            ["train.stages=[{epochs: 1.5, resize: 36, crop: 32}]"],
            r"a stage of train.stages: epochs=1.5: must be a whole number$",
        ),
        (["train.stages=[{epochs: 1, crop: 32}]"], r"train.stages\[0\].resize: has no value"),
        (["train.stages=[{epochs: 0, resize: 36, crop: 32}]"], r"train.stages\[0\].epochs=0: must be"),
        (
            ["train.stages=[{epochs: 1, resize: 30, crop: 32}]"],
            r"train.stages\[0\].crop=32: larger than its resize=30",
        ),
        (
            ["train.stages=[{epochs: 1, resize: 36, crop: 32, lr: 0}]"],
            r"train.stages\[0\].lr=0: must be greater than 0$",
        ),
        (
            ["train.stages=[{epochs: 1, resize: 36, crop: 32, lr: 0.1}]", "recipe=study"],
            r"train.stages\[0\].lr=0.1: is for train.schedule=one_cycle",
        ),
        (["data.resize=0"], r"data.resize=0: must be at least 1"),
        (["train.lr=-1"], r"train.lr=-1: must be greater than 0$"),
        (["loader.workers=-5"], r"loader.workers=-5: must be at least -1$"),
        (["train.momentum=1"], r"train.momentum=1: must be at least 0 and below 1"),
        (["data.validation_fraction=0"], r"data.validation_fraction=0: must be greater than 0 and below 1$"),
        (["data.train_fraction=0"], r"data.train_fraction=0: must be above 0 and at most 1"),
        (["data.train_fraction=1.5"], r"data.train_fraction=1.5: must be above 0"),
        (["data.std=[1,0,1]"], r"data.std=\[1.0, 0.0, 1.0\]"),
        (["data.crop=40"], r"data.crop=40: larger than data.resize=36"),
        (["data.crop=16"], r"data.crop=16: mobilenet_v3_small needs a crop of at least 32"),
        (["runtime.device=tpu"], r"runtime.device=tpu"),
        (["train.batch_size=100000"], r"batch"),
        (["data=imagefolder", "data.root=nowhere"], r"data.root=nowhere"),
        (["data=cifar10", "data.root=nowhere", "data.download=false"], r"data.root=nowhere"),
        (["hydra.run.dir=blocker/run"], r"hydra.run.dir=blocker\S*: the run folder cannot be made"),
        (["data=cifar10", "data.root="], r"data.root: is empty; name a folder$"),
        (["hydra.run.dir="], r"hydra.run.dir: is empty; name a folder$"),
        (["hydra.sweep.dir=''"], r"hydra.sweep.dir: is empty; name a folder$"),
        (["--epochs=3"], r"--epochs=3: settings have no dashes in front: train.epochs=3 "),
        (["--batch-size", "3"], r"--batch-size: settings have no dashes in front: train.batch_size=... "),
        (["--resume", "auto"], r"--resume: settings have no dashes in front: resume=... "),
        (
            ["--name=a-b"],
            r"--name=a-b: settings have no dashes in front: name=a-b ",
        ),  # of which there are several
        (["-m", "seed=1,2"], r"seed=1,2: has a flag between it and other settings; put flags in front"),
        (["--cfg=x"], r"argument --cfg/-c: invalid choice: 'x'"),
        (
            ["--config-name=row/foo"],
            r"--config-name=row/foo: there is no .* row/alexnet_bn, .* row/resnet18$",
        ),
        (['data.root="my" images (1)'], r"""quote it: 'data.root="\\"my\\" images \(1\)"'$"""),
        (["hydra.run.dir=/proc/fastalex"], r"hydra.run.dir=/proc/fastalex: the run folder cannot be made"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(command: Command, overrides: list[str], message: str) -> None:
    Path("blocker").write_text("a file where a folder should be")
    status, _, err = command(train.main, *QUICK, *overrides)
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("fastalex: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert re.search(message, lines[0]), lines[0]
    assert [path.name for path in Path().iterdir()] == ["blocker"]


def test_each_job_of_a_sweep_says_what_was_wrong_with_it(command: Command) -> None:
    synthetic = ["data=synthetic", "data.images=256", "train.epochs=1"]
    status, _, err = command(train.main, "-m", *TINY, *synthetic, "train.lr=-1,0.01,-2")
    assert status == 2
    assert re.findall("^fastalex: error: (.*)", err, re.MULTILINE) == [
        f"job {job}: train.lr={lr}: must be greater than 0" for job, lr in ((0, -1), (2, -2))
    ]
    assert [path.parent.name for path in Path("multirun").rglob("summary.json")] == ["1"]


def test_a_signal_ends_a_sweep(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []

    def stopped(*arguments: object, **named: object) -> None:
        jobs.append(arguments)
        raise StoppedError("stopped by SIGINT", signal.SIGINT)

    monkeypatch.setattr(launch, "train", stopped)
    status, _, err = command(train.main, "-m", *QUICK, "train.lr=0.1,0.2")
    assert (status, len(jobs)) == (130, 1)
    assert "fastalex: error: stopped by SIGINT" in err


def test_folders_that_were_there_before_stay(command: Command) -> None:
    Path("mine/empty").mkdir(parents=True)
    for folder in ("mine", "mine/empty", "mine/empty/new/run"):
        assert command(train.main, *QUICK, "train.lr=-1", f"hydra.run.dir={folder}")[0] == 2
        assert [path.name for path in Path("mine").rglob("*")] == ["empty"]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            PermissionError(13, "Permission denied", "locked/x"),
            2,
            "locked/x: cannot be used (Permission denied)",
        ),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    ],
    ids=["permission", "interrupt"],
)
def test_what_the_user_did_is_one_line(
    error: BaseException, status: int, line: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests may run as root, whom no permission stops."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(evaluating, "run", refuse)
    assert command(evaluate.main, "checkpoint=x") == (status, "", f"fastalex: error: {line}\n")


def test_more_kinds_of_batches_than_are_compiled_is_one_line(
    command: Command, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "PASSES_AT_A_CROP", 1)
    monkeypatch.setattr(trainer, "EVALUATION_PASSES", 0)
    status, _, err = command(train.main, *TINY, "runtime.compile=true", "hydra.run.dir=run")
    assert status == 1
    assert compiler.graphs == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        "fastalex: error: torch.compile has compiled the network for 1 kinds of batches, and the run has one "
        "more; train with runtime.compile=false"
    )


def test_hybrid_with_fp16_is_refused_in_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a card nor a second process is needed to refuse it: they are made up."""
    halves = replace(choose_runtime(RuntimeConfig(device="cpu")), dtype=torch.float16)
    monkeypatch.setattr(setup, "choose_runtime", lambda *_: halves)
    monkeypatch.setattr(setup, "check", lambda *_: None)
    status, out, err = command(train.main, *QUICK, "distributed.strategy=hybrid", "hydra.run.dir=run")
    assert (status, out) == (2, "")
    assert err == (
        "fastalex: error: distributed.strategy=hybrid: cannot scale the loss, which fp16 needs; "
        "choose runtime.precision=bf16 or fp32, or distributed.strategy=ddp\n"
    )
    assert not Path("run").exists()


def test_names_of_classes_are_no_formulas(tmp_path: Path) -> None:
    plots.confusion_matrix(np.eye(2), ["$5_$10", "_$^"], tmp_path / "matrix.png")
    plots.mistakes([np.zeros((2, 2, 3), np.uint8)], [("$5_$10", 0.5, "_$^")], tmp_path / "mistakes.png")
    for name in ("matrix.png", "mistakes.png"):
        assert Image.open(tmp_path / name).size > (100, 100)


def test_a_trace_that_the_disk_has_no_room_for_is_no_file(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(self: object, path: str) -> None:
        Path(f"{path}.tmp").write_text("half")  # as PyTorch leaves it, without an error

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", give_up)
    status, _, err = command(train.main, *TINY, "profile=true", "hydra.run.dir=run")
    assert status == 2
    assert re.search(r"^fastalex: error: \S+run/trace.json: cannot be written \(No space", err, re.MULTILINE)
    assert not [path.name for path in Path("run").iterdir() if "trace" in path.name]


def test_a_run_is_resumed_whatever_its_settings_would_be_without_it(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage at a crop that the default network, which the run does not have, would refuse."""
    stages = "train.stages=[{epochs: 1, resize: 36, crop: 32}]"
    synthetic = ["data=synthetic", "data.images=256", "hydra.run.dir=run"]
    stop_after = 1

    def stop(trainer: Any) -> None:
        if trainer.step >= stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr("fastalex.training.trainer.Trainer._stop_if_asked", stop)
    options = [*TINY, *synthetic, stages, "checkpoint.every_steps=1"]
    assert command(train.main, *options)[0] == 130
    stop_after = 1000
    status, out, err = command(train.main, "resume=run", stages)
    assert status == 0, err
    assert "resuming the run in run from step 1" in out


def test_images_that_are_no_longer_those_of_the_run_are_noticed(command: Command) -> None:
    """An image that is added or renamed may move others from training to the test, or back."""
    tree = image_tree(Path("tree"))
    for number, path in enumerate(sorted(tree.rglob("*.png"))):
        Image.new("RGB", (40 + number, 50)).save(path)
    settings = [
        "data=imagefolder",
        "data.root=tree",
        "train.batch_size=4",
        "train.epochs=1",
        "hydra.run.dir=run",
    ]
    assert command(train.main, *TINY, *settings)[0] == 0
    assert "warning" not in command(evaluate.main, "weights=run")[2]
    tree.rename("moved")
    assert "warning" not in command(evaluate.main, "weights=run", "data.root=moved")[2]
    renamed = min(Path("moved").rglob("*.png"))
    renamed.rename(renamed.with_name("zebra.png"))
    Path("moved").rename("tree")
    status, out, err = command(evaluate.main, "weights=run")
    assert status == 0
    assert "test images" in out
    assert "warning: data.root=tree: the images are not those of the run" in err
    Path("run/summary.json").unlink()  # as of a run that was stopped in its evaluation
    for name in ("model.safetensors", "best.safetensors", "checkpoint.pt"):
        copy = Path("elsewhere", name)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(Path("run", name), copy)
        _, _, err = command(evaluate.main, f"weights={copy}")
        assert "warning: data.root=tree: the images are not those of the run" in err
    status, _, err = command(train.main, "resume=run")
    assert status == 2
    assert "the images are no longer those of the run" in err


def test_a_folder_below_the_home_folder(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "at home"))
    status, _, err = command(train.main, *TINY, "data.root=~/none", "hydra.run.dir=~/runs/one")
    assert status == 0, err
    assert (tmp_path / "at home/runs/one/summary.json").exists()
    assert not Path("~").exists()
    status, _, err = command(train.main, "resume=~/runs/one")
    assert (status, "that run is finished" in err) == (2, True)


def test_a_folder_with_files_of_the_same_names_is_not_written_to(command: Command) -> None:
    for name in ("config.yaml", "model.safetensors", "checkpoint.pt"):
        folder = Path(name).with_suffix("")
        folder.mkdir()
        (folder / name).write_text("of another program")
        settings = ["data=synthetic", "data.images=256", "train.epochs=1", f"hydra.run.dir={folder}"]
        status, _, err = command(train.main, *TINY, *settings)
        assert status == 2
        assert "already holds a run" in err
        assert [path.name for path in folder.iterdir()] == [name]


def test_an_evaluation_takes_images_of_another_size_than_the_run_had(command: Command) -> None:
    tree = image_tree(Path("same"))
    overrides = ["data=imagefolder", "data.root=same", "train.batch_size=4", "train.epochs=1"]
    assert command(train.main, *TINY, *overrides, "hydra.run.dir=run")[0] == 0
    moved = tree.rename("other")
    for number, path in enumerate(sorted(moved.rglob("*.png"))):
        Image.new("RGB", (300 + number, 290)).save(path)
    status, out, err = command(evaluate.main, "checkpoint=run/checkpoint.pt", "data.root=other")
    assert status == 0, err
    assert "top-1" in out
    (moved / "dog").rename(moved / "elk")
    status, _, err = command(evaluate.main, "checkpoint=run/checkpoint.pt", "data.root=other")
    assert status == 2
    assert "class 2 is 'dog' there and 'elk' here, of 2 and 2" in err


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ([], r"weights: has no value; give it as weights=RUN"),
        (["checkpoint=none.pt"], r"checkpoint=none.pt: there is no such file"),
        (["checkpoint=cut.pt"], r"checkpoint=cut.pt: is damaged or cut short"),
        (["weights=none"], r"weights=none: there is no such file"),
        (["weights=."], r"weights=.: the folder holds neither model.safetensors nor checkpoint.pt"),
        (["weights=cut.safetensors"], r"weights=cut.safetensors: is missing, damaged or cut short"),
        (
            ["weights=flipped.safetensors"],
            r"weights=flipped.safetensors: is damaged \(it has another checksum",
        ),
        (["weights=foreign.safetensors"], r"weights=foreign.safetensors: does not say what network"),
        (["weights=other.safetensors"], r"weights=other.safetensors: .*another architecture"),
        (["weights=notes.txt"], r"weights=notes.txt: is neither a checkpoint \(.pt\) nor weights"),
        (["weights=a", "checkpoint=b"], r"checkpoint=b: is another name of weights="),
    ],
)
def test_bad_checkpoints_are_one_line(
    finished: tuple[Path, str], command: Command, checkpoint: list[str], message: str
) -> None:
    whole = (finished[0] / "checkpoint.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    weights = bytearray((finished[0] / "model.safetensors").read_bytes())
    Path("cut.safetensors").write_bytes(weights[:-1])
    weights[-1] ^= 1
    Path("flipped.safetensors").write_bytes(weights)
    tensors, facts = read_weights(finished[0] / "model.safetensors")
    save_file(tensors, "foreign.safetensors", metadata={"format": "pt"})
    save_weights(tensors, Path("other.safetensors"), facts["config"], facts["classes"][:9])
    Path("notes.txt").write_text("")
    status, _, err = command(evaluate.main, *checkpoint)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
