"""What data parallelism and the hybrid send, computed for 2 to 1,024 devices.

``python -m benchmarks.scaling`` writes ``docs/scaling.md``. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fastalex.models import count_parameters
from fastalex.models.alexnet import AlexNet

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
DEVICES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCH = 128  # on each device
GRADIENT, ACTIVATION = 4, 2  # bytes: fp32, and bf16 under autocast
LINKS = {"PCIe 4.0 x16": 32e9, "NVLink 4": 450e9, "100 Gb Ethernet": 12.5e9}  # bytes/s in one direction


def ddp_bytes(devices: int, parameters: int) -> float:
    """Bytes that a device sends a step: a ring's all-reduce of the gradients.

    Each gradient is sent (n - 1)/n times to be added up, and as often to be told.
    """
    return 2 * (devices - 1) / devices * parameters * GRADIENT


def hybrid_bytes(devices: int, shared: int, inputs: int, outputs: int, batch: int = BATCH) -> float:
    """Bytes that a device sends a step, where the hidden layers are divided.

    Args:
        devices: n.
        shared: parameters that every device has, whose gradients are all-reduced.
        inputs: activations an image that the first hidden layer reads: gathered by all in the forward pass,
            and their gradients reduced and scattered in the backward pass.
        outputs: activations an image that the second writes: the same in the other order.
        batch: images on each device.
    """
    activations = 2 * (devices - 1) * batch * (inputs + outputs) * ACTIVATION
    return ddp_bytes(devices, shared) + activations


def page() -> str:
    """Return the text of docs/scaling.md."""
    with torch.device("meta"):
        model = AlexNet()
    parameters = count_parameters(model)
    hidden = sum([count_parameters(model.fc6), count_parameters(model.fc7)])
    sizes = model.fc6.in_features, model.fc7.out_features
    rows = []
    for n in DEVICES:
        sent = ddp_bytes(n, parameters), hybrid_bytes(n, parameters - hidden, *sizes)
        times = [f"{1e3 * sent[0] / rate:.1f} / {1e3 * sent[1] / rate:.1f}" for rate in LINKS.values()]
        rows.append([f"{n:,}", f"{sent[0] / 1e6:,.1f}", f"{sent[1] / 1e6:,.1f}", *times])
    crossing = _crossing(parameters, parameters - hidden, sizes)
    heads = ["devices", "ddp, MB", "hybrid, MB", *(f"{name}, ms" for name in LINKS)]
    return f"""# Several devices

Written by `python -m benchmarks.scaling`. **Every figure on this page is computed; none was measured.**

`distributed.strategy=ddp` averages the gradients of all {parameters:,} parameters after each step; `hybrid`
keeps a part of the two hidden layers, which have {hidden:,} of them ({hidden / parameters:.0%}), in each
process and sends activations in place of their gradients (`fastalex/parallel.py`). What a device sends a
step, with {BATCH} images on each: gradients in fp32, activations in bf16, rings for all collectives, so that
an all-reduce of S bytes sends 2 (n-1)/n S, and to gather or to scatter what n devices have S bytes each of
sends (n-1) S. The times are those of the bytes over a link's nominal rate in one direction
({", ".join(f"{name} {rate / 1e9:g} GB/s" for name, rate in LINKS.items())}), ddp / hybrid, nothing
overlapped.

{_table(heads, rows)}

The hybrid sends less up to about {crossing} devices, and more beyond:
gradients weigh the same however many devices there are, but each device must see the activations of all
images. `distributed.compression=bf16` halves ddp's column.
"""


def _crossing(parameters: int, shared: int, sizes: tuple[int, int]) -> int:
    """The greatest number of devices at which the hybrid sends no more."""
    n = 2
    while hybrid_bytes(n + 1, shared, *sizes) <= ddp_bytes(n + 1, parameters):
        n += 1
    return n


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---:"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page())
