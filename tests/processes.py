"""Checks of processes."""

from __future__ import annotations

from pathlib import Path


def has_ended(pid: int) -> bool:
    """Whether a process has ended, even if its parent has not yet waited for it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rsplit(")", 1)[1].split()[0] == "Z"
