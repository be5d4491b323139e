"""``python -m fastalex.diagnose model=alexnet_paper_init``: what an initialisation does to the signal.

What it does (:mod:`fastalex.commands.diagnose`) is imported when the settings have been read.
"""

from __future__ import annotations

from pathlib import Path

from fastalex.cli import command
from fastalex.config import Config


@command("diagnose", Config)
def main(config: Config, run_dir: Path) -> None:
    """Diagnose an initialisation."""
    from fastalex.commands.diagnose import run
    from fastalex.training.limits import explained

    with explained(config):
        run(config, run_dir)


if __name__ == "__main__":
    main()
