"""Compiled code on disk is reused until a file that it was compiled from changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastalex.kernels
from fastalex.kernels._numba_simd import digest

PROGRAM = """
import os, sys
from fastalex.kernels import _numba_simd

for sources, package in zip(sys.argv[1::2], sys.argv[2::2]):
    for _ in range(2):  # in processes of their own, which have imported already
        child = os.fork()
        if not child:
            _numba_simd.SOURCES, _numba_simd.__name__ = sources, package

            @_numba_simd.jit()
            def twice(x):
                return 2 * x

            assert twice(3) == 6
            print(sum(twice.stats.cache_hits.values()), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


def test_changed_sources_are_compiled_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    states = ["one", "fastalex.kernels", "other", "fastalex.kernels", "other", "kernels"]
    command = [sys.executable, str(program), *states]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"] * 3


def test_the_digest_covers_every_kernel_file(tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(
        Path(fastalex.kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    before = digest(copy)
    assert digest(copy) == before
    seen = {before}
    for path in sorted(copy.glob("*.py")):
        path.write_text(path.read_text() + "\n")
        seen.add(digest(copy))
    assert len(seen) == 1 + len(list(copy.glob("*.py"))) > 10
