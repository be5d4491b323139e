"""The results of GPUs in docs/gpu.md, from made-up files."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import docs
from benchmarks.card import tiling
from benchmarks.card.agreement import Check
from benchmarks.card.page import alone, section
from benchmarks.card.tiling import POOL_BACKWARD, POOL_FORWARD, Tiling

FACTS = {
    "hardware": "NVIDIA T1",
    "capability": "9.0",
    "multiprocessors": 100,
    "clocks.max.sm": "1000 MHz",
    "driver_version": "1.2",
    "date": "2026-01-02",
    "torch": "2.11.0",
    "copy_bytes_per_second": 1e12,
}
NOW = {tiling.described(name, launch) for name, launch in tiling.launches_in_use(tiling.BATCH, "meta")}


def now(kernel: str, dtype: str = "bfloat16") -> Tiling:
    """The configuration of a kernel that is in use."""
    (found,) = (row for row in NOW if (row.kernel, row.dtype) == (kernel, dtype))
    return found


def code(row: Tiling, instructions: int) -> dict[str, Any]:
    """A kernel's machine code in kernels_inspect.json."""
    config = {"BLOCK": row.block, "num_warps": row.warps}
    config |= {"rows": row.rows} if row.rows else {}
    config |= {"maxnreg": row.maxnreg} if row.maxnreg else {}
    of = {"kernel": row.kernel, "dtype": row.dtype, "instructions": instructions}
    return {**of, "arch": 90, "config": config}


@pytest.fixture(name="results")
def made_up(tmp_path: Path) -> Path:
    """A card that copies a gigabyte in a millisecond, and issues 4e11 instructions per second."""
    folder = tmp_path / "card" / "t1-2026-01-02"
    folder.mkdir(parents=True)
    (folder / "facts.json").write_text(json.dumps(FACTS))
    rows = [
        replace(now("relu_lrn forward"), microseconds=100.0),
        replace(now("relu_lrn backward"), microseconds=150.0),
        replace(now(POOL_FORWARD), microseconds=300.0),
        replace(now(POOL_FORWARD), rows=27, microseconds=200.0),
        replace(now(POOL_BACKWARD), rows=7, microseconds=200.0),
        replace(now(POOL_BACKWARD, "float32"), rows=None, microseconds=400.0),
        replace(now("augment"), microseconds=200.0),
    ]
    tiling.write(folder, rows, "by hand.")
    of = {(row.kernel, row.dtype) for row in rows}
    traffic = [{"kernel": k, "dtype": d, "moved": 1e8 / tiling.BATCH} for k, d in of]  # 100 us each
    # 145,200 warps of 128x55x55x96 / 8 lanes: 110 instructions of each take 40 us.
    codes = [code(now("relu_lrn forward"), 1000), code(now("relu_lrn backward"), 110)]
    codes += [code(now(POOL_FORWARD), 3600), code(now("augment"), 50), code(now(POOL_BACKWARD), 7)]
    (tmp_path / "kernels_inspect.json").write_text(json.dumps({"traffic": traffic, "code": codes}))
    return tmp_path


def test_measured_beside_computed(results: Path) -> None:
    lines = section(results).splitlines()
    assert any(line.startswith("NVIDIA T1, 100 multiprocessors at 1000 MHz") for line in lines)
    assert "| relu_lrn forward | bf16 | block 128, warps 4 | as now | 100 | 100 | 1.00 |" in lines
    # The configuration in use is shown, even if another is faster; if it was not timed, another is shown.
    cut = "block 128, warps 4, rows"
    assert f"| {POOL_FORWARD} | bf16 | {cut} 3 | as now | 300 | 100 | 3.00 |" in lines
    was, is_now = f"{cut} 7, registers 72", f"{cut} 2, registers 72"
    assert f"| {POOL_BACKWARD} | bf16 | {was} | now {is_now} | 200 | 100 | 2.00 |" in lines
    was, is_now = f"{cut} not noted, registers 72", f"{cut} 2, registers 72"
    assert f"| {POOL_BACKWARD} | fp32 | {was} | now {is_now} | 400 | 100 | 4.00 |" in lines


def test_notes_explain_differences(results: Path) -> None:
    notes = {line[2:].split(",")[0]: line for line in section(results).splitlines() if line[:2] == "- "}
    assert "relu_lrn forward" not in notes
    assert "1.50 times" in notes["relu_lrn backward"]
    assert (
        "not explained: its instructions need about 39.9 us (110 in its text)" in notes["relu_lrn backward"]
    )
    # 128 x 9 strips x 27 columns x 12 vectors in warps; a third of the code runs once, the rest three times
    least = 1e6 * 3600 * 7 / 3 * (128 * 9 * 27 * 12 / 32) / 4e11
    assert f"That is explained: its instructions need about {least:.0f} us" in notes[POOL_FORWARD]
    assert "instructions" not in notes[POOL_BACKWARD]  # counted for another configuration only
    assert "not counted" in notes["augment"]


