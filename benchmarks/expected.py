"""How fast a GPU could train at its peak rates, from counted FLOPs and bytes.

`python -m benchmarks.expected` rewrites that section of docs/gpu.md. Nothing is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import reference
from benchmarks.counts import Operation, count_step, totals
from benchmarks.parts import CONVOLUTIONS, INPUT, OTHER, PARTS, PRODUCTS
from fastalex.config import Optimizer
from fastalex.files import write_text
from fastalex.markdown import replace_between, table
from fastalex.models import create_model

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- python -m benchmarks.expected writes this -->", "<!-- to here -->"
BATCH = 128
CLIP_NORM = 5.0  # recipe=one_cycle


@dataclass(frozen=True)
class Card:
    """A GPU and its maker's figures: dense bf16 products accumulated in fp32, and memory bandwidth."""

    name: str
    flops_per_second: float
    bytes_per_second: float


CARDS = (
    # 66 SMs at 2.61 GHz with 512 such FLOP a cycle each, as the Ada whitepaper has it for the RTX 4080
    # (76 SMs at 2.505 GHz: 97.5 TFLOP/s). The 353 and 706 of the advertisements are FP8, dense and sparse.
    Card("RTX 4070 Ti SUPER", 66 * 2.61e9 * 512, 672e9),
    Card("H100 SXM", 989e12, 3350e9),
)


# A rate of convolutions that careful kernels reach in practice, as a fraction of the card's
EFFICIENCY = 0.7
# What is left in a step in which every other operator is a part of one of these
_AT_THE_FLOOR = (
    "batch",
    "fastalex::lrn_max_pool",
    "fastalex::lrn_max_pool_backward",
    "aten::max_pool2d_with_indices",
    "aten::max_pool2d_with_indices_backward",
    "fastalex::factored_sgd",
    "aten::_fused_sgd_",
)


def fast_step(
    dtype: torch.dtype = torch.bfloat16, *, factored: bool = False, optimizer: Optimizer = Optimizer.sgd
) -> list[Operation]:
    """The operators of fastalex's step on a GPU, before torch.compile fuses any.

    Args:
        dtype: of the arithmetic.
        factored: whether the hidden layers' gradients are left as factors (`runtime.factored`).
        optimizer: what updates the convolutions.
    """
    return count_step(
        partial(create_model, "alexnet"),
        dtype=dtype,
        batch_size=BATCH,
        clip_norm=CLIP_NORM,
        factored=factored,
        optimizer=optimizer,
    )


def bias_passes() -> list[Operation]:
    """The passes for the biases of the first two convolutions, which a convolution's own count leaves out.

    In bf16: forward reads and writes the convolution's output, backward reads its gradient.
    """
    elements = BATCH * (96 * 55**2 + 256 * 27**2)
    return [Operation("bias", OTHER, 0, 4 * elements), Operation("bias gradient", OTHER, 0, 2 * elements)]


def batch_copy() -> Operation:
    """The copy of a bf16 batch to the tensor that a CUDA graph of the network reads."""
    return Operation("batch copy", INPUT, 0, 2 * 2 * BATCH * 3 * 224**2)


def steps(whole: Sequence[Operation], fused: Sequence[Operation]) -> dict[str, list[Operation]]:
    """The step as it is by default, with each fusion, and at its floor, by name.

    Args:
        whole: the step by default.
        fused: the step with factored gradients.
    """
    floor = [op for op in fused if op.part in (CONVOLUTIONS, PRODUCTS) or op.name in _AT_THE_FLOOR]
    return {
        "default on a GPU": [*whole, *bias_passes(), batch_copy()],
        "`runtime.factored=true`": [*fused, *bias_passes(), batch_copy()],
        "and `runtime.fused_bias=true`": [*fused, batch_copy()],
        "and `runtime.graph=step`": [*fused],
        "floor": floor,
    }


