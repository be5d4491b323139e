"""Times of the LRN kernels at AlexNet's two shapes, batch 128, beside PyTorch's.

    python -m pytest benchmarks/test_lrn.py --benchmark-enable -s

Writes results/lrn_cpu.csv and .png (lrn_cuda.* on a GPU, where the time is that of the kernels: see
`benchmarks.hardware.seconds_of`). The implementations take turns within a round, so that whatever else the
machine does falls on all of them:

- eager: `nn.ReLU`, `nn.LocalResponseNorm` and, for pooling, `nn.MaxPool2d`, in NCHW, where they are at their
  fastest. On the CPU in fp32 only: PyTorch has no 16-bit kernel for it there.
- torch.compile: the formula as the paper states it, with shifted slices for the window; and the same written
  so that Inductor fuses it best. Both channels-last.
- fastalex: this package, channels-last; for pooling also `relu_lrn` and then `max_pool2d`. In NCHW too, which
  costs copies to channels-last and back.
- copy: `copy_` of the input, the bandwidth that the others are measured against.

oneDNN has an LRN primitive, but no operator of PyTorch calls it: it cannot be reached from here.
On the CPU, "eager" is what PyTorch does in a process that sets nothing: glibc's malloc maps each of these
tensors afresh, and most of the time goes by in page faults. All others run as they do in fastalex, with pages
kept (`fastalex.runtime.keep_pages`), and "eager, pages kept" says what that alone is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.hardware import DEVICE, KIND, seconds_of
from benchmarks.passes import seconds_by_pass
from benchmarks.report import RESULTS, Row, draw, percentiles, table, write_csv
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
    """An implementation with the input it is timed on, and the size from which malloc maps on its own."""

    implementation: str
    dtype: str
    call: Function
    x: Tensor
    map_from: int = 2**31 - 1


# glibc raises its threshold to the largest block it has seen freed, and to this at most.
STOCK_MAP_FROM = 32 * 2**20


def papers_formula(x: Tensor) -> Tensor:
    """ReLU and LRN as section 3.3 of the paper writes them, with channels where PyTorch has them."""
    v = x.relu()
    squares = F.pad(v * v, (0, 0, 0, 0, SIZE // 2, (SIZE - 1) // 2))
    total = sum(squares[:, i : i + x.shape[1]] for i in range(SIZE))
    assert isinstance(total, Tensor)
    return v / (K + ALPHA / SIZE * total) ** BETA


def formula(x: Tensor) -> Tensor:
    """ReLU and LRN as one writes them for a compiler: in fp32, the channels last, no power, shifted slices.

    Of the variants tried on the CPU this is Inductor's fastest; `** -0.75` alone takes twice as long.
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
    """Every input and output once. Pooling writes, and reads again, one byte a result: where it was."""
    size = x.element_size()
    argmax = y.numel() if function == "relu_lrn_max_pool" else 0
    forward = (x.numel() + y.numel()) * size + argmax
    backward = (2 * x.numel() + y.numel()) * size + argmax
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """The rows of all cases; written when all have run, so that a part does not replace the whole."""
    collected: list[Row] = []
    yield collected
    if len({(row.function, row.shape) for row in collected}) == len(FUNCTIONS) * len(SHAPES):
        print("\n" + table(collected))
        write_csv(collected, RESULTS / f"lrn_{KIND}.csv", DEVICE)
        draw(collected, RESULTS / f"lrn_{KIND}.png", DEVICE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_lrn(function: str, shape: tuple[int, ...], rows: list[Row], benchmark: Any) -> None:
    if benchmark.disabled:
        pytest.skip("a measurement, not a test: needs --benchmark-enable")
    torch.manual_seed(0)
    field = candidates(function, shape)
    results = [candidate.call(candidate.x).detach() for candidate in field]
    for result, candidate in zip(results, field, strict=True):  # what is not equal need not be timed
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

    eager = {direction: percentiles(values[1:])[0] for direction, values in times[0].items()}
    sizes = {c.dtype: bytes_moved(function, c.x, result) for c, result in zip(field, results, strict=True)}
    name = "x".join(map(str, shape))

    def row(implementation: str, dtype: str, direction: str, values: list[float], moved: int) -> Row:
        median, low, high = percentiles(values[1:])  # the first round warms up
        copied = 2 * targets[dtype].nbytes / percentiles(copies[dtype][1:])[0]
        speedup = eager[direction] / median if direction in eager else None
        return Row(
            function,
            name,
            dtype,
            implementation,
            direction,
            median,
            low,
            high,
            len(values) - 1,
            moved,
            moved / median / 1e6,
            moved / median / copied,
            speedup,
        )

    for dtype, values in copies.items():
        rows.append(row("copy", dtype, "copy", values, 2 * targets[dtype].nbytes))
    for candidate, measured in zip(field, times, strict=True):
        for direction, values in measured.items():
            moved = sizes[candidate.dtype][direction]
            rows.append(row(candidate.implementation, candidate.dtype, direction, values, moved))
    benchmark.extra_info["median_ms"] = {
        f"{r.implementation}, {r.dtype}, {r.direction}": r.median_ms
        for r in rows
        if (r.function, r.shape) == (function, name)
    }
