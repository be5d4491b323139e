"""The machine and its measured limits: ``python -m benchmarks.card.facts FOLDER ROOT [--toy]``.

Writes ``facts.json``.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import torch

from benchmarks.card.place import given_place
from benchmarks.hardware import DEVICE, Hardware
from benchmarks.report import machine
from fastalex.files import write_text

# Fields of `nvidia-smi --query-gpu`.
QUERIES = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def card() -> dict[str, Any]:
    """The GPU's properties by PyTorch and by the driver."""
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(QUERIES, (field.strip() for field in answer.split(",")), strict=True)),
    }


def main() -> None:
    given = given_place("facts")
    facts: dict[str, Any] = machine(DEVICE)
    if DEVICE == "cuda":
        facts |= card()
    if not given.toy:
        hardware = Hardware()
        facts["copy_bytes_per_second"] = hardware.copy_bytes_per_second()
        facts["matmul_flops_per_second"] = hardware.matmul_flops_per_second()
    write_text(given.folder / "facts.json", json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
