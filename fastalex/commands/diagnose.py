"""``python -m fastalex.diagnose model=alexnet_paper_init``: what an initialisation does to the signal.

A network learns from how its outputs depend on its inputs. This command sends one batch of training images
through a freshly initialised network and back, and measures at each layer how large the activations and the
gradients are, how many units are dead, and how much of what arrives there still depends on the image; then
the same for PyTorch's default initialisation, to compare.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from fastalex import plots
from fastalex.config import AlexNetConfig, Config, Init, ModelConfig
from fastalex.config.checks import validate
from fastalex.config.plain import model_options
from fastalex.data import Views, build_loader, load_splits, resolve_loader
from fastalex.errors import ConfigError
from fastalex.files import write_text
from fastalex.models import check_batch, check_crop, create_model
from fastalex.runtime import Runtime, choose_runtime
from fastalex.training.memory import room_for_images

# Random regularisers: off, for they would add differences between images that the images do not have.
REGULARISERS = (nn.modules.dropout._DropoutNd, StochasticDepth)


@dataclass(frozen=True)
class Layer:
    """What arrives at a layer with weights, and what its weights are told.

    Attributes:
        name: of the layer; ``"logits"`` for what leaves the last.
        activation_rms: root mean square of the layer's input.
        gradient_rms: root mean square of the gradient of an image's own loss with respect to that input.
        weight_gradient_rms: root mean square of the gradient of the batch's mean loss with respect to the
            layer's weights; None for the logits.
        dead_units: share of the input's units that are zero for the whole batch: channels of a convolution's
            input, at every position, and single features of a linear layer's.
        image_dependence: standard deviation over the images, relative to the root mean square, of the input:
            ``sqrt(sum_u Var_n(a_nu) / sum_u Mean_n(a_nu^2))`` over images n and elements u. 0 where every
            image gives the same, 1 where the mean over the images is zero everywhere.
    """

    name: str
    activation_rms: float
    gradient_rms: float
    weight_gradient_rms: float | None
    dead_units: float
    image_dependence: float


@dataclass(frozen=True)
class Diagnosis:
    """One initialisation on one batch.

    Attributes:
        loss: mean cross-entropy of the batch, in nats.
        layers: in the order in which they compute; the last are the logits.
    """

    loss: float
    layers: list[Layer]

    @property
    def logits(self) -> Layer:
        return self.layers[-1]

    @property
    def steepest(self) -> Layer:
        """The layer that takes away the largest part of what is left of the dependence on the image."""
        pairs = zip(self.layers, self.layers[1:], strict=False)
        before, _ = min(pairs, key=lambda pair: pair[1].image_dependence / (pair[0].image_dependence or 1.0))
        return before


def diagnose(model: nn.Module, images: Tensor, labels: Tensor, runtime: Runtime) -> Diagnosis:
    """Measure a network on a batch.

    Batch normalisation uses the batch, as in training; dropout and stochastic depth are off.

    Args:
        model: on the runtime's device; gradients of its parameters are left cleared.
        images: ``(N, 3, H, W)``, normalised.
        labels: ``(N,)``, int64.
        runtime: the arithmetic.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, REGULARISERS):
            module.eval()
    weighted = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Tensor]) -> None:
        arguments[0].retain_grad()
        inputs[name] = arguments[0]

    hooks = [m.register_forward_pre_hook(partial(keep, name)) for name, m in weighted.items()]
    try:
        with runtime.autocast():
            logits = model(images.detach().clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    logits.retain_grad()
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    loss.backward()
    layers = [_measure(name, activation, weighted[name].weight.grad) for name, activation in inputs.items()]
    layers.append(_measure("logits", logits, None))
    model.zero_grad()
    return Diagnosis(loss.item(), layers)


def _measure(name: str, activation: Tensor, weight_gradient: Tensor | None) -> Layer:
    assert activation.grad is not None
    values = activation.detach()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    # A convolution's unit is a channel, (N, C, H, W); a linear layer's is a feature, (N, F) or (N, T, F).
    unit = 1 if values.dim() == 4 else values.dim() - 1
    alive = values.ne(0).movedim(unit, 0).flatten(1).any(dim=1)
    magnitude = _rms(values)
    deviation = values.var(dim=0, correction=0).double().mean().sqrt().item()
    return Layer(
        name=name,
        activation_rms=magnitude,
        gradient_rms=_rms(activation.grad) * len(values),
        weight_gradient_rms=None if weight_gradient is None else _rms(weight_gradient),
        dead_units=1 - alive.double().mean().item(),
        image_dependence=deviation / magnitude if magnitude else 0.0,
    )


def _rms(values: Tensor) -> float:
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return (torch.linalg.vector_norm(wide).double() / values.numel() ** 0.5).item()


def conclude(diagnoses: dict[str, Diagnosis]) -> str:
    """Say in one line how far each initialisation's logits depend on the image."""
    parts = []
    for name, diagnosis in diagnoses.items():
        logits = diagnosis.logits
        parts.append(
            f"{name}: over the images the logits vary by {logits.image_dependence:.2g} of their magnitude "
            f"({logits.image_dependence * logits.activation_rms:.2g} of {logits.activation_rms:.2g}), "
            f"and {diagnosis.steepest.name} takes the largest part of that"
        )
    return "; ".join(parts)


def table(diagnoses: dict[str, Diagnosis]) -> str:
    """Return the figures as the text that the command prints."""
    lines = []
    width = max(len(layer.name) for diagnosis in diagnoses.values() for layer in diagnosis.layers)
    for name, diagnosis in diagnoses.items():
        lines += [
            "",
            f"{name} initialisation, loss {diagnosis.loss:.4f}",
            f"{'input of':<{width}}  {'rms':>9}  {'gradient':>9}  {'weights gradient':>16}  {'dead':>6}  "
            f"{'depends on image':>16}",
        ]
        for layer in diagnosis.layers:
            weights = "" if layer.weight_gradient_rms is None else f"{layer.weight_gradient_rms:.2e}"
            columns = (
                f"{layer.name:<{width}}",
                f"{layer.activation_rms:9.2e}",
                f"{layer.gradient_rms:9.2e}",
                f"{weights:>16}",
                f"{layer.dead_units:6.1%}",
                f"{layer.image_dependence:16.2e}",
            )
            lines.append("  ".join(columns))
    return "\n".join(lines[1:])


def initialisations(model: ModelConfig) -> dict[str, ModelConfig]:
    """Return the network's own initialisation by name and the default beside it, where the two differ."""
    if not isinstance(model, AlexNetConfig) or model.init is Init.default:
        return {"default": model}
    return {model.init.value: model, "default": replace(model, init=Init.default)}


def run(config: Config, folder: Path) -> dict[str, Diagnosis]:
    """Diagnose a network's initialisation and the default one on the same batch of training images.

    Writes ``diagnose.json`` and ``diagnose.png`` to the folder.

    Raises:
        FastalexError: for input that has to be corrected, before anything is written.
    """
    for key, value in (("init_from", config.init_from), ("resume", config.resume)):
        if value:
            raise ConfigError(f"{key}={value}: is for training; a diagnosis is of a network's first weights")
    validate(config)
    check_crop(config.model.name, "data.crop", config.data.crop)
    check_batch(config.model.name, config.train.batch_size, config.data.crop)
    runtime = choose_runtime(config.runtime)
    splits = load_splits(config.data, config.seed)

    def network(model_config: ModelConfig) -> nn.Module:
        torch.manual_seed(config.seed)
        return create_model(model_config.name, len(splits.classes), **model_options(model_config))

    with torch.device("meta"):
        room = room_for_images(network(config.model), config, runtime)
    loader = build_loader(
        splits.train,
        config.data,
        resolve_loader(config.loader, splits, room),
        views=Views.random,
        batch_size=config.train.batch_size,
        seed=config.seed,
        runtime=runtime,
    )
    images, labels = next(iter(loader))
    assert isinstance(images, torch.Tensor)
    print(f"{runtime}\n{config.model.name}, a batch of {len(labels)} training images of {splits.source}\n")
    diagnoses = {}
    for name, model_config in initialisations(config.model).items():
        diagnoses[name] = diagnose(runtime.place(network(model_config)), images, labels, runtime)
    conclusion = conclude(diagnoses)
    content = {
        "model": config.model.name,
        "data": splits.source,
        "crop": config.data.crop,
        "batch_size": len(labels),
        "seed": config.seed,
        "runtime": str(runtime),
        "initialisations": {name: asdict(diagnosis) for name, diagnosis in diagnoses.items()},
        "conclusion": conclusion,
    }
    write_text(folder / "diagnose.json", json.dumps(content, indent=2) + "\n")
    _draw({name: d.layers for name, d in diagnoses.items()}, folder / "diagnose.png")
    print(f"{table(diagnoses)}\n\n{conclusion}\ndiagnose.json and diagnose.png are in {folder}")
    return diagnoses


def _draw(layers: Mapping[str, Sequence[Layer]], path: Path) -> None:
    """Draw what each initialisation does from layer to layer: a panel for each quantity."""
    figure = Figure(figsize=(16, 6.4), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    names = [layer.name for layer in next(iter(layers.values()))]
    quantities = (
        ("activation_rms", "Input of the layer (rms)", "log"),
        ("gradient_rms", "Gradient with respect to that input (rms, an image)", "log"),
        ("weight_gradient_rms", "Gradient with respect to the weights (rms, the batch)", "log"),
        ("dead_units", "Dead units of the input", "linear"),
        ("image_dependence", "Dependence on the image (deviation over images / rms)", "log"),
    )
    for panel, (quantity, title, scale) in zip(panels, quantities, strict=False):
        for (name, line), marker in zip(layers.items(), "osd^", strict=False):
            # Zero has no place on a logarithmic axis, and the logits no weights: gaps in the line.
            values = [getattr(layer, quantity) or (0.0 if scale == "linear" else np.nan) for layer in line]
            panel.plot(names, values, marker=marker, label=name)
        panel.set(title=title, yscale=scale)
        if scale == "linear":
            panel.set_ylim(-0.03, 1.03)
            panel.yaxis.set_major_formatter(PercentFormatter(1))
        panel.grid(alpha=0.3)
        panel.tick_params(
            axis="x", rotation=45 if len(names) <= 12 else 90, labelsize=None if len(names) <= 12 else 5
        )
    panels[0].legend(title="initialisation")
    panels[-1].axis("off")
    plots.save(figure, path)
