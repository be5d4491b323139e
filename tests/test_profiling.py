"""The table of `profile=true`, from profiler events of a GPU, which list each kernel and range twice."""

from __future__ import annotations

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList

from fastalex.training.profiling import ACTIVE, RANGES, Profile, _summarise, is_kernel, short
from tests.profiler_events import STEPS, event, on_gpu, training_steps


@pytest.fixture
def profile() -> Profile:
    assert STEPS == ACTIVE
    return _summarise(training_steps().key_averages(), cuda=True)


def test_a_range_has_host_time_and_not_that_of_its_gpu_copy(profile: Profile) -> None:
    expected = {"input": 0.1, "forward": 0.2, "backward": 0.3, "optimizer": 0.1}
    assert profile.ranges == pytest.approx(expected)


def test_a_kernel_counts_once_whether_launched_by_an_operator_or_a_cuda_graph(profile: Profile) -> None:
    rows = {name: (ms, share, calls) for name, ms, share, calls in profile.operators}
    assert rows == {
        "lrn": pytest.approx((0.16, 0.4, 2)),
        "gemm_graph": pytest.approx((0.12, 0.3, 1)),
        "gemm": pytest.approx((0.1, 0.25, 1)),
        "Memcpy HtoD (Pinned -> Device)": pytest.approx((0.02, 0.05, 1)),
    }
    assert list(rows) == ["lrn", "gemm_graph", "gemm", "Memcpy HtoD (Pinned -> Device)"]  # slowest first


def test_a_profile_without_kernels_has_a_table(profile: Profile) -> None:
    """Such as under a driver that does not permit profiling."""
    averages = [e for e in training_steps().key_averages() if e.device_type == DeviceType.CPU]
    assert _summarise(averages, cuda=True).operators == []
    assert "input" in _summarise(averages, cuda=True).table()
    nothing = Profile(dict.fromkeys(RANGES, 0.0), [], cuda=True).table()
    assert "0.0%" in nothing


def test_the_table_names_the_device_of_its_times(profile: Profile) -> None:
    table = profile.table()
    assert "part of the loop, on the host" in table
    assert "kernel, on the GPU" in table
    assert "aten::mm" not in table


def test_on_a_cpu_the_rows_are_operators_by_own_time() -> None:
    """Own time excludes nested operators; ranges and the autograd engine are not operators."""
    events = EventList(
        [
            event("forward", 0, 600, is_user_annotation=True, use_device=None),
            event("aten::linear", 100, 400, use_device=None),
            event("aten::addmm", 150, 350, use_device=None),
            event("autograd::engine::evaluate_function: AddmmBackward0", 450, 500, use_device=None),
        ]
    )
    events._build_tree()
    profile = _summarise(events.key_averages(), cuda=False)
    assert profile.ranges["forward"] == pytest.approx(0.6 / ACTIVE)
    assert profile.operators == [
        ("aten::addmm", pytest.approx(0.2 / ACTIVE), pytest.approx(2 / 3), 1 / ACTIVE),
        ("aten::linear", pytest.approx(0.1 / ACTIVE), pytest.approx(1 / 3), 1 / ACTIVE),
    ]
    assert "operator, its own time" in profile.table()


def test_is_kernel() -> None:
    assert is_kernel(on_gpu("gemm", 0, 1))
    assert not is_kernel(on_gpu("forward", 0, 1, is_user_annotation=True))
    assert not is_kernel(event("aten::mm", 0, 1))


def test_kernel_names_are_shortened() -> None:
    name = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::"
        "AddFunctor<float>>(int, float)"
    )
    assert short(name) == "vectorized_elementwise_kernel<4, AddFunctor<float>>(int, float)"
    assert short("aten::mm") == "aten::mm"
    assert short("triton_poi_fused_add_0") == "triton_poi_fused_add_0"
