"""A network's graph, for any number of images: as a program of ``torch.export``, and as ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastalex.errors import ConfigError

OPSET = 18


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


def program_of(network: nn.Module, name: str, crop: int, *, for_onnx: bool) -> ExportedProgram:
    """Return a network's graph for any number of images, without the names of this machine's files.

    Args:
        network: in plain PyTorch, fp32, on the CPU, in its mode of evaluation; for ONNX it is changed.
        name: of the network, for the message.
        crop: side of the images, in pixels.
        for_onnx: whether local response normalisation is to be ONNX's operator. PyTorch then cannot compute
            the graph.

    Raises:
        ConfigError: the network has an operator of fastalex's.
    """
    if for_onnx:
        for layer in network.modules():
            if type(layer) is nn.LocalResponseNorm and layer.size % 2:
                layer.__class__ = _OnnxLRN
    images = torch.zeros(2, 3, crop, crop)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
        if str(node.target).startswith("fastalex"):
            raise ConfigError(
                f"model.name={name}: cannot be exported, since it uses {node.target}, which only fastalex has"
            )
    return program


def write_onnx(program: ExportedProgram, name: str, metadata: dict[str, str], file: Path) -> None:
    """Write a program, which :func:`program_of` made for it, as ONNX with an input and an output.

    Args:
        program: the graph.
        name: of the graph in the file.
        metadata: what else the file is to say.
        file: where to.
    """
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
    graph.name = name
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)


def read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    """Return what ONNX Runtime computes with a file of :func:`write_onnx`, from images to logits."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
