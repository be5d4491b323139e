"""On a machine with a GPU, no benchmark of CPU tensors writes the GPU's results file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OF_THE_CPU = [path for path in BENCHMARKS.glob("test_*.py") if '_{KIND}.csv", "cpu"' in path.read_text()]
WITH_A_CARD = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["--benchmark-enable", "--setup-only", "-rs", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_benchmarks_of_the_cpu_are_skipped() -> None:
    assert len(OF_THE_CPU) >= 6
    command = [sys.executable, "-c", WITH_A_CARD, *map(str, OF_THE_CPU)]
    result = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=True)
    assert "times CPU tensors" in result.stdout
    collected = re.search(r"collected (\d+) items", result.stdout)
    assert collected
    assert f"= {collected[1]} skipped in " in result.stdout
