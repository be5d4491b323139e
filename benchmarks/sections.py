"""The sections of docs/benchmarks.md, each from one file of results and for one device."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.hardware import ARITHMETIC, KINDS
from benchmarks.memory import DEVICE_PEAKS
from benchmarks.parts import CONVOLUTIONS, PARTS, PRODUCTS
from benchmarks.report import Measurement

RESULTS_FROM_PAGE = "../benchmarks/results"
TITLES = {"cpu": "CPU with bf16", "cpu_fp32": "CPU without bf16", "cuda": "GPU"}


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """As Markdown, figures to the right."""
    _, *columns = zip(*rows, strict=True)
    rules = ["---:" if all(cell[:1].isdigit() for cell in column if cell) else "---" for column in columns]
    lines = [heads, ["---", *rules], *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def number(text: str, digits: int = 3) -> str:
    """A figure of the file to so many significant digits; nothing stays nothing."""
    if not text:
        return ""
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def spread(m: Measurement) -> list[str]:
    return [number(str(m.median)), f"{number(str(m.p20))} to {number(str(m.p80))}"]


def times(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


def machine(measurements: Sequence[Measurement]) -> str:
    record = measurements[0].record
    return (
        f"*{record['hardware']}, {record['threads']} threads, {record['system']}, Python {record['python']}, "
        f"PyTorch {record['torch']}, Numba {record['numba']}, {record['date']}.*"
    )


def profile(text: str) -> list[str]:
    return [
        "### The operators of a step",
        "",
        "`python -m fastalex.train profile=true`, which also writes the trace, prints:",
        "",
        "```",
        text.rstrip(),
        "```",
        "",
    ]


def step(measurements: list[Measurement], device: str) -> list[str]:
    of = {
        name: [m for m in measurements if m.record["measurement"] == name]
        for name in (
            "training",
            "hardware",
            "ten-crop evaluation",
            "peak memory",
            *DEVICE_PEAKS,
            "step by part",
        )
    }
    training = [
        [
            m.record["program"],
            *spread(m),
            times(m.record["times_reference"]),
            times(m.record["times_stock"]),
            number(m.record["gflop_per_s"]),
            f"{float(m.record['fraction_of_matmul']):.0%}",
        ]
        for m in of["training"]
    ]
    heads = ["", "images/s", "range", "times reference", "times stock", "GFLOP/s", "of the matrix product"]
    limits = ", ".join(f"{m.record['program']} {number(str(m.median))} {m.unit}" for m in of["hardware"])
    evaluation = [
        [m.record["program"], *spread(m), times(m.record["times_reference"])]
        for m in of["ten-crop evaluation"]
    ]
    memory = [
        [f"{m.record['program']}, {m.of[0]}", number(str(m.median)), times(m.record["times_reference"])]
        for name in ("peak memory", *DEVICE_PEAKS)
        for m in of[name]
    ]
    programs = list(dict.fromkeys(m.record["program"] for m in of["step by part"]))
    cells = {(m.record["program"], m.record["part"]): m for m in of["step by part"]}
    parts = [
        [part, *(f"{number(str(c.median))} ({float(c.record['share_of_step']):.1%})" for c in row)]
        for part in PARTS
        if (row := [cells[program, part] for program in programs])
    ]
    rest = [
        sum(
            float(cells[program, part].record["share_of_step"])
            for part in PARTS
            if part not in (CONVOLUTIONS, PRODUCTS)
        )
        for program in programs
    ]
    parts.append(["all but convolutions and matrix products", *(f"{share:.1%}" for share in rest)])
    arithmetic = ARITHMETIC[KINDS[device]]
    turns, batch = of["training"][0].record["rounds"], of["training"][0].record["batch"]
    return [
        f"## The training step ({TITLES[device]})",
        "",
        f"AlexNet at 224x224, batch {batch}, data pipeline included, {turns} turns each (`make bench-step`). "
        "*reference* is `benchmarks/reference.py`, plain eager PyTorch in fp32; *stock* is the same network "
        f"under torch.compile, {arithmetic}, channels-last, with fused SGD; *fastalex* is "
        "`python -m fastalex.train`. A ratio is the median of the ratios within the turns.",
        "",
        *table(heads, training),
        f"The machine in the same turns: {limits}. FLOPs are those of convolutions and matrix products, "
        "counted by PyTorch, forward and backward, for plain convolutions: Winograd's algorithm computes the "
        "same with fewer, so that its rate may exceed the matrix product's.",
        "",
        "By part, from torch.profiler, in ms and as shares of the step:",
        "",
        *table(["", *programs], parts),
        f"![A training step's time by part]({RESULTS_FROM_PAGE}/step_parts_{device}.png)",
        "",
        "Against what the machine allows (bytes: every operator's inputs and outputs once; LRN: operations "
        "counted from the formula):",
        "",
        f"![Roofline]({RESULTS_FROM_PAGE}/roofline_{device}.png)",
        "",
        "Ten-crop evaluation, whole images a second:",
        "",
        *table(["", "images/s", "range", "times reference"], evaluation),
        "Peak memory in training: of a process, its high-water mark after the warm-up, PyTorch itself "
        "included, and what the processes it started, a DataLoader's or torch.compile's, share with nobody.",
        "",
        *table(["", "MB", "times reference"], memory),
    ]


def summary(steps: dict[str, list[Measurement]]) -> list[str]:
    """The README's table: how much faster than plain PyTorch, for each kind of machine measured."""
    heads = ["", "training, images/s", "times eager PyTorch", "times torch.compile", "ten-crop, times eager"]
    rows, notes = [], []
    for device, measurements in steps.items():
        ours = {m.record["measurement"]: m for m in measurements if m.record["program"] == "fastalex"}
        training, evaluation = ours["training"], ours["ten-crop evaluation"]
        faster = [training.record["times_reference"], training.record["times_stock"]]
        faster.append(evaluation.record["times_reference"])
        rows.append([TITLES[device], number(str(training.median)), *map(times, faster)])
        notes.append(f"{TITLES[device]}: {machine(measurements).strip('*.')}.")
    return [*table(heads, rows), *(f"*{note}*  " for note in notes[:-1]), f"*{notes[-1]}*"]


