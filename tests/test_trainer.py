"""The training loop, compared with the same steps in plain PyTorch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn import functional as F

from fastalex.config import Precision, RuntimeConfig, Schedule, Stage, TrainConfig
from fastalex.data import StagedLoader
from fastalex.distributed.processes import World
from fastalex.errors import DivergedError
from fastalex.models import create_model
from fastalex.runtime import choose_runtime
from fastalex.training.metrics import predict
from fastalex.training.timing import WARMUP_STEPS
from fastalex.training.trainer import Trainer
from tests.compiling import Compiler
from tests.listed import Listed
from tests.ranks import narrow_alexnet
from tests.tolerances import assert_same_in_float64, sum_bound


class Batches(Listed):
    """A loader over batches in memory; the order differs between epochs."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.epoch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        shift = self.epoch % len(self.batches)
        return iter(self.batches[shift:] + self.batches[:shift])


def batches(count: int = 4, size: int = 8, crop: int = 63) -> Batches:
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        labels = torch.randint(0, 10, (size,), generator=generator)
        images = torch.randn(size, 3, crop, crop, generator=generator) + labels.view(-1, 1, 1, 1)
        result.append((images.to(memory_format=torch.channels_last), labels))
    return Batches(result)


def fp32():
    return choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32))


def test_two_epochs_match_plain_pytorch() -> None:
    config = TrainConfig(epochs=2, lr=0.01, warmup=0.5, clip_norm=0.0)
    loader = batches(size=4)
    loader.batches = [(images.double(), labels) for images, labels in loader.batches]
    model, plain = fp32().place(narrow_alexnet().double()), narrow_alexnet().double()

    trainer = Trainer(model, config, loader, loader, fp32(), log_every=1)
    epochs = [trainer.run_epoch(), trainer.run_epoch()]
    assert trainer.finished

    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    expected = []
    for step in range(8):
        # Linear from lr/25 to the peak at 0.5 * 9 - 1 = 3.5 steps, then to (almost) zero at step 8.
        rise = min(step / 3.5, 1.0)
        rate = 0.01 / 25 + rise * (0.01 - 0.01 / 25)
        if step > 3.5:
            rate = 0.01 - (step - 3.5) / 4.5 * (0.01 - 0.01 / 25e4)
        optimizer.param_groups[0]["lr"] = rate
        images, labels = loader.batches[(step + step // 4) % 4]
        loss = F.cross_entropy(plain(images.contiguous()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for epoch, losses in zip(epochs, (expected[:4], expected[4:]), strict=True):
        assert epoch.train_loss == pytest.approx(sum(losses) / 4)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_same_in_float64(ours, theirs)
    with torch.no_grad():
        images = torch.cat([images for images, _ in loader.batches])
        labels = torch.cat([labels for _, labels in loader.batches])
        logits = plain.eval()(images)
    # The probabilities are fp32.
    loss = F.cross_entropy(logits, labels).item()
    assert epochs[1].validation_loss == pytest.approx(loss, rel=sum_bound(torch.float32, 10))
    assert epochs[1].validation_top1_error == (logits.argmax(1) != labels).double().mean().item()


def test_steps_losses_and_figures_are_reported() -> None:
    seen: list[tuple[int, float | None]] = []
    loader = batches(count=5)
    trainer = Trainer(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10)),
        TrainConfig(epochs=1, lr=1e-5),
        loader,
        loader,
        fp32(),
        log_every=2,
        on_step=lambda step, loss: seen.append((step, loss)),
    )
    epoch = trainer.run_epoch()
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert [loss is not None for _, loss in seen] == [False, True, False, True, False]
    assert (epoch.epoch, epoch.step) == (1, 5)
    assert 0 <= epoch.train_top1_error <= 1
    assert epoch.images_per_second > 0
    assert 0 <= epoch.input_wait_fraction <= 1
    assert trainer.images_per_second == pytest.approx(epoch.images_per_second)


def test_warmup_is_timed_separately_and_only_once() -> None:
    class Slow(Batches):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in enumerate(super().__iter__()):
                if number < WARMUP_STEPS and self.epoch == 0:
                    time.sleep(0.1)
                yield batch

    loader = Slow(batches(count=5).batches)
    trainer = Trainer(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10)),
        TrainConfig(epochs=2, lr=1e-5),
        loader,
        None,
        fp32(),
    )
    first, second = trainer.run_epoch(), trainer.run_epoch()
    assert 0.1 * WARMUP_STEPS <= first.warmup_seconds < first.seconds
    assert second.warmup_seconds < 0.1


