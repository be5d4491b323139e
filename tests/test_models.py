"""AlexNet and its variants, compared with the paper's numbers and with plain PyTorch in float64."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex.config import Precision, RuntimeConfig
from fastalex.errors import ConfigError
from fastalex.kernels import winograd_conv2d, winograd_reference
from fastalex.models import MODELS, AlexNet, check_batch, check_crop, count_parameters, create_model, winograd
from fastalex.models.factored_linear import FactoredLinear
from fastalex.models.pooled_linear import PooledLinear
from fastalex.models.winograd import WinogradConv2d, allow_winograd
from fastalex.runtime import choose_runtime
from tests.kernels.test_winograd import amplification
from tests.tolerances import (
    assert_as_accurate,
    assert_same_in_float64,
    far_from_jumps,
    gradients,
    relative_error,
    unit_roundoff,
    usual_sum_error,
)

BIAS_ONE = {"conv2", "conv4", "conv5", "fc6", "fc7"}


def plain_alexnet(model: AlexNet, x: Tensor, norm: str, pool: int, groups: int = 1) -> Tensor:
    """The output of the paper's network, in torch.nn.functional, with the weights of `model`."""
    p = dict(model.named_parameters())

    def conv(name: str, x: Tensor, groups: int = 1, **kwargs: int) -> Tensor:
        return F.relu(F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], groups=groups, **kwargs))

    def normalise(x: Tensor) -> Tensor:
        # The paper's section 3.3: b = a / (k + alpha * sum of a^2 over 5 channels)^beta
        if norm == "none":
            return x
        squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
        total = sum(squares[:, i : i + x.shape[1]] for i in range(5))
        return x / (2 + 1e-4 * total) ** 0.75

    x = F.max_pool2d(normalise(conv("conv1", x, stride=4, padding=2)), pool, 2)
    x = F.max_pool2d(normalise(conv("conv2", x, groups, padding=2)), pool, 2)
    x = conv("conv4", conv("conv3", x, padding=1), groups, padding=1)
    x = F.max_pool2d(conv("conv5", x, groups, padding=1), pool, 2)
    x = F.adaptive_avg_pool2d(x, 6).flatten(1)
    x = F.relu(F.linear(x, p["fc6.weight"], p["fc6.bias"]))
    x = F.relu(F.linear(x, p["fc7.weight"], p["fc7.bias"]))
    return F.linear(x, p["fc8.weight"], p["fc8.bias"])


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"num_classes": 10}, 58_322_314),
        ({"num_classes": 1000}, 62_378_344),
        ({"num_classes": 1000, "groups": 2}, 60_965_224),
    ],
)
def test_parameter_count(options: dict, parameters: int) -> None:
    assert count_parameters(create_model("alexnet", **options)) == parameters


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 2}, {"norm": "none"}, {"overlapping_pool": False}],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_equals_the_paper_in_float64(options: dict, memory_format: torch.memory_format) -> None:
    # With He's initialisation the activations are large enough for the normalisation to matter.
    model = narrow(**options).double().to(memory_format=memory_format)
    x = 100 * torch.randn(2, 3, 127, 127, dtype=torch.float64).to(memory_format=memory_format)
    expected = plain_alexnet(
        model,
        x,
        options.get("norm", "lrn"),
        3 if options.get("overlapping_pool", True) else 2,
        options.get("groups", 1),
    )
    assert_same_in_float64(model(x), expected)


def narrow(**options: Any) -> AlexNet:
    """AlexNet with hidden layers of 32 units, without dropout; biases of a size that matters."""
    torch.manual_seed(0)
    model = AlexNet(init="he", dropout=0.0, **options)
    model.fc6, model.fc7 = PooledLinear(256, 6, 32), FactoredLinear(32, 32)
    model.fc8 = nn.Linear(32, 10)
    for layer in (model.conv1, model.conv2):
        nn.init.normal_(layer.bias, std=0.5)
    return model


