"""Training that starts from trained weights: what is taken, what is frozen, and how bad input ends."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastalex import train
from fastalex.config import (
    AlexNetConfig,
    Config,
    DataConfig,
    Flip,
    LoaderConfig,
    ModelConfig,
    Norm,
    Optimizer,
    Precision,
    RuntimeConfig,
    Schedule,
    Stage,
    Strategy,
    TrainConfig,
)
from fastalex.config.plain import model_options, plain
from fastalex.distributed.strategies import check_strategy
from fastalex.errors import CheckpointError, ConfigError
from fastalex.models import create_model
from fastalex.models.factored_linear import FactoredLinear, Tap, factored_layers
from fastalex.models.layers import last_layer, layers_named
from fastalex.runs import launch
from fastalex.runs.checkpoint import Checkpoint, read_weights, save_weights
from fastalex.runs.initial_weights import InitialWeights, _check_same
from fastalex.runtime import choose_runtime
from fastalex.training import flops
from fastalex.training.freezing import freeze
from fastalex.training.optim import create_optimizer
from fastalex.training.schedule import LearningRate
from fastalex.training.trainer import Trainer
from tests import tiny
from tests.commands import outcome
from tests.compiling import Compiler
from tests.test_trainer import Batches, batches
from tests.tolerances import assert_same_in_float64

SEVEN = [f"class {number}" for number in range(7)]


class Tapped(nn.Sequential):
    """A network whose layers 4 and 6 may leave their weights' gradients as factors."""

    @property
    def factored_layers(self) -> list[FactoredLinear]:
        return [layer for layer in self if isinstance(layer, FactoredLinear)]

    def forward(self, x: Tensor, taps: Sequence[Tap | None] = ()) -> Any:
        inputs = []
        given = iter(taps)
        for layer in self:
            tap = next(given, None) if isinstance(layer, FactoredLinear) else None
            if tap is None:
                x = layer(x)
            else:
                x, seen = layer.tapped(x, tap)
                inputs.append(seen)
        return (x, inputs) if taps else x


