"""``python -m fastalex.predict weights=RUN images=PATH``: what a trained network sees in images of yours.

What it does (:mod:`fastalex.commands.predict`) is imported when the settings have been read.
"""

from __future__ import annotations

from pathlib import Path

from fastalex.cli import command
from fastalex.config import PredictConfig


@command("predict", PredictConfig)
def main(config: PredictConfig, run_dir: Path) -> None:
    """Predict the classes of images."""
    from fastalex.commands.predict import run

    run(config)


if __name__ == "__main__":
    main()
