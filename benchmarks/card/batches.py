"""Images/s by batch size: ``python -m benchmarks.card.batches FOLDER ROOT [--toy]``.

Rewrites ``batches.json`` after each size, with the memory that PyTorch had reserved.
"""

from __future__ import annotations

import gc
import json
from functools import partial
from statistics import median

import torch

from benchmarks.card.place import given_place
from benchmarks.contenders import Fastalex
from benchmarks.hardware import DEVICE, seconds
from fastalex.files import write_text

SIZES = (128, 256, 512, 1024)
IMAGES = 25_600  # per turn
TURNS = 3


def main() -> None:
    given = given_place("batches")
    found = []
    for size in (4,) if given.toy else SIZES:
        steps = 1 if given.toy else IMAGES // size
        program = Fastalex(given.root, size)
        program.train(steps)
        if DEVICE == "cuda":  # what choosing kernels took counts no longer
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        turn = partial(program.train, steps)
        rate = median(steps * size / seconds(turn) for _ in range(TURNS))
        reserved = torch.cuda.max_memory_reserved() if DEVICE == "cuda" else None
        found.append({"batch": size, "images_per_second": rate, "reserved_bytes": reserved})
        print(found[-1], flush=True)
        write_text(given.folder / "batches.json", json.dumps(found, indent=1) + "\n")
        del program, turn
        torch.compiler.reset()  # its CUDA graphs keep the memory that they write to
        gc.collect()


if __name__ == "__main__":
    main()