# Of AlexNet in fp32: of a product with the weight of the first hidden layer
LONGEST_SUM = usual_sum_error(torch.float32, 9216)
# By how much Winograd's algorithm may err more in fp32, with its largest tile for 3x3 convolutions
WINOGRAD = amplification(*(winograd_reference.matrices(5, 3)[i] for i in (2, 1, 0)))


def logits_and_gradients(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradients of the sum of their squares, in the network's dtype."""
    network.zero_grad()
    logits = network(images.to(next(network.parameters()).dtype, memory_format=torch.channels_last))
    logits.square().sum().backward()
    return {"logits": logits.detach(), **gradients(network)}


@pytest.fixture(scope="module")
def narrow_alexnet() -> AlexNet:
    return narrow()


def with_fused_bias(model: AlexNet) -> AlexNet:
    """A copy whose pooling kernels add the biases of the convolutions before them."""
    model = copy.deepcopy(model)
    model.norm_pool1.fused_bias = model.norm_pool2.fused_bias = True
    return model


def test_biases_added_by_the_kernels_give_the_same_logits_and_gradients(narrow_alexnet: AlexNet) -> None:
    """In fp32, where the sums have another order."""
    exact = copy.deepcopy(narrow_alexnet).double()
    images = far_from_jumps(partial(plain_alexnet, exact, norm="lrn", pool=3), 2, 3, 63, 63)
    networks = with_fused_bias(narrow_alexnet), copy.deepcopy(narrow_alexnet), exact
    fused, usual, truth = (logits_and_gradients(network, images) for network in networks)
    assert_as_accurate(fused, [usual], truth, floor=LONGEST_SUM)


class Convolutions(TorchDispatchMode):
    """Records whether each convolution is given a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.biased: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.biased.append(args[2] is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("fused_bias", "norm", "biased"),
    [(True, "lrn", [False] * 2 + [True] * 3), (True, "none", [True] * 5), (None, "lrn", [True] * 5)],
)
def test_the_convolutions_add_the_other_biases(
    fused_bias: bool | None, norm: str, biased: list[bool]
) -> None:
    runtime = choose_runtime(
        RuntimeConfig(device="cpu", precision=Precision.fp32, winograd=False, fused_bias=fused_bias)
    )
    model = runtime.place(narrow(norm=norm))
    with Convolutions() as convolutions:
        model(torch.zeros(1, 3, 63, 63))
    assert convolutions.biased == biased


def test_a_convolution_without_its_bias_runs_its_hooks(narrow_alexnet: AlexNet) -> None:
    """`diagnose` finds the layers' inputs by hooks."""
    model, seen = with_fused_bias(narrow_alexnet), []
    model.conv1.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    model(torch.randn(1, 3, 63, 63))
    assert seen == [(1, 3, 63, 63)]


def test_normalisation_changes_the_result() -> None:
    """The comparisons above would detect a missing normalisation."""
    model = narrow().double()
    x = 100 * torch.randn(1, 3, 127, 127, dtype=torch.float64)
    with_lrn = plain_alexnet(model, x, "lrn", 3)
    without = plain_alexnet(model, x, "none", 3)
    assert not torch.allclose(with_lrn, without, rtol=1e-2)


def test_batch_norm_variant_normalises_before_the_relu() -> None:
    torch.manual_seed(0)
    model = create_model("alexnet", norm="batch")
    assert sum(isinstance(m, nn.BatchNorm2d) and m.num_features in (96, 256) for m in model.modules()) == 2
    x = torch.randn(4, 96, 15, 15, dtype=torch.float64) * 7 + 3
    expected = F.max_pool2d(F.relu(F.batch_norm(x, None, None, training=True)), 3, 2)
    assert_same_in_float64(model.norm_pool1.double()(x), expected)


def test_dropout_drops_hidden_units_only_in_training() -> None:
    torch.manual_seed(0)
    model = create_model("alexnet", dropout=0.5).double()
    x = torch.randn(2, 3, 63, 63, dtype=torch.float64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    none = create_model("alexnet", dropout=0.0).double()
    assert torch.equal(none(x), none(x))


def test_paper_initialisation() -> None:
    torch.manual_seed(0)
    model = create_model("alexnet", init="paper")
    for name, layer in model.named_children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
            assert (layer.bias == (1.0 if name in BIAS_ONE else 0.0)).all()


def test_he_initialisation_keeps_the_variance() -> None:
    torch.manual_seed(0)
    model = create_model("alexnet", init="he", groups=2)
    for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"):
        weight = getattr(model, name).weight
        assert weight.std().item() == pytest.approx(math.sqrt(2 / weight[0].numel()), rel=0.02)
        assert (getattr(model, name).bias == 0).all()


@pytest.mark.parametrize("crop", [63, 64, 112, 128, 223, 224, 256])
def test_every_crop_from_the_smallest_works(crop: int) -> None:
    model = create_model("alexnet", num_classes=7).eval()
    check_crop("alexnet", "data.crop", crop)
    assert model(torch.zeros(1, 3, crop, crop)).shape == (1, 7)


def test_a_smaller_crop_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.crop=62.*at least 63"):
        check_crop("alexnet", "data.crop", 62)
    model = create_model("alexnet").eval()
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.zeros(1, 3, 62, 62))  # the reason for the limit


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_torchvision_networks(name: str) -> None:
    model = create_model(name, num_classes=10).eval()
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_four_layer_network_against_its_formula(activation: str) -> None:
    """In float64, layer by layer, on 32x32 pixels: 32 to 15, 7 and 3."""
    model = create_model("four_layer", activation=activation).double()
    x = images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weights = list(model.parameters())
    for weight, bias in zip(weights[0:6:2], weights[1:6:2], strict=True):
        x = F.max_pool2d(getattr(torch, activation)(F.conv2d(x, weight, bias, padding=2)), 3, 2)
    assert x.shape == (2, 64, 3, 3)
    torch.testing.assert_close(model(images), F.linear(x.flatten(1), *weights[6:]))
    assert count_parameters(model) == 75 * 32 + 32 + 800 * 32 + 32 + 800 * 64 + 64 + 576 * 10 + 10


@pytest.mark.parametrize("name", MODELS)
def test_limits_on_a_batch_of_one_image(name: str) -> None:
    own = {"alexnet": 63, "four_layer": 15}  # without batch normalisation after the first layers
    model, smallest = create_model(name), own.get(name, 32)
    check_batch(name, 1, smallest + 1)
    model(torch.zeros(1, 3, smallest + 1, smallest + 1))
    image = torch.zeros(1, 3, smallest, smallest)
    if name in own:
        check_batch(name, 1, smallest)
        model(image)
    else:
        with pytest.raises(ConfigError, match=rf"{name} gets one image at a time, a crop of {smallest}"):
            check_batch(name, 1, smallest)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(image)


def test_checks_of_an_unknown_network_name_it() -> None:
    for check in (lambda: check_crop("vgg", "data.crop", 224), lambda: check_batch("vgg", 1, 224)):
        with pytest.raises(ConfigError, match=r"model.name=vgg: no such network"):
            check()


def test_resnet18_has_torchvisions_parameter_count() -> None:
    assert count_parameters(create_model("resnet18", num_classes=1000)) == 11_689_512


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alexnett", {}, f"alexnett.*{', '.join(MODELS)}"),
        ("alexnet", {"groups": 3}, "model.groups=3"),
        ("alexnet", {"norm": "layer"}, "model.norm=layer"),
        ("alexnet", {"dropout": 1.0}, "model.dropout=1.0"),
        ("alexnet", {"init": "xavier"}, "model.init=xavier"),
        ("four_layer", {"activation": "gelu"}, "model.activation=gelu: choose relu or tanh"),
        ("alexnet", {"num_classes": 0}, "num_classes=0"),
        ("resnet18", {"groups_of": 2}, "groups_of"),
    ],
)
def test_bad_options_are_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(name, **options)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The output channels of each convolution computed by Winograd's algorithm, in order."""
    channels = []

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        channels.append(weight.shape[0])
        return winograd_conv2d(x, weight, bias)

    monkeypatch.setattr(winograd, "winograd_conv2d", spy)
    return channels


