"""The results of GPUs for docs/gpu.md, from ``benchmarks/results/card/CARD-DATE``.

A part whose file is missing is left out. ``trial.json`` is from a session before ``python -m
benchmarks.card`` existed; nothing writes it any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.card.phases import PHASES
from benchmarks.card.place import Place
from benchmarks.card.tiling import BATCH, POOL_BACKWARD, POOL_FORWARD, Tiling, described, launches_in_use
from benchmarks.hardware import ARITHMETIC
from benchmarks.sections import OF_MATMUL, TRAINING, column, number, ratio, render
from benchmarks.time_to_error import MEASURED, PUBLISHED, measured
from fastalex.kernels._triton_launch import dtype_name
from fastalex.markdown import table
from fastalex.study.results import read_run
from fastalex.training.profiling import short

NOTEWORTHY = 1.25  # ratio of a measured time to a computed one
SHORT = {dtype_name(dtype): name for dtype, name in ARITHMETIC.items()}
SCHEDULERS = 4  # per multiprocessor; each issues one warp instruction per cycle
MOST_KERNELS = 15  # in the table of a step's kernels
# Kernels whose instructions a lane runs once, or as often as `_passes` says.
COUNTED = ("relu_lrn forward", "relu_lrn backward", POOL_FORWARD, POOL_BACKWARD)


def section(results: Path) -> str:
    """The results of all cards as Markdown; empty if there are none."""
    inspected = _read(results, "kernels_inspect.json") or {"traffic": [], "code": []}
    folders = sorted(path for path in (results / "card").glob("*") if path.is_dir())
    lines: list[str] = []
    for folder in folders:
        lines += [f"### {folder.name}", "", *card(folder, inspected)]
    return "\n".join(lines).rstrip()


def card(folder: Path, inspected: dict[str, Any]) -> list[str]:
    """The results of one card."""
    facts = _read(folder, "facts.json") or {}
    tiling = _read(folder, "tiling.json")
    lines = hardware(facts)
    if tiling:
        rows = [Tiling(**row) for row in tiling["rows"]]
        lines += kernels(rows, facts, inspected) + cuts(rows) + [f"How: {tiling['source']}", ""]
    parts = (
        ("phases.json", phases),
        ("agreement.json", agreement),
        ("throughput.json", throughput),
        ("batches.json", batches),
        ("trial.json", trial),
    )
    for name, part in parts:
        found = _read(folder, name)
        if found:
            lines += part(found)
    return lines + tests(folder / "tests.xml") + runs(folder)


def hardware(facts: dict[str, Any]) -> list[str]:
    """The card, its driver, and its measured bandwidth and arithmetic."""
    if not facts:
        return []
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "triton") if name in facts)
    rates = []
    if "copy_bytes_per_second" in facts:
        rates.append(
            f"a copy moves {facts['copy_bytes_per_second'] / 1e9:,.0f} GB/s, read and written together"
        )
    if "matmul_flops_per_second" in facts:
        rates.append(f"a matrix product reaches {facts['matmul_flops_per_second'] / 1e12:,.0f} TFLOP/s")
    text = (
        f"{facts['hardware']}, {facts['multiprocessors']} multiprocessors at {facts['clocks.max.sm']} at "
        f"most, driver {facts['driver_version']}, {versions}, {facts['date']}."
    )
    if rates:
        text += f" On it {' and '.join(rates)}."
    return [text, ""]


# ---------------------------------------------------------------- kernels


def kernels(rows: list[Tiling], facts: dict[str, Any], inspected: dict[str, Any]) -> list[str]:
    """Measured times beside the times that the bytes need, and what explains the differences."""
    copy = facts.get("copy_bytes_per_second")
    if not copy:
        return []
    lines, notes = [], []
    traffic = {(one["kernel"], one["dtype"]): one["moved"] * BATCH for one in inspected["traffic"]}
    for name, launch in launches_in_use(BATCH, "meta"):
        now = described(name, launch)
        found = [
            r for r in rows if (r.kernel, r.shape, r.dtype) == (name, now.shape, now.dtype) and r.microseconds
        ]
        if not found or (name, now.dtype) not in traffic:
            continue
        row = next((r for r in found if _same(r, now)), found[0])
        computed = 1e6 * traffic[name, now.dtype] / copy
        excess = (row.microseconds or 0) / computed
        state = "as now" if _same(row, now) else f"now {_cut(now)}"
        figures = [number(row.microseconds), number(computed), ratio(excess)]
        lines.append([name, SHORT[now.dtype], _cut(row), state, *figures])
        if excess > NOTEWORTHY:
            known = ""
            if _same(row, now):
                known = _instructions(row, computed, launch.programs, facts, inspected["code"])
            notes.append(f"- {name}, {SHORT[now.dtype]}: {excess:.2f} times what its bytes need.{known}")
    if not lines:
        return []
    heads = [
        "kernel",
        "type",
        "configuration measured",
        "in use",
        "measured, us",
        "by its bytes, us",
        "ratio",
    ]
    return [
        f"**The kernels, measured beside computed**, at batch {BATCH}. *By its bytes*: the bytes that it "
        "moves (as counted) over the bandwidth of a copy on this card. A ratio below 1 is possible: what was "
        "written last may still be in the L2 cache when the clock stops. *Its instructions*: those in its "
        "text, by how often they run, at one a cycle for each of the four schedulers of a multiprocessor.",
        "",
        table(heads, lines, numbers_right=True),
        "",
        *notes,
        "",
    ]


def _instructions(
    row: Tiling, computed: float, programs: int, facts: dict[str, Any], code: Iterable[dict[str, Any]]
) -> str:
    """How far its instructions explain a kernel's time; empty if they have not been counted."""
    arch = int(facts["capability"].replace(".", ""))
    cut = {"BLOCK": row.block, "num_warps": row.warps, **({"maxnreg": row.maxnreg} if row.maxnreg else {})}
    for one in code:
        same = {key: value for key, value in one["config"].items() if key not in ("rows", "ROWS")} == cut
        if same and (one["kernel"], one["dtype"], one["arch"]) == (row.kernel, row.dtype, arch):
            break
    else:
        return ""
    clock = 1e6 * float(facts["clocks.max.sm"].split()[0])
    issued = one["instructions"] * _passes(row) * programs * row.warps
    least = 1e6 * issued / (SCHEDULERS * facts["multiprocessors"] * clock)
    needs = f"its instructions need about {number(least)} us ({one['instructions']} in its text)"
    spent = row.microseconds or 0
    if row.kernel not in COUNTED:
        return (
            f" Once through its text, {one['instructions']} instructions, takes {number(least)} us; its "
            "loops go round more often, which is not counted."
        )
    if spent <= NOTEWORTHY * least:
        return f" That is explained: {needs}."
    if least >= computed:
        more = f"{spent / least:.2f} times as long"
        return f" That is explained in part: {needs}, more than its bytes, and it takes {more}."
    return f" That is not explained: {needs}, less than its bytes."


