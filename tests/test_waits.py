"""The host never waits for the device between two checks of the loss."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastalex.config import DataConfig, LoaderConfig, Optimizer, Precision, RuntimeConfig, TrainConfig
from fastalex.data import CutMixLoader, ImageSet, Loader, Views
from fastalex.data.loader import PlannedLoader, sent
from fastalex.runtime import Runtime, choose_runtime
from fastalex.training.metrics import predict
from fastalex.training.timing import WARMUP_STEPS
from fastalex.training.trainer import Trainer
from tests.listed import Listed
from tests.runtimes import loader_on
from tests.waits import GPU, Waits, gpu, no_waits_allowed

CPU = torch.device("cpu")
CLASSES, BATCH, STEPS = 7, 6, 20
PACKAGES = {"dali": "nvidia.dali", "ffcv": "ffcv"}
DATA = DataConfig(name="test", resize=20, crop=16)


class Stopped(Exception):
    """Ends an epoch early, because the loss is checked at its end."""


class RandomBatches(Listed):
    """A loader of random batches.

    Args:
        device: of the batches.
        poison: index of a batch with infinite pixels.
    """

    def __init__(self, device: torch.device, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (
                torch.randn(BATCH, 3, 8, 8, generator=generator).to(device),
                torch.arange(BATCH, device=device) % CLASSES,
            )
            for _ in range(STEPS)
        ]
        if poison is not None:
            self.batches[poison][0].fill_(torch.inf)


def images(count: int = 5 * BATCH) -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 8, 10, 3), dtype=np.uint8)
    return ImageSet(np.arange(count, dtype=np.int64) % CLASSES, pixels=pixels)


def network(device: torch.device) -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
    return nn.Sequential(*layers).to(device)


def between_checks(
    loader: Loader, runtime: Runtime, warm: Callable[[], None], scaled: bool = False, **recipe: Any
) -> None:
    """Take all steps of an epoch but the last; call ``warm`` after the warm-up steps."""

    def on_step(step: int, loss: float | None) -> None:
        if step == WARMUP_STEPS + 1:
            warm()
        if step == STEPS - 1:
            raise Stopped

    config = TrainConfig(epochs=2, lr=1e-3, batch_size=BATCH, **recipe)
    trainer = Trainer(network(runtime.device), config, loader, None, runtime, log_every=1000, on_step=on_step)
    if scaled:
        trainer.training_step.scaler = torch.amp.GradScaler(runtime.device.type)
    with pytest.raises(Stopped):
        trainer.run_epoch()


def test_waits_are_detected() -> None:
    with Waits() as waits:
        values = torch.zeros(3, device=GPU)
        assert waits.found == []
        float(values.sum())
        bool(values.sum() > 1)
        values[values > 0]
        values.nonzero()
        values.cpu()
        torch.zeros(3).to(GPU)
        values.copy_(torch.zeros(3))
        torch.as_tensor([1.0], device=GPU)
        torch.zeros(3).to(GPU, non_blocking=True)
        values.copy_(torch.zeros(3), non_blocking=True)
    copies = [
        "_to_copy from meta to cpu",
        "_to_copy from cpu to meta",
        "copy_ from cpu to meta",
        "as_tensor on meta",
    ]
    assert waits.found == ["_local_scalar_dense"] * 2 + ["index by a mask", "nonzero", *copies]


RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 1e-3},
    "in parts": {"accumulate": 3},
    "averaged": {"ema_decay": 0.9},
    "Muon": {"optimizer": Optimizer.muon, "clip_norm": 1e-3},
    "all of it": {"clip_norm": 1e-3, "accumulate": 2, "ema_decay": 0.9, "label_smoothing": 0.1},
}


@pytest.mark.parametrize("cutmix", [0.0, 0.5], ids=["", "mixed"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_no_step_waits(
    recipe: dict[str, Any], scaled: bool, cutmix: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch has fused SGD for real devices only; on the meta device it computes nothing.
    monkeypatch.setattr(
        sys.modules[torch.optim.SGD.__module__], "_device_dtype_check_for_fused", lambda parameter: None
    )
    loader: Loader = RandomBatches(GPU)
    if cutmix:
        torch.manual_seed(0)
        loader = CutMixLoader(loader, CLASSES, cutmix)
    with Waits() as waits:
        between_checks(loader, gpu(), waits.found.clear, scaled, **recipe)
    assert waits.found == []


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_step_with_an_overflowing_gradient_is_skipped(clip_norm: float) -> None:
    """As with GradScaler alone, although here the optimizer skips it."""
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32))
    states: list[list[Tensor]] = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))

    def on_step(step: int, loss: float | None) -> None:
        momentum = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
        states.append([tensor.detach().clone() for tensor in (*model.parameters(), *momentum)])
        if step == 6:
            raise Stopped

    config = TrainConfig(epochs=1, lr=1e-3, clip_norm=clip_norm)
    trainer = Trainer(
        model, config, RandomBatches(CPU, poison=4), None, runtime, log_every=1000, on_step=on_step
    )
    trainer.training_step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pytest.raises(Stopped):
        trainer.run_epoch()
    before, poisoned, after = states[3:]
    assert len(before) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, poisoned, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(poisoned, after, strict=True))
    assert all(tensor.isfinite().all() for tensor in after)
    assert trainer.training_step.scaler.get_scale() == 512.0


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_loss_scaling_gives_the_same_step(scale: float) -> None:
    weights = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
        runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32))
        trainer = Trainer(model, TrainConfig(epochs=1, lr=1e-2), RandomBatches(CPU), None, runtime)
        trainer.training_step.scaler = scaler or trainer.training_step.scaler
        trainer.run_epoch()
        weights.append(model[1].weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def epoch_of(name: str, views: Views, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loader:
    """A loader onto the meta device; its plan is drawn on the CPU, since meta has no generator."""
    if name in PACKAGES and not installed(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is not installed: .ci/install-loaders does that")
    plan = PlannedLoader.plan
    monkeypatch.setattr(
        PlannedLoader, "plan", lambda self, device="cpu": plan(self, "cpu").to(torch.device(device))
    )
    return loader_of(name, views, GPU, tmp_path)


def loader_of(name: str, views: Views, device: torch.device, tmp_path: Path) -> Loader:
    config = LoaderConfig(name=name, workers=0, beton=str(tmp_path))
    return loader_on(images(), DATA, config, views=views, batch_size=BATCH, device=device)


def installed(package: str) -> bool:
    parent = package.partition(".")[0]
    return find_spec(parent) is not None and find_spec(package) is not None


@pytest.mark.parametrize("views", list(Views), ids=lambda views: views.value)
@pytest.mark.parametrize("name", ["resident", "torchvision", "dali", "ffcv"])
def test_no_batch_waits(name: str, views: Views, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Except the first of an epoch, which may send the plan."""
    batches = iter(epoch_of(name, views, monkeypatch, tmp_path))
    next(batches)
    with Waits() as waits:
        rest = list(batches)
    assert len(rest) == 4
    assert all(labels.device == GPU for _, labels in rest)
    assert waits.found == []


