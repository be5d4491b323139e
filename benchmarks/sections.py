"""The sections of docs/benchmarks.md, each from one results file of one kind of machine.

A column of a table is its head and the function that renders its cell from a measurement, or from any record
with the same columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.hardware import ARITHMETIC, KINDS
from benchmarks.memory import DEVICE_PEAKS
from benchmarks.parts import CONVOLUTIONS, PARTS, PRODUCTS
from benchmarks.report import Measurement
from fastalex.markdown import table

RESULTS_FROM_PAGE = "../benchmarks/results"
TITLES = {
    "cpu": "CPU with bf16",
    "cpu_amx": "CPU with AMX",
    "cpu_fp32": "CPU without bf16",
    "cuda": "GPU",
}

Column = tuple[str, Callable[[Any], str]]


def number(value: str | float | None, digits: int = 3) -> str:
    """A figure to `digits` significant digits; empty if there is none."""
    if value is None or value == "":
        return ""
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def ratio(value: str | float | None) -> str:
    return "" if value is None or value == "" else f"{float(value):.2f}"


def percent(value: str | float) -> str:
    return f"{float(value):.0%}"


def column(head: str, name: str, render: Callable[[Any], str] = str) -> Column:
    """A column that shows the value of the column `name` of the results."""
    return head, lambda record: render(record[name])


def figures(head: str, range_head: str = "range") -> list[Column]:
    """The columns of the median and of the range from the 20th to the 80th percentile."""
    return [
        column(head, "median", number),
        (range_head, lambda record: f"{number(record['p20'])} to {number(record['p80'])}"),
    ]


def render(columns: Sequence[Column], records: Iterable[Any]) -> str:
    """A Markdown table with one line per record."""
    rows = [[cell(record) for _, cell in columns] for record in records]
    return table([head for head, _ in columns], rows, numbers_right=True)


def machine_line(measurements: Sequence[Measurement]) -> str:
    """The machine and the versions, in italics."""
    first = measurements[0]
    return (
        f"*{first['hardware']}, {first['threads']} threads, {first['system']}, Python {first['python']}, "
        f"PyTorch {first['torch']}, Numba {first['numba']}, {first['date']}.*"
    )


@dataclass(frozen=True)
class Section:
    """A title, a text, and a table with one line per measurement.

    Attributes:
        file: of results, without the kind of machine: `lrn` for lrn_cpu.csv.
        title: of the section.
        text: above the table; `{kind}` stands for the kind of machine.
        columns: of the table.
        shown: whether a measurement is in the table, given also the arithmetic of the machine, bf16 or fp32.
    """

    file: str
    title: str
    text: str
    columns: Sequence[Column]
    shown: Callable[[Measurement, str], bool] = lambda measurement, arithmetic: True

    def lines(self, measurements: Sequence[Measurement], kind: str) -> list[str]:
        arithmetic = ARITHMETIC[KINDS[kind]]
        shown = [m for m in measurements if self.shown(m, arithmetic)]
        text = self.text.format(kind=kind)
        return [f"## {self.title} ({TITLES[kind]})", "", text, "", render(self.columns, shown), ""]


SECTIONS = (
    Section(
        "lrn",
        "Local response normalisation",
        "`make bench-kernels`; all types and both passes: "
        f"[lrn_{{kind}}.csv]({RESULTS_FROM_PAGE}/lrn_{{kind}}.csv).",
        [
            ("", lambda m: f"{m['function']}, {m['shape']}"),
            ("implementation", lambda m: f"{m['implementation']}, {m['dtype']}"),
            *figures("ms, forward + backward"),
            column("times faster than eager", "times_faster_than_eager", ratio),
            column("of a copy's bandwidth", "fraction_of_copy", percent),
        ],
        lambda m, arithmetic: (
            m["direction"] == "forward + backward"
            and (m["dtype"] == arithmetic or m["implementation"].startswith("eager"))
        ),
    ),
    Section(
        "augment",
        "Making batches",
        "`make bench-kernels`",
        [
            column("", "case"),
            column("implementation", "implementation"),
            column("images/s", "images_per_s", number),
            column("augment is times faster", "augment_is_times_faster", ratio),
        ],
    ),
    Section(
        "loaders",
        "Loaders",
        "`make bench-loaders`; [what they are](loaders.md)",
        [
            column("", "data"),
            column("loader", "loader"),
            *figures("images/s"),
            column("times torchvision", "times_torchvision", ratio),
            column("peak memory, MB", "peak_memory_mb", number),
        ],
    ),
    Section(
        "folded_conv",
        "The folded first convolution",
        "The first convolution with the resize, crop and flip of the batch before it, "
        "`python -m pytest benchmarks/test_folded_conv.py --benchmark-enable -s`.",
        [
            column("", "case"),
            column("implementation", "implementation"),
            column("pass", "direction"),
            *figures("ms"),
            column("folded is times faster", "folded_is_times_faster", ratio),
        ],
    ),
    Section(
        "folded_block",
        "The first block as one operator",
        "The folded first convolution, ReLU, LRN and pooling: the convolution's output kept for the "
        "gradient, or computed again, "
        "`python -m pytest benchmarks/test_folded_block.py --benchmark-enable -s`.",
        [
            column("implementation", "implementation"),
            column("pass", "direction"),
            *figures("ms"),
            column("times two operators", "times_two_operators", ratio),
            column("kept for the gradient, MB", "kept_mb", number),
        ],
    ),
    Section(
        "winograd",
        "Convolutions by Winograd's algorithm",
        "`make bench-kernels`. Errors are the rms distance from float64, relative to the rms: of the result, "
        "of the gradient of the input and of that of the weight.",
        [
            column("", "case"),
            column("implementation", "implementation"),
            *figures("ms, forward + backward"),
            column("winograd is times faster", "winograd_is_times_faster", ratio),
            *(
                column(head, name, lambda error: number(error, 2))
                for head, name in (
                    ("error", "error"),
                    ("of d input", "error_d_input"),
                    ("of d weight", "error_d_weight"),
                )
            ),
        ],
        lambda m, arithmetic: m["direction"] == "forward + backward",
    ),
    Section(
        "pooled_linear",
        "The hidden layer behind a small image",
        "`make bench-kernels`; AlexNet's training step without the data. At these crops the last pool leaves "
        "1x1, 2x2, 3x3 or 4x4 pixels for a layer made for 6x6: either they are pooled up, or the weight is "
        "pooled, where that saves enough products (not at 4x4).",
        [
            ("", lambda m: f"{m['crop']}x{m['crop']}, batch {m['batch']}"),
            column("implementation", "implementation"),
            *figures("ms a step"),
            column("pooled weight is times faster", "pooled_weight_is_times_faster", ratio),
        ],
    ),
    Section(
        "factored_sgd",
        "The update of the hidden layers",
        "`make bench-kernels`; fc6 and fc7 alone: the product of gradient and input, clipping and the "
        "step. Their gradients are made whole, or multiplied out from their factors some rows at a time "
        "(`COLUMN_BYTES` of `kernels/factored_sgd_numba.py`); the norm of factors takes products of all "
        "images with each other.",
        [
            column("batch", "batch"),
            column("gradient", "gradient"),
            *figures("ms"),
            column("relative to the whole gradient", "times_whole", ratio),
        ],
    ),
    Section(
        "muon",
        "Muon",
        "`make bench-kernels`; one step of the weights of AlexNet's five convolutions, for random gradients. "
        "PyTorch's Muon multiplies in bf16; fastalex's in the dtype that the machine trains in, and in an "
        "order that takes about half as many operations (`fastalex/training/muon.py`).",
        [
            column("optimizer", "optimizer"),
            *figures("ms"),
            column("relative to fastalex's Muon", "times_ours", ratio),
        ],
    ),
)

TRAINING = [
    column("", "program"),
    *figures("images/s"),
    column("times reference", "times_reference", ratio),
    column("times stock", "times_stock", ratio),
]
OF_MATMUL = column("of the matrix product", "fraction_of_matmul", percent)
EVALUATION = [
    column("", "program"),
    *figures("images/s"),
    column("times reference", "times_reference", ratio),
]
MEMORY = [
    ("", lambda m: f"{m['program']}, {m['measurement']}"),
    column("MB", "median", number),
    column("times reference", "times_reference", ratio),
]


def step(measurements: Sequence[Measurement], kind: str) -> list[str]:
    """The section on the training step, which has a table for each kind of figure."""

    def of(*names: str) -> list[Measurement]:
        return [m for name in names for m in measurements if m["measurement"] == name]

    training = of("training")
    limits = ", ".join(f"{m['program']} {number(m.median)} {m.unit}" for m in of("hardware"))
    return [
        f"## The training step ({TITLES[kind]})",
        "",
        f"AlexNet at 224x224, batch {training[0]['batch']}, data pipeline included, {training[0]['rounds']} "
        "turns each (`make bench-step`). "
        "*reference* is `benchmarks/reference.py`, plain eager PyTorch in fp32; *stock* is the same network "
        f"under torch.compile, {ARITHMETIC[KINDS[kind]]}, channels-last, with fused SGD; *fastalex* is "
        "`python -m fastalex.train recipe=one_cycle`: all three update by SGD. A ratio is the median of the "
        "ratios within the turns.",
        "",
        render([*TRAINING, column("GFLOP/s", "gflop_per_s", number), OF_MATMUL], training),
        "",
        f"The machine in the same turns: {limits}. FLOPs are those of convolutions and matrix products, "
        "counted by PyTorch, forward and backward, for plain convolutions: Winograd's algorithm computes the "
        "same with fewer, so that its rate may exceed the matrix product's.",
        "",
        "By part, from torch.profiler, in ms and as shares of the step:",
        "",
        parts(of("step by part")),
        "",
        f"![A training step's time by part]({RESULTS_FROM_PAGE}/step_parts_{kind}.png)",
        "",
        "Against what the machine allows (bytes: every operator's inputs and outputs once; LRN: operations "
        "counted from the formula):",
        "",
        f"![Roofline]({RESULTS_FROM_PAGE}/roofline_{kind}.png)",
        "",
        "Ten-crop evaluation, whole images a second:",
        "",
        render(EVALUATION, of("ten-crop evaluation")),
        "",
        "Peak memory in training: of a process, its high-water mark after the warm-up, PyTorch itself "
        "included, and what the processes it started, a DataLoader's or torch.compile's, share with nobody.",
        "",
        render(MEMORY, of("peak memory", *DEVICE_PEAKS)),
        "",
    ]


def parts(measurements: Sequence[Measurement]) -> str:
    """The table of a step's time by part, with a column for each program."""
    programs = list(dict.fromkeys(m["program"] for m in measurements))
    cells = {(m["program"], m["part"]): m for m in measurements}

    def share(program: str, part: str) -> float:
        return float(cells[program, part]["share_of_step"])

    rows = [
        [part, *(f"{number(cells[p, part].median)} ({share(p, part):.1%})" for p in programs)]
        for part in PARTS
    ]
    others = [part for part in PARTS if part not in (CONVOLUTIONS, PRODUCTS)]
    rest = [sum(share(program, part) for part in others) for program in programs]
    rows.append(["all but convolutions and matrix products", *(f"{share:.1%}" for share in rest)])
    return table(["", *programs], rows, numbers_right=True)


def profile(text: str) -> list[str]:
    """The section on the operators of a step, from what the profiler printed."""
    return [
        "### The operators of a step",
        "",
        "`python -m fastalex.train recipe=one_cycle profile=true`, which also writes the trace, prints:",
        "",
        "```",
        text.rstrip(),
        "```",
        "",
    ]


def summary(steps: dict[str, list[Measurement]]) -> str:
    """The README's table: fastalex's speed beside plain PyTorch's, for each kind of machine measured."""
    heads = ["", "training, images/s", "times eager PyTorch", "times torch.compile", "ten-crop, times eager"]
    rows, notes = [], []
    for kind, measurements in steps.items():
        ours = {m["measurement"]: m for m in measurements if m["program"] == "fastalex"}
        training, evaluation = ours["training"], ours["ten-crop evaluation"]
        faster = [training["times_reference"], training["times_stock"], evaluation["times_reference"]]
        rows.append([TITLES[kind], number(training.median), *map(ratio, faster)])
        notes.append(f"*{TITLES[kind]}: {machine_line(measurements).strip('*')}*")
    return "\n".join([table(heads, rows, numbers_right=True), "", "  \n".join(notes)])
