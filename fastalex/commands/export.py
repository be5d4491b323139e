"""``python -m fastalex.export weights=RUN output=FILE``: a trained network for programs without fastalex."""

from __future__ import annotations

from pathlib import Path

from fastalex.config import ExportConfig
from fastalex.runs.export import BATCHES, check_output, export_network
from fastalex.runs.signals import StopSignals
from fastalex.runs.weights import open_weights


def run(config: ExportConfig) -> list[Path]:
    """Write a trained network as a file, and print how its logits compare with the network's.

    Args:
        config: the weights, the format and the file.

    Returns:
        The files that were written.

    Raises:
        FastalexError: if the weights cannot be used, or the file cannot be written.
    """
    output = Path(config.output).expanduser()
    check_output(config.format, output)
    trained = open_weights(config.weights)
    print(f"weights of {trained.source}")
    with StopSignals():
        paths, difference = export_network(trained, config.format, output)
    batches = ", ".join(map(str, BATCHES[:-1]))
    print(
        f"largest difference of a logit in batches of {batches} and {BATCHES[-1]} images: "
        f"{difference:.1e} of the largest\n{' and '.join(map(str, paths))}"
    )
    return paths
