"""Trained networks as files for other programs: ONNX, torch.export or a state dict of plain PyTorch."""

from __future__ import annotations

import json
import pprint
import re
import runpy
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastalex.config import ExportFormat
from fastalex.config.plain import model_options, plain
from fastalex.errors import ConfigError, MissingDependencyError, OutputError
from fastalex.files import replacing
from fastalex.models import load_weights
from fastalex.models.plain import definition, plain_network
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
OPSET = 18
_WRITTEN = (
    '"""A trained network in plain PyTorch, written by fastalex.export'  # the first line of a definition
)
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
        beside = _definition_path(output)
        if beside.exists() and not _is_definition(beside):
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
        OutputError: the file is one of the run's, or cannot be written, or its logits differ. Files that were
            there are unchanged.
    """
    if _RUN_FILES.fullmatch(output.name) and output.resolve().parent == trained.source.resolve().parent:
        raise OutputError(f"output={output}: is a file of the run; choose another name")
    network = trained.model().eval()
    config = trained.config.model
    exported = plain_network(config.name, len(trained.classes), **model_options(config)).eval()
    load_weights(exported, trained.weights)
    facts = _facts(trained)
    paths = [output]
    with ExitStack() as files, torch.no_grad():
        file = files.enter_context(replacing(output))
        if format is ExportFormat.state_dict:
            paths.append(_definition_path(output))
            code = files.enter_context(replacing(paths[1]))
            _write_state_dict(exported, trained, facts, file, code)
            logits = _read_state_dict(file, code)
        else:
            program = _program(exported, trained, format)
            if format is ExportFormat.onnx:
                _write_onnx(program, facts, file)
                logits = _read_onnx(file)
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


# --- torch.export and ONNX --------------------------------------------------------------------------------


class _OnnxLRN(nn.LocalResponseNorm):
    """The layer as ONNX's operator of the same definition, where PyTorch has several operators.

    The operator takes the window of an even size one channel further up than PyTorch does, so this is for odd
    sizes.
    """

    def forward(self, input: Tensor) -> Tensor:
        attributes: dict[str, Any] = {
            "size": self.size,
            "alpha": self.alpha,
            "beta": self.beta,
            "bias": self.k,
        }
        attributes |= {name: float(attributes[name]) for name in ("alpha", "beta", "bias")}
        return torch.onnx.ops.symbolic(
            "LRN", (input,), attributes, dtype=input.dtype, shape=input.shape, version=OPSET
        )


def _program(
    network: nn.Module, trained: TrainedNetwork, format: ExportFormat
) -> torch.export.ExportedProgram:
    """Return the network's graph for any number of images, without the names of this machine's files."""
    if format is ExportFormat.onnx:
        for layer in network.modules():
            if type(layer) is nn.LocalResponseNorm and layer.size % 2:
                layer.__class__ = _OnnxLRN
    crop = trained.config.data.crop
    images = torch.zeros(2, 3, crop, crop)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        if str(node.target).startswith("fastalex"):
            raise ConfigError(
                f"format={format.value}: model.name={trained.config.model.name} uses {node.target}, which "
                "only fastalex has"
            )
    return program


def _write_onnx(program: torch.export.ExportedProgram, facts: dict[str, Any], file: Path) -> None:
    import onnx

    images = program.example_inputs[0] if program.example_inputs else ()
    made = torch.onnx.export(
        program,
        images,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        verbose=False,
    )
    assert made is not None
    model = made.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")  # the exporter's notes: its own names, and files of this machine
    del graph.value_info[:]
    graph.name = facts["network"]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.helper.set_model_props(model, _texts(facts))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def _read_onnx(file: Path) -> Logits:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _is_installed(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


# --- a state dict -----------------------------------------------------------------------------------------


def _write_state_dict(
    network: nn.Module, trained: TrainedNetwork, facts: dict[str, Any], file: Path, code: Path
) -> None:
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if file.suffix == ".safetensors":
        save_file(weights, file, metadata=_texts(facts))
        load = 'safetensors.torch.load_file("NAME.safetensors")'
    else:
        torch.save(weights, file)
        load = 'torch.load("NAME.pt")'
    config = trained.config.model
    source = definition(config.name, len(trained.classes), **model_options(config))
    imports, _, rest = source.partition("\n\n\n")
    constants = "\n".join(
        f"{key.upper()} = {pprint.pformat(facts[key], width=100, compact=True, sort_dicts=False)}"
        for key in ("classes", "preprocessing")
    )
    code.write_text(
        f"""{_WRITTEN} {facts["fastalex"]}.

    model = network()
    model.load_state_dict({load})
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


def _read_state_dict(file: Path, code: Path) -> Logits:
    network: nn.Module = runpy.run_path(str(code))["network"]()
    network.load_state_dict(
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    )
    return network.eval()


def _definition_path(output: Path) -> Path:
    return output.with_suffix(".py")


def _is_definition(path: Path) -> bool:
    """Whether a file is one that an export wrote."""
    try:
        with path.open("rb") as file:
            return file.read(len(_WRITTEN)) == _WRITTEN.encode()
    except OSError:
        return False


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(names)
