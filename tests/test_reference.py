"""The plain PyTorch baseline, against the paper's formulas and its command line on real files."""

from __future__ import annotations

import ast
import hashlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets

from benchmarks import reference

ROOT = Path(__file__).parents[1]


def write_tree(root: Path, train: int = 5, test: int = 1, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """`{train,test}/CLASS/N.jpg`, so many 32x32 images of noise to a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root


def one_line_failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a run that exits with status 2 and a single line says."""
    with pytest.raises(SystemExit) as exit_info:
        reference.main(arguments)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_imports_nothing_from_fastalex() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(reference.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert {"torch", "torchvision"} <= imported
    assert not imported & {"fastalex", "kernels"}


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 58_322_314), (1000, 62_378_344)])
def test_parameter_count(num_classes: int, parameters: int) -> None:
    with torch.device("meta"):
        model = reference.AlexNet(num_classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("size", [63, 224])
def test_forward_shape(size: int) -> None:
    with torch.device("meta"):
        model, images = reference.AlexNet(7), torch.empty(2, 3, size, size)
        assert model(images).shape == (2, 7)
        if size == 224:  # where the adaptive pool is the identity
            assert model.features(images).shape == (2, 256, 6, 6)


def test_local_response_norm_is_the_papers() -> None:
    """Section 3.3: b_i = a_i / (k + alpha * sum over j = i-2..i+2 of a_j^2)^beta, on ReLU, before pooling."""

    def normalise(a: Tensor) -> Tensor:
        padded = F.pad(a.square(), (0, 0, 0, 0, 2, 2))
        return a / (2 + 1e-4 * sum(padded[:, i : i + a.shape[1]] for i in range(5))) ** 0.75

    torch.manual_seed(0)
    model = reference.AlexNet().double()
    images = 500 * torch.randn(2, 3, 95, 95, dtype=torch.float64)  # large enough for alpha to count
    conv1, conv2 = model.features[0], model.features[4]
    expected = images
    for conv, stride, padding in ((conv1, 4, 2), (conv2, 1, 2)):
        activation = F.relu(F.conv2d(expected, 100 * conv.weight, conv.bias, stride, padding))
        assert activation.square().max() * 1e-4 > 2
        expected = F.max_pool2d(normalise(activation), 3, 2)
        with torch.no_grad():
            conv.weight *= 100
    torch.testing.assert_close(model.features[:8](images), expected, rtol=1e-12, atol=1e-12)


def test_train_step_is_sgd_with_momentum_and_weight_decay() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    images, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    weight, velocity = model.weight.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(3):
        logits = images @ weight.T
        log_likelihood = logits - logits.logsumexp(1, keepdim=True)
        expected_loss = -log_likelihood[torch.arange(6), labels].mean()
        gradient = (log_likelihood.exp() - F.one_hot(labels, 3)).T @ images / 6
        velocity = 0.9 * velocity + gradient + 5e-4 * weight
        weight = weight - 0.1 * velocity
        loss = reference.train_step(model, optimizer, images, labels)
        torch.testing.assert_close(loss, expected_loss)
        assert not loss.requires_grad
    torch.testing.assert_close(model.weight.detach(), weight)


def normalised(image: Image.Image) -> Tensor:
    """(3, 256, 256): the resized image less the mean, undivided."""
    pixels = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    return torch.from_numpy((pixels - [0.485, 0.456, 0.406]).transpose(2, 0, 1)).float()


@pytest.fixture(name="image")
def noise_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_train_transform_crops_and_flips(image: Image.Image) -> None:
    torch.manual_seed(0)
    views = {False: normalised(image), True: normalised(image).flip(2)}
    transform, seen = reference.train_transform(), set()
    for _ in range(12):
        crop = transform(image)
        matches = [
            (flip, top, left)
            for flip, view in views.items()
            for top, left in (view[:, :33, :33] - crop[:, :1, :1]).abs().amax(0).lt(1e-6).nonzero().tolist()
            if torch.allclose(view[:, top : top + 224, left : left + 224], crop, atol=1e-6)
        ]
        seen.update(matches)
        assert len(matches) == 1
    assert {flip for flip, _, _ in seen} == {False, True}
    assert len({top for _, top, _ in seen}) > 3
    assert len({left for _, _, left in seen}) > 3


def test_ten_crop_transform(image: Image.Image) -> None:
    whole = normalised(image)
    crops = [
        view[:, top : top + 224, left : left + 224]
        for view in (whole, whole.flip(2))
        for top, left in ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16))
    ]
    torch.testing.assert_close(reference.ten_crop_transform()(image), torch.stack(crops))


