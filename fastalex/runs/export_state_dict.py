"""A network's state dict, and the file beside it that defines the network in plain PyTorch."""

from __future__ import annotations

import pprint
import runpy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastalex.config import ModelConfig
from fastalex.config.plain import model_options
from fastalex.models.plain import definition

_WRITTEN = (
    '"""A trained network in plain PyTorch, written by fastalex.export'  # the first line of a definition
)


def write_state_dict(network: nn.Module, metadata: dict[str, str], file: Path) -> None:
    """Write a network's weights.

    Args:
        network: the network.
        metadata: what a .safetensors is to say; a .pt has no place for it.
        file: where to; its ending is .safetensors or .pt.
    """
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if file.suffix == ".safetensors":
        save_file(weights, file, metadata=metadata)
    else:
        torch.save(weights, file)


def write_definition(config: ModelConfig, facts: dict[str, Any], file: Path, ending: str) -> None:
    """Write Python code that defines a network in plain PyTorch, its classes and its preprocessing.

    Args:
        config: the network.
        facts: ``classes``, ``preprocessing`` and ``fastalex``, the version.
        file: where to.
        ending: of the file of the weights.

    Raises:
        ConfigError: the network has no plain definition.
    """
    function = "safetensors.torch.load_file" if ending == ".safetensors" else "torch.load"
    source = definition(config.name, len(facts["classes"]), **model_options(config))
    imports, _, rest = source.partition("\n\n\n")
    constants = "\n".join(
        f"{key.upper()} = {pprint.pformat(facts[key], width=100, compact=True, sort_dicts=False)}"
        for key in ("classes", "preprocessing")
    )
    file.write_text(
        f"""{_WRITTEN} {facts["fastalex"]}.

    model = network()
    model.load_state_dict({function}("NAME{ending}"))
    model.eval()

Its input: images, float32 (N, 3, crop, crop), prepared as PREPROCESSING says: an RGB image is resized to
resize x resize pixels, bilinear with antialiasing (where fit is shorter_side: its shorter side is resized to
resize pixels, and the centre cut out), the crop x crop pixels in its middle are cut out, and each channel
becomes (pixel / 255 - mean) / std. Its output: a logit for each of CLASSES, (N, len(CLASSES)).
\"\"\"

{imports}

{constants}


{rest}""",
        encoding="utf-8",
    )


def read_state_dict(file: Path, code: Path) -> nn.Module:
    """Return the network that ``code`` defines, with the weights of ``file``, in its mode of evaluation."""
    network: nn.Module = runpy.run_path(str(code))["network"]()
    network.load_state_dict(
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    )
    return network.eval()


def definition_path(output: Path) -> Path:
    """Return the file of the definition that belongs to a file of weights."""
    return output.with_suffix(".py")


def is_definition(path: Path) -> bool:
    """Whether a file is one that an export wrote."""
    try:
        with path.open("rb") as file:
            return file.read(len(_WRITTEN)) == _WRITTEN.encode()
    except OSError:
        return False