def a_network(kind: type[nn.Sequential] = Tapped) -> nn.Module:
    """Convolutions, batch normalisation and two layers that may leave factors, without dropout."""
    torch.manual_seed(0)
    return kind(
        nn.Sequential(nn.Conv2d(3, 6, 7, stride=4), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        FactoredLinear(72, 24),
        nn.ReLU(),
        FactoredLinear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def a_trainer(
    config: TrainConfig,
    data: Batches,
    *,
    compiled: bool = False,
    kind: type[nn.Sequential] = Tapped,
    dtype: torch.dtype = torch.float32,
) -> Trainer:
    runtime = choose_runtime(
        RuntimeConfig(device="cpu", precision=Precision.fp32, compile=compiled, winograd=False)
    )
    return Trainer(runtime.place(a_network(kind).to(dtype)), config, data, None, runtime)


RECIPE = TrainConfig(
    epochs=2,
    batch_size=8,
    lr=0.05,
    head_lr=0.2,
    freeze=["0", "4"],
    accumulate=2,
    clip_norm=1.0,
    schedule=Schedule.plateau,
)


@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_layers_and_a_rate_of_the_last_one_match_plain_pytorch(
    compiled: bool, compiler: Compiler
) -> None:
    """In float64: SGD over the other parameters alone, and batch normalisation by the frozen statistics."""
    data = batches()
    data.batches = [(images.double(), labels) for images, labels in data.batches]
    trainer = a_trainer(RECIPE, data, compiled=compiled, dtype=torch.float64)
    reference = a_network().double()
    start = copy.deepcopy(reference.state_dict())
    frozen = [*reference[0].parameters(), *reference[4].parameters()]
    body = [*reference[1].parameters(), *reference[6].parameters()]
    head = list(reference[8].parameters())
    optimizer = torch.optim.SGD(
        [{"params": body}, {"params": head, "lr": 0.2}], lr=0.05, momentum=0.9, weight_decay=5e-4
    )
    for epoch in range(2):
        trainer.run_epoch()
        data.set_epoch(epoch)
        reference.train()
        reference[0][1].eval()
        for images, labels in data:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for x, y in zip(images.chunk(2), labels.chunk(2), strict=True):
                (F.cross_entropy(reference(x), y) / 2).backward()
            nn.utils.clip_grad_norm_([*body, *head], 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert (compiler.calls > 0) == compiled
    found = trainer.model.state_dict()
    for name, tensor in reference.state_dict().items():
        assert_same_in_float64(found[name].double(), tensor.double())
        if name.startswith(("0.", "4.")):
            assert torch.equal(found[name], start[name])
        else:
            assert not torch.equal(tensor, start[name])
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {p for p in trainer.model.parameters() if p.requires_grad}
    assert set(trainer.optimizer.state) == held
    assert trainer.learning_rate.current == 0.05


def test_an_average_keeps_frozen_layers_as_they_are() -> None:
    data = batches(9)
    trainer = a_trainer(replace(RECIPE, epochs=1, ema_decay=0.5), data)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.run_epoch()
    average = trainer.averaged_weights()
    assert average is not None
    for name, tensor in average.items():
        assert torch.equal(tensor, start[name]) == name.startswith(("0.", "4.")), name


def test_a_frozen_layer_leaves_no_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[FactoredLinear] = []
    monkeypatch.setattr(FactoredLinear, "add_factors", lambda layer, *factors: added.append(layer))
    data = batches(1)
    for frozen in ([], ["4"], ["4", "6"]):
        trainer = a_trainer(replace(RECIPE, freeze=frozen, accumulate=1), data)
        layers = list(factored_layers(trainer.model))
        added.clear()
        trainer._step(*data.batches[0])
        assert added == layers[len(frozen) :]
        assert all(layer.weight.grad is None for layer in layers)


def test_a_frozen_layer_costs_no_gradient_of_its_weight() -> None:
    """Of 2 x images x inputs x outputs FLOPs, where gradients are not left as factors."""
    data = batches(1)
    counted = {}
    for frozen in ([], ["4"]):
        trainer = a_trainer(replace(RECIPE, freeze=frozen, accumulate=1), data, kind=nn.Sequential)
        with FlopCounterMode(display=False) as counter:
            trainer._step(*data.batches[0])
        counted[bool(frozen)] = counter.get_total_flops()
    assert counted[False] - counted[True] == 2 * 8 * 72 * 24


def rates(config: TrainConfig, steps: int) -> list[list[float]]:
    """The rates of each parameter group, step by step."""
    optimizer = create_optimizer(a_network(), config)
    schedule = LearningRate(optimizer, config, steps)
    seen = []
    for step in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.after_step()
        if step % 4 == 3:
            schedule.after_validation(0.5, 0)
    return [list(each) for each in zip(*seen, strict=True)]


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(epochs=5, lr=0.02),
        TrainConfig(epochs=5, lr=0.02, stages=[Stage(2, 16, 12, lr=0.1)]),
        TrainConfig(epochs=5, lr=0.02, schedule=Schedule.plateau, patience=0),
        TrainConfig(epochs=5, lr=0.02, optimizer=Optimizer.lars),
    ],
    ids=["one cycle", "two cycles", "plateau", "LARS"],
)
def test_the_schedule_scales_both_rates(config: TrainConfig) -> None:
    alone = rates(config, 20)
    apart = rates(replace(config, head_lr=0.3), 20)
    assert apart[: len(alone)] == alone
    assert len(set(alone[0])) > 2
    for head in apart[len(alone) :]:
        assert head == pytest.approx([0.3 / 0.02 * rate for rate in alone[0]])


def test_layers_are_named_whole_or_by_a_prefix() -> None:
    network = create_model("efficientnet_b0", 2)
    inside = layers_named(network, "features.1")
    assert inside
    assert all(name.startswith("features.1.") for name in inside)
    alexnet = create_model("alexnet", 2)
    assert list(layers_named(alexnet, "conv")) == [f"conv{number}" for number in range(1, 6)]
    assert list(layers_named(alexnet, "fc6")) == ["fc6"]
    assert not layers_named(alexnet, "")


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("alexnet", "fc8"),
        ("resnet18", "fc"),
        ("mobilenet_v3_small", "classifier.3"),
        ("efficientnet_b0", "classifier.1"),
    ],
)
def test_the_last_layer_is_the_one_that_depends_on_the_number_of_classes(name: str, last: str) -> None:
    with torch.device("meta"):
        small, large = (create_model(name, classes) for classes in (3, 5))
    other = large.state_dict()
    changed = {key for key, tensor in small.state_dict().items() if tensor.shape != other[key].shape}
    assert changed == {f"{last}.weight", f"{last}.bias"}
    assert last_layer(small) == last


