"""How the benchmarks time a kernel, on a simulated GPU, and how they measure the machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import hardware
from benchmarks.hardware import Hardware, seconds_of
from benchmarks.passes import seconds_by_pass
from fastalex.kernels import relu_lrn

FLUSH = 1e-4


class Gpu:
    """A simulated GPU that runs kernels in the order in which the host enqueues them; times in seconds.

    Attributes:
        host: the time on the host's clock.
        free: when the GPU will have run all enqueued kernels.
        room: number of kernels that the queue holds; then the host has to wait.
    """

    def __init__(self, room: int = 1000) -> None:
        self.host = self.free = 0.0
        self.room = room
        self.ends: list[float] = []
        self.cold = False  # whether the inputs have been evicted from the cache

    def launch(self, spent: float, dispatch: float = 5e-6) -> None:
        if len(self.ends) >= self.room:
            self.host = max(self.host, self.ends[-self.room])
        self.host += dispatch
        self.free = max(self.free, self.host) + spent
        self.ends.append(self.free)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def kernel(self, spent: float, dispatch: float) -> Callable[..., str]:
        """A call that launches a kernel, which takes half as long if its inputs are in the cache."""

        def call(*arguments: object) -> str:
            self.launch(spent if self.cold else spent / 2, dispatch)
            self.cold = False
            return "result"

        return call


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.launch(0, dispatch=1e-6)
        self.at = self.gpu.free

    def query(self) -> bool:
        return self.at <= self.gpu.host

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def on(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Make `hardware` use the simulated GPU."""

    def flush() -> None:
        gpu.launch(FLUSH)
        gpu.cold = True

    cuda = SimpleNamespace(
        synchronize=gpu.synchronize,
        _sleep=lambda cycles: gpu.launch(cycles / hardware.CYCLES_PER_SECOND),
        Event=lambda enable_timing: Event(gpu),
    )
    empty = lambda *shape, **options: SimpleNamespace(zero_=flush)  # noqa: E731
    monkeypatch.setattr(hardware, "torch", SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8))
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: gpu.host))
    monkeypatch.setattr(hardware, "DEVICE", "cuda")
    return gpu


def test_a_kernels_time_excludes_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = on(Gpu(), monkeypatch)
    short, long = gpu.kernel(40e-6, dispatch=300e-6), gpu.kernel(90e-6, dispatch=10e-6)
    assert seconds_of(short, long) == pytest.approx([40e-6, 90e-6])


def test_a_launch_slower_than_estimated_is_timed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = on(Gpu(), monkeypatch)
    dispatch = iter([1e-6, 1e-6, *[5e-3] * 1000])  # slow after the first two
    assert seconds_of(lambda: gpu.kernel(40e-6, next(dispatch))()) == pytest.approx([40e-6])


def test_a_call_of_many_kernels_does_not_overflow_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = on(Gpu(), monkeypatch)
    kernel = gpu.kernel(2e-6, dispatch=5e-6)

    def many() -> None:
        for _ in range(300):
            kernel()

    assert seconds_of(many) == pytest.approx([2e-6 + 299 * 1e-6])


def test_a_call_that_waits_for_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = on(Gpu(), monkeypatch)

    def waits() -> None:
        gpu.kernel(40e-6, dispatch=5e-6)()
        gpu.synchronize()

    with pytest.raises(RuntimeError, match="wait for the GPU"):
        seconds_of(waits)


def test_each_call_is_given_the_previous_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "DEVICE", "cpu")
    given: list[int] = []

    def second(x: int) -> int:
        given.append(x)
        return 2

    spent = seconds_of(lambda: 1, second, given.append)
    assert given == [1, 2]
    assert len(spent) == 3
    assert min(spent) >= 0


def test_seconds_by_pass_runs_both_passes() -> None:
    x = torch.ones(3, requires_grad=True)
    seen: list[Tensor] = []
    x.register_hook(seen.append)
    spent = seconds_by_pass(lambda: x * 2, [x], torch.full((3,), 5.0))
    assert spent["forward + backward"] == spent["forward"] + spent["backward"] > 0
    assert seen[0].tolist() == [10.0] * 3


@pytest.mark.gpu
def test_a_gpu_is_kept_busy_while_both_passes_are_enqueued() -> None:
    x = torch.randn(16, 96, 55, 55, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for function in (relu_lrn, torch.compile(lambda x: x.sigmoid() * x)):
        spent = seconds_by_pass(partial(function, x), [x], torch.randn_like(x))
        assert min(spent.values()) > 0
    with pytest.raises(RuntimeError, match="wait for the GPU"):
        seconds_of(lambda: x.sum().item())


def test_the_machine_is_measured_with_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With constants a processor runs cooler, and a GPU keeps a higher clock."""
    multiplied: list[Tensor] = []
    product = torch.mm

    def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        multiplied.extend((a, b))
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    machine = Hardware((8, 64), 1 << 20)
    assert machine.matmul_flops_per_second() > 0
    assert machine.copy_bytes_per_second() > 0
    assert {len(x) for x in multiplied} == {8, 64}
    assert min(float(x.float().std()) for x in multiplied) > 0.5
    assert len(machine.source.unique()) == 256
    assert torch.equal(machine.source, machine.target)


@pytest.mark.parametrize(
    ("capabilities", "kind"),
    [
        ({"avx2", "avx512_f"}, "cpu_fp32"),
        ({"avx2", "avx512_f", "avx512_bf16"}, "cpu"),
        ({"avx2", "avx512_f", "avx512_bf16", "amx_bf16"}, "cpu_amx"),
        ({"bf16"}, "cpu"),  # of Arm
    ],
)
def test_a_cpu_has_the_kind_of_its_arithmetic(
    capabilities: set[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True))
    assert hardware._kind() == kind
    assert kind in hardware.KINDS
