"""Bytes that ``ddp`` and ``hybrid`` send: computed for 2 to 1,024 devices, and measured for two processes.

``python -m benchmarks.scaling`` writes ``docs/scaling.md``; ``test_ranks.py`` measures.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.report import RESULTS, read_measurements
from benchmarks.sections import column, figures, machine_line, number, ratio, render
from fastalex.files import write_text
from fastalex.markdown import table
from fastalex.models import count_parameters
from fastalex.models.alexnet import AlexNet

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MEASURED = RESULTS / "ranks_cpu.csv"
DEVICES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BATCH = 128  # on each device
GRADIENT, ACTIVATION = 4, 2  # bytes per value: fp32, and bf16 under autocast
LINKS = {"PCIe 4.0 x16": 32e9, "NVLink 4": 450e9, "100 Gb Ethernet": 12.5e9}  # bytes/s in one direction


def ddp_bytes(devices: int, parameters: int) -> float:
    """Bytes that a device sends per step: a ring all-reduce of the gradients.

    Of n devices each sends (n - 1)/n of all gradients to sum them, and as much to distribute the sums.
    """
    return 2 * (devices - 1) / devices * parameters * GRADIENT


def hybrid_bytes(devices: int, shared: int, inputs: int, outputs: int, batch: int = BATCH) -> float:
    """Bytes that a device sends per step when the hidden layers are divided among the devices.

    Args:
        devices: their number.
        shared: parameters that every device has, whose gradients are all-reduced.
        inputs: activations per image that the first hidden layer reads: all-gathered in the forward pass,
            their gradients reduce-scattered in the backward pass.
        outputs: activations per image that the second hidden layer writes: the reverse of `inputs`.
        batch: images on each device.
    """
    activations = 2 * (devices - 1) * batch * (inputs + outputs) * ACTIVATION
    return ddp_bytes(devices, shared) + activations


@dataclass(frozen=True)
class Sizes:
    """Numbers of AlexNet.

    Attributes:
        parameters: of all layers.
        hidden: parameters of the two hidden layers.
        inputs: activations per image that the first hidden layer reads.
        outputs: activations per image that the second hidden layer writes.
        kernels: weights of the convolutions.
    """

    parameters: int
    hidden: int
    inputs: int
    outputs: int
    kernels: int


@cache
def alexnet() -> Sizes:
    """AlexNet's sizes, counted without materializing it."""
    with torch.device("meta"):
        model = AlexNet()
    hidden = count_parameters(model.fc6) + count_parameters(model.fc7)
    kernels = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
    return Sizes(count_parameters(model), hidden, model.fc6.in_features, model.fc7.out_features, kernels)


def network_bytes(devices: int, batch: int = BATCH) -> tuple[float, float]:
    """Bytes that a device sends per step of AlexNet: with ``ddp``, with ``hybrid``."""
    sizes = alexnet()
    shared = sizes.parameters - sizes.hidden
    return ddp_bytes(devices, sizes.parameters), hybrid_bytes(
        devices, shared, sizes.inputs, sizes.outputs, batch
    )


def page() -> str:
    """Return the text of docs/scaling.md."""
    sizes = alexnet()
    parameters, hidden = sizes.parameters, sizes.hidden
    rows = []
    for n in DEVICES:
        sent = network_bytes(n)
        times = [f"{1e3 * sent[0] / rate:.1f} / {1e3 * sent[1] / rate:.1f}" for rate in LINKS.values()]
        rows.append([f"{n:,}", f"{sent[0] / 1e6:,.1f}", f"{sent[1] / 1e6:,.1f}", *times])
    heads = ["devices", "ddp, MB", "hybrid, MB", *(f"{name}, ms" for name in LINKS)]
    return f"""# Several devices

Written by `python -m benchmarks.scaling`.

## Bytes and times, computed

**Every figure in this table is computed; none was measured.**

`distributed.strategy=ddp` averages the gradients of all {parameters:,} parameters after each step; `hybrid`
keeps a part of the two hidden layers, which have {hidden:,} of them ({hidden / parameters:.0%}), in each
process and sends activations in place of their gradients (`fastalex/distributed/strategies.py`). What a
device sends a step, with {BATCH} images on each: gradients in fp32, activations in bf16, rings for all
collectives, so that an all-reduce of S bytes sends 2 (n-1)/n S, and to gather or to scatter what n devices
have S bytes each of sends (n-1) S. The times are those of the bytes over a link's nominal rate in one
direction ({", ".join(f"{name} {rate / 1e9:g} GB/s" for name, rate in LINKS.items())}), ddp / hybrid, nothing
overlapped.

{table(heads, rows, numbers_right=True)}

The hybrid sends less up to about {_crossing()} devices, and more beyond:
gradients weigh the same however many devices there are, but each device must see the activations of all
images. `distributed.compression=bf16` halves ddp's column.

The table is of an update by SGD. Muon, the default, shares out the convolutions, and their steps are sent as
well: {sizes.kernels:,} weights in fp32, {4 * sizes.kernels / 1e6:.1f} MB, each computed by one device and
received by the others.
{_measured()}"""


def _crossing() -> int:
    """The largest number of devices at which the hybrid sends no more than ddp."""
    n = 2
    while operator.ge(*network_bytes(n + 1)):
        n += 1
    return n


def _measured() -> str:
    """The section on two processes; empty if there is no results file."""
    if not MEASURED.exists():
        return ""
    measurements = read_measurements(MEASURED.read_text())
    training = [m for m in measurements if m["measurement"] == "training"]
    sent = {m["program"]: m for m in measurements if m not in training}
    rows = []
    for m in training:
        bytes_sent = sent.get(m["program"])
        mb = {"sent": bytes_sent.median, "computed": bytes_sent["computed"]} if bytes_sent else {}
        rows.append({**m.record, "sent": None, "computed": None, **mb})
    columns = [
        column("", "program"),
        column("processes", "processes"),
        *figures("images/s", "20th to 80th percentile"),
        column("times one process", "times_one_process", ratio),
        column("sent a step and process, MB", "sent", number),
        column("computed, MB", "computed", number),
    ]
    about = training[0]
    return f"""
## Two processes on the cores of one, measured

```sh
make bench-ranks
```

AlexNet at 224x224, {about["batch"]} images a step over all processes, {about["rounds"]} interleaved turns;
one process has as many threads as two together. Times one process is the median of the ratios within the
turns. The bytes are what the machine sent to itself during the steps (Linux's count for its loopback, headers
included), divided by steps and processes; beside them what the formulas above give for as many images in
each.

{render(columns, rows)}

{machine_line(training)}
"""


def write() -> None:
    """Write the page."""
    write_text(PAGE, page())


if __name__ == "__main__":
    write()
