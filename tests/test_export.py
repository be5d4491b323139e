"""Exported networks: used as other programs use them, beside the network in float64."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fastalex import export, predict
from fastalex.config import (
    Config,
    DataConfig,
    ExportFormat,
    Fit,
    LoaderConfig,
    ModelConfig,
    Precision,
    RuntimeConfig,
    TrainConfig,
)
from fastalex.config.plain import plain
from fastalex.config.schema import AlexNetConfig
from fastalex.kernels import LocalResponseNorm, relu_lrn
from fastalex.models import MODELS, create_model
from fastalex.models.plain import plain_network
from fastalex.runs import export as exporting
from fastalex.runs.checkpoint import save_weights
from fastalex.runs.initial_weights import InitialWeights
from tests import tiny
from tests.commands import outcome
from tests.tolerances import SAFETY, assert_near, usual_sum_error

onnx = pytest.importorskip("onnx", reason="exporting to ONNX needs onnx, which is optional")
onnxruntime = pytest.importorskip(
    "onnxruntime", reason="exporting to ONNX needs onnxruntime, which is optional"
)
pytest.importorskip("onnxscript", reason="exporting to ONNX needs onnxscript, which is optional")

CLASSES = ["ant", 'a "bee"\\', "Katze, groß"]
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.1]
# A bound of the error of logits in fp32: AlexNet's longest sums are those of its first hidden layer.
LONGEST_SUM = SAFETY * usual_sum_error(torch.float32, 9216)
SETTINGS = Path(__file__).parents[1] / "docs" / "settings.md"

Command = Callable[..., tuple[int, str, str]]


class Normed(nn.Sequential):
    """Windows of an odd and of an even size, which ONNX's operator has on the other side."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2),
            LocalResponseNorm(3, alpha=2.0),
            nn.LocalResponseNorm(4, alpha=2.0),
            nn.Flatten(),
            nn.Linear(8 * 7 * 7, num_classes),
        )


class Fused(nn.Module):
    """One of fastalex's operators in the middle of a network."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(relu_lrn(images, 5).mean(dim=(2, 3)))


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The networks of this module, and a cache of its own."""
    tiny.register()
    MODELS.update(normed=Normed, fused=Fused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    for name in ("tiny", "normed", "fused"):
        del MODELS[name]


def save_run(
    folder: Path,
    model: ModelConfig,
    resize: int,
    crop: int,
    weights: dict[str, Tensor],
    fit: Fit = Fit.square,
) -> Path:
    config = Config(
        model=model,
        data=DataConfig("imagefolder", resize=resize, crop=crop, fit=fit, mean=MEAN, std=STD),
        loader=LoaderConfig("torchvision", workers=0),
        runtime=RuntimeConfig(device="cpu", precision=Precision.fp32),
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(weights, folder / "model.safetensors", plain(config), CLASSES)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of small networks, by their names."""
    root = tmp_path_factory.mktemp("runs")
    for name, resize, crop in (
        ("tiny", 20, 16),
        ("normed", 20, 16),
        ("fused", 20, 16),
        ("resnet18", 36, 32),
    ):
        torch.manual_seed(0)
        weights = create_model(name, len(CLASSES)).state_dict()
        if name == "tiny":
            weights["6.weight"] *= 20  # so that images differ in their most probable class
        save_run(root / name, ModelConfig(name), resize, crop, weights)
    return root


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of AlexNet at the smallest crop that pools more than one pixel."""
    torch.manual_seed(0)
    weights = create_model("alexnet", len(CLASSES), init="he").state_dict()
    return save_run(tmp_path_factory.mktemp("alexnet"), AlexNetConfig(), 100, 95, weights)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in an empty folder; return its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, main: Callable[[], None] = export.main) -> tuple[int, str, str]:
        return outcome(main, overrides, monkeypatch, capsys)

    return run


def check(logits: Callable[[Tensor], Any], run: Path, network: nn.Module, crop: int) -> None:
    """Compare an exported network with ours in float64, for batches that the command does not try."""
    network.load_state_dict(load_file(run / "model.safetensors"))
    network = network.double().eval()
    for size in (1, 3, 7):
        images = torch.randn(size, 3, crop, crop, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            found, exact = torch.as_tensor(logits(images)), network(images.double())
        assert found.dtype == torch.float32
        assert_near(found, exact, LONGEST_SUM)


def session(path: str) -> tuple[Any, Callable[[Tensor], Any]]:
    made = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return made, lambda images: made.run(["logits"], {"images": images.numpy()})[0]


def test_onnx_has_names_metadata_and_any_batch(runs: Path, command: Command) -> None:
    status, out, err = command(f"weights={runs / 'tiny'}", "output=tiny.onnx")
    assert (status, err) == (0, "")
    assert re.search(r"batches of 1, 2 and 5 images: \S+ of the largest\ntiny.onnx$", out.strip())
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "tiny.onnx"]
    made, logits = session("tiny.onnx")
    (images,), (output,) = made.get_inputs(), made.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["N", 3, 16, 16])
    assert (output.name, output.type, output.shape) == ("logits", "tensor(float)", ["N", 3])
    facts = made.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == CLASSES
    prepared = json.loads(facts["preprocessing"])
    assert prepared == {"resize": 20, "fit": "square", "crop": 16, "mean": MEAN, "std": STD}
    check(logits, runs / "tiny", tiny.Tiny(len(CLASSES)), 16)
    content = Path("tiny.onnx").read_bytes()
    assert b".py" not in content  # no names of this machine's files