def lrn(measurements: list[Measurement], device: str) -> list[str]:
    """Forward and backward together, in bf16 where machine and implementation have it."""
    name = ARITHMETIC[KINDS[device]]
    both = [m for m in measurements if m.record["direction"] == "forward + backward"]
    rows = [
        [
            f"{m.record['function']}, {m.record['shape']}",
            f"{m.record['implementation']}, {m.record['dtype']}",
            *spread(m),
            times(m.record["times_faster_than_eager"]),
            f"{float(m.record['fraction_of_copy']):.0%}",
        ]
        for m in both
        if m.record["dtype"] == name or m.record["implementation"].startswith("eager")
    ]
    heads = [
        "",
        "implementation",
        "ms, forward + backward",
        "range",
        "times faster than eager",
        "of a copy's bandwidth",
    ]
    return [
        f"## Local response normalisation ({TITLES[device]})",
        "",
        "`make bench-kernels`; all types and both passes: "
        f"[lrn_{device}.csv]({RESULTS_FROM_PAGE}/lrn_{device}.csv).",
        "",
        *table(heads, rows),
    ]


def augment(measurements: list[Measurement], device: str) -> list[str]:
    rows = [
        [
            m.record["case"],
            m.record["implementation"],
            number(m.record["images_per_s"]),
            times(m.record["augment_is_times_faster"]),
        ]
        for m in measurements
    ]
    heads = ["", "implementation", "images/s", "augment is times faster"]
    return [f"## Making batches ({TITLES[device]})", "", "`make bench-kernels`", "", *table(heads, rows)]