def test_no_validation_batch_waits() -> None:
    model, batches = network(GPU), RandomBatches(GPU).batches
    with Waits() as waits:
        predict(model, batches, gpu())
    assert waits.found == []


def test_data_for_a_gpu_are_first_copied_to_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def empty_like(tensor: Tensor, pin_memory: bool = False) -> Tensor:
        calls.append("pinned" if pin_memory else "pageable")
        return torch.empty(tensor.shape)

    def to(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
        calls.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(Tensor, "to", to)
    device, ring_buffer = torch.device("cuda", 1), torch.ones(3)
    found = sent(ring_buffer, device)
    ring_buffer.zero_()
    assert found.tolist() == [1.0, 1.0, 1.0]
    assert calls == ["pinned", (device, True)]


@pytest.mark.gpu
def test_data_for_a_gpu_may_be_overwritten_once_sent() -> None:
    """Even if the GPU is busy and the source is pinned memory."""
    ring_buffer = torch.ones(1 << 20, pin_memory=True)
    busy = torch.ones(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy
    found = sent(ring_buffer, torch.device("cuda"))
    ring_buffer.zero_()
    assert bool((found == 1).all())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16], ids=lambda p: p.value)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_no_step_waits_on_a_gpu(recipe: dict[str, Any], precision: Precision, compiled: bool) -> None:
    """As detected by CUDA; the warm-up steps, which compile kernels, may wait."""
    runtime = choose_runtime(RuntimeConfig(device="cuda", precision=precision, compile=compiled))
    torch.manual_seed(0)
    loader = CutMixLoader(RandomBatches(runtime.device), CLASSES, 0.0 if compiled else 0.5)
    with ExitStack() as context:
        between_checks(loader, runtime, lambda: context.enter_context(no_waits_allowed()), **recipe)


@pytest.mark.gpu
@pytest.mark.parametrize("views", list(Views), ids=lambda views: views.value)
@pytest.mark.parametrize("name", ["resident", "torchvision", "dali", "ffcv"])
def test_no_batch_waits_on_a_gpu(name: str, views: Views, tmp_path: Path) -> None:
    if name in PACKAGES and not installed(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is not installed: .ci/install-loaders does that")
    loader = loader_of(name, views, torch.device("cuda"), tmp_path)
    list(loader)  # compiles the kernels
    batches = iter(loader)
    next(batches)
    with no_waits_allowed():
        rest = list(batches)
    torch.cuda.synchronize()
    assert [len(labels) for _, labels in rest] == [BATCH] * 4
