"""Claims of the paper and of the study, each as a difference between two rows, with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastalex import plots
from fastalex.files import write_csv, write_text
from fastalex.markdown import table
from fastalex.study.intervals import seeds_bound
from fastalex.study.results import NOT_RUN
from fastalex.study.rows import CLAIMS, ROWS, SHORT

TEST, ONE_CROP = "ten_crop_top1_error", "single_crop_top1_error"  # of a run's record
TRAINING, GAP, LOG_EPOCHS = "training_top1_error", "gap", "log2_epochs"  # computed from it
QUARTER = 0.25  # training error in the paper's Figure 1
FIGURES = {
    TEST: "test error, ten-crop",
    ONE_CROP: "test error, one crop",
    TRAINING: "training error of the last epoch",
    GAP: "validation error less training error",
    LOG_EPOCHS: "epochs to a training error of 25%",
}
HOLDS, CONTRADICTED, NOT_VISIBLE = "holds", "contradicted", "not visible"
ONE_SEED = "one seed, so no interval"
SIGNS = {HOLDS: True, CONTRADICTED: False}
CHANCE = 0.85  # a network that errs more than this on ten classes has not learned, and has no spread to pool


@dataclass(frozen=True)
class Claim:
    """A claim: that a figure of ``row`` is greater than that of ``base``.

    Attributes:
        text: what is claimed.
        source: where: a section of the paper, or the study.
        measured: what its authors measured.
        row: the row with the thing taken away, or with the worse choice.
        figure: what is compared; a key of :data:`FIGURES`.
        base: the row that it is compared with.
        base_figure: the figure of the base, where it is another one.
    """

    text: str
    source: str
    measured: str
    row: str
    figure: str = TEST
    base: str = "claim_base"
    base_figure: str = ""


_LRN = Claim("LRN lowers the error", "paper, 3.3", "by 1.4%; 13% to 11% on CIFAR-10", "claim_no_lrn")
_CLAIMED = (
    Claim(
        "ReLU trains faster than tanh",
        "paper, 3.1, Figure 1",
        "6 times, on CIFAR-10",
        "claim_tanh",
        LOG_EPOCHS,
        base="claim_relu",
    ),
    Claim(
        "Two towers, as on two GPUs, lower the error",
        "paper, 3.2",
        "by 1.7%, against half the kernels in one tower",
        "claim_base",
        base="claim_two_towers",
    ),
    _LRN,
    replace(
        _LRN,
        text=f"{_LRN.text}, at three times the rate",
        row="claim_high_rate_no_lrn",
        base="claim_high_rate",
    ),
    Claim("Overlapping pooling lowers the error", "paper, 3.4", "by 0.4%", "claim_non_overlapping_pool"),
    Claim("Overlapping pooling overfits less", "paper, 3.4", "slightly", "claim_non_overlapping_pool", GAP),
    Claim(
        "Ten crops lower the error",
        "paper, 4.1 and 6.1",
        "39.0% to 37.5%",
        "claim_base",
        ONE_CROP,
        base_figure=TEST,
    ),
    Claim(
        "Crops and flips lower the error",
        "paper, 4.1; study",
        "substantial overfitting without",
        "claim_no_augmentation",
        ONE_CROP,
    ),
    Claim("Random crops alone lower it", "paper, 4.1", "", "claim_no_random_crop", ONE_CROP),
    Claim("Flips alone lower it", "paper, 4.1", "", "claim_no_flip", ONE_CROP),
    Claim("PCA colour lowers the error", "paper, 4.1", "by over 1%", "claim_base", base="claim_pca_color"),
    Claim("Dropout lowers the error", "paper, 4.2", "substantial overfitting without", "claim_no_dropout"),
    Claim("Weight decay lowers the training error", "paper, 5", "", "claim_no_weight_decay", TRAINING),
    Claim("Weight decay lowers the test error", "paper, 5", "", "claim_no_weight_decay"),
    Claim(
        "PyTorch's initialisation is better than the paper's",
        "study",
        "0.9000 to 0.1397",
        "claim_paper_init",
        base="claim_default_init",
    ),
    Claim(
        "AlexNet overfits more than ResNet-18",
        "study",
        "by the curves of the losses",
        "claim_base",
        GAP,
        base="claim_resnet18",
    ),
    Claim(
        "Batch normalisation is better than LRN",
        "study, future work",
        "",
        "claim_base",
        base="claim_batch_norm",
    ),
)
FIGURE_1 = {"ReLU": "claim_relu", "tanh": "claim_tanh"}


def _lengths(claim: Claim) -> list[Claim]:
    """A claim and, where there are short runs that it can be examined with, the same claim of these."""
    row, base = (name.replace("claim_", SHORT) for name in (claim.row, claim.base))
    if claim.figure == GAP or not {row, base} <= ROWS.keys():
        return [claim]
    return [claim, replace(claim, text=f"{claim.text}, in a short run", row=row, base=base)]


CLAIMED = tuple(each for claim in _CLAIMED for each in _lengths(claim))


@dataclass(frozen=True)
class Finding:
    """What the runs so far say of a claim.

    Attributes:
        claim: the claim.
        seeds: the number of complete runs of the row and of the base.
        value: the difference of the means, the row less the base; None while one has no run. Of
            :data:`LOG_EPOCHS` in powers of two.
        bound: half the 95% interval about it; None while no row has two seeds.
    """

    claim: Claim
    seeds: tuple[int, int]
    value: float | None = None
    bound: float | None = None

    @property
    def is_ratio(self) -> bool:
        """Whether the value is the logarithm of a ratio."""
        return self.claim.figure == LOG_EPOCHS

    @property
    def limits(self) -> tuple[float, float] | None:
        """The value's 95% interval."""
        if self.value is None or self.bound is None:
            return None
        return self.value - self.bound, self.value + self.bound

    @property
    def verdict(self) -> str:
        """What the interval says of the claim."""
        if self.value is None:
            return NOT_RUN
        if self.limits is None:
            return ONE_SEED
        low, high = self.limits
        return HOLDS if low > 0 else CONTRADICTED if high < 0 else NOT_VISIBLE