def reference_step() -> list[Operation]:
    """The operators of benchmarks/reference.py's step, in fp32."""
    return count_step(reference.AlexNet, dtype=torch.float32, batch_size=BATCH)


def least_seconds(operations: Sequence[Operation], card: Card) -> float:
    """Seconds if every operator ran at the card's peak arithmetic or bandwidth, whichever takes it longer."""
    return sum(
        max(operation.flops / card.flops_per_second, operation.bytes / card.bytes_per_second)
        for operation in operations
    )


def _variants(variants: Mapping[str, Sequence[Operation]]) -> str:
    """The steps of :func:`steps` as a Markdown table."""
    heads = ["", "GB", "GB outside convolutions and products"]
    heads += [f"{card.name}, ms" for card in CARDS]
    heads += [f"{card.name}, at {EFFICIENCY:.0%}" for card in CARDS]
    rows = []
    for name, operations in variants.items():
        outside = [op for op in operations if op.part not in (CONVOLUTIONS, PRODUCTS)]
        slower = [
            replace(op, flops=int(op.flops / EFFICIENCY)) if op.part == CONVOLUTIONS else op
            for op in operations
        ]
        times = [least_seconds(chosen, card) for chosen in (operations, slower) for card in CARDS]
        moved = [sum(op.bytes for op in chosen) / 1e9 for chosen in (operations, outside)]
        rows.append([name, *(f"{gb:.2f}" for gb in moved), *(f"{1e3 * time:.2f}" for time in times)])
    return table(heads, rows)


# Products for each output of the first convolution: 11x11 pixels of 3 channels, or what they become
FIRST_CONVOLUTION = {
    "11x11 pixels, 3 channels": 11 * 11 * 3,
    "padded to 4 channels": 11 * 11 * 4,
    "padded to 8 channels": 11 * 11 * 8,
    "blocks of 4x4 pixels as channels (3x3 blocks, stride 1)": 3 * 3 * 48,
    "folded onto images of 32x32, enlarged eight times (4x4 pixels, 4 kernels an axis)": 4 * 4 * 3,
}


def _first_seconds(products: int, card: Card) -> float:
    """Seconds of the first convolution's forward pass and weight gradient."""
    return 2 * 2 * products * BATCH * 96 * 55**2 / card.flops_per_second


def _first_convolution(step: Sequence[Operation]) -> str:
    """The ways to compute the first convolution, as shares of a step too, as a Markdown table."""
    rows = []
    for name, products in FIRST_CONVOLUTION.items():
        times = [_first_seconds(products, card) for card in CARDS]
        shares = [time / least_seconds(step, card) for time, card in zip(times, CARDS, strict=True)]
        numbers = [f"{1e3 * time:.3f} ({share:.1%})" for time, share in zip(times, shares, strict=True)]
        rows.append([name, str(products), *numbers])
    return table(["", "products an output", *(f"{card.name}, ms" for card in CARDS)], rows)


def _fold_saves(step: Sequence[Operation]) -> str:
    whole, *_, folded = FIRST_CONVOLUTION.values()
    saved = [
        (_first_seconds(whole, card) - _first_seconds(folded, card)) / least_seconds(step, card)
        for card in CARDS
    ]
    return " and ".join(f"{share:.1%}" for share in saved)


def _muon(fast: Sequence[Operation]) -> str:
    """What Muon adds to a step, as a paragraph."""
    muon = fast_step(optimizer=Optimizer.muon)
    flops, moved = (
        sum(getattr(op, count) for op in muon) - sum(getattr(op, count) for op in fast)
        for count in ("flops", "bytes")
    )
    ada, hopper = (1e3 * (least_seconds(muon, card) - least_seconds(fast, card)) for card in CARDS)
    more = len(muon) - len(fast)
    return f"""**Muon**, by which the default recipe updates the convolutions, adds to that {flops / 1e9:.1f}
GFLOP and {moved / 1e9:.2f} GB, {ada:.2f} and {hopper:.2f} ms at those rates. These are {more} operators
more, most of them on small matrices, and a GPU starts each by itself unless `runtime.graph=step`
records the step. So they take longer."""


