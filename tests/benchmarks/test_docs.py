"""The format of the files of results, and the page that is made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from benchmarks.report import RESULTS, measurement_files, read_measurements, write_csv
from benchmarks.step import Row


@dataclass(frozen=True)
class Lrn:
    """A line of lrn_cpu.csv."""

    function: str = "relu_lrn"
    shape: str = "128x96x55x55"
    dtype: str = "bf16"
    implementation: str = "fastalex, Numba"
    direction: str = "forward + backward"
    median_ms: float = 31.25
    p20_ms: float = 30.0
    p80_ms: float = 32.0
    rounds: int = 7
    bytes: int = 371712000
    gb_per_s: float = 11.9
    fraction_of_copy: float = 0.87
    times_faster_than_eager: float = 61.5


def step_rows() -> list[Row]:
    """A run in which the reference takes ten seconds a step and fastalex two."""
    rows = []
    for program, rate in (("reference", 12.8), ("stock", 32.0), ("fastalex", 64.0)):
        figures = (rate, rate - 1, rate + 1, 5)
        row = Row("training", program, "", 128, "images/s", *figures, times_reference=rate / 12.8)
        rows.append(replace(row, times_stock=rate / 32, gflop_per_s=6.5 * rate, fraction_of_matmul=rate / 80))
        rows.append(Row("peak memory", program, "", 128, "MB", 1234, 1234, 1234, 1, rate / 12.8))
        for name in DEVICE_PEAKS:
            rows.append(Row(name, program, "", 128, "MB", 4321, 4321, 4321, 1, rate / 12.8))
        if program != "stock":
            rows.append(Row("ten-crop evaluation", program, "", 128, "images/s", *figures, rate / 12.8))
            for i, part in enumerate(PARTS):
                ms, share = 100.0 * (6 - i), (6 - i) / 25  # medians, which need not add up to one
                rows.append(Row("step by part", program, part, 128, "ms", ms, ms, ms, 5, share_of_step=share))
    rows.append(Row("hardware", "matrix product", "", 128, "GFLOP/s", 400, 390, 410, 5))
    rows.append(Row("hardware", "copy", "", 128, "GB/s", 20, 19, 21, 5))
    return rows


@pytest.fixture(name="results")
def small_results(tmp_path: Path) -> Path:
    write_csv(step_rows(), tmp_path / "step_cpu.csv", "cpu")
    write_csv([Lrn()], tmp_path / "lrn_cpu.csv", "cpu")
    return tmp_path


def test_written_rows_are_read(results: Path) -> None:
    step = read_measurements((results / "step_cpu.csv").read_text())
    assert [(m.of, m.unit, m.median) for m in step] == [
        ((r.measurement, r.program, r.part, str(r.batch)), r.unit, pytest.approx(r.median, rel=1e-3))
        for r in step_rows()
    ]
    (lrn,) = read_measurements((results / "lrn_cpu.csv").read_text())
    assert (lrn.of[-1], lrn.unit, lrn.median, lrn.p20, lrn.p80) == ("forward + backward", "ms", 31.25, 30, 32)
    assert lrn.less_is_better


@pytest.mark.parametrize("path", measurement_files(RESULTS), ids=lambda path: path.name)
def test_every_committed_file_has_the_format(path: Path) -> None:
    measurements = read_measurements(path.read_text())
    keys = {(*m.of, m.unit) for m in measurements}
    assert len(keys) == len(measurements) > 0
    assert all(m.p20 <= m.median <= m.p80 for m in measurements)
    assert all(m.record["torch"] and m.record["hardware"] for m in measurements)


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


def test_the_page_is_made_of_the_committed_files() -> None:
    assert docs.PAGE.read_text() == docs.page(RESULTS), "run python -m benchmarks.docs"
    readme = docs.README.read_text()
    assert docs.readme(readme, RESULTS) == readme, "run python -m benchmarks.docs"
    gpu = docs.GPU.read_text()
    assert docs.gpu(gpu, RESULTS) == gpu, "run python -m benchmarks.docs"


def test_a_kind_of_cpu_has_a_section_of_its_own(results: Path) -> None:
    (results / "step_cpu_fp32.csv").write_text((results / "step_cpu.csv").read_text())
    text = docs.page(results)
    with_bf16, without = text.split("## The training step (CPU without bf16)")
    assert "torch.compile, bf16," in with_bf16
    assert "torch.compile, fp32," in without
    assert "roofline_cpu_fp32.png" in without


def test_a_readme_without_marks_is_left_alone(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, readme = results / "benchmarks.md", results / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(SystemExit):
        docs.main(["--results", str(results), "--page", str(page), "--readme", str(readme)])
    assert f"{readme}: has no lines" in capsys.readouterr().err
    assert readme.read_text() == "# Title\n"
    assert not page.exists()


@pytest.mark.parametrize("text", [None, "x,y\n1,2\n"])
def test_says_what_is_wrong(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text:
        (tmp_path / "step_cpu.csv").write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        docs.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("is not a file of results" if text else "make bench writes them") in line
    assert not (tmp_path / "page.md").exists()
