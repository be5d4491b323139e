"""A recorded and repeated training step, compared with the step itself.

What a CUDA graph does is imitated on the CPU: the operators of a step are recorded with the tensors that they
read and write, and repeated on the same tensors, without the step's Python code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastalex.config import (
    Color,
    Config,
    DataConfig,
    Fit,
    Graph,
    LoaderConfig,
    ModelConfig,
    Optimizer,
    Precision,
    RuntimeConfig,
    TrainConfig,
)
from fastalex.config.checks import validate
from fastalex.data import ImageSet, Loader, Views
from fastalex.data.wrappers import CutMixLoader
from fastalex.distributed.processes import ALONE
from fastalex.errors import ConfigError
from fastalex.kernels import LazyBatch, relu_lrn_max_pool
from fastalex.models.factored_linear import FactoredLinear, Tap
from fastalex.models.pooled_linear import PooledLinear
from fastalex.runs.weights import TrainedNetwork
from fastalex.runtime import _check_step_graph, choose_runtime
from fastalex.training.graphs import WARMUP_STEPS, StepGraphs
from fastalex.training.step import TrainingStep
from fastalex.training.trainer import Trainer
from tests.listed import Listed
from tests.runtimes import a_runtime, loader_on

CROP, CLASSES = 9, 4
EPOCHS = WARMUP_STEPS + 2  # the smaller batch, one an epoch, is recorded in the last but one


class Tape(TorchDispatchMode):
    """Records the operators that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the host waits for the device, which a graph cannot record")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def repeat(self) -> None:
        """Run the operators again, with their results where they were."""
        for func, args, kwargs, result in self.calls:
            if func.is_view or "empty" in func.name() or func.namespace in ("prim", "profiler"):
                continue
            given = {id(t) for t in tree_leaves([args, kwargs]) if isinstance(t, Tensor)}
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and id(old) not in given:
                    old.copy_(new)


class TapeRecorder:
    """Records steps on the CPU; see ``fastalex.training.graphs.Recorder``."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        tape, is_done = Tape(), True
        with tape:
            result = run()  # unlike a GPU, this does the work

        def repeat() -> None:
            nonlocal is_done
            if is_done:
                is_done = False
                return
            self.repeated += 1
            with torch.no_grad():
                tape.repeat()

        return result, repeat


class Network(nn.Module):
    """What AlexNet consists of, small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = PooledLinear(8, 4, 20)
        self.second = FactoredLinear(20, 20)
        self.last = nn.Linear(20, CLASSES)
        self.dropout = nn.Dropout(0.5)

    @property
    def factored_layers(self) -> list[FactoredLinear]:
        return [self.first, self.second]

    def forward(self, images: Tensor, taps: tuple[Tap, ...] = ()) -> Any:
        x = relu_lrn_max_pool(self.norm(self.conv(images)), 5, 5e-4, 0.75, 2.0)
        inputs = []
        for layer, tap in zip(self.factored_layers, taps or (None, None), strict=True):
            if tap is None:
                x = layer(x)
            else:
                x, seen = layer.tapped(x, tap)
                inputs.append(seen)
            x = self.dropout(torch.relu(x))
        logits = self.last(x)
        return (logits, inputs) if taps else logits


class Batches(Listed):
    """Noise; the last batch is smaller, and the labels of every third are probabilities."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = []
        for number in range(8):
            count = 8 if number < 7 else 5
            labels = torch.randint(CLASSES, (count,), generator=generator)
            images = torch.randn(count, 3, CROP, CROP, generator=generator)
            given = labels if number % 3 else nn.functional.one_hot(labels, CLASSES) * 0.7 + 0.1
            self.batches.append((images.contiguous(memory_format=torch.channels_last), given))


def trained(
    config: TrainConfig,
    recorder: TapeRecorder | None,
    factored: bool = True,
    epochs: int = EPOCHS,
    loader: Loader | None = None,
) -> tuple[list[Any], Trainer]:
    torch.manual_seed(0)
    network = Network()
    runtime = replace(a_runtime(), factored=factored)
    trainer = Trainer(network, config, loader or Batches(), None, runtime, log_every=1)
    if recorder is not None:
        trainer.training_step.record(recorder)
    torch.manual_seed(1)
    found = [trainer.run_epoch() for _ in range(epochs)]
    return [(e.train_loss, e.train_top1_error, e.learning_rate) for e in found], trainer


@pytest.mark.parametrize(
    ("settings", "factored"),
    [
        ({}, True),
        ({}, False),
        ({"clip_norm": 0.0, "weight_decay": 0.0}, True),
        ({"accumulate": 2}, True),
        ({"ema_decay": 0.5, "momentum": 0.0}, True),
        ({"optimizer": Optimizer.muon}, True),
    ],
    ids=str,
)
def test_repeated_steps_are_the_steps_themselves(settings: dict[str, Any], factored: bool) -> None:
    """Bit for bit: losses, weights, momentum, averages, and statistics of batch normalisation."""
    config = TrainConfig(epochs=EPOCHS, lr=0.05, **settings)
    recorder = TapeRecorder()
    ours, repeated = trained(config, recorder, factored)
    expected, plain = trained(config, None, factored)
    assert recorder.recorded == 3  # whole batches with two kinds of labels, and the last
    assert recorder.repeated == EPOCHS * 8 - 3 * (WARMUP_STEPS + 1)
    assert ours == expected
    for name, value in plain.model.state_dict().items():
        assert torch.equal(repeated.model.state_dict()[name], value), name
    theirs, mine = plain.state_dict(), repeated.state_dict()
    for number, state in theirs["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(mine["optimizer"]["state"][number][name], value)
    assert mine["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    if repeated.average:
        for name, value in plain.averaged_weights().items():
            assert torch.equal(repeated.averaged_weights()[name], value)


def resident(graph: Graph, fit: Fit = Fit.square, device: str = "cpu") -> Loader:
    """Build a loader of images that are no squares; half of its batches are mixed, the last is smaller."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (29, 12, 16, 3), dtype=np.uint8)
    images = ImageSet(rng.integers(0, CLASSES, 29), pixels=pixels)
    data = DataConfig("synthetic", resize=12, crop=CROP, fit=fit, color=Color.pca)
    options = {"views": Views.random, "batch_size": 8, "network": nn.Identity()}
    loader = loader_on(images, data, LoaderConfig("resident"), graph=graph, device=device, **options)
    return CutMixLoader(loader, CLASSES, 0.5)