def test_the_hybrid_needs_a_trained_layer_beside_the_hidden_ones() -> None:
    with torch.device("meta"):
        alexnet = create_model("alexnet", 2)
    freeze(alexnet, TrainConfig(freeze=["conv"]))
    check_strategy(alexnet, Strategy.hybrid)
    freeze(alexnet, TrainConfig(freeze=["fc8"]))
    check_strategy(alexnet, Strategy.ddp)
    with pytest.raises(ConfigError, match=r"fc6 and fc7, and train\.freeze freezes all of those"):
        check_strategy(alexnet, Strategy.hybrid)


def randomised(network: nn.Module) -> nn.Module:
    """Give each batch normalisation statistics and weights that matter."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias.data):
                assert tensor is not None
                tensor.normal_()
            for tensor in (layer.running_var, layer.weight.data):
                assert tensor is not None
                tensor.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("resnet18", "resnet18"),
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("efficientnet_b0", "efficientnet_b0"),
    ],
)
def test_weights_of_timm_compute_what_they_do_there(
    ours: str, theirs: str, suffix: str, tmp_path: Path
) -> None:
    """In float64, with timm's last layer and its batch normalisation's epsilon."""
    torch.manual_seed(0)
    other = randomised(timm.create_model(theirs, pretrained=False, num_classes=7)).eval()
    path = tmp_path / f"weights{suffix}"
    state = {name: tensor.contiguous() for name, tensor in other.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    model = create_model(ours, 7)
    line = InitialWeights.read(str(path), model, ModelConfig(ours)).copy_to(model, SEVEN, TrainConfig())
    last = last_layer(model)
    total = len(model.state_dict())
    assert line == (
        f"init_from={path}: {total - 2} of {total} tensors taken; {last}.weight and {last}.bias start anew: "
        "the file does not name its classes"
    )
    model.get_submodule(last).load_state_dict(other.get_classifier().state_dict())
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-5
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.double().eval()(x), other.double()(x), rtol=1e-9, atol=1e-9)


def test_weights_of_torchvision_of_any_number_of_classes_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = randomised(torchvision.models.resnet18(num_classes=20))
    state = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    for number, content in enumerate((state, {"model": state, "epoch": 3}, old)):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path, _use_new_zipfile_serialization=number != 2)
        model = create_model("resnet18", 7)
        own = copy.deepcopy(model.fc.state_dict())
        line = InitialWeights.read(str(path), model, ModelConfig("resnet18")).copy_to(
            model, SEVEN, TrainConfig()
        )
        assert line.endswith("fc.weight and fc.bias start anew: 20 classes there, 7 here")
        assert ("20 counts of batches start at 0" in line) == (number == 2)
        for name, tensor in other.state_dict().items():
            if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
                assert torch.equal(model.state_dict()[name], tensor), name
        assert all(torch.equal(model.fc.state_dict()[name], tensor) for name, tensor in own.items())


class Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("executed"),)


def saved(path: Path, config: ModelConfig, classes: list[str]) -> Path:
    """Weights as a run saves them."""
    network = create_model(config.name, len(classes), **model_options(config))
    of_run = Config(model=config, data=DataConfig("digits"), loader=LoaderConfig("resident"))
    save_weights(network.state_dict(), path, plain(of_run), classes)
    return path


def test_files_that_do_not_fit_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.register()
    model = create_model("tiny", 7)
    torch.save({"w": Code()}, "code.pt")
    Path("text.pt").write_text("no weights")
    Path("text.safetensors").write_text("no weights")
    Path("text.txt").write_text("no weights")
    torch.save(torch.zeros(3), "tensor.pth")
    torch.save({"epoch": 3}, "plain.pth")
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), "other.pth")
    narrow = {name: tensor[..., :1] for name, tensor in model.state_dict().items() if tensor.ndim}
    torch.save(narrow, "narrow.pth")
    saved(Path("resnet.safetensors"), ModelConfig("resnet18"), SEVEN)
    whole = saved(Path("whole.safetensors"), ModelConfig("tiny"), SEVEN)
    Path("cut.safetensors").write_bytes(whole.read_bytes()[:-9])
    for name, message in {
        "nowhere": r"init_from=nowhere: there is no such file",
        ".": r"init_from=\.: the folder holds neither model.safetensors nor checkpoint.pt",
        "code.pt": r"init_from=code.pt: is damaged, or holds more than tensors",
        "text.pt": r"init_from=text.pt: is damaged",
        "text.safetensors": r"init_from=text.safetensors: .*damaged",
        "cut.safetensors": r"init_from=cut.safetensors: .*damaged",
        "text.txt": r"init_from=text.txt: is neither a run's folder nor a file of weights",
        "tensor.pth": r"init_from=tensor.pth: holds no state dict",
        "plain.pth": r"init_from=plain.pth: holds no state dict",
        "other.pth": r"of another network than model.name=tiny .*: 0.weight is absent there and \(4",
        "narrow.pth": r"of another network .*: 0.weight is \(4, 3, 3, 1\) there and \(4, 3, 3, 3\) here",
        "resnet.safetensors": r"of another network: it has model.name=resnet18, and here model.name=tiny",
    }.items():
        with pytest.raises(CheckpointError) as error:
            InitialWeights.read(name, model, ModelConfig("tiny"))
        assert re.search(message, str(error.value)), str(error.value)
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()


def test_options_that_change_what_weights_compute_have_to_be_the_same() -> None:
    options = AlexNetConfig(norm=Norm.none, dropout=0.1)
    with pytest.raises(CheckpointError, match=r"it has model\.norm=none, and here model\.norm=lrn"):
        _check_same(options, AlexNetConfig(), "init_from=x")
    _check_same(AlexNetConfig(dropout=0.1), AlexNetConfig(), "init_from=x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two data sets with other classes, and a run on the first."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    rng = np.random.default_rng(0)
    for data, names in (("one", ("dark", "light")), ("two", ("black", "grey", "white"))):
        for number, name in enumerate(names):
            (folder / data / name).mkdir(parents=True)
            for i in range(20):
                pixels = (60 + 60 * number + rng.integers(-50, 50, (16, 16, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / data / name / f"{i}.png")
    tiny.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(flops.MATMUL_SIZE, "cpu", 64)
        launch.train(a_config(folder / "one"), folder / "run")
    return folder


def a_config(images: Path, **train: Any) -> Config:
    return Config(
        model=ModelConfig("tiny"),
        data=DataConfig("imagefolder", root=str(images), resize=36, crop=32, flip=Flip.none),
        loader=LoaderConfig("resident"),
        train=TrainConfig(**{"epochs": 2, "batch_size": 8, "lr": 0.01} | train),
        runtime=RuntimeConfig(device="cpu", precision=Precision.fp32, threads=1),
    )


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement of the peak rate takes half of a run's time."""
    tiny.register()
    monkeypatch.setitem(flops.MATMUL_SIZE, "cpu", 64)


