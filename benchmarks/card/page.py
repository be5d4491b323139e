"""What was measured on cards, for docs/gpu.md, from ``benchmarks/results/card/CARD-DATE``.

Every part is left out where its file is not there. ``trial.json`` is of a session before ``python -m
benchmarks.card`` was; nothing writes it any more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.card.phases import PHASES
from benchmarks.card.place import Place
from benchmarks.card.tiling import BATCH, POOL_BACKWARD, POOL_FORWARD, Row, as_they_are, described
from benchmarks.hardware import ARITHMETIC
from benchmarks.sections import number, table, times
from benchmarks.time_to_error import MEASURED, PUBLISHED, measured
from fastalex.kernels._triton_launch import dtype_name
from fastalex.study.results import read_run
from fastalex.training.profiling import short

NOTEWORTHY = 1.25  # of a measured time to a computed one
SHORT = {dtype_name(dtype): name for dtype, name in ARITHMETIC.items()}
SCHEDULERS = 4  # of a multiprocessor, each of which issues an instruction of a warp in a cycle
MOST_KERNELS = 15  # of a step, in the table
# Of these a lane runs its text once, or as often as `_passes` says.
COUNTED = ("relu_lrn forward", "relu_lrn backward", POOL_FORWARD, POOL_BACKWARD)


def section(results: Path) -> str:
    """All cards' parts as Markdown; empty where no card has been measured."""
    inspected = _read(results, "kernels_inspect.json") or {"traffic": [], "code": []}
    folders = sorted(path for path in (results / "card").glob("*") if path.is_dir())
    lines: list[str] = []
    for folder in folders:
        lines += [f"### {folder.name}", "", *card(folder, inspected)]
    return "\n".join(lines).rstrip()


def card(folder: Path, inspected: dict[str, Any]) -> list[str]:
    """The parts of one card."""
    facts = _read(folder, "facts.json") or {}
    tiling = _read(folder, "tiling.json")
    lines = machine(facts)
    if tiling:
        rows = [Row(**row) for row in tiling["rows"]]
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


def machine(facts: dict[str, Any]) -> list[str]:
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


def kernels(rows: list[Row], facts: dict[str, Any], inspected: dict[str, Any]) -> list[str]:
    """Measured times beside those that the bytes need, and what is known of the difference."""
    copy = facts.get("copy_bytes_per_second")
    if not copy:
        return []
    lines, notes = [], []
    traffic = {(one["kernel"], one["dtype"]): one["moved"] * BATCH for one in inspected["traffic"]}
    for name, launch in as_they_are(BATCH, "meta"):
        now = described(name, launch)
        found = [
            r for r in rows if (r.kernel, r.shape, r.dtype) == (name, now.shape, now.dtype) and r.microseconds
        ]
        if not found or (name, now.dtype) not in traffic:
            continue
        row = next((r for r in found if _same(r, now)), found[0])
        computed = 1e6 * traffic[name, now.dtype] / copy
        ratio = (row.microseconds or 0) / computed
        state = "as now" if _same(row, now) else f"now {_cut(now)}"
        figures = [number(str(row.microseconds)), number(str(computed)), times(str(ratio))]
        lines.append([name, SHORT[now.dtype], _cut(row), state, *figures])
        if ratio > NOTEWORTHY:
            known = ""
            if _same(row, now):
                known = _instructions(row, computed, launch.programs, facts, inspected["code"])
            notes.append(f"- {name}, {SHORT[now.dtype]}: {ratio:.2f} times what its bytes need.{known}")
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
        *table(heads, lines),
        *notes,
        "",
    ]


def _instructions(
    row: Row, computed: float, programs: int, facts: dict[str, Any], code: Iterable[dict[str, Any]]
) -> str:
    """What the instructions in a kernel's text say of its time; nothing where they are not known."""
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
    needs = f"its instructions need about {number(str(least))} us ({one['instructions']} in its text)"
    spent = row.microseconds or 0
    if row.kernel not in COUNTED:
        return (
            f" Once through its text, {one['instructions']} instructions, takes {number(str(least))} us; its "
            "loops go round more often, which is not counted."
        )
    if spent <= NOTEWORTHY * least:
        return f" That is explained: {needs}."
    if least >= computed:
        more = f"{spent / least:.2f} times as long"
        return f" That is explained in part: {needs}, more than its bytes, and it takes {more}."
    return f" That is not explained: {needs}, less than its bytes."