@pytest.mark.parametrize("fit", list(Fit))
def test_batches_are_written_where_the_recorded_step_reads_them(fit: Fit) -> None:
    """The same bits as with batches of their own, with and without CutMix."""
    ours, theirs = resident(Graph.step, fit), resident(Graph.network, fit)
    assert any(isinstance(images, LazyBatch) for images, _ in ours)
    assert not any(isinstance(images, LazyBatch) for images, _ in theirs)
    config = TrainConfig(epochs=2 * EPOCHS, lr=0.05)
    recorder = TapeRecorder()
    found, repeated = trained(config, recorder, epochs=2 * EPOCHS, loader=ours)
    expected, plain = trained(config, None, epochs=2 * EPOCHS, loader=theirs)
    assert recorder.repeated > EPOCHS
    assert found == expected
    for name, value in plain.model.state_dict().items():
        assert torch.equal(repeated.model.state_dict()[name], value), name


def test_a_rate_that_is_no_tensor_would_stay_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the comparison above notices what a graph would repeat."""
    expected, _ = trained(TrainConfig(epochs=EPOCHS, lr=0.05), None)
    monkeypatch.setattr(TrainingStep, "_rates_on_device", lambda self: nullcontext())
    found, _ = trained(TrainConfig(epochs=EPOCHS, lr=0.05), TapeRecorder())
    assert found != expected


def test_a_step_that_the_host_waits_for_is_noticed() -> None:
    """Negative control."""
    graphs = StepGraphs(lambda images, labels: images.sum() * images.max().item(), TapeRecorder())
    batch = torch.ones(2), torch.ones(2)
    for _ in range(WARMUP_STEPS):
        graphs(*batch)
    with pytest.raises(AssertionError, match="host waits"):
        graphs(*batch)


def test_it_resumes_to_the_same_bits() -> None:
    config = TrainConfig(epochs=4, lr=0.05)
    expected, whole = trained(config, TapeRecorder(), epochs=4)
    _, first = trained(config, TapeRecorder(), epochs=2)
    state, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(first.weights())
    _, second = trained(config, TapeRecorder(), epochs=0)
    second.load_weights(weights)
    second.load_state_dict(state, None)
    found = [second.run_epoch() for _ in range(2)]
    assert [(e.train_loss, e.train_top1_error, e.learning_rate) for e in found] == expected[2:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "message"),
    [
        ("cuda", torch.float16, 1, "is not for fp16"),
        ("cuda", torch.bfloat16, 2, "is for one process"),
        ("cuda", torch.bfloat16, 1, ""),
    ],
)
def test_where_a_step_cannot_be_recorded(device: str, dtype: torch.dtype, size: int, message: str) -> None:
    world = replace(ALONE, size=size)
    with pytest.raises(ConfigError, match=f"runtime.graph=step: {message}") if message else nullcontext():
        _check_step_graph(torch.device(device), dtype, world)


def test_a_cpu_records_no_step() -> None:
    with pytest.raises(
        ConfigError, match=r"runtime\.graph=step: is for a GPU; on a CPU use runtime.graph=network"
    ):
        choose_runtime(RuntimeConfig(device="cpu", graph=Graph.step))


def test_lars_is_refused_because_its_step_waits_for_the_device() -> None:
    config = Config(ModelConfig(), DataConfig(name="digits"), LoaderConfig())
    config.runtime.graph, config.train.optimizer = Graph.step, Optimizer.lars
    with pytest.raises(ConfigError, match=r"runtime\.graph=step: .* train.optimizer=lars"):
        validate(config)
    with pytest.raises(AssertionError, match="the host waits"):
        trained(TrainConfig(epochs=EPOCHS, lr=0.05, optimizer=Optimizer.lars), TapeRecorder())


def test_a_network_whose_steps_were_recorded_can_be_used_on_a_cpu() -> None:
    runtime = RuntimeConfig(graph=Graph.step, precision=Precision.fp32)
    config = Config(ModelConfig(), DataConfig(), LoaderConfig(), runtime=runtime)
    network = TrainedNetwork(Path("model.safetensors"), "weights=model.safetensors", config, ["a", "b"], {})
    assert network.runtime("cpu").device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_on_a_gpu(compiled: bool, lazy: bool) -> None:
    """Without dropout. Kernels may add in another order when they are recorded, so not to the bit."""
    losses = []
    for graph in (Graph.off, Graph.step):
        torch.manual_seed(0)
        network = Network()
        network.dropout.p = 0.0
        options = {"compile": compiled, "factored": True, "graph": graph, "precision": Precision.fp32}
        runtime = choose_runtime(RuntimeConfig(device="cuda", **options))
        loader: Loader = resident(graph, device="cuda")
        if not lazy:
            listed = loader = Batches()
            listed.batches = [(images.cuda(), labels.cuda()) for images, labels in listed.batches]
        trainer = Trainer(runtime.place(network), TrainConfig(epochs=EPOCHS, lr=0.05), loader, None, runtime)
        losses.append([trainer.run_epoch().train_loss for _ in range(EPOCHS)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