@pytest.mark.parametrize("groups", [1, 2])
def test_winograd_in_bf16_is_as_accurate_as_bf16(
    groups: int, used: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's runtime turns it on; it computes every ungrouped convolution but the first."""
    everything = winograd.Limits(channels=0, five_taps=0, three_taps=0, both_axes=0)
    monkeypatch.setattr(winograd, "VECTOR_UNITS", everything)  # the batch has only two images
    monkeypatch.setattr(winograd, "MATRIX_UNITS", everything)
    model = narrow(groups=groups)
    images = torch.randn(2, 3, 127, 127, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()
    found = []
    for allowed in (False, True):
        runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.bf16, winograd=allowed))
        assert ("Winograd" in str(runtime)) is allowed
        runtime.place(model)
        with torch.no_grad(), runtime.autocast():
            logits = model(images.bfloat16().contiguous(memory_format=torch.channels_last))
        found.append({"logits": logits})
    assert used == ([256, 384, 384, 256] if groups == 1 else [384])
    plain, fast = found
    truth = {"logits": exact(images.double()).detach()}
    assert_as_accurate(fast, [plain], truth, floor=unit_roundoff(torch.bfloat16))


def with_and_without_winograd(model: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    """Logits and gradients in fp32 by Winograd's algorithm where it is supported, and without."""
    found = []
    for allowed in (True, False):
        choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32, winograd=allowed)).place(model)
        found.append(logits_and_gradients(model, images))
        model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("groups", [1, 2])