def test_onnx_has_alexnets_normalisation_as_its_own_operator(alexnet: Path, command: Command) -> None:
    status, _, err = command(f"weights={alexnet}", "format=onnx", "output=alexnet.onnx")
    assert status == 0, err
    model = onnx.load("alexnet.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [domain.domain for domain in model.opset_import] == [""]
    normed = [node for node in model.graph.node if node.op_type == "LRN"]
    attributes = [
        {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute} for node in normed
    ]
    # The paper's, with ONNX's alpha, which is divided by the size as PyTorch's is
    paper = {"size": 5, "alpha": pytest.approx(5e-4), "beta": 0.75, "bias": 2.0}
    assert attributes == [paper, paper]
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 5
    check(session("alexnet.onnx")[1], alexnet, create_model("alexnet", len(CLASSES)), 95)


def test_a_state_dict_has_alexnets_definition_beside_it(alexnet: Path, command: Command) -> None:
    overrides = f"weights={alexnet}", "format=state_dict", "output=alexnet.safetensors"
    status, out, err = command(*overrides)
    assert status == 0, err
    assert out.splitlines()[-1] == "alexnet.safetensors and alexnet.py"
    source = Path("alexnet.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {node.module for node in imports if isinstance(node, ast.ImportFrom)} == {"collections", "torch"}
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    defined = runpy.run_path("alexnet.py")
    assert defined["CLASSES"] == CLASSES
    assert defined["PREPROCESSING"] == {"resize": 100, "fit": "square", "crop": 95, "mean": MEAN, "std": STD}
    network = defined["network"]()
    network.load_state_dict(load_file("alexnet.safetensors"))
    assert {type(layer).__module__.split(".")[0] for layer in network.modules()} == {"torch", "<run_path>"}
    check(network.eval(), alexnet, create_model("alexnet", len(CLASSES)), 95)
    with safe_open("alexnet.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == CLASSES


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2, "norm": "lrn", "overlapping_pool": False},
        {"groups": 1, "norm": "batch", "overlapping_pool": True},
        {"groups": 1, "norm": "none", "overlapping_pool": True},
    ],
)
def test_plain_variants_of_alexnet_are_its_equivalents(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    options |= {"dropout": 0.5, "init": "default"}
    network, equivalent = create_model("alexnet", 3, **options), plain_network("alexnet", 3, **options)
    if options["norm"] == "batch":
        nn.init.normal_(network.norm_pool1.batch_norm.running_mean)
    equivalent.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 63, 63)
    with torch.no_grad():
        found, expected = equivalent.eval()(images), network.eval()(images)
    assert_near(found, expected.double(), LONGEST_SUM)
    assert expected.std() > 100 * LONGEST_SUM * expected.abs().max()


