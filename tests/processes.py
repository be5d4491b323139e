"""Processes that tests start, and checks of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed.run import get_args_parser


def shutdown_timeout(seconds: int) -> list[str]:
    """The option of torchrun for how long it waits for processes to end; PyTorch 2.11 has none, and 30 s."""
    option = "--shutdown-timeout"
    return [f"{option}={seconds}"] if option in get_args_parser().format_help() else []


TORCHRUN = [
    sys.executable,
    "-m",
    "tests.impatient_torchrun",
    "--standalone",
    "--nproc-per-node=2",
    *shutdown_timeout(2),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def torchrun(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes, to its end; it may import what is in ``tests``."""
    done = subprocess.run(
        [*TORCHRUN, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def has_ended(pid: int) -> bool:
    """Whether a process has ended, even if its parent has not yet waited for it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rsplit(")", 1)[1].split()[0] == "Z"
