"""The page on several devices is up to date, and its formulas are those of a ring."""

from __future__ import annotations

import pytest

from benchmarks import scaling


def test_the_page_equals_the_output_of_the_command() -> None:
    assert scaling.PAGE.read_text() == scaling.page(), "run python -m benchmarks.scaling"


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_bytes_are_those_of_a_ring(devices: int) -> None:
    """Counted step by step: a ring sends one of n blocks in each of n - 1 steps, twice for an all-reduce."""
    parameters, inputs, outputs, batch = 24 * 7, 5, 3, 4
    all_reduce = sum(parameters / devices * 4 for _ in range(2) for _ in range(devices - 1))
    assert scaling.ddp_bytes(devices, parameters) == pytest.approx(all_reduce)
    gathers = sum(batch * width * 2 for width in (inputs, outputs) * 2 for _ in range(devices - 1))
    assert scaling.hybrid_bytes(devices, parameters, inputs, outputs, batch) == pytest.approx(
        all_reduce + gathers
    )
