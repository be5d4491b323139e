"""The memory of a process, as Linux counts it, and on a GPU as PyTorch counts it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Peaks of a GPU's memory, in bytes. The memory of a CUDA graph's replay is reserved, but not allocated.
DEVICE_PEAKS = {
    "peak device memory, allocated": torch.cuda.max_memory_allocated,
    "peak device memory, reserved": torch.cuda.max_memory_reserved,
}


def family(pid: int) -> list[int]:
    """The ids of a process and of all its descendants."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def proportional_bytes(pid: int) -> int:
    """A process's proportional set size: each page divided among the processes that share it."""
    return _sum(f"/proc/{pid}/smaps_rollup", "Pss:")


def forget_peak() -> None:
    """Reset the high-water mark that `peak_bytes` reads."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # see proc_pid_clear_refs(5)


def peak_bytes() -> int:
    """This process's peak of resident memory plus the memory private to its children now.

    The kernel keeps the peak (`VmHWM`), so that no polling is needed. Batches that wait in shared memory to
    be received count in neither. 0 on a system without /proc.
    """
    children = family(os.getpid())[1:]
    private = sum(_sum(f"/proc/{pid}/smaps_rollup", "Private_Clean:", "Private_Dirty:") for pid in children)
    return _sum("/proc/self/status", "VmHWM:") + private


def _sum(path: str, *names: str) -> int:
    """The sum of these fields of a file, in bytes (the file has kB); 0 if the process has ended."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))