def test_ten_crop_error_is_that_of_the_mean_softmax() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 4, (200, 10, 7)), rng.integers(0, 7, 200)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)

    def errors(scores: np.ndarray) -> list[float]:
        ranked = np.argsort(-scores, axis=1)
        return [
            float(np.mean([y not in row[:k] for y, row in zip(labels, ranked, strict=True)])) for k in (1, 5)
        ]

    assert errors(softmax.mean(axis=1)) != errors(logits.mean(axis=1))
    # The model hands on the logits that the "images" (7 channels of one pixel) hold.
    model = nn.Conv2d(7, 7, 1, bias=False).requires_grad_(False).double()
    nn.init.dirac_(model.weight)
    dataset = TensorDataset(torch.from_numpy(logits)[..., None, None], torch.from_numpy(labels))
    got = reference.ten_crop_evaluate(nn.Sequential(model, nn.Flatten()), dataset, workers=0)
    assert got == pytest.approx(errors(softmax.mean(axis=1)), abs=1e-6)


def test_evaluate_takes_single_views_and_switches_dropout_off() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 4, bias=False)).train()
    nn.init.eye_(model[2].weight)
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])].reshape(8, 4, 1, 1)
    labels = torch.tensor([0, 1, 2, 3, 1, 1, 2, 3])
    got = reference.evaluate(model, DataLoader(TensorDataset(logits, labels), batch_size=3))
    assert got == pytest.approx((1 / 8, 0.0))  # of four classes, all are among the first five


def test_command_line(tmp_path: Path) -> None:
    """The whole program, from files to a ten-crop error, in one step of the real network."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.reference",
        "--data",
        str(write_tree(tmp_path)),
        "--epochs",
        "1",
    ]
    command += ["--batch-size", "2", "--num-workers", "1", "--limit-steps", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    train, test = run.stdout.splitlines()
    figures = re.fullmatch(
        r"epoch 1: (\S+) images/s, learning rate 0\.01, loss (\S+), "
        r"validation top-1 error (\S+), top-5 error (\S+)",
        train,
    )
    assert figures, train
    speed, loss, top1, top5 = map(float, figures.groups())
    assert speed > 0
    assert loss == pytest.approx(np.log(2), abs=0.1)  # two classes, and an untrained network near chance
    assert top1 in (0, 0.5, 1)
    assert top5 == 0
    assert re.fullmatch(r"test, ten-crop: top-1 error (0\.0|0\.5|1\.0)000, top-5 error 0\.0000", test)


def test_sgd_whose_learning_rate_falls_when_validation_error_stalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed's hand rule. A model without weights that count cannot improve on its first epoch."""

    class Constant(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.arange(float(num_classes)))

        def forward(self, images: Tensor) -> Tensor:
            return self.logits.expand(len(images), -1)

    optimizers = []

    def train_step(
        model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
    ) -> Tensor:
        optimizers.append(optimizer)
        return real_train_step(model, optimizer, images, labels)

    real_train_step = reference.train_step
    monkeypatch.setattr(reference, "train_step", train_step)
    monkeypatch.setattr(reference, "AlexNet", Constant)
    arguments = ["--data", str(write_tree(tmp_path)), "--epochs", "5", "--lr", "1e-4", "--num-workers", "0"]
    reference.main(arguments)
    rates = re.findall(r"learning rate (\S+),", capsys.readouterr().out)
    assert [float(rate) for rate in rates] == pytest.approx([1e-4] * 4 + [1e-5])
    (settings,) = optimizers[-1].param_groups
    assert (settings["momentum"], settings["weight_decay"], settings["nesterov"]) == (0.9, 5e-4, False)
    assert settings["lr"] == pytest.approx(1e-5)


def test_reads_the_published_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 3072), dtype=np.uint8)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    batch = {"data": pixels, "labels": [0, 1, 1]}
    names = write("batches.meta", {"label_names": ["cat", "dog"]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write("data_batch_1", batch)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch)])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": names[0], "key": "label_names", "md5": names[1]}
    )
    train = reference.open_split(tmp_path, "train", np.asarray)
    assert train.classes == ["cat", "dog"]
    assert [label for _, label in train] == [0, 1, 1]
    np.testing.assert_array_equal(train[2][0], pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))

    (folder / "data_batch_1").write_bytes(b"cut short")
    with pytest.raises(reference.DataError, match=re.escape(str(tmp_path))):
        reference.open_split(tmp_path, "train", np.asarray)


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line_failure(["--data", str(tmp_path / "nowhere")], capsys)
    assert str(tmp_path / "nowhere") in line
    assert "--data" in line


def test_empty_class_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write_tree(tmp_path) / "train" / "eel").mkdir()
    assert "eel" in one_line_failure(["--data", str(tmp_path)], capsys)


def test_different_classes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write_tree(tmp_path) / "test" / "dog").rename(tmp_path / "test" / "wolf")
    assert "classes" in one_line_failure(["--data", str(tmp_path)], capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_image_is_named(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (write_tree(tmp_path) / "train" / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:400])
    line = one_line_failure(["--data", str(tmp_path), "--num-workers", str(workers)], capsys)
    assert re.search(r"train/cat/\d\.jpg", line)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--epochs", "0"),
        ("--batch-size", "-1"),
        ("--lr", "nan"),
        ("--lr", "-0.1"),
        ("--num-workers", "-1"),
        ("--limit-steps", "0"),
        ("--batch-size", "many"),
    ],
)
def test_bad_argument_is_named(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        reference.main(["--data", "unused", name, value])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert name in message
    assert value in message
