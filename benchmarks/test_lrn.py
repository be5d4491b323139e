"""Times of the LRN kernels at AlexNet's two shapes, batch 128, beside PyTorch's.

    python -m pytest benchmarks/test_lrn.py --benchmark-enable -s

Writes results/lrn_cpu.csv and .png (lrn_cuda.* on a GPU, where the time is that of the kernels: see
`benchmarks.hardware.seconds_of`). The implementations take turns within a round, so that other load on the
machine affects them all:

- eager: `nn.ReLU`, `nn.LocalResponseNorm` and, for pooling, `nn.MaxPool2d`, in NCHW, where they are fastest.
  On the CPU in fp32 only: PyTorch has no 16-bit kernel for LRN there.
- torch.compile: the formula as the paper states it, with shifted slices for the window; and the same written
  so that Inductor fuses it best. Both channels-last.
- fastalex: this package, channels-last; for pooling also `relu_lrn` followed by `max_pool2d`. In NCHW too,
  which costs copies to channels-last and back.
- copy: `copy_` of the input, the bandwidth that the others are compared with.

A measurement's `bytes` are those of all inputs and outputs, each counted once, whatever the implementation
really moves, so that implementations of one pass and dtype compare; `fraction_of_copy` is that bandwidth over
a copy's in the same run. oneDNN has an LRN primitive, but no operator of PyTorch calls it.
On the CPU, "eager" is PyTorch in a process with default settings: glibc's malloc maps each of these tensors
anew, and most of the time is spent in page faults. All others run as they do in fastalex, with pages kept
(`fastalex.runtime.keep_pages`), and "eager, pages kept" shows how much that alone gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import charts
from benchmarks.hardware import DEVICE, KIND, seconds_of
from benchmarks.passes import seconds_by_pass
from benchmarks.report import RESULTS, Measurement, aligned, write_csv
from fastalex.kernels import relu_lrn, relu_lrn_max_pool
from fastalex.runtime import set_malloc_thresholds

BATCH = 128
SHAPES = [(BATCH, 96, 55, 55), (BATCH, 256, 27, 27)]
SIZE, ALPHA, BETA, K = OPTIONS = 5, 5e-4, 0.75, 2.0  # the paper's, in PyTorch's meaning of alpha
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EAGER_DTYPES = DTYPES if DEVICE == "cuda" else {"fp32": torch.float32}
ROUNDS = 7
OURS = "fastalex, Triton" if DEVICE == "cuda" else "fastalex, Numba"
FUNCTIONS = ["relu_lrn", "relu_lrn_max_pool"]
Function = Callable[[Tensor], Tensor]


class Candidate(NamedTuple):
    """An implementation, its input, and the block size in bytes from which malloc maps memory separately."""

    implementation: str
    dtype: str
    call: Function
    x: Tensor
    map_from: int = 2**31 - 1


# glibc raises its threshold to the largest freed block, up to this.
STOCK_MAP_FROM = 32 * 2**20


def papers_formula(x: Tensor) -> Tensor:
    """ReLU and LRN as in section 3.3 of the paper, with PyTorch's order of dimensions."""
    v = x.relu()
    squares = F.pad(v * v, (0, 0, 0, 0, SIZE // 2, (SIZE - 1) // 2))
    total = sum(squares[:, i : i + x.shape[1]] for i in range(SIZE))
    assert isinstance(total, Tensor)
    return v / (K + ALPHA / SIZE * total) ** BETA


def formula(x: Tensor) -> Tensor:
    """ReLU and LRN written for a compiler: in fp32, channels last, without powers, with shifted slices.

    Of the variants tried on the CPU this is the fastest with Inductor; `** -0.75` alone takes twice as long.
    """
    v = x.movedim(1, -1).float().relu()
    squares = F.pad(v * v, (SIZE // 2, (SIZE - 1) // 2))
    total = sum(squares[..., i : i + x.shape[1]] for i in range(SIZE))
    assert isinstance(total, Tensor)
    root = (K + ALPHA / SIZE * total).rsqrt()
    return (v * root * root.sqrt()).to(x.dtype).movedim(-1, 1)


def pooled(call: Function) -> Function:
    return lambda x: F.max_pool2d(call(x), 3, 2)


def candidates(function: str, shape: tuple[int, ...]) -> list[Candidate]:
    nchw = torch.randn(shape, device=DEVICE)
    inputs = {
        name: nchw.to(dtype, memory_format=torch.channels_last).requires_grad_()
        for name, dtype in DTYPES.items()
    }
    pools = function == "relu_lrn_max_pool"
    modules: list[nn.Module] = [nn.ReLU(), nn.LocalResponseNorm(SIZE, ALPHA, BETA, K)]
    eager = nn.Sequential(*modules, *([nn.MaxPool2d(3, 2)] if pools else []))
    unfused: Function = lambda x: relu_lrn(x, *OPTIONS)  # noqa: E731
    found = [
        Candidate("eager", name, eager, nchw.to(dtype).requires_grad_(), STOCK_MAP_FROM)
        for name, dtype in EAGER_DTYPES.items()
    ]
    if DEVICE == "cpu":
        found.append(Candidate("eager, pages kept", "fp32", eager, found[0].x))
    ours_in_nchw = (lambda x: relu_lrn_max_pool(x, *OPTIONS)) if pools else unfused
    found.append(Candidate(f"{OURS}, NCHW", "fp32", ours_in_nchw, found[0].x))
    for name, x in inputs.items():
        for written, text in (("the paper's formula", papers_formula), ("written for it", formula)):
            compiled = torch.compile(pooled(text) if pools else text, dynamic=False)
            found.append(Candidate(f"torch.compile, {written}", name, compiled, x))
        if pools:
            found.append(Candidate("fastalex relu_lrn, then max_pool2d", name, pooled(unfused), x))
            found.append(Candidate(OURS, name, lambda x: relu_lrn_max_pool(x, *OPTIONS), x))
        else:
            found.append(Candidate(OURS, name, unfused, x))
    return found


def bytes_moved(function: str, x: Tensor, y: Tensor) -> dict[str, int]:
    """Bytes of every input and output, counted once. Pooling writes and reads one argmax byte per output."""
    size = x.element_size()
    argmax = y.numel() if function == "relu_lrn_max_pool" else 0
    forward = (x.numel() + y.numel()) * size + argmax
    backward = (2 * x.numel() + y.numel()) * size + argmax
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}


@pytest.fixture(scope="module")
def measurements() -> Iterator[list[Measurement]]:
    """Collects the measurements of all cases; writes them only if all have run."""
    collected: list[Measurement] = []
    yield collected
    if len({(m["function"], m["shape"]) for m in collected}) == len(FUNCTIONS) * len(SHAPES):
        print("\n" + report(collected))
        write_csv(collected, RESULTS / f"lrn_{KIND}.csv", DEVICE, unit="ms")
        charts.lrn(collected, RESULTS / f"lrn_{KIND}.png", DEVICE)


def report(measurements: list[Measurement]) -> str:
    """The measurements as text."""
    heads = ["function", "shape", "dtype", "implementation", "pass", "median ms", "p20", "p80"]
    heads += ["GB/s", "of copy", "vs eager"]
    lines = [heads]
    for m in measurements:
        figures = (m.median, m.p20, m.p80, m["gb_per_s"], m["fraction_of_copy"])
        faster = m["times_faster_than_eager"]
        last = f"{faster:.1f}x" if faster else ""
        lines.append([*m.subject.values(), *(f"{value:.2f}" for value in figures), last])
    return aligned(lines)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_lrn(function: str, shape: tuple[int, ...], measurements: list[Measurement], benchmark: Any) -> None:
    torch.manual_seed(0)
    field = candidates(function, shape)
    results = [candidate.call(candidate.x).detach() for candidate in field]
    for result, candidate in zip(results, field, strict=True):  # wrong results need not be timed
        torch.testing.assert_close(
            result.float(), results[0].float(), rtol=2 * torch.finfo(result.dtype).eps + 1e-5, atol=1e-2
        )
        assert result.dtype == candidate.x.dtype
    grads = [torch.randn_like(result) for result in results]
    targets = {name: torch.empty_like(c.x) for name, c in ((c.dtype, c) for c in field)}
    times: list[dict[str, list[float]]] = [{} for _ in field]
    copies: dict[str, list[float]] = {name: [] for name in targets}

    def measure(index: int) -> None:
        set_malloc_thresholds(field[index].map_from)
        candidate = field[index]
        forward = partial(candidate.call, candidate.x)
        for direction, duration in seconds_by_pass(forward, [candidate.x], grads[index]).items():
            times[index].setdefault(direction, []).append(duration)

    ours = field.index(next(c for c in field if c.implementation == OURS and c.dtype == "bf16"))

    def everyone_else() -> None:
        for index, candidate in enumerate(field):
            if index != ours:
                measure(index)
            if candidate.implementation == OURS:
                copy = partial(targets[candidate.dtype].copy_, candidate.x.detach())
                copies[candidate.dtype].append(seconds_of(copy)[0])

    # pytest-benchmark's own clock sees ours in bf16; the others take their turns in its set-up.
    benchmark.pedantic(partial(measure, ours), setup=everyone_else, rounds=ROUNDS, warmup_rounds=1)

    eager = {direction: median(values[1:]) for direction, values in times[0].items()}
    sizes = {c.dtype: bytes_moved(function, c.x, result) for c, result in zip(field, results, strict=True)}

    def measurement(
        implementation: str, dtype: str, direction: str, values: list[float], moved: int
    ) -> Measurement:
        values = values[1:]  # the first round warms up
        rate = moved / median(values)
        subject = {"function": function, "shape": "x".join(map(str, shape)), "dtype": dtype}
        return Measurement.of_times(
            {**subject, "implementation": implementation, "direction": direction},
            values,
            bytes=moved,
            gb_per_s=rate / 1e9,
            fraction_of_copy=rate * median(copies[dtype][1:]) / (2 * targets[dtype].nbytes),
            # Eager fp32, which has no equal of a copy.
            times_faster_than_eager=eager[direction] / median(values) if direction in eager else None,
        )

    found = [
        measurement("copy", dtype, "copy", values, 2 * targets[dtype].nbytes)
        for dtype, values in copies.items()
    ]
    for candidate, measured in zip(field, times, strict=True):
        for direction, values in measured.items():
            moved = sizes[candidate.dtype][direction]
            found.append(measurement(candidate.implementation, candidate.dtype, direction, values, moved))
    measurements += found
    benchmark.extra_info["median_ms"] = {
        f"{m['implementation']}, {m['dtype']}, {m['direction']}": m.median for m in found
    }
