"""The kernels that ran on the GPU, from the profiler's records."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.kernel_table import kernel_times
from tests.profiler_events import on_gpu, recorded, training_steps


def closed(events: Any) -> Any:
    """A closed profiler with these events."""
    return SimpleNamespace(key_averages=events.key_averages)


def test_calls_and_times_per_step_and_shares() -> None:
    rows = kernel_times(closed(training_steps()))
    assert rows == [
        ("lrn", 2, pytest.approx(0.16), pytest.approx(0.4)),
        ("gemm_graph", 1, pytest.approx(0.12), pytest.approx(0.3)),
        ("gemm", 1, pytest.approx(0.1), pytest.approx(0.25)),
        ("Memcpy HtoD (Pinned -> Device)", 1, pytest.approx(0.02), pytest.approx(0.05)),
    ]
    assert sum(share for *_, share in rows) == pytest.approx(1)


def test_without_steps_the_figures_are_totals() -> None:
    rows = kernel_times(closed(recorded(on_gpu("gemm", 0, 10), on_gpu("gemm", 10, 40))))
    assert rows == [("gemm", 2, pytest.approx(0.04), 1)]


def test_an_idle_gpu_has_no_rows() -> None:
    assert kernel_times(closed(recorded())) == []