def section() -> str:
    """The section as Markdown."""
    fast, fused, plain = fast_step(), fast_step(factored=True), totals(reference_step())
    heads = ["", "GFLOP", "GB", *(f"{card.name}, ms" for card in CARDS), "GB in the reference, fp32"]
    rows = []
    for part in (*PARTS, "step"):
        chosen = [operation for operation in fast if part in (operation.part, "step")]
        moved = sum(operation.bytes for operation in chosen)
        least = [f"{1e3 * least_seconds(chosen, card):.2f}" for card in CARDS]
        other = plain.get(part, (0, 0))[1] if part != "step" else sum(b for _, b in plain.values())
        flops = sum(operation.flops for operation in chosen)
        rows.append([part, f"{flops / 1e9:.1f}", f"{moved / 1e9:.2f}", *least, f"{other / 1e9:.2f}"])
    rates = "\n".join(
        f"- {card.name}: {BATCH / least_seconds(fast, card):,.0f} images/s "
        f"({card.flops_per_second / 1e12:.0f} TFLOP/s, {card.bytes_per_second / 1e9:,.0f} GB/s)"
        for card in CARDS
    )
    return f"""
**Computed, not measured.** A step of {BATCH} images at 224x224 in bf16, each operator at the card's full rate
of arithmetic or of memory, whichever takes it longer, one after another. It is a step of `recipe=one_cycle`:
without CutMix, and updated by SGD:

{table(heads, rows)}

At those rates:

{rates}

{_muon(fast)}

These counts leave out the passes for the biases of the first two convolutions, and the copy of the batch to
the tensor that the network's CUDA graph reads. With them, and with what fastalex has against such passes,
which is not its default on a GPU, since no card has run it (*at {EFFICIENCY:.0%}*: with convolutions at
{EFFICIENCY:.0%} of the card's rate):

{_variants(steps(fast, fused))}

- `runtime.factored=true`: the gradients of the two hidden layers are never stored; `factored_sgd` multiplies
  them out and applies them in one pass (18 bytes a weight, where cast, clipping and update take 46).
- `runtime.fused_bias=true`: `relu_lrn_max_pool` adds the bias of the convolution before it, and sums its
  gradient.
- `runtime.graph=step`: the resident loader's kernel writes the batch where the step's CUDA graph reads it.
- *floor*: convolutions, products, the pooled kernels, pooling and the updates; everything else within these.

**The first convolution** has three input channels, which tensor cores take in groups: forward and the
weight's gradient at the card's full rate, for each way to compute them, and as a share of the whole step.

{_first_convolution(fused)}

At the arithmetic of the first row, the fold would save {_fold_saves(fused)} of the step, less than the 5%
for which it would be built for a GPU. Whether cuDNN pads the channels to eight, which would change that, a
profile on a card shows (`make card`).

The rates of arithmetic are for dense bf16 with fp32 accumulation (`benchmarks/expected.py` says where they
are from). FLOPs are PyTorch's count, forward and backward. Bytes are every operator's inputs and outputs
once, before torch.compile fuses any of them, which takes off some of "other" and of "ReLU, LRN, pooling".
No card runs convolutions at its full rate, and a desktop card may not hold its boost clock: expect less.
This measures it on a machine with a card, and writes `benchmarks/results/step_cuda.csv`:

```sh
make bench-step ARGS="--data-root DATA"     # DATA: the folder of CIFAR-10; without, generated images
```
"""


def main(arguments: list[str] | None = None) -> None:
    """Compute how fast GPUs could train at their full rates, and write it to docs/gpu.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expected", description=main.__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="the file to rewrite a section of")
    page = parser.parse_args(arguments).page
    try:
        text = section()
        write_text(page, replace_between(page.read_text(), BEGIN, END, text))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {page}: {error}\n")
    print(text)


if __name__ == "__main__":
    main()
