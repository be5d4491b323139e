"""The choices of the runtime, and the configurations it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from fastalex.config import Precision, RuntimeConfig
from fastalex.errors import ConfigError
from fastalex.runtime import Runtime, choose_runtime
from tests.compiling import Compiler


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_auto_chooses_the_gpu_if_there_is_one() -> None:
    assert choose_runtime(RuntimeConfig()).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("capable", [True, False])
def test_auto_chooses_bf16_only_if_the_cpu_supports_it(
    capable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable, "cpu_name": "x"})
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    assert runtime.dtype == (torch.bfloat16 if capable else torch.float32)


def test_every_choice_can_be_overridden_and_is_printed() -> None:
    runtime = choose_runtime(
        RuntimeConfig(device="cpu", precision=Precision.fp32, channels_last=False, compile=True, threads=1)
    )
    assert torch.get_num_threads() == 1
    assert str(runtime).endswith("float32, NCHW, compiled, Winograd, 1 thread")
    assert "\n" not in str(runtime)


def test_the_usual_number_of_threads_is_that_before_another_was_set() -> None:
    """In a sweep over runtime.threads one process has all runs."""
    usual = choose_runtime(RuntimeConfig(device="cpu")).threads
    assert choose_runtime(RuntimeConfig(device="cpu", threads=usual + 1)).threads == usual + 1
    assert choose_runtime(RuntimeConfig(device="cpu")).threads == torch.get_num_threads() == usual


def test_place_keeps_master_weights_in_fp32_and_channels_last() -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.bf16))
    convolution = runtime.place(nn.Conv2d(3, 8, 5))
    assert convolution.weight.dtype == torch.float32
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    with runtime.autocast():
        assert convolution(torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RuntimeConfig(device="tpu"), "runtime.device=tpu"),
        (RuntimeConfig(device="mps"), "runtime.device=mps"),
        (RuntimeConfig(device=f"cuda:{torch.cuda.device_count()}"), "runtime.device=cuda.*CUDA devices here"),
        (RuntimeConfig(device="cpu", precision=Precision.fp16), "runtime.precision=fp16"),
    ],
)
def test_unusable_configurations_are_refused(config: RuntimeConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_runtime(config)


def test_a_configured_gpu_becomes_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any other CUDA call: calls that name no GPU would use the first one."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set {device}"))
    for name, answer in (("get_device_capability", (8, 0)), ("get_device_name", "a GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda device, a=answer: calls.append(f"ask {device}") or a)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert choose_runtime(RuntimeConfig(device="cuda:1")).device == torch.device("cuda", 1)
    assert calls == ["set cuda:1", "ask cuda:1", "ask cuda:1"]


def compiling(device: str = "cpu") -> Runtime:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32, compile=True))
    return replace(runtime, device=torch.device(device))


def test_each_variant_is_compiled_and_one_more_raises(compiler: Compiler) -> None:
    """By default, that call and all later ones would run uncompiled."""
    network = compiling().compiled(nn.Linear(3, 2), variants=9)
    for _ in range(2):
        for size in range(1, 10):
            network(torch.zeros(size, 3))
    assert (compiler.graphs, compiler.calls) == (9, 18)
    with pytest.raises(FailOnRecompileLimitHit):
        network(torch.zeros(10, 3))


def test_a_second_network_starts_with_no_variants(compiler: Compiler) -> None:
    """Variants of the first network, which has the same code, do not count."""
    for variants in (3, 2):
        layer = nn.Linear(3, 2)
        network = compiling().compiled(layer, variants=variants)
        for size in range(1, variants + 1):
            images = torch.randn(size, 3)
            assert torch.equal(network(images), layer(images))
        with pytest.raises(FailOnRecompileLimitHit):
            network(torch.zeros(variants + 1, 3))
    assert compiler.graphs == 3 + 2


@pytest.mark.parametrize(
    ("device", "graphs", "mode"),
    [
        ("cuda", True, "reduce-overhead"),
        ("cuda", False, "default"),
        ("cpu", True, "default"),
        ("cpu", False, "default"),
    ],
)
def test_cuda_graphs_are_recorded_on_a_gpu_if_allowed(
    device: str, graphs: bool, mode: str, compiler: Compiler
) -> None:
    compiling(device).compiled(nn.Linear(3, 2), variants=1, graphs=graphs)
    assert compiler.asked == [{"dynamic": False, "mode": mode}]


def test_nothing_is_compiled_without_compile(compiler: Compiler) -> None:
    layer = nn.Linear(3, 2)
    assert replace(compiling(), compile=False).compiled(layer, variants=1) is layer
    assert compiler.asked == []
