"""Images a second and peak memory of the four loaders, by turns in one run.

    make bench-loaders

Each loader lives in a process of its own, warmed up by an epoch, and they take turns at timed epochs, so that
all of them see the same machine. What is timed is the loader alone: batches are dropped as they come. Memory
is the proportional set size of the process and its workers (shared pages counted once, divided among those
who share them), at its largest during its turns; PyTorch itself is in it. A table and a chart go to
``benchmarks/results/loaders_cpu.*``, or ``loaders_cpu_fp32.*`` on a CPU without bf16.

Two data sets: 1,024 images of CIFAR-10 (noise of that size where the data are not at hand), and generated
JPEG photographs of 500 x 375. The resident loader takes no files: it is shown with the photographs decoded
beforehand, as is FFCV, whose .beton file is written before the clock starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.hardware import KIND
from benchmarks.memory import family, proportional_bytes
from benchmarks.report import RESULTS, machine, write_csv
from fastalex.config import DataConfig, LoaderConfig, Precision, RuntimeConfig
from fastalex.data import ImageSet, Views, build_loader, load_splits
from fastalex.files import replacing, write_text
from fastalex.runtime import choose_runtime

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
NAMES = ("torchvision", "dali", "ffcv", "resident")
GEOMETRY: dict[str, Any] = {"resize": 256, "crop": 224}
WORKERS = 2
ROUNDS = 5
LEAST_SECONDS = 0.5  # of epochs in a turn
SMALL, PHOTOGRAPHS = 1024, 256


@dataclass(frozen=True)
class Row:
    """One loader on one data set; images a second over the timed epochs, memory in MB."""

    data: str
    loader: str
    images_per_s: float
    p20: float
    p80: float
    times_torchvision: float
    peak_memory_mb: float
    rounds: int


class Server:
    """A loader in a process of its own, which runs epochs each time it is asked."""

    def __init__(self, name: str, source: Path) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.test_loaders", name, str(source)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        )
        self.rates: list[float] = []
        self.peak = 0

    def wait_until_warm(self) -> None:
        self._answer()

    def epoch(self) -> None:
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,))
        watcher.start()
        try:
            assert self.process.stdin is not None
            print("epoch", file=self.process.stdin, flush=True)
            self.rates.append(float(self._answer()))
        finally:
            done.set()
            watcher.join()

    def close(self) -> None:
        self.process.communicate("")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                return line.split()[1]
        raise RuntimeError(f"the process of loader {self.name} ended")

    def _watch(self, done: threading.Event) -> None:
        while True:
            self.peak = max(self.peak, sum(map(proportional_bytes, family(self.process.pid))))
            if done.wait(0.1):
                return


def serve(name: str, source: Path) -> None:
    """Runs epochs for each line of standard input and answers with the images a second."""
    data = DataConfig(name="benchmark", **GEOMETRY)
    if source.suffix == ".npy":
        pixels = np.load(source, mmap_mode="r")
        images = ImageSet(np.zeros(len(pixels), np.int64), pixels=pixels)
    else:
        paths = tuple(sorted(source.glob("*.jpg")))
        images = ImageSet(np.zeros(len(paths), np.int64), paths=paths)
        if name == "resident":
            images = ImageSet(images.labels, pixels=np.stack([images.image(i) for i in range(len(images))]))
    loader = build_loader(
        images,
        data,
        LoaderConfig(name=name, workers=WORKERS, beton=str(source.parent / "beton")),
        views=Views.random,
        batch_size=128,
        runtime=choose_runtime(RuntimeConfig(device="cpu", precision=Precision.bf16)),
    )
    for _ in loader:  # compiles, starts workers, fills the page cache
        pass
    print("answer warm", flush=True)
    epoch = 0
    for _ in sys.stdin:
        loaded, start = 0, time.perf_counter()
        while time.perf_counter() < start + LEAST_SECONDS:
            epoch += 1
            loader.set_epoch(epoch)
            for _, labels in loader:
                loaded += len(labels)
        print("answer", loaded / (time.perf_counter() - start), flush=True)
    os._exit(0)  # nothing is left to tidy up


@pytest.fixture(scope="module")
def rows() -> Any:
    """Collects the rows and reports them when all are there."""
    collected: list[Row] = []
    yield collected
    if collected and collected[0].rounds > 1:
        write(collected)


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("kind", ["CIFAR-10, 32x32", "JPEG files, 500x375"])
def test_loaders(kind: str, rows: list[Row], tmp_path: Path, benchmark: Any) -> None:
    if find_spec("nvidia.dali") is None or find_spec("ffcv") is None:
        pytest.skip("DALI and FFCV are not installed: .ci/install-loaders PYTHON")
    source = small_images(tmp_path) if kind.startswith("CIFAR") else photographs(tmp_path)
    servers = {name: Server(name, source) for name in NAMES}

    def let_others() -> None:
        for name, server in servers.items():
            if name != "resident":
                server.epoch()

    try:
        for server in servers.values():
            server.wait_until_warm()
        benchmark.pedantic(servers["resident"].epoch, setup=let_others, rounds=ROUNDS)
    finally:
        for server in servers.values():
            server.close()
    reference = float(np.median(servers["torchvision"].rates))
    for name, server in servers.items():
        low, middle, high = (float(value) for value in np.percentile(server.rates, [20, 50, 80]))
        memory = server.peak / 1e6
        rows.append(Row(kind, name, middle, low, high, middle / reference, memory, len(server.rates)))
        benchmark.extra_info[f"{name}, images/s"] = round(middle)


def small_images(folder: Path) -> Path:
    """1,024 images of 32 x 32 as one array in a file."""
    if CIFAR10.is_dir():
        pixels = load_splits(DataConfig(name="cifar10", root=str(CIFAR10)), seed=0).train.pixels
        assert pixels is not None
        pixels = pixels[:SMALL]
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (SMALL, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "small.npy", pixels)
    return folder / "small.npy"


def photographs(folder: Path) -> Path:
    """Smooth random pictures as JPEG files, about as large as photographs of that size (45 kB)."""
    target = folder / "photographs"
    target.mkdir()
    rng = np.random.default_rng(0)
    for i in range(PHOTOGRAPHS):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(target / f"{i:04}.jpg", quality=90)
    return target


def write(rows: Sequence[Row]) -> None:
    """Prints the table and writes it as CSV, Markdown and a chart."""
    about = machine("cpu")
    lines = [
        "| data | loader | images/s | 20th to 80th percentile | times torchvision | peak memory, MB |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.data} | {row.loader} | {row.images_per_s:,.0f} | {row.p20:,.0f} to {row.p80:,.0f} "
            f"| {row.times_torchvision:.1f} | {row.peak_memory_mb:,.0f} |"
            for row in rows
        ),
    ]
    note = (
        f"{GEOMETRY['resize']} -> {GEOMETRY['crop']}, bf16, batch 128, loader.workers={WORKERS}, "
        f"{rows[0].rounds} turns each; {about['hardware']}, {about['threads']} threads, "
        f"PyTorch {about['torch']}, {about['date']}. Written by `make bench-loaders`."
    )
    text = "\n".join([*lines, "", note, ""])
    print(f"\n{text}")
    write_text(RESULTS / f"loaders_{KIND}.md", text)
    write_csv(rows, RESULTS / f"loaders_{KIND}.csv", "cpu")
    draw(rows, RESULTS / f"loaders_{KIND}.png", about)


def draw(rows: Sequence[Row], path: Path, about: dict[str, str]) -> None:
    """A row of panels a data set: images a second (log scale), peak memory."""
    kinds = list(dict.fromkeys(row.data for row in rows))
    figure = Figure(figsize=(10, 2.4 * len(kinds) + 0.6), layout="constrained")
    for (speed, memory), kind in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        shown = [row for row in rows if row.data == kind]
        names = [row.loader for row in shown]
        speed.barh(names, [row.images_per_s for row in shown], color="tab:blue")
        for position, row in enumerate(shown):
            label = f" {row.images_per_s:,.0f} ({row.times_torchvision:.1f}x)"
            speed.text(row.images_per_s, position, label, va="center", fontsize=9)
        speed.set(title=kind, xscale="log", xlabel="images/s (log scale)")
        speed.set_xlim(min(r.images_per_s for r in shown) / 2, max(r.images_per_s for r in shown) * 6)
        memory.barh(names, [row.peak_memory_mb for row in shown], color="tab:orange")
        for position, row in enumerate(shown):
            memory.text(row.peak_memory_mb, position, f" {row.peak_memory_mb:,.0f}", va="center", fontsize=9)
        memory.set(xlabel="peak memory, MB")
        memory.margins(x=0.15)
    figure.suptitle(
        f"Loaders on {about['hardware']}, {about['threads']} threads, PyTorch {about['torch']}, "
        f"{about['date']}; in brackets: times torchvision",
        fontsize=10,
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
