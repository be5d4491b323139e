"""Images/s and peak memory of the four loaders, by turns in one run.

    make bench-loaders

Each loader has a process of its own, warmed up by an epoch, and they take turns at timed epochs, so that all
of them see the same machine. Only the loader is timed: batches are discarded. Memory is the proportional set
size of the process and its workers (each shared page divided among the processes that share it), the largest
during its turns; it includes PyTorch itself. A table and a chart go to ``benchmarks/results/loaders_KIND.*``
(``hardware.py``).

Two data sets: 1,024 images of CIFAR-10 (noise of that size without the data set), and generated JPEG
photographs of 500 x 375. The resident loader reads no files: it gets the photographs decoded beforehand;
FFCV's .beton file is written before the clock starts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.hardware import KIND
from benchmarks.memory import family, proportional_bytes
from benchmarks.report import RESULTS, Measurement, machine, spread, write_csv
from benchmarks.sections import column, render
from fastalex.config import DataConfig, LoaderConfig, Precision, RuntimeConfig
from fastalex.data import ImageSet, Views, build_loader, load_splits
from fastalex.files import replacing, write_text
from fastalex.runtime import choose_runtime

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
NAMES = ("torchvision", "dali", "ffcv", "resident")
GEOMETRY: dict[str, Any] = {"resize": 256, "crop": 224}
WORKERS = 2
ROUNDS = 5
LEAST_SECONDS = 0.5  # of a turn, which runs whole epochs
SMALL, PHOTOGRAPHS = 1024, 256


class LoaderProcess:
    """A loader in a process of its own, which runs epochs on request."""

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
    """Run epochs for each line of standard input; answer with images/s."""
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
    os._exit(0)  # there is nothing to clean up


@pytest.fixture(scope="module")
def measurements() -> Iterator[list[Measurement]]:
    """Collects the measurements; writes them if they were timed."""
    collected: list[Measurement] = []
    yield collected
    if collected and collected[0]["rounds"] > 1:
        write(collected)


@pytest.mark.usefixtures("cpu_only")
@pytest.mark.parametrize("kind", ["CIFAR-10, 32x32", "JPEG files, 500x375"])
def test_loaders(kind: str, measurements: list[Measurement], tmp_path: Path, benchmark: Any) -> None:
    if find_spec("nvidia.dali") is None or find_spec("ffcv") is None:
        pytest.skip("DALI and FFCV are not installed: .ci/install-loaders PYTHON")
    source = small_images(tmp_path) if kind.startswith("CIFAR") else photographs(tmp_path)
    processes = {name: LoaderProcess(name, source) for name in NAMES}

    def let_others() -> None:
        for name, process in processes.items():
            if name != "resident":
                process.epoch()

    try:
        for process in processes.values():
            process.wait_until_warm()
        benchmark.pedantic(processes["resident"].epoch, setup=let_others, rounds=ROUNDS)
    finally:
        for process in processes.values():
            process.close()
    reference = float(np.median(processes["torchvision"].rates))
    for name, process in processes.items():
        m = Measurement(
            {"data": kind, "loader": name},
            "images/s",
            *spread(process.rates),
            {
                "times_torchvision": float(np.median(process.rates)) / reference,
                "peak_memory_mb": process.peak / 1e6,
                "rounds": len(process.rates),
            },
        )
        measurements.append(m)
        benchmark.extra_info[f"{name}, images/s"] = round(m.median)


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
    """Smooth random pictures as JPEG files, of the file size of photographs (45 kB)."""
    target = folder / "photographs"
    target.mkdir()
    rng = np.random.default_rng(0)
    for i in range(PHOTOGRAPHS):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(target / f"{i:04}.jpg", quality=90)
    return target


def write(measurements: Sequence[Measurement]) -> None:
    """Print the table and write it as CSV, Markdown and a chart."""
    about = machine("cpu")
    columns = [
        column("data", "data"),
        column("loader", "loader"),
        column("images/s", "median", "{:,.0f}".format),
        ("20th to 80th percentile", lambda m: f"{m.p20:,.0f} to {m.p80:,.0f}"),
        column("times torchvision", "times_torchvision", "{:.1f}".format),
        column("peak memory, MB", "peak_memory_mb", "{:,.0f}".format),
    ]
    note = (
        f"{GEOMETRY['resize']} -> {GEOMETRY['crop']}, bf16, batch 128, loader.workers={WORKERS}, "
        f"{measurements[0]['rounds']} turns each; {about['hardware']}, {about['threads']} threads, "
        f"PyTorch {about['torch']}, {about['date']}. Written by `make bench-loaders`."
    )
    text = f"{render(columns, measurements)}\n\n{note}\n"
    print(f"\n{text}")
    write_text(RESULTS / f"loaders_{KIND}.md", text)
    write_csv(measurements, RESULTS / f"loaders_{KIND}.csv", "cpu", unit="images/s")
    draw(measurements, RESULTS / f"loaders_{KIND}.png", about)


def draw(measurements: Sequence[Measurement], path: Path, about: dict[str, str]) -> None:
    """Draw a row of panels per data set: images/s on a log scale, and peak memory."""
    kinds = list(dict.fromkeys(m["data"] for m in measurements))
    figure = Figure(figsize=(10, 2.4 * len(kinds) + 0.6), layout="constrained")
    for (speed, memory), kind in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds, strict=True):
        shown = [m for m in measurements if m["data"] == kind]
        names, rates = [m["loader"] for m in shown], [m.median for m in shown]
        speed.barh(names, rates, color="tab:blue")
        for position, m in enumerate(shown):
            label = f" {m.median:,.0f} ({m['times_torchvision']:.1f}x)"
            speed.text(m.median, position, label, va="center", fontsize=9)
        speed.set(title=kind, xscale="log", xlabel="images/s (log scale)")
        speed.set_xlim(min(rates) / 2, max(rates) * 6)
        peaks = [m["peak_memory_mb"] for m in shown]
        memory.barh(names, peaks, color="tab:orange")
        for position, peak in enumerate(peaks):
            memory.text(peak, position, f" {peak:,.0f}", va="center", fontsize=9)
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