def loaders(measurements: list[Measurement], device: str) -> list[str]:
    rows = [
        [
            m.record["data"],
            m.record["loader"],
            *spread(m),
            times(m.record["times_torchvision"]),
            number(m.record["peak_memory_mb"]),
        ]
        for m in measurements
    ]
    heads = ["", "loader", "images/s", "range", "times torchvision", "peak memory, MB"]
    return [
        f"## Loaders ({TITLES[device]})",
        "",
        "`make bench-loaders`; [what they are](loaders.md)",
        "",
        *table(heads, rows),
    ]


def folded(measurements: list[Measurement], device: str) -> list[str]:
    rows = [[*m.of, *spread(m), times(m.record["folded_is_times_faster"])] for m in measurements]
    heads = ["", "implementation", "pass", "ms", "range", "folded is times faster"]
    return [
        f"## The folded first convolution ({TITLES[device]})",
        "",
        "The first convolution with the resize, crop and flip of the batch before it, "
        "`python -m pytest benchmarks/test_folded_conv.py --benchmark-enable -s`.",
        "",
        *table(heads, rows),
    ]


def block(measurements: list[Measurement], device: str) -> list[str]:
    rows = [
        [*m.of, *spread(m), times(m.record["times_two_operators"]), number(m.record["kept_mb"])]
        for m in measurements
    ]
    heads = ["implementation", "pass", "ms", "range", "times two operators", "kept for the gradient, MB"]
    return [
        f"## The first block as one operator ({TITLES[device]})",
        "",
        "The folded first convolution, ReLU, LRN and pooling: the convolution's output kept for the "
        "gradient, or computed again, "
        "`python -m pytest benchmarks/test_folded_block.py --benchmark-enable -s`.",
        "",
        *table(heads, rows),
    ]


def winograd(measurements: list[Measurement], device: str) -> list[str]:
    shown = [m for m in measurements if m.record["direction"] == "forward + backward"]
    rows = [
        [
            *m.of[:2],
            *spread(m),
            times(m.record["winograd_is_times_faster"]),
            *(number(m.record[name], 2) for name in ("error", "error_d_input", "error_d_weight")),
        ]
        for m in shown
    ]
    heads = ["", "implementation", "ms, forward + backward", "range", "winograd is times faster"]
    return [
        f"## Convolutions by Winograd's algorithm ({TITLES[device]})",
        "",
        "`make bench-kernels`. Errors are the rms distance from float64, relative to the rms: of the result, "
        "of the gradient of the input and of that of the weight.",
        "",
        *table([*heads, "error", "of d input", "of d weight"], rows),
    ]


def pooled(measurements: list[Measurement], device: str) -> list[str]:
    rows = [
        [
            f"{m.record['crop']}x{m.record['crop']}, batch {m.record['batch']}",
            m.record["implementation"],
            *spread(m),
            times(m.record["pooled_weight_is_times_faster"]),
        ]
        for m in measurements
    ]
    heads = ["", "implementation", "ms a step", "range", "pooled weight is times faster"]
    return [
        f"## The hidden layer behind a small image ({TITLES[device]})",
        "",
        "`make bench-kernels`; AlexNet's training step without the data. At these crops the last pool leaves "
        "1x1, 2x2, 3x3 or 4x4 pixels for a layer made for 6x6: either they are pooled up, or the weight is "
        "pooled, where that saves enough products (not at 4x4).",
        "",
        *table(heads, rows),
    ]


def factored(measurements: list[Measurement], device: str) -> list[str]:
    rows = [[*m.of, *spread(m), times(m.record["times_whole"])] for m in measurements]
    heads = ["batch", "gradient", "ms", "range", "times the whole one's"]
    return [
        f"## The update of the hidden layers ({TITLES[device]})",
        "",
        "`make bench-kernels`; fc6 and fc7 alone: the product of gradient and input, clipping and the "
        "step. Their gradients are made whole, or multiplied out from their factors some rows at a time "
        "(`ROWS` of `fastalex/training/optim.py`); the norm of factors takes products of all images with "
        "each other.",
        "",
        *table(heads, rows),
    ]