def test_winograd_in_fp32_is_as_accurate_as_fp32(groups: int, used: list[int]) -> None:
    """It computes every ungrouped convolution but the first."""
    model = narrow(groups=groups)
    exact = copy.deepcopy(model).double()
    images = far_from_jumps(partial(plain_alexnet, exact, norm="lrn", pool=3, groups=groups), 2, 3, 63, 63)
    fast, usual = with_and_without_winograd(model, images)
    assert used == ([256, 384, 384, 256] if groups == 1 else [384])
    truth = logits_and_gradients(exact, images)
    assert_as_accurate(fast, [usual], truth, floor=LONGEST_SUM, factor=WINOGRAD)


def test_winograd_in_fp32_is_as_accurate_on_large_images() -> None:
    """Logits only: at 224 pixels, some activations are always close to a jump of the derivative."""
    model = narrow().requires_grad_(False)
    exact = copy.deepcopy(model).double()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found = []
    for allowed in (True, False):
        choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32, winograd=allowed)).place(model)
        found.append({"logits": model(images.contiguous(memory_format=torch.channels_last))})
    assert_as_accurate(
        found[0], found[1:], {"logits": exact(images.double())}, floor=LONGEST_SUM, factor=WINOGRAD
    )


def test_winograd_serves_resnet18_and_does_not_change_its_weights(used: list[int]) -> None:
    """It computes all 3x3 convolutions of stride 1: four after the stem, and three at each further size."""
    torch.manual_seed(0)
    model = create_model("resnet18").eval()
    torch.manual_seed(0)
    exact = torchvision.models.resnet18(num_classes=10).double().eval()
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours.double(), theirs), name
    images = far_from_jumps(exact, 1, 3, 64, 64)
    fast, usual = with_and_without_winograd(model, images)
    assert used == 4 * [64] + 3 * [128] + 3 * [256] + 3 * [512]
    # The longest sums are over the taps and channels of the last convolutions.
    floor = usual_sum_error(torch.float32, 9 * 512)
    truth = logits_and_gradients(exact, images)
    assert_as_accurate(fast, [usual], truth, floor=floor, factor=WINOGRAD)


