"""The kernels pass the checks of `inspect`, and each of these checks can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fastalex.kernels import _aot, _traffic, inspect
from fastalex.kernels._triton_launch import KernelCase, Launch, cdiv

if not sys.platform.startswith("linux"):
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

ARCHS = list(_aot.ARCHITECTURES)


@triton.jit
def narrow_kernel(x_pointer, y_pointer, n, BLOCK: tl.constexpr):
    """Copy every second element: each access is one element wide."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_pointer + 2 * i, tl.load(x_pointer + 2 * i, mask=i < n), mask=i < n)


def narrow_launch(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
    x = torch.zeros(batch, 1024, dtype=dtype, device=device)
    arguments = {"x_pointer": x, "y_pointer": torch.zeros_like(x), "n": x.numel() // 2, "BLOCK": 128}
    return Launch(narrow_kernel, cdiv(x.numel() // 2, 128), arguments, warps=4)


NARROW = KernelCase("narrow", narrow_launch, ("y_pointer",), "x_pointer", 1.05, 1, 1)


def lrn_case(name: str) -> KernelCase:
    from fastalex.kernels import lrn_triton

    return next(case for case in lrn_triton.inspect_cases() if case.name == name)


# ---------------------------------------------------------------- machine code


@pytest.fixture(scope="module")
def machine_code() -> list[dict[str, Any]]:
    """Every kernel in bf16 for every architecture, and in fp32 for one; the command compiles all.

    The pooled kernels without a bias, which AlexNet does not run on a GPU, are compiled for one only.
    """

    def is_wanted(job: inspect._Job) -> bool:
        name = inspect._cases(job.module)[job.case].name
        return job.arch == 89 or not name.startswith("relu_lrn_max_pool")

    jobs = inspect._jobs(ARCHS, ["bfloat16"], "") + inspect._jobs([89], ["float32"], "")
    jobs = list(filter(is_wanted, jobs))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(inspect._compile, jobs))


def test_no_spills_and_wide_accesses(machine_code: list[dict[str, Any]]) -> None:
    assert {row["arch"] for row in machine_code} == set(ARCHS)
    assert {row["kernel"] for row in machine_code} >= {"relu_lrn forward", "relu_lrn_max_pool backward"}
    broken = [(r["kernel"], r["dtype"], r["arch"], r["problems"]) for r in machine_code if r["problems"]]
    assert not broken


def test_lrn_kernels_use_no_shared_memory(machine_code: list[dict[str, Any]]) -> None:
    """Splitting and joining columns must not move data between threads.

    The exception sums the bias's gradient over a program, by way of at most one copy of its sums.
    """
    shared = {
        row["kernel"]: row["shared"] for row in machine_code if "lrn" in row["kernel"] and row["shared"]
    }
    assert set(shared) == {"bias_relu_lrn_max_pool backward"}
    assert max(shared.values()) <= 128 * 8 * 4


def test_occupancy_of_the_lrn_kernels_in_bf16(machine_code: list[dict[str, Any]]) -> None:
    """At least three eighths of the warps, on every architecture."""
    rows = [row for row in machine_code if "lrn" in row["kernel"] and row["dtype"] == "bfloat16"]
    assert min(row["occupancy"] for row in rows) >= 3 / 8


def test_too_few_registers_spill() -> None:
    """Negative control."""
    case = lrn_case("relu_lrn_max_pool backward")
    launch = replace(case.launch(torch.bfloat16, 128, torch.device("meta")), maxnreg=40)
    code = _aot.compile_launch(launch, 89)
    assert code.stack > 0
    assert code.local_accesses > 0
    assert "spills" in _aot.problems(case, torch.bfloat16, code)[0]


def test_narrow_accesses_are_detected() -> None:
    """Negative control: a kernel that loads and stores one bf16 at a time."""
    launch = narrow_launch(torch.bfloat16, 128, torch.device("meta"))
    code = _aot.compile_launch(launch, 89)
    assert set(code.loads) == set(code.stores) == {16}
    found = _aot.problems(NARROW, torch.bfloat16, code)
    assert [problem.split(", ")[0] for problem in found] == [
        "0 loads of 128 bits",
        "0 stores of 128 bits",
        "a store of 16 bits",
    ]


def test_a_missing_argument_is_named() -> None:
    launch = replace(narrow_launch(torch.bfloat16, 1, torch.device("meta")), arguments={})
    with pytest.raises(ValueError, match="narrow_kernel: no tensor or number for the argument 'x_pointer'"):
        _aot.compile_launch(launch, 89)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        (80, 32, 0, 8, 1.0),  # 2048 threads of 32 registers fill the SM
        (90, 64, 0, 8, 0.5),
        (90, 127, 0, 4, 0.25),  # 128 x 32 x 4 = 16384: one block a quarter, four in all
        (89, 64, 0, 8, 32 / 48),
        (86, 72, 0, 8, 24 / 48),  # 28 warps fit: three blocks of eight
        (86, 16, 0, 1, 16 / 48),  # 16 blocks at most
        (80, 32, 81 * 1024, 8, 16 / 64),  # shared memory for two blocks
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, warps: int, expected: float) -> None:
    """Expected values computed by hand from NVIDIA's table."""
    assert _aot.occupancy(arch, registers, shared, warps) == pytest.approx(expected)


# ---------------------------------------------------------------- bytes


VIEWS = 2  # of an image that are counted: one is mirrored, and all take as many programs


def at_most_two_views(launch: Launch) -> Launch:
    """Leave out the other views, with their programs; to write into one of them is then out of bounds."""
    views = launch.arguments.get("VIEWS", 1)
    if views <= VIEWS:
        return launch
    assert launch.programs % views == 0
    arguments = {**launch.arguments, "out_pointer": launch.arguments["out_pointer"][:VIEWS]}
    return replace(launch, programs=launch.programs // views * VIEWS, arguments=arguments)


def check_traffic(module: str) -> list[tuple[str, _traffic.Traffic, list[str]]]:
    import importlib

    rows = []
    for case in importlib.import_module(module).inspect_cases(quick=True):
        launch = case.launch(torch.bfloat16, 1, torch.device("cpu"))
        traffic = _traffic.count(case, at_most_two_views(launch))
        rows.append((case.name, traffic, _traffic.problems(case, traffic)))
    return rows


@pytest.mark.parametrize("module", inspect.KERNEL_MODULES)
def test_traffic(interpreted: Any, module: str) -> None:
    """Near the floor, in bounds, every output element once; the floor is the size of all tensors."""
    rows = interpreted(check_traffic, module)
    assert [(name, problems) for name, _, problems in rows if problems] == []
    by_name = {name: traffic for name, traffic, _ in rows}
    if "relu_lrn backward" in by_name:
        elements, pooled = 31 * 31 * 96, 15 * 15 * 96
        assert by_name["relu_lrn backward"].floor == 3 * 2 * elements
        assert by_name["relu_lrn_max_pool backward"].floor == 2 * 2 * elements + (2 + 1) * pooled
        # Each program reads the bias and, backward, writes a row of sums. Its lanes move 38 KB, or more.
        for name, rows in (("forward", 0), ("backward", cdiv(8 * 16 * 12, 128))):
            without, with_bias = (by_name[f"{of}relu_lrn_max_pool {name}"] for of in ("", "bias_"))
            assert with_bias.floor - without.floor == (1 + rows) * 4 * 96
            assert with_bias.moved - without.moved <= 0.025 * without.moved


def problems_of(name: str, **changes: Any) -> list[str]:
    """The problems of an LRN kernel at a small shape, with some arguments replaced."""
    case = replace(lrn_case(name), traffic_limit=1e9)
    x = torch.randn(2, 4, 4, 16)
    y = torch.zeros(2 * x.numel())[: x.numel()].view_as(x)
    from fastalex.kernels import lrn_triton

    launch = lrn_triton._forward(x, y, 5, 1e-2, 0.75, 2.0, True)
    launch = replace(launch, arguments={**launch.arguments, **changes})
    return _traffic.problems(case, _traffic.count(case, launch))


class Twice(Launch):
    def run(self) -> None:
        super().run()
        super().run()


def check_controls() -> dict[str, list[str]]:
    """The problems that the checks find in deliberately wrong launches."""
    case = replace(NARROW, traffic_limit=1e9)
    device = torch.device("cpu")
    right = narrow_launch(torch.float32, 1, device)
    limit = right.arguments["n"]
    wrong = {
        "too many": replace(
            right, programs=cdiv(limit + 3, 128), arguments={**right.arguments, "n": limit + 3}
        ),
        "twice": Twice(right.kernel, right.programs, right.arguments, right.warps),
        "every second": right,
    }
    found = {name: _traffic.problems(case, _traffic.count(case, launch)) for name, launch in wrong.items()}
    output = replace(case, writes=("x_pointer", "y_pointer"))
    found["loads from an output"] = _traffic.problems(output, _traffic.count(output, right))
    found["wasteful"] = _traffic.problems(NARROW, _traffic.count(NARROW, right))
    found["lrn, too many"] = problems_of("relu_lrn forward", vectors=64 + 3)
    found["lrn, too few"] = problems_of("relu_lrn forward", vectors=64 - 1)
    found["lrn, right"] = problems_of("relu_lrn forward")
    return found


def test_wrong_launches_are_detected(interpreted: Any) -> None:
    """Negative controls: out of bounds, unwritten, written twice, wasteful."""
    found = interpreted(check_controls)
    assert "6 accesses out of bounds" in found["too many"]
    assert "512 accesses out of bounds" in found["loads from an output"]
    assert "512 output elements not written, 512 more than once" in found["twice"]
    assert found["every second"] == ["512 output elements not written, 0 more than once"]
    assert "moves 2.000 times the floor, more than 1.05" in found["wasteful"]
    assert any("out of bounds" in problem for problem in found["lrn, too many"])
    assert found["lrn, too few"] == ["8 output elements not written, 0 more than once"]
    assert found["lrn, right"] == []


def test_counting_needs_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _traffic.count(NARROW, narrow_launch(torch.float32, 1, torch.device("cpu")))


def test_eager_bytes() -> None:
    """ReLU reads and writes every element once; a view moves nothing."""
    x = torch.empty(3, 5, 7, dtype=torch.bfloat16, device="meta")
    case = replace(NARROW, eager=lambda dtype, batch: lambda: torch.relu(x).transpose(0, 1))
    assert _traffic.eager_bytes(case, torch.bfloat16, 1) == 2 * 2 * 105
    assert _traffic.eager_bytes(NARROW, torch.bfloat16, 1) is None


# ---------------------------------------------------------------- the command


def test_command_writes_its_tables(tmp_path: Path) -> None:
    only = ("--arch", "80", "--dtype", "bfloat16", "--kernel", "relu_lrn forward")
    command = [sys.executable, "-m", "fastalex.kernels.inspect", *only, "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "kernels_inspect.md").read_text()
    assert text.strip() == result.stdout.strip()
    data = json.loads((tmp_path / "kernels_inspect.json").read_text())
    (traffic,) = data["traffic"]
    (code,) = data["code"]
    assert traffic["floor"] == 4 * traffic["elements"]
    assert f"| relu_lrn forward | bfloat16 | 4.00 | {traffic['moved'] / traffic['elements']:.2f} |" in text
    assert f"| {code['registers']} | 0 | 0 |" in text


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--kernel", "nosuch"), {}, "error: no kernel has 'nosuch' in its name"),
        (("--out", "nosuch"), {}, "error: no folder nosuch"),
        (("--no-write",), {"TRITON_INTERPRET": "1"}, "error: unset TRITON_INTERPRET"),
    ],
)
def test_command_errors(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect", "--arch", "80", *arguments])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert inspect.main() == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_the_page_quotes_the_results() -> None:
    """Every row that docs/gpu.md quotes is a row of the tables that the command wrote."""
    root = Path(__file__).parents[2]
    results = (root / "benchmarks/results/kernels_inspect.md").read_text().splitlines()
    page = (root / "docs/gpu.md").read_text().splitlines()
    quoted = [line for line in page if "| bfloat16 |" in line]
    assert quoted
    assert [line for line in quoted if line not in results] == []
