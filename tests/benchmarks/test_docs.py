"""The format of results files, and the page that is generated from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import docs
from benchmarks.charts import roofline_points
from benchmarks.counts import totals
from benchmarks.expected import fast_step
from benchmarks.memory import DEVICE_PEAKS
from benchmarks.parts import CONVOLUTIONS, PARTS
from benchmarks.report import (
    RESULTS,
    UNIT_IN_HEADER,
    Measurement,
    machine,
    measurement_files,
    read_measurements,
    read_records,
    write_csv,
)
from benchmarks.step import DERIVED

LRN = Measurement(
    {
        "function": "relu_lrn",
        "shape": "128x96x55x55",
        "dtype": "bf16",
        "implementation": "fastalex, Numba",
        "direction": "forward + backward",
    },
    *("ms", 31.25, 30.0, 32.0),
    {
        "rounds": 7,
        "bytes": 371712000,
        "gb_per_s": 11.9,
        "fraction_of_copy": 0.87,
        "times_faster_than_eager": 61.5,
    },
)


def measurement(
    name: str, program: str, unit: str, median: float, spread: float = 0, part: str = "", **derived: float
) -> Measurement:
    """A line of step_cpu.csv, with percentiles at a distance of `spread` from the median."""
    subject = {"measurement": name, "program": program, "part": part, "batch": 128}
    more = {"rounds": 5, **dict.fromkeys(DERIVED), **derived}
    return Measurement(subject, unit, median, median - spread, median + spread, more)


def step_measurements() -> list[Measurement]:
    """A run in which the reference takes ten seconds per step and fastalex two."""
    found = [
        measurement("hardware", "matrix product", "GFLOP/s", 400, 10),
        measurement("hardware", "copy", "GB/s", 20, 1),
    ]
    for program, rate in (("reference", 12.8), ("stock", 32.0), ("fastalex", 64.0)):
        faster = {"times_reference": rate / 12.8}
        rates = {"times_stock": rate / 32, "gflop_per_s": 6.5 * rate, "fraction_of_matmul": rate / 80}
        found.append(measurement("training", program, "images/s", rate, 1, **faster, **rates))
        found.append(measurement("peak memory", program, "MB", 1234, **faster))
        found += [measurement(name, program, "MB", 4321, **faster) for name in DEVICE_PEAKS]
        if program != "stock":
            found.append(measurement("ten-crop evaluation", program, "images/s", rate, 1, **faster))
            for i, part in enumerate(PARTS):
                ms, share = 100.0 * (6 - i), (6 - i) / 25  # medians, which need not add up to one
                found.append(measurement("step by part", program, "ms", ms, part=part, share_of_step=share))
    return found


@pytest.fixture(name="results")
def small_results(tmp_path: Path) -> Path:
    write_csv(step_measurements(), tmp_path / "step_cpu.csv", "cpu")
    write_csv([LRN], tmp_path / "lrn_cpu.csv", "cpu", unit="ms")
    return tmp_path


def test_written_measurements_are_read(results: Path) -> None:
    step = read_measurements((results / "step_cpu.csv").read_text())
    assert [(m.subject, m.unit, m.median) for m in step] == [
        ({**m.subject, "batch": "128"}, m.unit, pytest.approx(m.median, rel=1e-3))
        for m in step_measurements()
    ]
    (lrn,) = read_measurements((results / "lrn_cpu.csv").read_text())
    assert lrn.subject == LRN.subject
    assert (lrn.unit, lrn.median, lrn.p20, lrn.p80) == ("ms", 31.25, 30, 32)
    assert lrn.less_is_better


@pytest.mark.parametrize("path", measurement_files(RESULTS), ids=lambda path: path.name)
def test_every_committed_file_has_the_format(path: Path) -> None:
    measurements = read_measurements(path.read_text())
    keys = {(*m.subject.values(), m.unit) for m in measurements}
    assert len(keys) == len(measurements) > 0
    assert all(m.p20 <= m.median <= m.p80 for m in measurements)
    assert all(m["torch"] and m["hardware"] for m in measurements)


@pytest.mark.parametrize("path", measurement_files(RESULTS), ids=lambda path: path.name)
def test_a_committed_file_is_written_again_as_it_was_read(path: Path, tmp_path: Path) -> None:
    columns = path.read_text().splitlines()[0].split(",")
    unit = next((unit for unit, (median, *_) in UNIT_IN_HEADER.items() if median in columns), None)
    again = tmp_path / "again.csv"
    write_csv(read_measurements(path.read_text()), again, "cpu", unit)
    assert again.read_text().splitlines()[0].split(",") == columns
    own_machine = dict.fromkeys(machine("cpu"), "")
    assert [line | own_machine for line in read_records(again)] == [
        line | own_machine for line in read_records(path)
    ]


def test_page_shows_the_figures(results: Path) -> None:
    lines = docs.page(results).splitlines()
    assert "| fastalex | 64 | 63 to 65 | 5.00 | 2.00 | 416 | 80% |" in lines
    assert "| stock, peak memory | 1,234 | 2.50 |" in lines
    assert "| stock, peak device memory, allocated | 4,321 | 2.50 |" in lines
    assert "| stock, peak device memory, reserved | 4,321 | 2.50 |" in lines
    assert "| convolutions | 600 (24.0%) | 600 (24.0%) |" in lines
    assert "| all but convolutions and matrix products | 40.0% | 40.0% |" in lines
    assert "| relu_lrn, 128x96x55x55 | fastalex, Numba, bf16 | 31.2 | 30 to 32 | 61.50 | 87% |" in lines


def test_command_writes_page_and_pictures(results: Path) -> None:
    page, readme, gpu = (results / name for name in ("benchmarks.md", "README.md", "gpu.md"))
    readme.write_text(f"# Title\n{docs.BEGIN}\nold\n{docs.END}\nThe end.\n")
    gpu.write_text("No card.\n")
    given = ["--results", str(results), "--page", str(page), "--readme", str(readme), "--gpu", str(gpu)]
    docs.main(given)
    assert gpu.read_text() == "No card.\n"
    assert page.read_text() == docs.page(results)
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["# Title", docs.BEGIN]
    assert lines[-2:] == [docs.END, "The end."]
    assert "| CPU with bf16 | 64 | 5.00 | 2.00 | 5.00 |" in lines
    assert "old" not in lines
    for name in ("step_parts_cpu.png", "roofline_cpu.png"):
        assert name in page.read_text()
        with Image.open(results / name) as image:
            assert image.width > 500


def test_roofline_points(results: Path) -> None:
    step, lrn = (read_measurements((results / f"{name}_cpu.csv").read_text()) for name in ("step", "lrn"))
    points = {point.label: point for point in roofline_points(step, lrn, torch.bfloat16)}
    flops, moved = totals(fast_step())[CONVOLUTIONS]
    assert points["fastalex: convolutions"].intensity == pytest.approx(flops / moved)
    assert points["fastalex: convolutions"].gflop_per_s == pytest.approx(flops / 0.6 / 1e9)
    kernel = points["relu_lrn, 128x96x55x55"]  # 34 operations and 10 bytes an element
    assert kernel.intensity == pytest.approx(3.4)
    assert kernel.gflop_per_s == pytest.approx(3.4 * 0.87 * 20)  # at 87% of a copy's 20 GB/s
    assert points["fastalex: step"].gflop_per_s == pytest.approx(416)


def test_the_pages_are_generated_from_the_committed_files() -> None:
    assert docs.PAGE.read_text() == docs.page(RESULTS), "run python -m benchmarks.docs"
    readme = docs.README.read_text()
    assert docs.readme(readme, RESULTS) == readme, "run python -m benchmarks.docs"
    gpu = docs.GPU.read_text()
    assert docs.gpu(gpu, RESULTS) == gpu, "run python -m benchmarks.docs"


def test_each_kind_of_cpu_has_its_own_section(results: Path) -> None:
    (results / "step_cpu_fp32.csv").write_text((results / "step_cpu.csv").read_text())
    text = docs.page(results)
    with_bf16, without = text.split("## The training step (CPU without bf16)")
    assert "torch.compile, bf16," in with_bf16
    assert "torch.compile, fp32," in without
    assert "roofline_cpu_fp32.png" in without


def test_a_readme_without_marks_is_not_changed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, readme = results / "benchmarks.md", results / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(SystemExit):
        docs.main(["--results", str(results), "--page", str(page), "--readme", str(readme)])
    assert f"{readme}: has no lines" in capsys.readouterr().err
    assert readme.read_text() == "# Title\n"
    assert not page.exists()


@pytest.mark.parametrize("text", [None, "x,y\n1,2\n"])
def test_errors_name_the_cause(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text:
        (tmp_path / "step_cpu.csv").write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        docs.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("is not a file of results" if text else "make bench writes them") in line
    assert not (tmp_path / "page.md").exists()
