"""Trained networks as files for other programs: ONNX, torch.export or a state dict of plain PyTorch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalex.config import ExportFormat
from fastalex.config.plain import model_options, plain
from fastalex.errors import ConfigError, MissingDependencyError, OutputError
from fastalex.files import replacing
from fastalex.models import load_weights
from fastalex.models.plain import plain_network
from fastalex.runs.export_graph import program_of, read_onnx, write_onnx
from fastalex.runs.export_state_dict import (
    definition_path,
    is_definition,
    read_state_dict,
    write_definition,
    write_state_dict,
)
from fastalex.runs.weights import TrainedNetwork

ENDINGS = {
    ExportFormat.onnx: (".onnx",),
    ExportFormat.pt2: (".pt2",),
    ExportFormat.state_dict: (".pt", ".safetensors"),
}
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
BATCHES = (1, 2, 5)  # sizes of the batches of the check
TOLERANCE = 1e-5  # of the largest logit, or of 1 if that is smaller
EXTRA_FILE = "fastalex.json"  # in a .pt2
_RUN_FILES = re.compile(r"(model|best)\.safetensors|checkpoint(-\d+)?\.pt")
_PREPARED = ("resize", "fit", "crop", "mean", "std")  # keys of the data

Logits = Callable[[Tensor], Tensor]  # images, fp32 (N, 3, crop, crop), to logits, fp32 (N, classes)


def check_output(format: ExportFormat, output: Path) -> None:
    """Refuse what can be known to fail before the weights are read.

    Args:
        format: what is to be written.
        output: the file.

    Raises:
        ConfigError: the name has another ending than the format's.
        OutputError: there is no such folder, or the definition of a state dict would replace a file of the
            user's.
        MissingDependencyError: ONNX without its packages.
    """
    endings = ENDINGS[format]
    if output.suffix not in endings:
        raise ConfigError(
            f"output={output}: format={format.value} needs a name that ends with {_or(endings)}"
        )
    if not output.parent.is_dir():
        raise OutputError(f"output={output}: there is no folder {output.parent}; make it first")
    if output.is_dir():
        raise OutputError(f"output={output}: is a folder; name a file")
    if format is ExportFormat.state_dict:
        beside = definition_path(output)
        if beside.exists() and not is_definition(beside):
            raise OutputError(
                f"output={output}: {beside} would be replaced, which fastalex.export did not write; choose "
                "another name"
            )
    if format is ExportFormat.onnx:
        missing = [name for name in PACKAGES if not _is_installed(name)]
        if missing:
            raise MissingDependencyError(
                f"format=onnx needs {', '.join(missing)}: pip install {' '.join(missing)}, or choose pt2 or "
                "state_dict"
            )


def export_network(trained: TrainedNetwork, format: ExportFormat, output: Path) -> tuple[list[Path], float]:
    """Write a trained network as a file, once its logits are those of the network.

    The file is read again and computed with on the CPU, in fp32, on batches of several sizes.

    Args:
        trained: the network.
        format: what is written.
        output: the file. Beside a state dict, a file with the ending .py defines the network.

    Returns:
        The files, and the largest difference of a logit, as a share of the largest logit (or of 1).

    Raises:
        CheckpointError: the weights belong to another network than their file says.
        ConfigError: the format cannot express the network.
        OutputError: the file is one of a run's, or cannot be written, or its logits differ. Files that were
            there are unchanged.
    """
    folder = output.resolve().parent
    is_run = folder == trained.source.resolve().parent or (folder / "config.yaml").exists()
    if is_run and _RUN_FILES.fullmatch(output.name):
        raise OutputError(f"output={output}: is a file of a run; choose another name")
    network = trained.model().eval()
    config = trained.config.model
    exported = plain_network(config.name, len(trained.classes), **model_options(config)).eval()
    load_weights(exported, trained.weights)
    facts = _facts(trained)
    paths = [output]
    logits: Logits
    with ExitStack() as files, torch.no_grad():
        file = files.enter_context(replacing(output))
        if format is ExportFormat.state_dict:
            paths.append(definition_path(output))
            code = files.enter_context(replacing(paths[1]))
            write_state_dict(exported, _texts(facts), file)
            write_definition(config, facts, code, output.suffix)
            logits = read_state_dict(file, code)
        else:
            for_onnx = format is ExportFormat.onnx
            program = program_of(exported, config.name, trained.config.data.crop, for_onnx=for_onnx)
            if for_onnx:
                write_onnx(program, config.name, _texts(facts), file)
                logits = read_onnx(file)
            else:
                torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(facts)})
                logits = torch.export.load(file).module()
        difference = _difference(network, logits, trained)
        if not difference <= TOLERANCE:  # nor is NaN
            raise OutputError(
                f"output={output}: its logits differ from the network's by {difference:.1e} of the largest; "
                "not written"
            )
    return paths, difference


def _facts(trained: TrainedNetwork) -> dict[str, Any]:
    """Return what a program needs to know beside the network."""
    data = plain(trained.config)["data"]
    return {
        "classes": trained.classes,
        "preprocessing": {key: data[key] for key in _PREPARED},
        "network": trained.config.model.name,
        "fastalex": version("fastalex"),
    }


def _texts(facts: dict[str, Any]) -> dict[str, str]:
    """Return facts as the text that a file's metadata takes: JSON, but a text as it is."""
    return {key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()}


def _difference(network: nn.Module, logits: Logits, trained: TrainedNetwork) -> float:
    """Return the largest difference of two networks' logits on random images, relative to the largest."""
    data = trained.config.data
    mean, std = torch.tensor([data.mean, data.std])[..., None, None]
    generator = torch.Generator().manual_seed(0)
    differences = []
    for images in BATCHES:
        pixels = torch.rand(images, 3, data.crop, data.crop, generator=generator)
        batch = (pixels - mean) / std
        expected = network(batch)
        difference = (logits(batch) - expected).abs().max()
        differences.append(difference / expected.abs().max().clamp(min=1))
    return torch.stack(differences).max().item()


def _is_installed(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(names)