def _passes(row: Tiling) -> float:
    """How often, at least about, a lane runs the instructions of its kernel."""
    if row.kernel == POOL_FORWARD:  # three of the nine normalisations come before the loop over rows
        return (1 + 2 * (row.rows or 1)) / 3
    if row.kernel == POOL_BACKWARD:  # without the inner loops over windows, nine instead of four
        return row.rows or 1
    return 1


def _same(row: Tiling, now: Tiling) -> bool:
    return (row.block, row.warps, row.maxnreg, row.rows) == (now.block, now.warps, now.maxnreg, now.rows)


def _cut(row: Tiling) -> str:
    """The configuration as text."""
    parts = [f"block {row.block}", f"warps {row.warps}"]
    if row.rows:
        parts.append(f"rows {row.rows}")
    elif row.kernel in (POOL_FORWARD, POOL_BACKWARD):
        parts.append("rows not noted")
    if row.maxnreg:
        parts.append(f"registers {row.maxnreg}")
    return ", ".join(parts)


def cuts(rows: list[Tiling]) -> list[str]:
    """The pooled kernels' configurations in use beside the fastest and the slowest that were timed."""
    lines = []
    for name, launch in launches_in_use(1, "meta"):
        now = described(name, launch)
        found = [r for r in rows if (r.kernel, r.dtype) == (name, now.dtype) and r.rows and r.microseconds]
        for shape in dict.fromkeys(r.shape for r in found if name in (POOL_FORWARD, POOL_BACKWARD)):
            tried = sorted((r for r in found if r.shape == shape), key=lambda r: r.microseconds or 0)
            if len(tried) > 1:
                used = next((r for r in tried if _same(r, now)), None)
                cells = [f"{_cut(r)}: {number(r.microseconds)}" for r in (tried[0], tried[-1])]
                in_use = f"{_cut(now)}: {number(used.microseconds) if used else 'not timed'}"
                lines.append([name, shape, in_use, *cells, str(len(tried))])
    if not lines:
        return []
    heads = ["kernel", "activation", "in use", "fastest", "slowest", "tried"]
    return [
        "**The pooled kernels, cut in several ways**, in microseconds, in bf16:",
        "",
        table(heads, lines, numbers_right=True),
        "",
    ]