def test_without_validation_there_are_no_validation_figures() -> None:
    loader = batches(count=4)
    trainer = Trainer(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10)), TrainConfig(lr=1e-5), loader, None, fp32()
    )
    epoch = trainer.run_epoch()
    assert epoch.validation_loss is None
    assert epoch.validation_top1_error is None


@pytest.mark.parametrize("log_every", [1, 3, 100])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_divergence_error_names_step_and_learning_rate(log_every: int, poison: float) -> None:
    loader = batches(count=5)
    loader.batches[3][0][0, 0, 0, 0] = poison
    trainer = Trainer(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10)),
        TrainConfig(lr=1e-5, schedule=Schedule.plateau),
        loader,
        loader,
        fp32(),
        log_every=log_every,
    )
    with pytest.raises(DivergedError, match=r"the loss became nan at step 4 with learning rate 1e-05"):
        trainer.run_epoch()


def test_plateau_ends_the_run_after_its_last_reduction() -> None:
    loader = batches(count=1)
    config = TrainConfig(epochs=1000, lr=1e-30, schedule=Schedule.plateau, patience=0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10))
    trainer = Trainer(network, config, loader, loader, fp32())
    epochs = 0
    while not trainer.finished:
        trainer.run_epoch()
        epochs += 1
    assert epochs == 5  # the first sets the best error, then four without improvement


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_clipping_limits_the_length_of_the_step(clip_norm: float) -> None:
    loader = batches(count=1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10))
    before = [parameter.detach().clone() for parameter in network.parameters()]
    images, labels = loader.batches[0]
    F.cross_entropy(network.double()(images.double()), labels).backward()
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in network.parameters()))
    network.float().zero_grad()
    config = TrainConfig(lr=1e-4, momentum=0, weight_decay=0, clip_norm=clip_norm, schedule=Schedule.plateau)
    Trainer(network, config, loader, None, fp32()).run_epoch()
    moved = math.sqrt(
        sum(
            (new.detach().double() - old.double()).square().sum().item()
            for new, old in zip(network.parameters(), before, strict=True)
        )
    )
    assert norm > 0.5
    assert moved == pytest.approx(1e-4 * (min(norm, clip_norm) if clip_norm else norm), rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_spreads_its_fraction_over_all_classes(smoothing: float) -> None:
    loader = batches(count=1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10))
    (images, labels) = loader.batches[0]
    log_likelihood = network.double()(images.double()).log_softmax(1)
    target = torch.full_like(log_likelihood, smoothing / 10)
    target[torch.arange(len(labels)), labels] += 1 - smoothing
    expected = -(target * log_likelihood).sum(1).mean().item()
    epoch = Trainer(
        network.float(), TrainConfig(lr=1e-5, label_smoothing=smoothing), loader, None, fp32()
    ).run_epoch()
    assert epoch.train_loss == pytest.approx(expected, rel=1e-5)


def test_cutmix_loss_has_both_classes_and_the_larger_one_is_correct() -> None:
    loader = batches(count=1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10))
    images, labels = loader.batches[0]
    shares = 0.7 * F.one_hot(labels, 10) + 0.3 * F.one_hot((labels + 1) % 10, 10)
    loader.batches = [(images, shares)]
    exact = copy.deepcopy(network).double()(images.double())
    likelihood = exact.log_softmax(1)
    own, other = (likelihood.gather(1, column[:, None]) for column in (labels, (labels + 1) % 10))
    epoch = Trainer(network, TrainConfig(lr=1e-5, accumulate=2), loader, None, fp32()).run_epoch()
    assert epoch.train_loss == pytest.approx(-(0.7 * own + 0.3 * other).mean().item(), rel=1e-5)
    assert epoch.train_top1_error == (exact.argmax(1) != labels).double().mean().item()