def test_a_state_dict_of_another_network_is_defined_with_torchvision(runs: Path, command: Command) -> None:
    status, _, err = command(f"weights={runs / 'resnet18'}", "format=state_dict", "output=net.pt")
    assert status == 0, err
    network = runpy.run_path("net.py")["network"]()
    network.load_state_dict(torch.load("net.pt", weights_only=True))
    assert {type(layer) for layer in network.modules() if isinstance(layer, nn.Conv2d)} == {nn.Conv2d}
    check(network.eval(), runs / "resnet18", torchvision.models.resnet18(num_classes=3), 32)
    network_to_train = create_model("resnet18", len(CLASSES))
    assert command(f"weights={runs / 'resnet18'}", "format=state_dict", "output=net.safetensors")[0] == 0
    InitialWeights.read("net.safetensors", network_to_train, ModelConfig("resnet18")).copy_to(
        network_to_train, CLASSES, TrainConfig()
    )
    assert torch.equal(network_to_train.conv1.weight, network.conv1.weight)
    # An export wrote the files, so another may replace them.
    exporting.check_output(ExportFormat.state_dict, Path("net.pt"))


def test_pt2_is_a_program_of_torchs_operators(runs: Path, command: Command) -> None:
    status, _, err = command(f"weights={runs / 'normed'}", "format=pt2", "output=normed.pt2")
    assert status == 0, err
    extra = {exporting.EXTRA_FILE: ""}
    program = torch.export.load("normed.pt2", extra_files=extra)
    assert json.loads(extra[exporting.EXTRA_FILE])["classes"] == CLASSES
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "fastalex" in name]
    check(program.module(), runs / "normed", Normed(len(CLASSES)), 16)
    assert b".py" not in Path("normed.pt2").read_bytes()  # stored uncompressed


def test_onnx_expresses_even_windows_otherwise(runs: Path, command: Command) -> None:
    status, _, err = command(f"weights={runs / 'normed'}", "output=normed.onnx")
    assert status == 0, err
    nodes = onnx.load("normed.onnx").graph.node
    assert [onnx.helper.get_node_attr_value(node, "size") for node in nodes if node.op_type == "LRN"] == [3]
    check(session("normed.onnx")[1], runs / "normed", Normed(len(CLASSES)), 16)


