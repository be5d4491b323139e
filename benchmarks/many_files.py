"""A folder of very many image files: time and memory to the first batch, beside torchvision's ImageFolder.

    python -m benchmarks.many_files [--files 300000] [--rounds 3] [--folder FOLDER]

The files are hard links to a JPEG for each class, so that they take no room; they lie in the page cache. Each
program is a process of its own, by turns, and its clock starts after its imports. ImageFolder lists names;
fastalex reads every file once, so that a damaged one is named before the training, and remembers it: its
first run and a later one are measured. Writes ``results/many_files.csv``, and the table in docs/loaders.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.memory import forget_peak, peak_bytes
from benchmarks.report import RESULTS, Measurement, read_measurements, write_csv
from fastalex.files import write_text
from fastalex.markdown import replace_between, table

RECORDS = RESULTS / "many_files.csv"
PAGE = Path(__file__).parents[1] / "docs" / "loaders.md"
BEGIN, END = "<!-- python -m benchmarks.many_files writes this -->", "<!-- to here -->"
TIME, MEMORY = "time to the first batch", "memory added"
CLASSES = 100
SIZE = 160  # pixels a side: larger than what fastalex keeps decoded
RESIZE, CROP, BATCH, WORKERS = 128, 112, 128, 1
FIRST, LATER, PLAIN = "fastalex, first run", "fastalex, later run", "torchvision.datasets.ImageFolder"


def make_tree(root: Path, files: int) -> None:
    """Make class folders with this many files in all."""
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        folder = root / f"class{number:03}"
        folder.mkdir(parents=True)
        first = folder / "0000000.jpg"
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(first)
        for i in range(1, files // CLASSES):
            os.link(first, folder / f"{i:07}.jpg")


def fastalex(root: Path) -> Callable[[], int]:
    from sklearn import model_selection  # noqa: F401

    from fastalex.config import DataConfig, LoaderConfig, RuntimeConfig
    from fastalex.data import Views, build_loader, folders, load_splits, torchvision  # noqa: F401
    from fastalex.runtime import choose_runtime

    data = DataConfig("imagefolder", root=str(root), resize=RESIZE, crop=CROP)

    def first_batch() -> int:
        splits = load_splits(data, 0, progress=False)
        loader = build_loader(
            splits.train,
            data,
            LoaderConfig("torchvision", WORKERS),
            views=Views.random,
            batch_size=BATCH,
            runtime=choose_runtime(RuntimeConfig(device="cpu")),
        )
        return len(next(iter(loader))[1])

    return first_batch


def image_folder(root: Path) -> Callable[[], int]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize((RESIZE, RESIZE), antialias=True),
            v2.RandomCrop(CROP),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )

    def first_batch() -> int:
        images = ImageFolder(str(root), transform)
        return len(next(iter(DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS)))[1])

    return first_batch


PROGRAMS = {FIRST: fastalex, LATER: fastalex, PLAIN: image_folder}


def measure(program: str, root: Path) -> tuple[float, float]:
    """Return the seconds to the first batch, and the MB that were added to the process and its workers."""
    first_batch = PROGRAMS[program](root)
    forget_peak()
    before, began = peak_bytes(), time.perf_counter()
    assert first_batch() == BATCH
    return time.perf_counter() - began, (peak_bytes() - before) / 1e6


def by_turns(root: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Measure each program in processes of its own; return seconds and MB of each round."""
    found: dict[str, list[tuple[float, float]]] = {program: [] for program in PROGRAMS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:  # which the first run fills and the later one reads
            for program, values in found.items():
                command = [sys.executable, "-m", "benchmarks.many_files", "--once", program]
                command += ["--folder", str(root)]
                environment = {**os.environ, "XDG_CACHE_HOME": cache}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                values.append(tuple(json.loads(done.stdout)))
    return found


def measurements(found: dict[str, list[tuple[float, float]]], files: int) -> list[Measurement]:
    subject = {"files": files, "workers": WORKERS}
    return [
        Measurement.of({"program": program, **subject, "quantity": quantity}, unit, [v[i] for v in values])
        for i, (quantity, unit) in enumerate(((TIME, "s"), (MEMORY, "MB")))
        for program, values in found.items()
    ]


def page(text: str, measured: list[Measurement]) -> str:
    """The text of a page with the table of the measurements between its marks."""
    medians = {(m["program"], m["quantity"]): m.median for m in measured}
    rows = [
        [program, f"{medians[program, TIME]:,.1f}", f"{medians[program, MEMORY]:,.0f}"]
        for program in PROGRAMS
    ]
    first = measured[0]
    lines = [
        table([f"{int(first['files']):,} files", f"{TIME}, s", f"{MEMORY}, MB"], rows, numbers_right=True),
        "",
        f"*{first['hardware']}, {first['system']}, Python {first['python']}, PyTorch {first['torch']}, "
        f"{first['date']}; one loading process, files in the page cache, medians of {first['rounds']}.*",
    ]
    return replace_between(text, BEGIN, END, "\n".join(lines))


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write results/many_files.csv and docs/loaders.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_files", description=main.__doc__)
    parser.add_argument("--files", type=int, default=300_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to make the files for the time of this; it has room"
    )
    parser.add_argument("--once", choices=PROGRAMS, help=argparse.SUPPRESS)  # what each process runs
    given = parser.parse_args(arguments)
    if given.once:
        print(json.dumps(measure(given.once, given.folder)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        make_tree(Path(folder, "images"), given.files)
        found = by_turns(Path(folder, "images"), given.rounds)
    measured = measurements(found, given.files)
    write_csv(measured, RECORDS, "cpu")
    write_text(PAGE, page(PAGE.read_text(), read_measurements(RECORDS.read_text())))
    for m in measured:
        print(f"{m['program']}, {m['quantity']}: {m.median:,.1f} {m['unit']}")


if __name__ == "__main__":
    main()
