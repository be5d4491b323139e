"""Two ranks train like one process, and none keeps running when another fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastalex import train
from fastalex.config import Compression, Optimizer, Scaling, TrainConfig
from fastalex.distributed.processes import World
from fastalex.runs.checkpoint import read_weights
from fastalex.training.optim import create_optimizer
from fastalex.training.schedule import LearningRate
from tests import ranks, tiny_train
from tests.processes import ENVIRONMENT, TORCHRUN, has_ended, shutdown_timeout, torchrun
from tests.tolerances import (
    HALF,
    Tensors,
    assert_as_accurate,
    joined,
    relative_error,
    sum_bound,
    unit_roundoff,
)

REPEATS = int(os.environ.get("FASTALEX_FAULT_REPEATS", "1"))
FULL = REPEATS > 1  # set by `make faults`
repeated = pytest.mark.parametrize("repeat", range(REPEATS))
TRAIN = [tiny_train.__file__, *ranks.RUN]


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have written."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(ranks.__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def together(ranks_folder: Path) -> list[dict[str, Any]]:
    """The results of two ranks, by rank."""
    return [torch.load(ranks_folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


# Validation takes logarithms of fp32 probabilities of ten classes.
PROBABILITY = sum_bound(torch.float32, 10)


def change(case: ranks.Case, weights: Tensors) -> dict[str, Tensor]:
    """By how much all weights together, and the statistics of batch normalisation, change in a run."""
    before = ranks.narrow_alexnet(**case.network).state_dict()
    names = [name for name, value in before.items() if value.is_floating_point()]
    return {"change": joined({name: weights[name].double() - before[name] for name in names})}


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_ranks_take_the_steps_of_one_process(name: str, together: list[dict[str, Any]]) -> None:
    case = ranks.CASES[name]
    alone = ranks.run(case, World())
    expected = change(case, alone["weights"])
    exact = {}
    if case.dtype == torch.bfloat16:
        exact = change(case, ranks.run(replace(case, dtype=torch.float64), World())["weights"])
    for theirs in together:
        found = change(case, theirs[name]["weights"])
        bound = HALF
        if case.dtype == torch.bfloat16:
            bound = unit_roundoff(torch.bfloat16)
            assert_as_accurate(found, [expected], exact, factor=2.0, floor=bound)
        else:
            if case.distributed.compression is Compression.bf16:
                bound = 3 * unit_roundoff(torch.bfloat16)  # each rank's gradient is rounded, and their sum
            assert relative_error(found["change"], expected["change"]) < bound
        if alone["average"]:
            averages = (change(case, each["average"])["change"] for each in (theirs[name], alone))
            assert relative_error(*averages) < bound
        for figures in ("losses", "epoch"):
            assert theirs[name][figures] == pytest.approx(alone[figures], rel=max(bound, PROBABILITY))
        for key, weight in alone["weights"].items():
            assert theirs[name]["weights"][key].dtype == weight.dtype
            if not weight.is_floating_point():
                assert torch.equal(theirs[name]["weights"][key], weight)
    assert alone["losses"][0] != alone["losses"][-1]
    # Both ranks have bit-identical weights.
    first, second = (theirs[name]["weights"] for theirs in together)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("frozen with batch normalisation, ddp", ("conv1.", "norm_pool1.", "fc6.")),
        ("frozen, hybrid", ("conv1.", "fc6.")),
    ],
)
def test_frozen_layers_stay_as_they_were_on_two_ranks(
    name: str, prefixes: tuple[str, ...], together: list[dict[str, Any]]
) -> None:
    before = ranks.narrow_alexnet(**ranks.CASES[name].network).state_dict()
    for theirs in together:
        for key, weight in theirs[name]["weights"].items():
            assert torch.equal(weight, before[key]) == key.startswith(prefixes), key


def test_hybrid_shards_the_hidden_layers(together: list[dict[str, Any]]) -> None:
    whole = together[0]["ddp"]["parameters here"]
    hidden = 9216 * 256 + 256 + 256 * 256  # without the second layer's bias, which both ranks hold
    for theirs in together:
        assert theirs["hybrid"]["parameters here"] == whole - hidden // 2


@pytest.mark.parametrize("name", [name for name in ranks.CASES if "hybrid" in name])
def test_weights_are_gathered_once_after_a_step(name: str, together: list[dict[str, Any]]) -> None:
    """By the validation, for the checkpoint, the final weights and the evaluation that follow."""
    for theirs in together:
        assert theirs[name]["gathers after validation"] == 0
        found, weights = theirs[name]["evaluated"], theirs[name]["weights"]
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["ddp", "hybrid", "batch normalisation, hybrid", "frozen, hybrid"])
def test_resumed_ranks_are_bit_identical(name: str, together: list[dict[str, Any]]) -> None:
    assert all(theirs[f"{name}, resumed"] for theirs in together)


def test_collectives(together: list[dict[str, Any]]) -> None:
    for theirs in together:
        found = theirs["collectives"]
        assert found["sum"] == [3.0, 1.0]
        assert found["any"] == (True, False)
        assert found["min"] == 4
        assert found["gather"] == ["process 0", "process 1"]
        assert found["interleave"][:, 0].tolist() == list(range(7))
        assert found["main"] == "from process 0"


def test_gloo_threads_end_with_the_connection(together: list[dict[str, Any]]) -> None:
    # A remaining thread could abort a process that has finished successfully, at random.
    for theirs in together:
        threads = theirs["gloo's threads"]
        assert threads["own"]
        assert not threads["left"]


def test_a_world_of_size_1_does_not_communicate() -> None:
    world = World()
    assert world.sum(1, 2) == [1, 2]
    assert world.gather("x") == ["x"]
    rows = torch.arange(3)
    assert world.interleave(rows) is rows


def check_errors(stderr: str, message: str, folder: Path, traceback: str = "Traceback") -> None:
    errors = [line for line in stderr.splitlines() if "fastalex: error" in line]
    assert errors
    assert all(re.search(message, line) for line in errors), errors
    assert len(set(errors)) == 1
    assert traceback not in stderr
    assert not folder.exists()


def test_a_configuration_error_ends_torchrun_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = torchrun(*TRAIN, "train.batch_size=127", f"hydra.run.dir={folder}", check=False)
    assert done.returncode
    message = r"train.batch_size=127: is of all 2 processes together .* multiple of 2"
    check_errors(done.stderr, message, folder, "rank0]: Traceback")  # torchrun has a traceback of its own


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "accumulated",
            r"train.batch_size=12: is of all 2 processes together and does not divide among them in "
            r"train.accumulate=4 equal parts each; use a multiple of 8",
        ),
        ("hybrid", r"distributed.strategy=hybrid: divides AlexNet's two hidden layers"),
    ],
)
def test_a_configuration_error_is_one_line(
    name: str, message: str, together: list[dict[str, Any]], ranks_folder: Path
) -> None:
    ended = [theirs["commands"][name] for theirs in together]
    assert [end["status"] for end in ended] == [2, 2]
    check_errors("".join(end["stderr"] for end in ended), message, ranks_folder / name)


@pytest.mark.parametrize("resume", ["", "auto"])
def test_hybrid_with_one_process_is_refused(
    resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ranks.RUN, "model.name=resnet18", "distributed.strategy=hybrid", f"resume={resume}"]
    monkeypatch.setattr(sys, "argv", ["fastalex", *arguments, f"hydra.run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert "takes several processes; start them with torchrun" in capsys.readouterr().err


def start(
    run_dir: Path, *arguments: str, restarts: int = 0, torchrun_options: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Train, and write a checkpoint as soon as the last one is written, which only rank 0 knows."""
    options = [f"hydra.run.dir={run_dir}", "checkpoint.every_seconds=0", *arguments]
    return subprocess.Popen(
        [*TORCHRUN, f"--max-restarts={restarts}", *torchrun_options, *TRAIN, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the process ids of torchrun's workers, by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranked = {}
    for child in children:
        environment = dict(
            entry.split("=", 1)
            for entry in Path(f"/proc/{child}/environ").read_text().split("\0")
            if "=" in entry
        )
        if "RANK" in environment:
            ranked[int(environment["RANK"])] = int(child)
    return [ranked[rank] for rank in sorted(ranked)]


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[str]) -> None:
    while not condition():
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(ranks_folder: Path, together: list[dict[str, Any]]) -> Path:
    assert [theirs["commands"]["undisturbed"]["status"] for theirs in together] == [0, 0]
    return ranks_folder / "undisturbed"


@repeated
@pytest.mark.parametrize("rank", [0, 1] if FULL else [0])
def test_the_run_completes_after_a_killed_process_is_restarted(
    rank: int, repeat: int, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    launcher = start(run_dir, restarts=1)
    wait_for((run_dir / "checkpoint.pt").is_file, launcher)
    os.kill(workers(launcher)[rank], signal.SIGKILL)
    printed, _ = launcher.communicate()
    assert launcher.returncode == 0, printed
    assert "resuming the run" in printed
    epochs = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4]
    expected, _ = read_weights(undisturbed / "model.safetensors")
    weights, _ = read_weights(run_dir / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@repeated
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP] if FULL else [signal.SIGSTOP])
def test_the_run_ends_with_a_message_when_a_process_dies_or_hangs(
    fault: signal.Signals, repeat: int, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    launcher = start(run_dir, "distributed.timeout=10", "train.epochs=1000")
    wait_for((run_dir / "checkpoint.pt").is_file, launcher)
    processes = workers(launcher)
    os.kill(processes[1], fault)
    printed, _ = launcher.communicate()
    assert launcher.returncode
    if fault is signal.SIGSTOP:
        assert "process 0 of 2: another process has ended, or did not answer within 10 s" in printed
    assert all(has_ended(process) for process in processes)
    assert (run_dir / "checkpoint.pt").is_file()


def test_a_signal_to_torchrun_saves_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # torchrun kills what has not ended by then; on a busy machine two seconds are too few to finish a step.
    patient = shutdown_timeout(60)
    launcher = start(run_dir, "train.epochs=1000", torchrun_options=patient)
    wait_for((run_dir / "checkpoint.pt").is_file, launcher)
    processes = workers(launcher)
    launcher.send_signal(signal.SIGTERM)
    printed, _ = launcher.communicate()
    assert "stopped by SIGTERM; step" in printed
    assert printed.count("fastalex: error") == 1  # only rank 0 prints
    assert f"resume with resume={run_dir}" in printed
    assert all(has_ended(process) for process in processes)


def test_linear_scaling_multiplies_the_learning_rate() -> None:
    config = TrainConfig(batch_size=1024, lr=0.02, lr_scaling=Scaling.linear, warmup=0.5)
    optimizer = create_optimizer(nn.Linear(2, 2), config)
    schedule = LearningRate(optimizer, config, steps=9)
    rates = []
    for _ in range(9):
        rates.append(schedule.current)
        optimizer.step()
        schedule.after_step()
    assert max(rates) == pytest.approx(8 * 0.02)
    assert rates.index(max(rates)) == 4  # the end of the warm-up, half of the run


def test_lars_step_has_the_papers_norm() -> None:
    """The step of a layer is lr * 0.001 * |w| / (|g| + wd * |w|) * (g + wd * w)."""
    pytest.importorskip("timm", reason="LARS is timm's, which is not installed")
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    before = layer.weight.detach().clone()
    config = TrainConfig(optimizer=Optimizer.lars, lr=0.7, momentum=0.0, weight_decay=0.01)
    optimizer = create_optimizer(layer, config)
    layer(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.clone()
    optimizer.step()
    trust = 0.001 * before.norm() / (gradient.norm() + 0.01 * before.norm())
    expected = before - 0.7 * trust * (gradient + 0.01 * before)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-9)