def test_validation_uses_the_averaged_weights() -> None:
    loader = batches(count=17)
    decay = 0.9
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10))
    seen: list[Tensor] = []
    trainer = Trainer(
        network,
        TrainConfig(lr=1e-4, ema_decay=decay, schedule=Schedule.plateau, clip_norm=0.0),
        loader,
        loader,
        fp32(),
        on_step=lambda step, loss: seen.append(network[1].weight.detach().double().clone()),
    )
    epoch = trainer.run_epoch()
    # Updated at steps 8 and 16; the first update copies the weights.
    expected = decay**8 * seen[7] + (1 - decay**8) * seen[15]
    with trainer.evaluated():
        torch.testing.assert_close(network[1].weight.double(), expected, rtol=0, atol=1e-6)
        images, labels = map(torch.cat, zip(*loader.batches, strict=True))
        with torch.no_grad():
            loss = F.cross_entropy(network(images), labels).item()
    assert epoch.validation_loss == pytest.approx(loss, rel=1e-5)
    assert torch.equal(network[1].weight.double(), seen[-1])  # training keeps its own weights
    averaged = trainer.averaged_weights()
    assert averaged is not None
    torch.testing.assert_close(averaged["1.weight"].double(), expected, rtol=0, atol=1e-6)


def test_the_average_is_not_used_before_its_first_update() -> None:
    loader = batches(count=3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10))
    trainer = Trainer(network, TrainConfig(lr=1e-4, ema_decay=0.9), loader, None, fp32())
    trainer.run_epoch()
    now = network[1].weight.detach().clone()
    with trainer.evaluated():
        assert torch.equal(network[1].weight, now)
    assert trainer.averaged_weights() is None


@pytest.mark.parametrize("size", [None, 7, 6], ids=["even", "a smaller last part", "fewer parts"])
def test_accumulation_gives_the_same_step(size: int | None) -> None:
    weights = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10)).double()
        loader = batches(count=3)
        loader.batches = [(images[:size].double(), labels[:size]) for images, labels in loader.batches]
        config = TrainConfig(lr=1e-4, accumulate=accumulate, clip_norm=1.0, label_smoothing=0.1)
        epoch = Trainer(network, config, loader, None, fp32()).run_epoch()
        weights.append((network[1].weight.detach(), epoch.train_loss, epoch.train_top1_error))
    (whole, *figures), (parts, *figures_in_parts) = weights
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert figures_in_parts == pytest.approx(figures)


def test_flops_leave_out_warmup_steps() -> None:
    loader = batches(count=6)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 63 * 63, 10))
    trainer = Trainer(network, TrainConfig(lr=1e-5), loader, None, fp32(), peak_flops=1e9)
    epoch = trainer.run_epoch()
    per_image = 2 * 2 * 3 * 63 * 63 * 10  # forward, and the gradient of the weights
    assert epoch.flops_per_second == pytest.approx(per_image * epoch.images_per_second)
    assert epoch.flops_utilization == pytest.approx(epoch.flops_per_second / 1e9)
    assert trainer.flops_utilization == pytest.approx(epoch.flops_utilization)


def test_bf16_training_keeps_fp32_weights_and_learns() -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.bf16))
    torch.manual_seed(0)
    model = runtime.place(create_model("alexnet", init="he"))
    loader = batches(count=2)
    loader.batches = [(images.bfloat16(), labels) for images, labels in loader.batches]
    trainer = Trainer(model, TrainConfig(epochs=5, lr=0.01, clip_norm=0.0), loader, loader, runtime)
    first, *_, last = [trainer.run_epoch() for _ in range(5)]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert last.validation_loss < 0.8 * first.validation_loss


class Logits(nn.Module):
    """A network that returns the same bf16 logits for any input."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.float())

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.bfloat16()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_bf16_logits_is_computed_in_fp32(smoothing: float) -> None:
    """Without autocast, as here, cross-entropy of bf16 logits is wrong in the third digit."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 100, (8,), generator=generator)
    logits = torch.randn(8, 100, generator=generator).bfloat16()
    exact = F.cross_entropy(logits.double(), labels, label_smoothing=smoothing).item()
    assert F.cross_entropy(logits, labels, label_smoothing=smoothing).item() != pytest.approx(exact, rel=1e-4)
    config = TrainConfig(lr=1e-3, label_smoothing=smoothing)
    epoch = Trainer(Logits(logits), config, Batches([(logits, labels)]), None, fp32()).run_epoch()
    assert epoch.train_loss == pytest.approx(exact, rel=1e-6)