@pytest.mark.parametrize("name", ["", "checkpoint.pt", "best.safetensors", "model.safetensors"])
@pytest.mark.usefixtures("small_products")
def test_a_run_on_other_classes_starts_from_a_runs_weights(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the last layer is frozen, so it must be there at the end as it was at the start."""
    config = a_config(folder / "two", freeze=["0", "1"], head_lr=0.1)
    config.init_from = str(folder / "run" / name)
    if name:
        config.data.std = [0.5, 0.5, 0.5]
    launch.train(config, tmp_path / "run")
    captured = capsys.readouterr()
    warning = r"warning: init_from=\S+: was trained on images with .* data.std=\[1.0, 1.0, 1.0\]"
    assert bool(re.search(warning, captured.err)) == bool(name)
    assert (
        f"init_from={folder / 'run' / name}: 7 of 9 tensors taken; 6.weight and 6.bias start anew: "
        "2 classes there, 3 here\n"
    ).replace("/:", ":") in captured.out.replace("/:", ":")
    source = "best.safetensors" if name == "best.safetensors" else "model.safetensors"
    before, after = (
        read_weights(folder / "run" / source)[0],
        read_weights(tmp_path / "run/model.safetensors")[0],
    )
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("6."))
    assert after["6.weight"].shape == (3, 16)
    momentum = Checkpoint.load(tmp_path / "run/checkpoint.pt").training["optimizer"]["state"]
    assert sorted(state["momentum_buffer"].shape for state in momentum.values()) == [(3,), (3, 16)]
    assert f"init_from: {config.init_from}" in (tmp_path / "run/config.yaml").read_text()


def test_the_last_layer_is_taken_where_the_classes_are_the_same(folder: Path) -> None:
    for classes, reason in (
        (["dark", "light"], ""),
        (["dark", "pale"], "other classes, 'light' there in place of 'pale'"),
        (["light", "dark"], "other classes, 'dark' there in place of 'light'"),
    ):
        tiny.register()
        model = create_model("tiny", 2)
        own = model.state_dict()["6.weight"].clone()
        initial = InitialWeights.read(str(folder / "run"), model, ModelConfig("tiny"))
        line = initial.copy_to(model, classes, TrainConfig())
        assert line.endswith(f"start anew: {reason}" if reason else "all 9 tensors taken")
        expected = own if reason else initial.weights["6.weight"]
        assert torch.equal(model.state_dict()["6.weight"], expected)
        if reason:
            with pytest.raises(
                ConfigError, match=r"train.freeze=\[6\]: freezes the last layer, 6, which has"
            ):
                initial.copy_to(model, classes, TrainConfig(freeze=["6"]))
        else:
            initial.copy_to(model, classes, TrainConfig(freeze=["6"]))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    small_products: None,
) -> Command:
    """Train on the second data set; return the exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, str, str]:
        arguments = ["data=imagefolder", f"data.root={folder / 'two'}", "data.resize=36", "data.crop=32"]
        arguments += ["model=mobilenet_v3_small", "model.name=tiny", "train.batch_size=8", "data.flip=none"]
        arguments += ["runtime.precision=fp32", "runtime.device=cpu", "runtime.threads=1"]
        return outcome(train.main, [*arguments, *overrides], monkeypatch, capsys)

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.freeze=[conv9]"],
            r"train.freeze=conv9: the network has no such layer; choose from 0, 1, 6$",
        ),
        (["train.freeze=[0,'']"], r"train.freeze=: the network has no such layer"),
        (
            ["train.freeze=[0,1,6]"],
            r"train.freeze=\[0,1,6\]: freezes every layer, .*; leave out the last one, 6",
        ),
        (["train.head_lr=0.1"], r"train.head_lr=0.1: .*give their weights with init_from"),
        (["train.head_lr=0", "init_from=RUN"], r"train.head_lr=0: must be greater than 0"),
        (["train.head_lr=nan", "init_from=RUN"], r"train.head_lr=nan: must be a finite number"),
        (
            ["train.head_lr=0.1", "train.freeze=[6]", "init_from=RUN"],
            r"train.head_lr=0.1: is the learning rate of the last layer, 6, which train.freeze=\[6\] freezes",
        ),
        (["train.freeze=[6]", "init_from=RUN"], r"starts anew \(2 classes there, 3 here\); leave it out"),
        (["init_from=nowhere"], r"init_from=nowhere: there is no such file"),
        (["init_from=RUN", "model.name=resnet18"], r"of another network: it has model.name=tiny, and here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(command: Command, folder: Path, overrides: list[str], message: str) -> None:
    given = [value.replace("RUN", str(folder / "run")) for value in overrides]
    status, _, err = command(*given)
    assert status == 2
    (line,) = (line for line in err.splitlines() if line.startswith("fastalex: error: "))
    assert re.search(message, line), line
    assert "Traceback" not in err
    assert not list(Path().iterdir())


PLATEAU = ["recipe=study", "data.flip=none", "train.patience=0", "train.lr=0.01"]


def test_a_plateau_run_is_made_longer_as_if_it_had_been_asked_for(command: Command, folder: Path) -> None:
    """Also where it starts from weights and has frozen layers; the weights to start from may be gone then."""
    weights = Path("start.safetensors")
    weights.write_bytes((folder / "run" / "model.safetensors").read_bytes())
    options = [
        *PLATEAU,
        f"init_from={weights}",
        "train.freeze=[0]",
        "train.head_lr=0.1",
        "train.ema_decay=0.5",
    ]
    assert command(*options, "train.epochs=4", "hydra.run.dir=whole")[0] == 0
    assert command(*options, "train.epochs=2", "hydra.run.dir=longer")[0] == 0
    weights.unlink()
    status, out, _ = command("resume=longer", "train.epochs=4", "log_every=7")
    assert status == 0
    assert "now to 4 epochs in place of 2" in out
    assert "init_from" not in out
    ours, theirs = (Checkpoint.load(Path(run, "checkpoint.pt")) for run in ("longer", "whole"))
    assert ours.config["train"] == theirs.config["train"]
    assert ours.step == theirs.step
    for found, wanted in ((ours.model, theirs.model), (ours.average or {}, theirs.average or {})):
        assert wanted
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    epochs = [json.loads(line)["epoch"] for line in Path("longer/metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]
    assert json.loads(Path("longer/summary.json").read_text())["epochs"] == 4
    assert "  epochs: 4\n" in Path("longer/config.yaml").read_text()
    # A recipe has a number of epochs too, but does not ask for more.
    for asked in (["train.epochs=3"], ["train.epochs=4"], PLATEAU):
        status, _, err = command("resume=longer", *asked)
        assert status == 2
        assert "resume=longer: that run is finished" in err


def test_a_run_whose_rate_has_ended_says_what_to_do_instead(command: Command) -> None:
    assert command("train.epochs=1", "hydra.run.dir=cycle")[0] == 0
    status, _, err = command("resume=cycle", "train.epochs=3")
    assert status == 2
    assert re.search(
        r"train.epochs=3: the run in \S*cycle lowers its learning rate to zero over 1 epochs "
        r"\(train.schedule=one_cycle\) .*, with init_from=\S*cycle train.epochs=2$",
        err.splitlines()[-1],
    )
    # A rate of nothing: the error never improves, so each epoch but the first reduces it.
    assert command(*PLATEAU, "train.lr=1e-30", "train.epochs=9", "hydra.run.dir=ended")[0] == 0
    assert json.loads(Path("ended/summary.json").read_text())["epochs"] == 5
    status, _, err = command("resume=ended", "train.epochs=12")
    assert status == 2
    assert re.search(r"train.epochs=12: the run in \S*ended has ended by its schedule", err.splitlines()[-1])


def test_weights_of_a_tensor_are_copied_not_shared(folder: Path) -> None:
    tiny.register()
    model = create_model("tiny", 2)
    initial = InitialWeights.read(str(folder / "run"), model, ModelConfig("tiny"))
    initial.copy_to(model, ["dark", "light"], TrainConfig())
    shared: Tensor = initial.weights["0.weight"]
    with torch.no_grad():
        model.get_submodule("0").weight.zero_()
    assert shared.abs().max() > 0