CHANGES = {
    "stride": 2,
    "kernel_size": 5,
    "padding": 2,
    "dilation": 2,
    "groups": 2,
    "padding_mode": "reflect",
    "out_channels": 20,  # Winograd's fast kernels take multiples of 16
}


@pytest.mark.parametrize("changed", CHANGES)
def test_winograd_is_used_only_for_supported_convolutions(changed: str, used: list[int]) -> None:
    plain: dict = {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1, "bias": False}
    other = plain | {changed: CHANGES[changed]}
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(**plain), nn.Conv2d(**other))
    usual, exact = copy.deepcopy(network), copy.deepcopy(network).double()
    choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32)).place(allow_winograd(network))
    x = torch.randn(2, 16, 9, 9)
    found, theirs, truth = ({"result": each} for each in (network(x), usual(x), exact(x.double())))
    floor = usual_sum_error(torch.float32, 16 * 25)
    assert_as_accurate(found, [theirs], truth, floor=floor, factor=WINOGRAD)
    assert used == [16]


def test_pytorch_computes_unsupported_inputs(used: list[int]) -> None:
    torch.manual_seed(0)
    layer = WinogradConv2d(128, 128, 3, padding=1)
    choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32)).place(layer)
    image = torch.randn(128, 9, 9)
    exact = F.conv2d(image.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert relative_error(layer(image), exact) < usual_sum_error(torch.float32, 9 * 128)  # no batch dimension
    layer.bfloat16()
    images = image.bfloat16().expand(256, 128, 9, 9)
    assert layer(images).dtype == torch.bfloat16
    assert used == []


@pytest.mark.parametrize(
    ("images", "channels", "taps", "pixels", "vector_units", "matrix_units"),
    [  # layers of ResNet-18 at 224x224, 112x112 and 64x64, and 5x5 ones as large as AlexNet's at the last two
        (128, 256, 3, 14, True, True),
        (128, 128, 3, 28, True, True),
        (128, 128, 3, 14, True, False),
        (128, 512, 3, 4, True, True),
        (128, 64, 3, 56, True, False),
        (128, 64, 3, 16, False, False),
        (128, 32, 3, 56, False, False),
        (128, 256, 3, 4, False, True),
        (16, 256, 3, 7, False, False),
        (128, 160, 5, 13, True, True),
        (128, 160, 5, 7, True, False),
        (64, 160, 5, 7, False, False),
    ],
)
@pytest.mark.parametrize("has_matrix_units", [True, False])
def test_winograd_in_bf16_is_used_only_where_it_was_measured_faster(
    has_matrix_units: bool,
    images: int,
    channels: int,
    taps: int,
    pixels: int,
    vector_units: bool,
    matrix_units: bool,
    used: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a processor with AMX and on one without; the other is imitated."""
    capabilities = {**torch.cpu.get_capabilities(), "amx_bf16": has_matrix_units}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    serves = matrix_units if has_matrix_units else vector_units
    layer = WinogradConv2d(channels, channels, taps, padding=taps // 2, bias=False)
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.bf16))
    runtime.place(layer)
    with torch.no_grad(), runtime.autocast():
        layer(torch.zeros(images, channels, pixels, pixels, dtype=torch.bfloat16))
    assert used == ([channels] if serves else [])


@pytest.mark.parametrize("crop", [63, 112, 224])
def test_alexnet_is_one_graph_under_autocast(crop: int) -> None:
    """At crops at which the first hidden layer pools its weight, enlarges its input, and does neither."""
    torch.manual_seed(0)
    model = create_model("alexnet", init="he").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    images = torch.randn(2, 3, crop, crop)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(images), model(images))  # the same operators
