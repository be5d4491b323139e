"""Runs of two processes on two machines, for ``tests/test_nodes.py``.

``torchrun --nnodes=2 --nproc-per-node=1 tests/node_runs.py FOLDER`` trains on FOLDER/images, and writes each
run to FOLDER/NAME.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastalex.distributed.processes import joined
from tests import rank_runs, ranks

# Data parallel; with initial weights, which are in the first one's folder; and the hybrid
NAMES = ("plain", "initial weights and frozen layers", "hybrid")
UNDISTURBED = "undisturbed"


def main(folder: Path) -> None:
    with joined(60) as world:
        for name in NAMES:
            outcome = rank_runs.run(name, folder / "images", folder, world)
            assert "error" not in outcome, outcome
        outcome = ranks.command([*ranks.RUN, f"hydra.run.dir={folder / UNDISTURBED}"], world)
        assert outcome["status"] == 0, outcome


if __name__ == "__main__":
    main(Path(sys.argv[1]))