def _passes(row: Row) -> float:
    """How often a lane runs its kernel's text, about, or more."""
    if row.kernel == POOL_FORWARD:  # three of the nine normalisations come before the loop over rows
        return (1 + 2 * (row.rows or 1)) / 3
    if row.kernel == POOL_BACKWARD:  # the loops over windows inside, nine in place of four, are not counted
        return row.rows or 1
    return 1


def _same(row: Row, now: Row) -> bool:
    return (row.block, row.warps, row.maxnreg, row.rows) == (now.block, now.warps, now.maxnreg, now.rows)


def _cut(row: Row) -> str:
    parts = [f"block {row.block}", f"warps {row.warps}"]
    if row.rows:
        parts.append(f"rows {row.rows}")
    elif row.kernel in (POOL_FORWARD, POOL_BACKWARD):
        parts.append("rows not noted")
    if row.maxnreg:
        parts.append(f"registers {row.maxnreg}")
    return ", ".join(parts)


def cuts(rows: list[Row]) -> list[str]:
    """The pooled kernels as they are in use beside the other ways of cutting them that were timed."""
    lines = []
    for name, launch in as_they_are(1, "meta"):
        now = described(name, launch)
        found = [r for r in rows if (r.kernel, r.dtype) == (name, now.dtype) and r.rows and r.microseconds]
        for shape in dict.fromkeys(r.shape for r in found if name in (POOL_FORWARD, POOL_BACKWARD)):
            tried = sorted((r for r in found if r.shape == shape), key=lambda r: r.microseconds or 0)
            if len(tried) > 1:
                used = next((r for r in tried if _same(r, now)), None)
                cells = [f"{_cut(r)}: {number(str(r.microseconds))}" for r in (tried[0], tried[-1])]
                in_use = (
                    f"{_cut(now)}: {number(str(used.microseconds))}" if used else f"{_cut(now)}: not timed"
                )
                lines.append([name, shape, in_use, *cells, str(len(tried))])
    if not lines:
        return []
    return [
        "**The pooled kernels, cut in several ways**, in microseconds, in bf16:",
        "",
        *table(["kernel", "activation", "in use", "fastest", "slowest", "tried"], lines),
    ]


# ---------------------------------------------------------------- the phases of python -m benchmarks.card


def phases(found: list[dict[str, Any]]) -> list[str]:
    lines = [[one["phase"], one["status"], number(str(one["seconds"]))] for one in found]
    return [
        "**`make card`**, by phase; status 0 is a good end:",
        "",
        *table(["phase", "ended", "seconds"], lines),
    ]


def agreement(found: dict[str, Any]) -> list[str]:
    lines = [
        [
            one["name"],
            number(str(one["value"])),
            number(str(one["bound"])),
            "yes" if one["passed"] else "**no**",
        ]
        for one in found["checks"]
    ]
    return [
        "**Compiled programs beside plain PyTorch** (`benchmarks/card/agreement.py`): the largest distance "
        "of two losses of AlexNet at 112x112, or what the name says.",
        "",
        *table(["", "found", "allowed", "passed"], lines),
    ]


