"""``python -m fastalex.export weights=RUN output=FILE``: a trained network for programs without fastalex.

What it does (:mod:`fastalex.commands.export`) is imported when the settings have been read.
"""

from __future__ import annotations

from pathlib import Path

from fastalex.cli import command
from fastalex.config import ExportConfig


@command("export", ExportConfig)
def main(config: ExportConfig, run_dir: Path) -> None:
    """Export a trained network."""
    from fastalex.commands.export import run

    run(config)


if __name__ == "__main__":
    main()