@pytest.mark.parametrize("fit", Fit)
def test_the_program_of_the_documentation_finds_the_classes_of_predict(
    fit: Fit, runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file(runs / "tiny" / "model.safetensors")
    run = save_run(Path("run"), ModelConfig("tiny"), 20, 17, weights, fit)
    rng = np.random.default_rng(0)
    Path("images").mkdir()
    for i in range(24):  # of other shapes, and of other colours in the middle
        pixels = rng.integers(0, 192, 3) + rng.integers(0, 64, (24 + i, 61 - i, 3))
        pixels[:, 20:40] = rng.integers(0, 255, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(f"images/{i:02}.png")
    assert command(f"weights={run}", "images=images", "output=predictions.csv", main=predict.main)[0] == 0
    with Path("predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert command(f"weights={run}", "output=model.onnx")[0] == 0

    section = SETTINGS.read_text(encoding="utf-8").partition("## Export")[2].partition("\n## ")[0]
    program = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    imports = [node for node in ast.parse(program).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.name for node in imports for name in node.names}
    assert names == {"json", "sys", "numpy", "onnxruntime", "Image", "ImageOps"}
    monkeypatch.setattr(sys, "argv", ["program.py", *(row["path"] for row in rows)])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        variables: dict[str, Any] = {}
        exec(compile(program, "program.py", "exec"), variables)
    assert out.getvalue().splitlines() == [f"{row['path']} {row['class_1']}" for row in rows]
    assert len({row["class_1"] for row in rows}) > 1
    # The last image's probability too, which says more: Pillow and torchvision round some pixels otherwise.
    logits = variables["session"].run(["logits"], {"images": variables["images"]})[0]
    best = torch.from_numpy(logits).softmax(dim=1).max().item()
    assert best == pytest.approx(float(rows[-1]["probability_1"]), abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights=tiny"], r"output: has no value; give it as output="),
        (["output=a.onnx"], r"weights: has no value; give it as weights="),
        (
            ["weights=tiny", "format=tflite", "output=a.onnx"],
            r"format: invalid value 'tflite'.*onnx, pt2, state_d",
        ),
        (["weights=tiny", "output=a.pt2"], r"output=a.pt2: format=onnx needs a name that ends with .onnx"),
        (["weights=tiny", "format=pt2", "output=a.pt"], r"a.pt: format=pt2 needs a name that ends with .pt2"),
        (["weights=tiny", "format=state_dict", "output=a"], r"ends with .pt or .safetensors"),
        (["weights=tiny", "output=no/a.onnx"], r"output=no/a.onnx: there is no folder no; make it first"),
        (["weights=none", "output=a.onnx"], r"weights=none: there is no such file"),
        (
            ["weights=wrong", "output=a.onnx"],
            r"weights=\S+: the checkpoint is of another architecture: 0.weight",
        ),
        (
            ["weights=fused", "format=pt2", "output=a.pt2"],
            r"since it uses fastalex.lrn.default, which only fastalex has",
        ),
        (
            ["weights=fused", "output=a.onnx"],
            r"model.name=fused: cannot be exported, since it uses fastalex.lrn.default, which only",
        ),
        (
            ["weights=tiny", "format=state_dict", "output=a.pt"],
            r"no plain definition of model.name=tiny; choose",
        ),
        (
            ["weights=tiny", "format=state_dict", "output=tiny/best.safetensors"],
            r"is a file of a run; choose",
        ),
    ],
)
def test_bad_input_is_one_line(overrides: list[str], message: str, runs: Path, command: Command) -> None:
    other = tiny.Tiny(len(CLASSES)).state_dict() | {"0.weight": torch.zeros(1)}
    save_run(runs / "wrong", ModelConfig("tiny"), 20, 16, other)
    overrides = [
        re.sub(r"=(tiny|fused|wrong)\b(?!\.)", lambda match: f"={runs / match[1]}", override)
        for override in overrides
    ]
    before = sorted(runs.rglob("*"))
    status, out, err = command(*overrides)
    assert status == 2, out
    assert err.startswith("fastalex: error: ")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert not list(Path.cwd().iterdir())
    assert sorted(runs.rglob("*")) == before


def test_a_missing_package_is_one_line(runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, _, err = command(f"weights={runs / 'tiny'}", "output=a.onnx")
    assert status == 2
    assert err.startswith(
        "fastalex: error: format=onnx needs onnxscript: pip install onnxscript, or choose pt2"
    )
    assert not list(Path.cwd().iterdir())
    assert command(f"weights={runs / 'tiny'}", "format=pt2", "output=a.pt2")[0] == 0


def test_a_definition_replaces_no_file_of_the_users(runs: Path, command: Command) -> None:
    Path("train.py").write_text("import torch\n")
    status, _, err = command(f"weights={runs / 'resnet18'}", "format=state_dict", "output=train.pt")
    assert status == 2
    assert "train.py would be replaced, which fastalex.export did not write" in err
    assert Path("train.py").read_text() == "import torch\n"
    assert not Path("train.pt").exists()


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_other_logits_are_not_written(
    wrong: float, runs: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = exporting.read_onnx
    monkeypatch.setattr(exporting, "read_onnx", lambda file: lambda images: read(file)(images) + wrong)
    Path("a.onnx").write_text("old")
    status, _, err = command(f"weights={runs / 'tiny'}", "output=a.onnx")
    assert status == 2
    assert re.match(
        r"fastalex: error: output=a.onnx: its logits differ from the network's by \S+ of the larg", err
    )
    assert Path("a.onnx").read_text() == "old"
    assert list(Path.cwd().iterdir()) == [Path.cwd() / "a.onnx"]