# ---------------------------------------------------------------- the phases of python -m benchmarks.card


def phases(found: list[dict[str, Any]]) -> list[str]:
    columns = [column("phase", "phase"), column("ended", "status"), column("seconds", "seconds", number)]
    return ["**`make card`**, by phase; status 0 is a good end:", "", render(columns, found), ""]


def agreement(found: dict[str, Any]) -> list[str]:
    columns = [
        column("", "name"),
        column("found", "value", number),
        column("allowed", "bound", number),
        column("passed", "passed", lambda passed: "yes" if passed else "**no**"),
    ]
    return [
        "**Compiled programs beside plain PyTorch** (`benchmarks/card/agreement.py`): the largest distance "
        "of two losses of AlexNet at 112x112, or what the name says.",
        "",
        render(columns, found["checks"]),
        "",
    ]


def throughput(found: dict[str, Any]) -> list[str]:
    training = [row for row in found["rows"] if row["measurement"] == "training"]
    text = []
    if "host_seconds" in found:
        text.append(f"Python takes {1e3 * found['host_seconds']:.2f} ms to enqueue a step of fastalex.")
    if "waits_a_step" in found:
        text.append(f"The host waits for the card {found['waits_a_step']:.2f} times a step.")
    result = [
        f"**The training step**, AlexNet at 224x224, batch {training[0]['batch']}, the programs by turns "
        "([what they are](benchmarks.md)):",
        "",
        render([*TRAINING, OF_MATMUL], training),
        "",
        *([" ".join(text), ""] if text else []),
    ]
    result += options(found.get("options", []))
    profiled = {key: key.removeprefix("kernels_") for key in found if key.startswith("kernels_")}
    for name, program in {"kernels": "fastalex", **profiled}.items():
        if found.get(name):
            spent = [
                [f"`{short(kernel)[:70]}`", f"{calls:.1f}", f"{ms:.3f}", f"{share:.1%}"]
                for kernel, calls, ms, share in found[name][:MOST_KERNELS]
            ]
            heads = ["kernel", "calls a step", "ms a step", "share"]
            kernel_table = table(heads, spent, numbers_right=True)
            result += [f"What the card runs in a step of {program}:", "", kernel_table, ""]
    return result


def options(rows: list[dict[str, Any]]) -> list[str]:
    """What is not fastalex's default on a GPU, beside the default; empty if it was not measured."""
    medians = {row["program"]: row["median"] for row in rows if row["measurement"] == "training"}
    if not medians:
        return []
    lines = [[name, number(median), ratio(median / medians["fastalex"])] for name, median in medians.items()]
    return [
        "fastalex beside itself with options that are not its default on a GPU, by turns:",
        "",
        table(["", "images/s", "times fastalex"], lines, numbers_right=True),
        "",
    ]


