"""``python -m fastalex.train key=value ...``: train a network and report its error on the test set.

The configuration is composed here, the run is :func:`fastalex.runs.launch.train`: it builds the trainer
(:mod:`fastalex.runs.setup`), trains and evaluates (:mod:`fastalex.runs.run`), and on rank 0 writes files and
prints (:mod:`fastalex.runs.recorder`). PyTorch takes seconds to import, and is imported with it: ``--help``
and an error in a setting's name do not wait for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from fastalex.cli import Job, command, explicit_overrides
from fastalex.config import Config
from fastalex.distributed.launcher import is_main, under_torchrun


def _write_sweep(folder: Path, jobs: Sequence[Job]) -> None:
    from fastalex.runs.sweep import write_sweep

    write_sweep(folder, jobs)


@command("config", Config, after_job=_write_sweep)
def main(config: Config, run_dir: Path) -> Path:
    """Train; return the run's folder."""
    from fastalex.runs.launch import train

    given = any("hydra.run.dir=" in override for override in HydraConfig.get().overrides.hydra)
    may_resume = config.resume or (under_torchrun() and is_main())  # which may have started it again
    overrides = explicit_overrides() if may_resume else None
    return train(config, run_dir, run_dir_given=given, overrides=overrides)


if __name__ == "__main__":
    main()
