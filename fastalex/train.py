"""``python -m fastalex.train key=value ...``: train a network and report its error on the test set.

The configuration is composed here, the run is :func:`fastalex.runs.launch.train`: it builds the trainer
(:mod:`fastalex.runs.setup`), trains and evaluates (:mod:`fastalex.runs.run`), and on rank 0 writes files and
prints (:mod:`fastalex.runs.recorder`).
"""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from fastalex.cli import command, explicit_overrides
from fastalex.config import Config
from fastalex.distributed.processes import is_main, under_torchrun
from fastalex.runs.launch import train
from fastalex.runs.sweep import write_sweep


@command("config", Config, after_job=write_sweep)
def main(config: Config, run_dir: Path) -> None:
    """Train, and say where the run's files are."""
    given = any("hydra.run.dir=" in override for override in HydraConfig.get().overrides.hydra)
    may_resume = config.resume or (under_torchrun() and is_main())  # which may have started it again
    overrides = explicit_overrides() if may_resume else None
    train(config, run_dir, run_dir_given=given, overrides=overrides)


if __name__ == "__main__":
    main()
