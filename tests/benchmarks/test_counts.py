"""FLOPs and bytes of a step, and the least time that they take, beside sums by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import expected
from benchmarks.counts import Operation, count_step, totals
from benchmarks.expected import BEGIN, END, Card, least_seconds
from benchmarks.parts import CONVOLUTIONS, INPUT, LRN, OPTIMIZER, PRODUCTS
from fastalex.config import Optimizer
from fastalex.models import create_model


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 5, bias=False)
    )


def test_a_small_network() -> None:
    operations = count_step(small, dtype=torch.float32, batch_size=2, crop=8)
    x, y, kernel, weight, logits = 2 * 3 * 64, 2 * 8 * 36, 8 * 27, 8 * 36 * 5, 2 * 5
    parts = totals(operations)
    assert parts[INPUT] == (0, 4 * x)
    # Forward, and the weight's gradient: the image's is not needed.
    assert parts[CONVOLUTIONS] == (2 * 2 * y * 27, 4 * (x + kernel + y) + 4 * (y + x + kernel + kernel))
    # Forward, and the gradients of weight and input.
    assert parts[PRODUCTS] == (3 * 2 * 2 * weight, 3 * 4 * (y + weight + logits))
    # In place: read and written; backward reads gradient and output and writes a gradient.
    assert parts[LRN] == (0, 4 * 5 * y)
    # Weights, gradients and momentum read, weights and momentum written.
    assert parts[OPTIMIZER] == (0, 4 * 5 * (kernel + weight))


def test_clipping_reads_the_gradients_and_scales_them() -> None:
    plain = totals(count_step(small, batch_size=2, crop=8))[OPTIMIZER][1]
    clipped = totals(count_step(small, batch_size=2, crop=8, clip_norm=1.0))[OPTIMIZER][1]
    gradients = 4 * (8 * 27 + 8 * 36 * 5)
    assert 3 * gradients <= clipped - plain < 3 * gradients + 100  # and some scalars


def test_muon_adds_its_products() -> None:
    """Of a matrix of 8x27 four are as wide as that. Those of 8x8 are one for each of the five applications,
    and three more for each but the first of the two blocks.
    """
    sgd, muon = (
        count_step(small, batch_size=2, crop=8, optimizer=optimizer)
        for optimizer in (Optimizer.sgd, Optimizer.muon)
    )
    added = totals(muon)[OPTIMIZER][0] - totals(sgd)[OPTIMIZER][0]
    wide, square = 2 * 8 * 27 * 8, 2 * 8**3
    assert added == 4 * wide + (5 + 3 * 3) * square
    assert totals(muon)[CONVOLUTIONS] == totals(sgd)[CONVOLUTIONS]


def test_bytes_of_alexnets_kernels() -> None:
    operations = count_step(lambda: create_model("alexnet"), batch_size=2)
    forward = [op.bytes for op in operations if op.name == "fastalex::lrn_max_pool"]
    sizes = [(96, 55, 27), (256, 27, 13)]
    assert forward == [2 * c * (2 * before**2 + 3 * after**2) for c, before, after in sizes]


def test_least_seconds_is_the_slower_of_arithmetic_and_memory() -> None:
    card = Card("a card", flops_per_second=100.0, bytes_per_second=10.0)
    work = [Operation("a", CONVOLUTIONS, 200, 5), Operation("b", LRN, 0, 30), Operation("c", PRODUCTS, 50, 5)]
    assert least_seconds(work, card) == pytest.approx(2 + 3 + 0.5)


def test_the_page_equals_the_output_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    expected.main(["--page", str(page)])
    before, _, written = page.read_text().partition(BEGIN)
    section, _, after = written.partition(END)
    assert (before, after) == ("before\n", "\nafter\n")
    assert section.strip() in expected.PAGE.read_text()
    assert section.strip() in capsys.readouterr().out


@pytest.mark.parametrize("text", ["no marks", None])
def test_a_page_without_the_marks_is_refused(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    if text:
        page.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        expected.main(["--page", str(page)])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(page) in line