def throughput(found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    lines = [
        [
            one["program"],
            number(str(one["median"])),
            f"{number(str(one['p20']))} to {number(str(one['p80']))}",
            *(times(str(one[name] or "")) for name in ("times_reference", "times_stock")),
            f"{one['fraction_of_matmul']:.0%}",
        ]
        for one in rows
        if one["measurement"] == "training"
    ]
    heads = ["", "images/s", "range", "times reference", "times stock", "of the matrix product"]
    text = []
    if "host_seconds" in found:
        text.append(f"Python takes {1e3 * found['host_seconds']:.2f} ms to enqueue a step of fastalex.")
    if "waits_a_step" in found:
        text.append(f"The host waits for the card {found['waits_a_step']:.2f} times a step.")
    result = [
        f"**The training step**, AlexNet at 224x224, batch {rows[0]['batch']}, the programs by turns "
        "([what they are](benchmarks.md)):",
        "",
        *table(heads, lines),
        *([" ".join(text), ""] if text else []),
    ]
    for name, program in (("kernels", "fastalex"), ("kernels_stock", "stock")):
        if found.get(name):
            spent = [
                [f"`{short(kernel)[:70]}`", f"{calls:.1f}", f"{ms:.3f}", f"{share:.1%}"]
                for kernel, calls, ms, share in found[name][:MOST_KERNELS]
            ]
            heads = ["kernel", "calls a step", "ms a step", "share"]
            result += [f"What the card runs in a step of {program}:", "", *table(heads, spent)]
    return result


def batches(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        [
            str(one["batch"]),
            number(str(one["images_per_second"])),
            number(str((one["reserved_bytes"] or 0) / 1e9)) if one["reserved_bytes"] else "",
        ]
        for one in found
    ]
    heads = ["batch", "images/s", "memory reserved, GB"]
    return ["**fastalex by the size of the batch**, AlexNet at 224x224:", "", *table(heads, lines)]


def tests(path: Path) -> list[str]:
    """What pytest counted."""
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
    """The names of the runs that have the card for themselves, so that their times mean something."""
    place = Place(folder, folder, toy=False)
    prefix = f"hydra.run.dir={folder}/runs/"
    commands = [
        command for phase in PHASES.values() if not phase.together for command in phase.commands(place)
    ]
    return {word.removeprefix(prefix) for command in commands for word in command if word.startswith(prefix)}


def runs(folder: Path) -> list[str]:
    """The errors of the finished runs, and how long they took to the study's."""
    assert PUBLISHED is not None
    by_themselves = alone(folder)
    lines = []
    for path in sorted((folder / "runs").glob("*")):
        run = read_run(path)
        if run is None:
            continue
        wall, reached = "", ""
        if path.name in by_themselves:
            wall = number(str(run.summary["wall_seconds"]))
            time = measured(run, PUBLISHED[0])
            reached = f"{number(str(time.seconds))}" if time.kind == MEASURED else "not reached"
        errors = [run.summary[views] for views in ("ten_crop", "single_crop")]
        lines.append(
            [
                path.name,
                run.summary["data"],
                str(run.summary["epochs"]),
                *(f"{one['top1_error']:.4f} / {one['top5_error']:.4f}" for one in errors),
                wall,
                reached,
            ]
        )
    if not lines:
        return []
    heads = ["run", "data", "epochs", "ten-crop", "single crop", "seconds in all"]
    return [
        "**Trainings**: top-1 and top-5 test error. Seconds are of runs that had the card for "
        f"themselves; those to a validation error of {PUBLISHED[0]:.4f} count from the settings on, "
        "compilation included.",
        "",
        *table([*heads, f"seconds to {PUBLISHED[0]:.4f}"], lines),
    ]


# ---------------------------------------------------------------- what came before it


def trial(found: dict[str, Any]) -> list[str]:
    """A session in which everything was tried, and the kernels alone were timed."""
    lines = [
        [
            one["settings"],
            one["ended"],
            *(
                " / ".join(f"{error:.4f}" for error in one[views]) if views in one else ""
                for views in ("single_crop", "several_crops")
            ),
        ]
        for one in found["runs"]
    ]
    tried, sanitizer, losses = found["tests"], found["sanitizer"], found["agreement"]
    distances = ", ".join(f"{name} {value:.2f}" for name, value in losses["largest_distance"].items())
    return [
        f"**What was tried** ({found['commit']}). {found['source']}",
        "",
        *table(["", "ended", "single crop", "several crops"], lines),
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
    """A file of results; None where there is none."""
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None
