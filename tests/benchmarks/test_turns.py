"""Programs that take turns: between turns they and their children are stopped; at the end all have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.turns import Worker

PROGRAM = """
import os, signal, subprocess
from benchmarks.turns import serve

def start():
    child = subprocess.Popen(["sleep", "1000"])
    print("a library's greeting")
    return {
        "pids": lambda: [os.getpid(), child.pid],
        "add": lambda a, b: print("on the way") or a + b,
        "die": lambda: os._exit(3),
        "kill parent": lambda: os.kill(os.getppid(), signal.SIGKILL) or signal.pause(),
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


def test_a_program_in_its_turn_ends_with_its_killed_parent() -> None:
    benchmark = (
        "import sys; from benchmarks.turns import Worker; worker = Worker('it', ['-c', sys.argv[1]]); "
        "worker.start(); print(*worker.ask('pids'), flush=True); worker.ask('kill parent')"
    )
    ended = subprocess.run([sys.executable, "-c", benchmark, PROGRAM], stdout=subprocess.PIPE)
    assert ended.returncode == -signal.SIGKILL
    program, child = map(int, ended.stdout.split())
    wait_for(program, "XZ")
    os.kill(child, signal.SIGKILL)


def wait_for(pid: int, states: str) -> None:
    """Wait for a state: a signal takes effect some time after it is sent."""
    for _ in range(1000):
        if state(pid) in states:
            return
        time.sleep(0.01)
    assert state(pid) in states