def test_instructions_that_take_most_of_the_time_explain_it_in_part(results: Path) -> None:
    path = results / "kernels_inspect.json"
    inspected = json.loads(path.read_text())
    inspected["code"][2]["instructions"] = 1600  # 109 us of the 300; bytes take 100
    path.write_text(json.dumps(inspected))
    (note,) = (line for line in section(results).splitlines() if line.startswith(f"- {POOL_FORWARD}, bf"))
    assert "explained in part: its instructions need about 109 us (1600 in its text), more than" in note
    assert "2.76 times as long" in note


def test_fastest_and_slowest_configurations(results: Path) -> None:
    (line,) = (one for one in section(results).splitlines() if one.startswith(f"| {POOL_FORWARD} | 128x55"))
    cut = "block 128, warps 4, rows"
    assert f"| {cut} 3: 300 | {cut} 27: 200 | {cut} 3: 300 | 2 |" in line


def test_phases(results: Path) -> None:
    folder = results / "card" / "t1-2026-01-02"
    step = {"measurement": "training", "program": "fastalex", "part": "", "batch": 128, "unit": "images/s"}
    step |= {"median": 8000.0, "p20": 7900.0, "p80": 8100.0, "rounds": 3, "times_reference": 4.0}
    step |= {"times_stock": 2.0, "gflop_per_s": 52000.0, "fraction_of_matmul": 0.31, "share_of_step": None}
    plain = {**step, "program": "fastalex eager", "times_reference": None, "times_stock": None}
    kernel = ["void at::native::copy<float>(float*)", 12.0, 0.25, 0.125]
    parts: dict[str, Any] = {
        "phases": [{"phase": "facts", "status": "status 0", "seconds": 12.5}],
        "agreement": {"checks": [asdict(Check("a and b", 0.125, 0.25, True))], "compiler": {}},
        "throughput": {
            "rows": [step, plain],
            "host_seconds": 0.0015,
            "waits_a_step": 0.01,
            "kernels": [kernel],
            "options": [step, {**step, "program": "fastalex step graph", "median": 9000.0}],
        },
        "batches": [{"batch": 256, "images_per_second": 9000.4, "reserved_bytes": 2.5e9}],
    }
    for name, content in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    suite = '<testsuite tests="9" failures="1" errors="1" skipped="2"/>'
    (folder / "tests.xml").write_text(f"<testsuites>{suite}</testsuites>")
    lines = section(results).splitlines()
    assert "| facts | status 0 | 12.5 |" in lines
    assert "| a and b | 0.125 | 0.25 | yes |" in lines
    assert "| fastalex | 8,000 | 7,900 to 8,100 | 4.00 | 2.00 | 31% |" in lines
    assert "| fastalex eager | 8,000 | 7,900 to 8,100 |  |  | 31% |" in lines
    assert (
        "Python takes 1.50 ms to enqueue a step of fastalex. The host waits for the card 0.01 times a step."
        in lines
    )
    assert "| fastalex step graph | 9,000 | 1.12 |" in lines
    assert "| `copy<float>(float*)` | 12.0 | 0.250 | 12.5% |" in lines
    assert "| 256 | 9,000 | 2.5 |" in lines
    assert "**The gpu tests**: 9 ran, 2 failed, 2 were skipped." in lines


def run(folder: Path, validation: list[float]) -> None:
    folder.mkdir(parents=True)
    errors = {"top1_error": 0.1234, "top5_error": 0.0056}
    summary = {
        "hardware": "NVIDIA T1",
        "data": "CIFAR-10",
        "epochs": len(validation),
        "best_on_validation": {"validation_top1_error": min(validation)},
        "ten_crop": errors,
        "single_crop": errors,
        "startup_seconds": 5.0,
        "wall_seconds": 250.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {
            "epoch": i + 1,
            "step": 10 * (i + 1),
            "seconds": 100.0,
            "warmup_seconds": 1.0,
            "validation_top1_error": error,
        }
        for i, error in enumerate(validation)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.yaml").write_text("train: {batch_size: 128}\n")


def test_trainings(results: Path) -> None:
    """Runs in parallel have no times; unfinished runs are left out."""
    folder = results / "card" / "t1-2026-01-02"
    run(folder / "runs" / "alexnet", [0.2, 0.13])
    run(folder / "runs" / "resnet18", [0.2, 0.19])
    run(folder / "runs" / "alexnet_seed1", [0.2, 0.13])
    (folder / "runs" / "profile").mkdir()
    assert {"alexnet", "alexnet_fast", "one_size", "resnet18", "alexnet_study_recipe", "profile"} == alone(
        folder
    )
    lines = section(results).splitlines()
    errors = "CIFAR-10 | 2 | 0.1234 / 0.0056 | 0.1234 / 0.0056"
    assert f"| alexnet | {errors} | 250 | 205 |" in lines
    assert f"| resnet18 | {errors} | 250 | not reached |" in lines
    assert f"| alexnet_seed1 | {errors} |  |  |" in lines


def test_results_are_written_between_the_marks(results: Path) -> None:
    page = f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n"
    lines = docs.gpu(page, results).splitlines()
    assert lines[:2] == ["before", docs.BEGIN]
    assert lines[-2:] == [docs.END, "after"]
    assert "### t1-2026-01-02" in lines
    assert "old" not in lines
    with pytest.raises(ValueError, match="has no lines"):
        docs.gpu("no marks", results)
