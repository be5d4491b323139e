"""What the diagnosis reports, against closed forms and the same figures computed by hand in float64."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastalex import diagnose as command
from fastalex.commands.diagnose import Layer, conclude, diagnose, initialisations
from fastalex.config import AlexNetConfig, Init, ModelConfig, Precision, RuntimeConfig
from fastalex.runtime import choose_runtime

RUNTIME = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32, channels_last=False))


class Tiny(nn.Module):
    """A convolution, ReLU and two linear layers, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.hidden = nn.Linear(4 * 4, 6)
        self.dropout = nn.Dropout(0.9)
        self.out = nn.Linear(6, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True).flatten(1)
        return self.out(self.dropout(F.relu(self.hidden(x))))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(7, 3, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (7,), generator=generator)


def by_name(layers: list[Layer]) -> dict[str, Layer]:
    return {layer.name: layer for layer in layers}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_magnitudes_are_those_of_the_plain_computation() -> None:
    model, (images, labels) = Tiny(), batch()
    diagnosis = diagnose(model, images, labels, RUNTIME)
    layers = by_name(diagnosis.layers)
    assert list(layers) == ["conv", "hidden", "out", "logits"]

    w1, b1, w2, b2, w3, b3 = (p.detach().clone().requires_grad_() for p in model.parameters())
    x = images.clone().requires_grad_()
    h1 = F.relu(F.conv2d(x, w1, b1)).flatten(1)
    h2 = F.relu(h1 @ w2.T + b2)
    logits = h2 @ w3.T + b3
    loss = (logits.logsumexp(1) - logits[torch.arange(7), labels]).mean()
    inputs = {"conv": x, "hidden": h1, "out": h2, "logits": logits}
    gradients = torch.autograd.grad(loss, [*inputs.values(), w1, w2, w3])
    assert diagnosis.loss == pytest.approx(loss.item())
    for (name, value), gradient in zip(inputs.items(), gradients[:4], strict=True):
        assert layers[name].activation_rms == pytest.approx(rms(value))
        assert layers[name].gradient_rms == pytest.approx(7 * rms(gradient))
        mean = value.mean(dim=0, keepdim=True)
        dependence = math.sqrt(((value - mean) ** 2).sum().item() / (value**2).sum().item())
        assert layers[name].image_dependence == pytest.approx(dependence)
    for name, gradient in zip(("conv", "hidden", "out"), gradients[4:], strict=True):
        assert layers[name].weight_gradient_rms == pytest.approx(rms(gradient))
    assert layers["logits"].weight_gradient_rms is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_known_dead_units_are_counted() -> None:
    model, (images, labels) = Tiny(), batch()
    with torch.no_grad():
        model.conv.bias[1] = -1e6  # one channel of four, so four features of the sixteen that follow
        model.hidden.bias[:2] = -1e6
        model.hidden.bias[2:] = 1e3
        model.conv.bias[[0, 2, 3]] = 1e3
    layers = by_name(diagnose(model, images, labels, RUNTIME).layers)
    assert layers["conv"].dead_units == 0
    assert layers["hidden"].dead_units == pytest.approx(1 / 4)
    assert layers["out"].dead_units == pytest.approx(2 / 6)


def test_a_channel_that_is_alive_anywhere_is_not_dead() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 4), nn.Flatten()).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).view(2, 3, 1, 1))
        model[0].bias.zero_()
    images = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
    images[1, 0, 2, 3] = 1.0  # one pixel of one image: the first channel lives, the second does not
    layers = by_name(diagnose(model, images, torch.zeros(3, dtype=torch.int64), RUNTIME).layers)
    assert layers["2"].dead_units == 0.5


def test_a_constant_network_does_not_depend_on_the_image() -> None:
    model, (images, labels) = Tiny(), batch()
    with torch.no_grad():
        model.hidden.weight.zero_()
    diagnosis = diagnose(model, images, labels, RUNTIME)
    assert diagnosis.logits.image_dependence == pytest.approx(0, abs=1e-12)
    assert diagnosis.logits.activation_rms > 0
    assert diagnosis.steepest.name == "hidden"
    assert "vary by 0 of their magnitude" in conclude({"constant": diagnosis})
    assert "hidden takes the largest part" in conclude({"constant": diagnosis})


def test_logits_without_a_common_part_depend_on_the_image_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)).double()
    images = torch.tensor([[1.0, 2, 3], [-1, -2, -3]], dtype=torch.float64).view(2, 3, 1, 1)
    diagnosis = diagnose(model, images, torch.tensor([0, 1]), RUNTIME)
    assert diagnosis.logits.image_dependence == pytest.approx(1)


def test_dropout_is_off_and_batch_normalisation_uses_the_batch() -> None:
    torch.manual_seed(0)
    images, labels = batch()
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 5)).double()
    layers = by_name(diagnose(model, 5 + 3 * images, labels, RUNTIME).layers)
    assert layers["3"].activation_rms == pytest.approx(1, abs=1e-4)


def test_the_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 100))
    images, labels = torch.randn(8, 3, 2, 2), torch.randint(0, 100, (8,))
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.bf16, channels_last=False))
    with runtime.autocast():
        logits = network(images).detach()
    exact = F.cross_entropy(logits.double(), labels).item()
    assert F.cross_entropy(logits, labels).item() != pytest.approx(exact, rel=1e-4)
    assert diagnose(network, images, labels, runtime).loss == pytest.approx(exact, rel=1e-6)


def test_the_default_is_beside_what_differs_from_it() -> None:
    paper = AlexNetConfig(init=Init.paper, groups=2)
    assert initialisations(paper) == {"paper": paper, "default": replace(paper, init=Init.default)}
    assert list(initialisations(AlexNetConfig(init=Init.default))) == ["default"]
    assert list(initialisations(ModelConfig("resnet18"))) == ["default"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["data=digits", "train.batch_size=16", "hydra.run.dir=run"]
    monkeypatch.setattr(sys, "argv", ["diagnose", "model=alexnet_paper_init", *arguments])
    command.main()
    out = capsys.readouterr().out
    written = json.loads(Path("run/diagnose.json").read_text())
    assert list(written["initialisations"]) == ["paper", "default"]
    names = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8", "logits"]
    for diagnosis in written["initialisations"].values():
        assert [layer["name"] for layer in diagnosis["layers"]] == names
    paper, default = (d["layers"][-1] for d in written["initialisations"].values())
    assert paper["image_dependence"] < 0.1 * default["image_dependence"]
    assert written["conclusion"] in out
    assert "paper initialisation, loss" in out
    with Image.open("run/diagnose.png") as image:
        assert image.width > 600


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.crop=32", "data.crop=32: alexnet needs a crop of at least 63"),
        ("init_from=run", "init_from=run: is for training; a diagnosis is of a network's first weights"),
        ("resume=auto", "resume=auto: is for training"),
    ],
)
def test_bad_input_is_one_line(
    override: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["diagnose", "data=digits", override])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