def of_sizes(*sizes: int, crop: int) -> Batches:
    """Batches with the given numbers of images."""
    return Batches(
        [(torch.randn(size, 3, crop, crop), torch.zeros(size, dtype=torch.int64)) for size in sizes]
    )


def convolution() -> nn.Module:
    """A network for any crop size."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_all_of_a_staged_run_and_its_evaluation_is_compiled(accumulate: int, compiler: Compiler) -> None:
    """No call of the network runs uncompiled or exceeds the limit of variants."""
    runtime = replace(fp32(), compile=True)
    train, validation = (
        StagedLoader([of_sizes(*sizes, crop=crop) for crop in (8, 12)], epochs=[1])
        for sizes in ((8, 8, 7), (8, 8, 5))
    )
    config = TrainConfig(epochs=3, lr=1e-3, accumulate=accumulate, stages=[Stage(1, 8, 8)])
    trainer = Trainer(convolution(), config, train, validation, runtime)
    for _ in range(3):
        trainer.run_epoch()
    parts = 4 if accumulate == 4 else 1  # of 2, 2, 2 and 1 images in the last batch
    assert compiler.calls == 3 * (3 * parts + 3)
    with trainer.evaluated() as network:
        for sizes in ((8, 8, 6), (10, 10, 3)):  # centre crop and ten-crop of the test set
            predict(network, of_sizes(*sizes, crop=12), runtime)
    assert compiler.calls == 3 * (3 * parts + 3) + 6
    assert compiler.graphs == 2 * (2 + 2) + 3


class Lazy:
    """A batch that the network materializes; stands for ``fastalex.kernels.LazyBatch``."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    @property
    def shape(self) -> torch.Size:
        return self.images.shape

    def chunk(self, chunks: int) -> list[Lazy]:
        return [Lazy(images) for images in self.images.chunk(chunks)]


class Materializing(nn.Module):
    """A network that takes tensors and lazy batches."""

    def __init__(self) -> None:
        super().__init__()
        self.network = convolution()

    def forward(self, images: Tensor | Lazy) -> Tensor:
        return self.network(images.images if isinstance(images, Lazy) else images)


def test_the_limit_of_variants_is_the_most_that_a_run_can_have(compiler: Compiler) -> None:
    """Three sizes of parts, at two crops, lazy or not, and two sizes of batch in each validation."""
    runtime = replace(fp32(), compile=True)
    batches: list[Batches] = []
    for crop in (8, 12):
        pixels, lazy = of_sizes(16, 7, crop=crop), of_sizes(16, 7, crop=crop)
        lazy.batches = [(Lazy(images), labels) for images, labels in lazy.batches]
        batches.append(Batches(pixels.batches + lazy.batches))
    train = StagedLoader(batches, epochs=[1])
    validation = StagedLoader([of_sizes(16, 5, crop=crop) for crop in (8, 12)], epochs=[1])
    config = TrainConfig(epochs=2, lr=1e-3, accumulate=4, stages=[Stage(1, 8, 8)])
    trainer = Trainer(Materializing(), config, train, validation, runtime)
    trainer.run_epoch()
    trainer.run_epoch()
    with trainer.evaluated() as network:
        for sizes in ((15, 6), (10, 3)):
            predict(network, of_sizes(*sizes, crop=12), runtime)
    assert compiler.graphs == 2 * (2 * 3 + 2) + 4
    with pytest.raises(FailOnRecompileLimitHit):  # the limit is exact
        network(torch.zeros(9, 3, 12, 12))


@pytest.mark.parametrize(
    ("accumulate", "processes", "mode"),
    [(1, 1, "reduce-overhead"), (2, 1, "default"), (1, 2, "default"), (2, 2, "default")],
)
def test_no_cuda_graphs_when_gradients_are_kept_over_passes(
    accumulate: int, processes: int, mode: str, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next pass of a CUDA graph overwrites the outputs of the last."""
    monkeypatch.setattr(
        "fastalex.distributed.strategies.parallelize", lambda model, *rest: nn.Sequential(model)
    )
    gpu = replace(fp32(), compile=True, device=torch.device("cuda"))
    config = TrainConfig(accumulate=accumulate)
    loader = of_sizes(8, crop=8)
    Trainer(convolution(), config, loader, None, gpu, world=replace(World(), size=processes))
    assert {options["mode"] for options in compiler.asked} == {mode}
