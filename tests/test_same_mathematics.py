"""The trainer and a plain PyTorch loop compute the same losses from the same weights and batches."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import reference
from fastalex.config import Precision, RuntimeConfig, Schedule, TrainConfig
from fastalex.models import create_model
from fastalex.runtime import choose_runtime
from fastalex.training.trainer import Trainer

STEPS, BATCH, CROP, LR = 20, 16, 63, 0.0004
# The baseline's names of our layers.
BASELINE = {
    "conv1": "features.0",
    "conv2": "features.4",
    "conv3": "features.8",
    "conv4": "features.10",
    "conv5": "features.12",
    "fc6": "classifier.2",
    "fc7": "classifier.5",
    "fc8": "classifier.7",
}


class Batches:
    """Batches of noise whose mean depends on the class, so that there is something to learn."""

    num_samples = STEPS * BATCH

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for _ in range(STEPS):
            labels = torch.randint(10, (BATCH,), generator=generator)
            images = torch.randn(BATCH, 3, CROP, CROP, generator=generator)
            images = (images + labels.view(-1, 1, 1, 1) / 2 - 2) / 4
            self.batches.append((images.to(dtype, memory_format=torch.channels_last), labels))

    def __len__(self) -> int:
        return STEPS

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        pass

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("alexnet", init="he", dropout=0.0)


def baseline(weights: dict[str, Tensor]) -> reference.AlexNet:
    """Return the baseline with our weights and without dropout, which is elsewhere in it than in ours."""
    model = reference.AlexNet()
    model.load_state_dict(
        {f"{BASELINE[layer]}.{kind}": value for (layer, kind), value in _split(weights).items()}
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _split(weights: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    return {(name.rpartition(".")[0], name.rpartition(".")[2]): value for name, value in weights.items()}


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """The losses of the plain loop."""
    model = baseline(network().state_dict())
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    losses = [
        reference.train_step(model, optimizer, images.contiguous(), labels).item()
        for images, labels in Batches()
    ]
    assert losses[-1] < 0.9 * losses[0]  # it learns, so agreement means something
    return losses


def losses(precision: Precision, *, compiled: bool = False, accumulate: int = 1) -> list[float]:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=precision, compile=compiled))
    seen: list[float] = []
    trainer = Trainer(
        runtime.place(network()),
        TrainConfig(lr=LR, schedule=Schedule.plateau, batch_size=BATCH, accumulate=accumulate, clip_norm=0.0),
        Batches(runtime.dtype),
        None,
        runtime,
        log_every=1,
        on_step=lambda step, loss: seen.append(loss if loss is not None else float("nan")),
    )
    trainer.run_epoch()
    return seen


@pytest.mark.parametrize("accumulate", [1, 4])
def test_fp32(expected: list[float], accumulate: int) -> None:
    assert losses(Precision.fp32, accumulate=accumulate) == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_fp32_compiled(expected: list[float]) -> None:
    assert losses(Precision.fp32, compiled=True) == pytest.approx(expected, abs=1e-4)


def test_bf16(expected: list[float]) -> None:
    """bf16 has 8 bits of mantissa: losses agree to 3% in each step, and their sum to 1%."""
    ours = losses(Precision.bf16)
    assert ours == pytest.approx(expected, rel=0.03)
    assert sum(ours) == pytest.approx(sum(expected), rel=0.01)


def test_gradients_of_all_parameters() -> None:
    model = network()
    plain = baseline(model.state_dict()).double()
    # Only two images: with many, some pooling window has two values that fp32 cannot distinguish, and the
    # gradient goes to the other one.
    images = torch.randn(2, 3, CROP, CROP, generator=torch.Generator().manual_seed(1))
    images = images.to(memory_format=torch.channels_last)
    labels = torch.tensor([3, 7])
    F.cross_entropy(model.to(memory_format=torch.channels_last)(images), labels).backward()
    F.cross_entropy(plain(images.double().contiguous()), labels).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        gradient = theirs[f"{BASELINE[layer]}.{kind}"].grad
        assert gradient is not None
        assert parameter.grad is not None
        assert gradient.abs().max() > 0
        distance = (parameter.grad.double() - gradient).norm() / gradient.norm()
        assert distance < 1e-5, f"{name}: {distance:.2g}"
