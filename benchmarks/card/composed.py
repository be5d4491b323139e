"""Compose the configurations of trainings, and train none.

    python -m benchmarks.card.composed ARGUMENTS ...

Each of ARGUMENTS is a JSON list of the arguments of one ``fastalex.train``. Ends with the first wrong ones.
"""

from __future__ import annotations

import json
import sys

from fastalex import train


def main() -> None:
    for arguments in sys.argv[1:]:
        sys.argv = ["fastalex.train", *json.loads(arguments), "--cfg", "job"]
        train.main()


if __name__ == "__main__":
    main()
