"""Interleaved measurements: functions, or programs in processes of their own, that take turns.

A program has its own process where what is measured depends on the whole process: `keep_pages`, for one,
changes malloc for good, and stock PyTorch has to be measured with the stock malloc. Between its turns a
process is stopped together with its children (SIGSTOP), because a DataLoader's workers would otherwise
prepare batches at the others' expense. Each process reads its own clock, so that requests and answers are not
timed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Worker:
    """A process that runs `serve`; from `start` on it is stopped except while it answers.

    Args:
        name: of the program, for errors.
        command: arguments of `python`, run in the repository's root.

    Raises:
        RuntimeError: the process has ended. It shares standard error, which says why.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, *command], text=True, cwd=ROOT, **pipes)

    def start(self) -> None:
        """Wait until it is ready for its first turn."""
        self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Call one of the process's functions and return what it returns."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended, status {self._process.wait()}")
        self._signal(signal.SIGSTOP)
        return json.loads(line)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended, which reading the next answer will show
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Let the process end, and kill its children."""
        self._signal(signal.SIGCONT)
        self._process.communicate()
        self._signal(signal.SIGKILL)

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Programs:
    """Workers, by name, that take turns.

    Args:
        commands: of the workers, by name; see :class:`Worker`.
        rounds: number of turns of each worker.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]], rounds: int) -> None:
        self.rounds = rounds
        self._exits = ExitStack()
        with self._exits:  # closes what has been started if the next cannot be
            self.workers = {
                name: self._exits.push(Worker(name, command)) for name, command in commands.items()
            }
            for worker in self.workers.values():  # they start up in parallel
                worker.start()
            self._exits = self._exits.pop_all()

    def close(self) -> None:
        self._exits.close()

    def by_turns(self, benchmark: Any, turns: Mapping[str, Callable[[], None]]) -> None:
        """Let each program take its turn in every round."""
        take_turns(benchmark, turns, self.rounds)


class RoundRunner:
    """Runs rounds like pytest-benchmark's fixture, without its statistics."""

    def pedantic(
        self,
        target: Callable[[], None],
        setup: Callable[[], None],
        rounds: int,
        warmup_rounds: int = 0,
    ) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()
            target()


def take_turns(
    benchmark: Any, turns: Mapping[str, Callable[[], None]], rounds: int, warmup_rounds: int = 0
) -> None:
    """Take all turns in every round.

    Args:
        benchmark: pytest-benchmark's fixture, whose own clock sees the last turn, or a :class:`RoundRunner`.
        turns: functions by name, each of which does its own timing.
        rounds: after the warm-up.
        warmup_rounds: before them.
    """
    *others, last = turns.values()

    def set_up() -> None:
        for turn in others:
            turn()

    benchmark.pedantic(last, setup=set_up, rounds=rounds, warmup_rounds=warmup_rounds)


def seconds_by_turns(
    benchmark: Any, turns: Mapping[str, Callable[[], Mapping[Any, float]]], rounds: int
) -> dict[tuple[Any, str], list[float]]:
    """Let implementations take turns after a warm-up round, which compiles.

    Args:
        benchmark: see :func:`take_turns`.
        turns: by implementation, functions that return seconds by case.
        rounds: after the warm-up.

    Returns:
        Seconds by case and implementation, one value per round.
    """
    seconds: dict[tuple[Any, str], list[float]] = {}

    def turn(name: str) -> None:
        for case, spent in turns[name]().items():
            seconds.setdefault((case, name), []).append(spent)

    take_turns(benchmark, {name: partial(turn, name) for name in turns}, rounds, warmup_rounds=1)
    return {key: values[1:] for key, values in seconds.items()}


def serve(start: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """Answer each line of standard input, ``{"do": name, ...}``, with what the function of that name returns.

    Args:
        start: returns the functions; it runs before the process reports that it is ready.
    """
    os.setpgid(0, 0)  # a process group of its own, to be stopped as one
    # A signal for the benchmark's group does not reach this one, which would keep the device from others.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to standard error
    functions = start()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(functions[request.pop("do")](**request)), file=answers, flush=True)
    os._exit(0)  # without waiting for threads and processes that a library has left
