"""The trainer and a plain PyTorch loop take the same steps from the same weights and batches."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import reference
from fastalex.config import Precision, RuntimeConfig, Schedule, TrainConfig
from fastalex.runtime import choose_runtime
from fastalex.training.trainer import Trainer
from tests.listed import Listed
from tests.ranks import narrow_alexnet
from tests.tolerances import (
    NOISE,
    Tensors,
    assert_as_accurate,
    assert_within_noise,
    far_from_jumps,
    gradients,
    joined,
    unit_roundoff,
    usual_sum_error,
)

STEPS, BATCH, CROP, LR = 5, 16, 63, 0.004
# Our names of the baseline's layers.
OURS = {
    "features.0": "conv1",
    "features.4": "conv2",
    "features.8": "conv3",
    "features.10": "conv4",
    "features.12": "conv5",
    "classifier.2": "fc6",
    "classifier.5": "fc7",
    "classifier.7": "fc8",
}


class Batches(Listed):
    """Batches of noise whose mean depends on the class, so that there is something to learn."""

    def __init__(self, dtype: torch.dtype, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for step in range(STEPS):
            labels = torch.randint(10, (BATCH,), generator=generator)
            images = torch.randn(BATCH, 3, CROP, CROP, generator=generator)
            images = (images + labels.view(-1, 1, 1, 1) / 2 - 2) / 4
            if noise:
                images *= 1 + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(step))
            self.batches.append((images.to(dtype, memory_format=torch.channels_last), labels))


def baseline() -> reference.AlexNet:
    """Return the baseline with our weights, 256 hidden units and no dropout, which is elsewhere in it."""
    model = reference.AlexNet()
    model.classifier[2] = nn.Linear(9216, 256)
    model.classifier[5] = nn.Linear(256, 256)
    model.classifier[7] = nn.Linear(256, 10)
    weights = narrow_alexnet().state_dict()
    model.load_state_dict({name: weights[ours(name)] for name in model.state_dict()})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def ours(name: str) -> str:
    """Return our name of a parameter of the baseline."""
    layer, _, kind = name.rpartition(".")
    return f"{OURS[layer]}.{kind}"


def figures(losses: list[float], weights: Tensors) -> dict[str, Tensor]:
    """Return the losses of the steps, and the change of all weights together, by our names."""
    start = narrow_alexnet().state_dict()
    change = {name: weights[name].double() - start[name].double() for name in start}
    return {"losses": torch.tensor(losses, dtype=torch.float64), "change": joined(change)}


def plain(dtype: torch.dtype = torch.float32, noise: float = 0.0) -> dict[str, Tensor]:
    """The figures of the plain loop, with images in a dtype, under autocast if it is bf16."""
    model = baseline()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    losses = []
    for images, labels in Batches(dtype, noise):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses.append(reference.train_step(model, optimizer, images.contiguous(), labels).item())
    return figures(losses, {ours(name): value for name, value in model.state_dict().items()})


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return plain()


@pytest.fixture(scope="module")
def noisy() -> dict[str, Tensor]:
    return plain(noise=NOISE)


def trained(precision: Precision, *, compiled: bool = False, accumulate: int = 1) -> dict[str, Tensor]:
    """The figures of the trainer."""
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=precision, compile=compiled))
    losses: list[float] = []
    trainer = Trainer(
        runtime.place(narrow_alexnet()),
        TrainConfig(lr=LR, schedule=Schedule.plateau, batch_size=BATCH, accumulate=accumulate, clip_norm=0.0),
        Batches(runtime.dtype),
        None,
        runtime,
        log_every=1,
        on_step=lambda step, loss: losses.append(loss if loss is not None else float("nan")),
    )
    trainer.run_epoch()
    return figures(losses, trainer.weights())


LOGIT = usual_sum_error(torch.float32, 256)  # of a sum over the hidden units


@pytest.mark.parametrize("accumulate", [1, 4])
def test_fp32(accumulate: int, expected: Tensors, noisy: Tensors) -> None:
    assert_within_noise(trained(Precision.fp32, accumulate=accumulate), expected, noisy, floor=LOGIT)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_fp32_compiled(expected: Tensors, noisy: Tensors) -> None:
    assert_within_noise(trained(Precision.fp32, compiled=True), expected, noisy, floor=LOGIT)


def test_bf16(expected: Tensors) -> None:
    """As close to fp32 as plain PyTorch under autocast, which rounds the logits too."""
    found, theirs = trained(Precision.bf16), plain(torch.bfloat16)
    assert_as_accurate(found, [theirs], expected, factor=2.0, floor=unit_roundoff(torch.bfloat16))


@pytest.mark.parametrize(("count", "crop"), [(2, 63), (1, 127)])
def test_gradients_of_all_parameters(count: int, crop: int) -> None:
    """Of images so large that normalisation matters."""
    exact = baseline().double()
    images, labels = far_from_jumps(exact, count, 3, crop, crop, scale=30), torch.tensor([3, 7])[:count]
    found = []
    for network, memory_format in (
        (narrow_alexnet(), torch.channels_last),
        (baseline(), torch.contiguous_format),
        (baseline(), torch.channels_last),
        (exact, torch.contiguous_format),
    ):
        given = images.to(next(network.parameters()).dtype, memory_format=memory_format)
        F.cross_entropy(network.to(memory_format=memory_format)(given), labels).backward()
        found.append(gradients(network))
    *plain, truth = ({ours(name): value for name, value in each.items()} for each in found[1:])
    # The longest sums are those of a product with fc6's weight.
    assert_as_accurate(found[0], plain, truth, floor=usual_sum_error(torch.float32, 9216))
