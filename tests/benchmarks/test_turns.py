"""Programs that take turns: between turns they and their children are stopped; at the end all have ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.turns import Worker

PROGRAM = """
import os, subprocess
from benchmarks.turns import serve

def start():
    child = subprocess.Popen(["sleep", "1000"])
    print("a library's greeting")
    return {
        "pids": lambda: [os.getpid(), child.pid],
        "add": lambda a, b: print("on the way") or a + b,
        "die": lambda: os._exit(3),
    }

serve(start)
"""


def state(pid: int) -> str:
    """The state letter of proc_pid_stat(5): R, S, T (stopped), Z; X for a process that no longer exists."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


@pytest.fixture(name="worker")
def one_worker() -> Iterator[Worker]:
    with Worker("the test's program", ["-c", PROGRAM]) as worker:
        yield worker


def test_answers_although_libraries_print(worker: Worker) -> None:
    assert worker.ask("add", a=1, b=2) == 3
    assert worker.ask("add", a="x", b="y") == "xy"


def test_is_stopped_between_turns(worker: Worker) -> None:
    for _ in range(2):
        for pid in worker.ask("pids"):
            wait_for(pid, "T")


def test_leaves_no_process() -> None:
    with Worker("the test's program", ["-c", PROGRAM]) as worker:
        pids = worker.ask("pids")
    for pid in pids:
        wait_for(pid, "XZ")  # the child may wait for init to reap it


def test_names_the_program_that_ended(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="the process of the test's program ended, status 3"):
        worker.ask("die")


def wait_for(pid: int, states: str) -> None:
    """Wait for a state: a signal takes effect some time after it is sent."""
    for _ in range(1000):
        if state(pid) in states:
            return
        time.sleep(0.01)
    assert state(pid) in states
