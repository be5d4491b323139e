"""The claims: their differences and intervals, on runs made up here."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from fastalex.study import claims
from fastalex.study.rows import ROWS


def run(
    ten: float, one: float | None = None, training: tuple[float, ...] = (0.5, 0.1), validation: float = 0.3
) -> dict[str, Any]:
    """What a run's record has of what the claims read."""
    return {
        "ten_crop_top1_error": ten,
        "single_crop_top1_error": ten + 0.01 if one is None else one,
        "training_top1_errors": list(training),
        "validation_top1_error": validation,
    }


def rows(**runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: {"runs": runs.get(name, [])} for name in ROWS}


def finding(text: str, made: dict[str, Any]) -> claims.Finding:
    (found,) = (each for each in claims.examine(made) if each.claim.text == text)
    return found


BASE = [0.300, 0.304, 0.308]


@pytest.mark.parametrize(
    ("without", "verdict"),
    [
        ([0.320, 0.326, 0.320], "holds"),
        ([0.290, 0.284, 0.290], "contradicted"),
        ([0.303, 0.309, 0.303], "not visible"),
    ],
)
def test_a_difference_its_interval_and_its_verdict(without: list[float], verdict: str) -> None:
    """Against a t-test of two samples of equal variance, which pools the two rows; here they are all."""
    made = rows(claim_base=[run(error) for error in BASE], claim_no_lrn=[run(error) for error in without])
    found = finding("LRN lowers the error", made)
    assert found.value == pytest.approx(statistics.fmean(without) - 0.304)
    variance = (statistics.variance(BASE) + statistics.variance(without)) / 2
    bound = student.ppf(0.975, 4) * math.sqrt(variance * 2 / 3)
    assert found.limits == pytest.approx((found.value - bound, found.value + bound))
    assert found.verdict == verdict
    assert found.seeds == (3, 3)


def test_the_spread_is_that_of_all_rows_but_of_those_at_chance() -> None:
    made = rows(
        claim_base=[run(error) for error in BASE],
        claim_no_lrn=[run(0.32)],
        claim_no_dropout=[run(0.30), run(0.34)],
        claim_paper_init=[run(0.9), run(0.9), run(0.9)],
        claim_tanh=[run(0.4), run(0.7)],
    )
    squares = 2 * statistics.variance(BASE) + statistics.variance([0.30, 0.34])
    bound = student.ppf(0.975, 3) * math.sqrt(squares / 3 * (1 / 3 + 1))
    assert finding("LRN lowers the error", made).bound == pytest.approx(bound)


def test_short_runs_have_a_spread_of_their_own() -> None:
    made = rows(
        claim_base=[run(0.1), run(0.5)],
        claim_no_lrn=[run(0.2)],
        ablation_base=[run(0.300), run(0.304)],
        ablation_no_lrn=[run(0.330), run(0.336)],
    )
    found = finding("LRN lowers the error, in a short run", made)
    assert found.value == pytest.approx(0.031)
    bound = student.ppf(0.975, 2) * math.sqrt((0.004**2 / 2 + 0.006**2 / 2) / 2)
    assert found.bound == pytest.approx(bound)
    assert finding("LRN lowers the error", made).value == pytest.approx(-0.1)


def test_ten_crops_are_compared_run_by_run() -> None:
    """One crop and ten of a run rise and fall together: their difference varies less."""
    gains = [0.010, 0.012, 0.014]
    made = rows(claim_base=[run(ten, ten + gain) for ten, gain in zip(BASE, gains, strict=True)])
    found = finding("Ten crops lower the error", made)
    assert found.value == pytest.approx(0.012)
    assert found.bound == pytest.approx(student.ppf(0.975, 2) * statistics.stdev(gains) / math.sqrt(3))


def test_overfitting_is_validation_less_training_error() -> None:
    made = rows(
        claim_base=[run(0.3, training=(0.6, 0.1), validation=0.35)],
        claim_resnet18=[run(0.3, training=(0.6, 0.2), validation=0.36)],
        claim_no_weight_decay=[run(0.3, training=(0.6, 0.13))],
    )
    assert finding("AlexNet overfits more than ResNet-18", made).value == pytest.approx(0.25 - 0.16)
    assert finding("Weight decay lowers the training error", made).value == pytest.approx(0.03)
    assert finding("LRN lowers the error", made).verdict == "not run"
    assert finding("AlexNet overfits more than ResNet-18", made).verdict == claims.ONE_SEED


def test_epochs_to_an_error_are_counted_with_a_fraction() -> None:
    assert claims.epochs_to(0.25, [0.6, 0.4, 0.2, 0.3]) == pytest.approx(2.75)
    assert claims.epochs_to(0.25, [0.25, 0.1]) == 1
    assert claims.epochs_to(0.25, [0.6, 0.3]) is None


def test_relu_and_tanh_are_compared_by_a_ratio(tmp_path: Path) -> None:
    fast, slow = (0.5, 0.25), (0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.25)
    made = rows(
        claim_relu=[run(0.3, training=fast), run(0.3, training=fast)],
        claim_tanh=[run(0.3, training=slow), run(0.3, training=(0.5,))],  # of which one does not get there
    )
    found = finding("ReLU trains faster than tanh", made)
    assert found.value == pytest.approx(2)
    assert found.seeds == (1, 2)
    claims.write(tmp_path, made)
    assert "| 4.00 times |" in (tmp_path / "claims.md").read_text()
    assert (tmp_path / "relu_and_tanh.png").stat().st_size > 10_000


def test_what_is_written(tmp_path: Path) -> None:
    claims.write(tmp_path, rows())
    assert not list(tmp_path.iterdir())
    made = rows(
        claim_base=[run(error) for error in BASE],
        claim_no_lrn=[run(error - 0.05) for error in BASE],
        claim_no_dropout=[run(error) for error in BASE],
        claim_no_flip=[run(error + 0.05) for error in BASE],
    )
    claims.write(tmp_path, made)
    limits = {found.claim.row: found.limits for found in claims.examine(made)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claims.csv", "claims.md", "claims.png"]
    with (tmp_path / "claims.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["claim"] for line in lines] == [claim.text for claim in claims.CLAIMED]
    by_row = {line["row"]: line for line in lines}
    assert by_row["claim_no_lrn"]["verdict"] == "contradicted"
    assert float(by_row["claim_no_flip"]["low"]) == pytest.approx(limits["claim_no_flip"][0], abs=1e-6)  # type: ignore[index]
    assert by_row["claim_tanh"]["difference"] == ""
    text = (tmp_path / "claims.md").read_text()
    assert all(claim.text in text for claim in claims.CLAIMED)