def examine(rows: Mapping[str, Any]) -> list[Finding]:
    """Compare the runs of each claim's two rows.

    The interval is the two-sided 95% bound of Student's t for the standard deviation from seed to seed,
    pooled over all rows of the same length that have learned: for :data:`LOG_EPOCHS` those of the four-layer
    network, for another figure those of the other networks.

    Args:
        rows: those of :func:`fastalex.study.report.collect`.
    """
    return [_examine(claim, rows) for claim in CLAIMED]


def _examine(claim: Claim, rows: Mapping[str, Any]) -> Finding:
    is_pair = claim.row == claim.base  # two figures of the same runs, which are subtracted run by run

    def values(name: str, figure: str) -> list[float]:
        found = []
        for record in rows[name]["runs"]:
            value = _value(record, figure)
            other = _value(record, claim.base_figure) if is_pair else 0.0
            if value is not None and other is not None:
                found.append(value - other)
        return found

    row = values(claim.row, claim.figure)
    base = [0.0] if is_pair else values(claim.base, claim.figure)
    seeds = len(row), len(row) if is_pair else len(base)
    if not row or not base:
        return Finding(claim, seeds)
    pool = [values(name, claim.figure) for name in _pool(claim, rows)]
    spread = math.sqrt(1 / len(row) + (0 if is_pair else 1 / len(base)))
    difference = statistics.fmean(row) - statistics.fmean(base)
    return Finding(claim, seeds, difference, seeds_bound(pool, spread))


def _value(record: Mapping[str, Any], figure: str) -> float | None:
    """A figure of a run; None for the epochs to an error that it has not reached."""
    training: Sequence[float] = record["training_top1_errors"]
    if figure == TRAINING:
        return training[-1]
    if figure == GAP:
        return float(record["validation_top1_error"]) - training[-1]
    if figure == LOG_EPOCHS:
        epochs = epochs_to(QUARTER, training)
        return None if epochs is None else math.log2(epochs)
    return float(record[figure])


def epochs_to(error: float, errors: Sequence[float]) -> float | None:
    """Return when a falling curve first is at an error, in epochs, linearly between two epochs.

    Args:
        error: the error to reach.
        errors: the error of each epoch, from the first on.
    """
    for epoch, reached in enumerate(errors, start=1):
        if reached <= error:
            if epoch == 1:
                return 1.0
            before = errors[epoch - 2]
            return epoch - (error - reached) / (before - reached)
    return None


def _pool(claim: Claim, rows: Mapping[str, Any]) -> list[str]:
    """Names of the rows whose spread is pooled."""
    names = [
        name
        for name, row in ROWS.items()
        if (row.group == CLAIMS or name.startswith(SHORT))
        and name.startswith(SHORT) == claim.base.startswith(SHORT)
        and (name in FIGURE_1.values()) == (claim.figure == LOG_EPOCHS)
    ]
    return [name for name in names if all(record[ONE_CROP] < CHANCE for record in rows[name]["runs"])]


