"""The command ``fastalex.train`` with the networks of ``tests/tiny.py``, for processes that tests start."""

from __future__ import annotations

from fastalex import train
from fastalex.training import flops
from tests import tiny


def main() -> None:
    tiny.register()
    flops.MATMUL_SIZE["cpu"] = 64  # measuring the peak rate would take most of a short run
    train.main()


if __name__ == "__main__":
    main()
