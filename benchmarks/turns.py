"""Programs that take turns: each in a process of its own, of which only one runs at a time.

What is measured may depend on the whole process: `keep_pages`, for one, changes malloc for good, and stock
PyTorch has to be measured with the stock malloc. Between its turns a process is stopped together with its
children (SIGSTOP), because a DataLoader's workers would otherwise prepare batches at the others' expense.
The clock is the process's own, so that asking and answering are not timed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]


class Worker:
    """A process that runs `serve`; from `start` on it is stopped except while it answers.

    Args:
        name: what an error calls it.
        command: after `python`; run in the repository's root.

    Raises:
        RuntimeError: the process has ended; why stands on standard error, which it shares.
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
        with suppress(ProcessLookupError):  # it has ended, which the next answer will show
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Let the process end, and see that its children do."""
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
    """Workers by name, which take turns.

    Args:
        commands: what each runs; see :class:`Worker`.
        rounds: turns of each.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]], rounds: int) -> None:
        self.rounds = rounds
        self._exits = ExitStack()
        with self._exits:  # closes what has been started if the next cannot be
            self.workers = {
                name: self._exits.push(Worker(name, command)) for name, command in commands.items()
            }
            for worker in self.workers.values():  # they get ready side by side
                worker.start()
            self._exits = self._exits.pop_all()

    def close(self) -> None:
        self._exits.close()

    def by_turns(self, benchmark: Any, turns: dict[str, Callable[[], None]]) -> None:
        """Take all turns in every round; pytest-benchmark's own clock sees the last."""
        *others, last = turns.values()

        def set_up() -> None:
            for turn in others:
                turn()

        benchmark.pedantic(last, setup=set_up, rounds=self.rounds)


class Rounds:
    """Stands in for pytest-benchmark's fixture, without its statistics."""

    def pedantic(self, target: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()


def serve(start: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """Answer each line of standard input, ``{"do": name, ...}``, with what the function of that name returns.

    Args:
        start: returns the functions; what it takes to make them comes before the first answer.
    """
    os.setpgid(0, 0)  # a group of its own, to be stopped as one
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    functions = start()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(functions[request.pop("do")](**request)), file=answers, flush=True)
    os._exit(0)  # without a wait for whatever threads and processes a library has left