def examined(rows: Mapping[str, Any]) -> bool:
    """Whether there are runs that say something of a claim; the argument is that of :func:`examine`."""
    return any(finding.value is not None for finding in examine(rows))


def write(folder: Path, rows: Mapping[str, Any]) -> None:
    """Write ``claims.md``, ``claims.csv`` and the pictures, if there are runs that say something of a claim.

    Args:
        folder: of the rows' runs.
        rows: as in :func:`examine`.
    """
    findings = examine(rows)
    shown = [finding for finding in findings if finding.value is not None]
    if not shown:
        return
    write_csv(folder / "claims.csv", _csv_rows(findings))
    points = [
        (finding.claim.text, finding.value or 0.0, finding.bound, SIGNS.get(finding.verdict))
        for finding in shown
        if not finding.is_ratio
    ]
    pictures = []
    if points:
        plots.differences(
            points,
            "difference of the errors:\nabove 0 for the claim, below 0 against it",
            folder / "claims.png",
        )
        pictures.append("![Differences with 95% intervals](claims.png)")
    curves = {
        label: [record["training_top1_errors"] for record in rows[name]["runs"]]
        for label, name in FIGURE_1.items()
        if rows[name]["runs"]
    }
    if curves:
        title = "Training error of a four-layer network"
        plots.error_curves(curves, QUARTER, title, folder / "relu_and_tanh.png")
        pictures.append("![Training error with ReLU and with tanh](relu_and_tanh.png)")
    write_text(folder / "claims.md", "\n\n".join([TEXT, claims_table(findings), NOTES, *pictures]) + "\n")


TEXT = (
    "# The claims\n\n"
    "Written by `python -m fastalex.reproduce rows=claims`: each claim as a difference of two rows, in which "
    "one thing differs. A difference above 0, or a ratio above 1, is for the claim. It *holds* where the "
    "whole 95% interval is, is *contradicted* where none of it is, and otherwise the effect, if there is "
    "one, is *not visible*."
)
NOTES = (
    "Errors are shares of the images: 0.01 is one of a hundred. ReLU and tanh are compared by the ratio of "
    "the epochs, counted with a fraction, after which the training error is 25%. An interval is Student's, "
    "from the spread over the generator's seeds, which draw the weights, the tenth of the images and their "
    "order; the spread is pooled over all rows of a length but those that have not learned. It does not "
    "cover other test images, which are the same in all rows. One in twenty such intervals is expected to "
    "miss the true difference.\n\n"
    "The rows train for 40 epochs on a tenth of the images, 4,800, so that the network overfits, and what "
    "the paper adds against overfitting can show its effect. A *short run* is of 6 epochs on 40,000 images, "
    "where the network still underfits (`ablation_base` and its rows). *At three times the rate* is at 0.06 "
    "in place of 0.02, with LRN and without. ReLU and tanh are compared in a "
    "four-layer network on 40,000 images, for 12 epochs."
)


def claims_table(findings: Sequence[Finding]) -> str:
    """Return the table of the claims in Markdown."""
    heads = ["claim", "where", "they measured", "figure", "difference", "95% interval", "seeds", "verdict"]
    lines = [
        [
            finding.claim.text,
            finding.claim.source,
            finding.claim.measured,
            _figure(finding.claim),
            "" if finding.value is None else _number(finding, finding.value),
            "" if finding.limits is None else " to ".join(_number(finding, end) for end in finding.limits),
            " and ".join(map(str, finding.seeds)),
            finding.verdict,
        ]
        for finding in findings
    ]
    return table(heads, lines)


def _figure(claim: Claim) -> str:
    name = FIGURES[claim.figure]
    return f"{name}, less ten-crop" if claim.base_figure else name


def _number(finding: Finding, value: float) -> str:
    return f"{2**value:.2f} times" if finding.is_ratio else f"{value:+.4f}"


def _csv_rows(findings: Sequence[Finding]) -> list[list[object]]:
    lines: list[list[object]] = [
        ["claim", "row", "base", "figure", "difference", "low", "high", "row_seeds", "base_seeds", "verdict"]
    ]
    for finding in findings:
        claim = finding.claim
        numbers = [finding.value, *(finding.limits or (None, None))]
        cells = ["" if number is None else f"{number:.6f}" for number in numbers]
        lines.append(
            [claim.text, claim.row, claim.base, claim.figure, *cells, *finding.seeds, finding.verdict]
        )
    return lines
