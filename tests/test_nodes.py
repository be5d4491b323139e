"""Two machines train like one process, and survive what happens to one of them and to their network."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from fastalex.distributed.processes import ALONE
from fastalex.runs.checkpoint import read_weights
from tests import node_runs, rank_runs, ranks, tiny_train
from tests.nodes import ended, two_nodes, wait_for

REPEATS = int(os.environ.get("FASTALEX_FAULT_REPEATS", "1"))
FULL = REPEATS > 1  # set by `make faults`
repeated = pytest.mark.parametrize("repeat", range(REPEATS))
TRAIN = [tiny_train.__file__, *ranks.RUN]
# torchrun's: each attempt to connect the processes has a store of its own, as a node that returns needs
OWN_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the runs of two nodes, of which the second sees only the images; its clock is wrong."""
    base = tmp_path_factory.mktemp("nodes")
    folder = base / "runs"
    folder.mkdir()
    rank_runs.make_images(base / "images")
    with two_nodes(base) as (first, second):
        second.hide(folder)
        for node in (first, second):
            node.run("ln", "-s", str(base / "images"), str(folder / "images"))
        # By default torchrun takes a node for dead whose clock is 15 s behind.
        patient = "--rdzv-conf=keep_alive_max_attempt=1000"
        program = [patient, node_runs.__file__, str(folder)]
        assert ended(first.torchrun(*program), second.torchrun(*program, clock=-3600)) == [0, 0], (
            first.printed + second.printed
        )
        assert second.seen(folder) == ["images"]
        warnings = [line for line in first.printed.splitlines() if "fastalex: warning" in line]
        assert len(warnings) == 1
        assert re.search(r"the clocks of the nodes are 3(59\d|60\d) s apart", warnings[0])
    return folder


@pytest.mark.parametrize("name", node_runs.NAMES)
def test_two_nodes_take_the_steps_of_one_process(name: str, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(runs / "images")
    if name != "plain":  # whose weights another starts from
        (tmp_path / "plain").symlink_to(runs / "plain")
    rank_runs.run(name, tmp_path / "images", tmp_path, ALONE)
    nodes, one = (
        [json.loads(line) for line in (each / name / "metrics.jsonl").read_text().splitlines()]
        for each in (runs, tmp_path)
    )
    assert len(nodes) == len(one) == 2
    for key in ("train_loss", "validation_loss", "learning_rate"):
        # Sums differ in order.
        assert [epoch[key] for epoch in nodes] == pytest.approx([epoch[key] for epoch in one], rel=1e-4)


@repeated
def test_a_pulled_cable_ends_both_nodes_with_one_line(repeat: int, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    options = [f"hydra.run.dir={run}", "checkpoint.every_seconds=0", "distributed.timeout=8"]
    with two_nodes(tmp_path) as (first, second):
        second.hide(run.parent)
        launchers = [node.torchrun(*TRAIN, *options, "train.epochs=1000") for node in (first, second)]
        wait_for((run / "checkpoint.pt").is_file, first, second)
        first.cable("down")
        wait_for(lambda: bool(first.errors and second.errors), first, second)
        first.cable("up")  # torchrun itself would wait for a minute or more
        assert all(ended(*launchers))
        for rank, node in enumerate((first, second)):
            message = f"process {rank} of 2: another process has ended, or did not answer within 8 s"
            assert [message in line for line in node.errors] == [True], node.printed
            assert not node.processes()
    assert (run / "checkpoint.pt").is_file()


@repeated
@pytest.mark.parametrize("fault", ["killed", "switched off"] if FULL else ["killed"])
def test_a_node_that_returns_resumes_the_run(fault: str, repeat: int, runs: Path, tmp_path: Path) -> None:
    """A machine that is switched off leaves its connections open, unlike one whose processes are killed."""
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    program = ["--max-restarts=1", *TRAIN, *elastic(run)]
    with two_nodes(tmp_path) as (first, second):
        second.hide(run.parent)
        stays, gone = (node.torchrun(*program, environment=OWN_STORES) for node in (first, second))
        wait_for((run / "checkpoint.pt").is_file, first, second)
        if fault == "switched off":
            second.cable("down")
        second.kill()
        ended(gone)
        second.boot()
        second.hide(run.parent)
        second.cable("up")
        assert ended(stays, second.torchrun(*program, environment=OWN_STORES)) == [0, 0], first.printed
        assert "resuming the run" in first.printed
    assert_same_weights(run, runs / node_runs.UNDISTURBED)


@repeated
@pytest.mark.skipif(not FULL, reason="takes a minute: make faults ARGS=first-node")
def test_without_the_first_node_the_second_ends(repeat: int, runs: Path, tmp_path: Path) -> None:
    """torchrun's rendezvous lives on the first node, so there is nothing to restart from."""
    run = tmp_path / "runs" / "run"
    run.parent.mkdir()
    program = ["--max-restarts=1", *TRAIN, *elastic(run)]
    with two_nodes(tmp_path) as (first, second):
        second.hide(run.parent)
        launchers = [node.torchrun(*program) for node in (first, second)]
        wait_for((run / "checkpoint.pt").is_file, first, second)
        first.kill()
        assert all(ended(*launchers))
        assert len(second.errors) == 1, second.printed
        assert not second.processes()
        first.boot()
        assert ended(*[node.torchrun(*program) for node in (first, second)]) == [0, 0], first.printed
        assert "resuming the run" in first.printed
    assert_same_weights(run, runs / node_runs.UNDISTURBED)


def elastic(run: Path) -> list[str]:
    """The settings of a run that resumes when it is started again."""
    return [f"hydra.run.dir={run}", "resume=auto", "checkpoint.every_seconds=0", "distributed.timeout=20"]


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = (read_weights(each / "model.safetensors")[0] for each in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
