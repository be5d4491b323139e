"""``python -m fastalex.reproduce``: run the rows of the study's table, and compare their errors.

What it does (:mod:`fastalex.commands.reproduce`) is imported when the settings have been read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastalex.cli import command
from fastalex.config import ReproduceConfig


@command("reproduce", ReproduceConfig)
def _reproduce(config: ReproduceConfig, run_dir: Path) -> None:
    from fastalex.commands.reproduce import run

    run(config)


def main() -> None:
    """Reproduce the study's table."""
    sys.argv[1:] = [_as_hydra(argument) for argument in sys.argv[1:]]
    _reproduce()


def _as_hydra(argument: str) -> str:
    """Allow ``rows=a,b``, which Hydra would take for two runs, and ``--dry-run``."""
    if argument == "--dry-run":
        return "dry_run=true"
    key, _, value = argument.partition("=")
    return f"rows=[{value}]" if key == "rows" and not value.startswith("[") else argument


if __name__ == "__main__":
    main()
