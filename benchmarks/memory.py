"""How much memory a process takes, as Linux counts it, and on a GPU as PyTorch does."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Of a GPU's memory, in bytes. What a replayed CUDA graph works in is reserved, but not allocated.
DEVICE_PEAKS = {
    "peak device memory, allocated": torch.cuda.max_memory_allocated,
    "peak device memory, reserved": torch.cuda.max_memory_reserved,
}


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def proportional_bytes(pid: int) -> int:
    """Its proportional set size: each page divided among the processes that share it."""
    return _sum(f"/proc/{pid}/smaps_rollup", "Pss:")


def forget_peak() -> None:
    """Make `peak_bytes` begin anew."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # see proc_pid_clear_refs(5)


def peak_bytes() -> int:
    """The most that this process has held at once, and what its children hold now that nobody shares.

    The kernel keeps the first figure (`VmHWM`), so that nothing has to watch; batches that wait in shared
    memory to be received are in neither. 0 where there is no /proc.
    """
    children = family(os.getpid())[1:]
    private = sum(_sum(f"/proc/{pid}/smaps_rollup", "Private_Clean:", "Private_Dirty:") for pid in children)
    return _sum("/proc/self/status", "VmHWM:") + private


def _sum(path: str, *names: str) -> int:
    """The fields of these names, in kB in the file, in bytes; 0 if the process has ended."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))
