"""``python -m fastalex.evaluate weights=RUN``: a run's test errors, and its mistakes.

What it does (:mod:`fastalex.commands.evaluate`) is imported when the settings have been read.
"""

from __future__ import annotations

from pathlib import Path

from fastalex.cli import command
from fastalex.config import EvaluateConfig


@command("evaluate", EvaluateConfig)
def main(config: EvaluateConfig, run_dir: Path) -> None:
    """Evaluate trained weights."""
    from fastalex.commands.evaluate import run

    run(config)


if __name__ == "__main__":
    main()
