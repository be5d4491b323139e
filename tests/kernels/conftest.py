"""Run Triton kernels on the CPU from the tests.

Triton reads TRITON_INTERPRET when it is imported, and a process that interprets kernels cannot compile any,
neither for `inspect` nor for torch.compile. So the interpreter runs in a separate process, shared by the
tests of a module, and the tests send it functions of their module by name.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Interpreter:
    """A process with TRITON_INTERPRET=1 that has loaded the test module at `path`."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, check: Callable[..., Any], *arguments: Any) -> Any:
        """Run `check`, a function of the test module, in that process; the test fails if it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((check.__name__, arguments), self.process.stdin)
        self.process.stdin.flush()
        try:
            failure, result = pickle.load(self.process.stdout)
        except EOFError:
            pytest.fail(f"the interpreter's process died (exit status {self.process.wait()})", pytrace=False)
        if failure:
            pytest.fail(failure, pytrace=False)
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> Iterator[Interpreter]:
    """Call it to run a function of the test module in a process where Triton kernels are interpreted."""
    interpreter = Interpreter(request.path)
    yield interpreter
    interpreter.close()


def _serve(path: str) -> None:
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a check prints goes to the terminal, not into the replies
    import torch

    torch.set_num_threads(1)
    from fastalex.kernels._traffic import mended, patch_language_once

    patch_language_once()

    spec = importlib.util.spec_from_file_location("interpreted_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mended():
        while True:
            try:
                name, arguments = pickle.load(requests)
            except EOFError:
                return
            try:
                reply = None, getattr(module, name)(*arguments)
            except BaseException:
                reply = traceback.format_exc(), None
            pickle.dump(reply, replies)
            replies.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])