def batches(found: list[dict[str, Any]]) -> list[str]:
    columns = [
        column("batch", "batch"),
        column("images/s", "images_per_second", number),
        column("memory reserved, GB", "reserved_bytes", lambda size: number(size / 1e9) if size else ""),
    ]
    return [
        "**fastalex by the size of the batch**, AlexNet at 224x224:",
        "",
        render(columns, found),
        "",
    ]


def tests(path: Path) -> list[str]:
    """How many tests pytest ran, and how they ended."""
    if not path.exists():
        return []
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {
        name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    return [
        f"**The gpu tests**: {counts['tests']} ran, {counts['failures'] + counts['errors']} failed, "
        f"{counts['skipped']} were skipped.",
        "",
    ]


def alone(folder: Path) -> set[str]:
    """The names of the runs that have the card to themselves, whose times can be compared."""
    place = Place(folder, folder, toy=False)
    prefix = f"hydra.run.dir={folder}/runs/"
    commands = [
        command for phase in PHASES.values() if not phase.together for command in phase.commands(place)
    ]
    return {word.removeprefix(prefix) for command in commands for word in command if word.startswith(prefix)}


def runs(folder: Path) -> list[str]:
    """The errors of the finished runs, and their seconds in all and to the study's error."""
    assert PUBLISHED is not None
    by_themselves = alone(folder)
    lines = []
    for path in sorted((folder / "runs").glob("*")):
        run = read_run(path)
        if run is None:
            continue
        wall, reached = "", ""
        if path.name in by_themselves:
            wall = number(run.summary["wall_seconds"])
            time = measured(run, PUBLISHED[0])
            reached = number(time.seconds) if time.kind == MEASURED else "not reached"
        errors = [_errors(run.summary[views]) for views in ("ten_crop", "single_crop")]
        summary = [run.summary["data"], str(run.summary["epochs"])]
        lines.append([path.name, *summary, *errors, wall, reached])
    if not lines:
        return []
    heads = ["run", "data", "epochs", "ten-crop", "single crop", "seconds in all"]
    return [
        "**Trainings**: top-1 and top-5 test error. Seconds are of runs that had the card for "
        f"themselves; those to a validation error of {PUBLISHED[0]:.4f} count from the settings on, "
        "compilation included.",
        "",
        table([*heads, f"seconds to {PUBLISHED[0]:.4f}"], lines, numbers_right=True),
        "",
    ]


def _errors(errors: dict[str, float]) -> str:
    return f"{errors['top1_error']:.4f} / {errors['top5_error']:.4f}"


# ---------------------------------------------------------------- the session before it


def trial(found: dict[str, Any]) -> list[str]:
    """A session in which everything was tried, and only the kernels were timed."""

    def errors(views: str) -> Callable[[Any], str]:
        return lambda run: " / ".join(f"{error:.4f}" for error in run.get(views, ()))

    columns = [
        column("", "settings"),
        column("ended", "ended"),
        ("single crop", errors("single_crop")),
        ("several crops", errors("several_crops")),
    ]
    tried, sanitizer, losses = found["tests"], found["sanitizer"], found["agreement"]
    distances = ", ".join(f"{name} {value:.2f}" for name, value in losses["largest_distance"].items())
    return [
        f"**What was tried** ({found['commit']}). {found['source']}",
        "",
        render(columns, found["runs"]),
        "",
        f"The gpu tests: of {tried['selected']}, {tried['shown']} had ended when they were cut off: "
        f"{tried['passed']} passed, {tried['failed']} failed. {tried['note']}",
        "",
        f"`{sanitizer['tool']}` over {', '.join(sanitizer['kernels'])} ({sanitizer['passes']}; odd shapes): "
        f"{sanitizer['errors']} errors.",
        "",
        f"Losses: {distances}. {losses['note']}",
        "",
    ]


def _read(folder: Path, name: str) -> Any:
    """The content of a results file; None if it does not exist."""
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None
