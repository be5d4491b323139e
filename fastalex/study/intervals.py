"""Intervals of differences between error rates, from the number of test images and the spread over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest
from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A difference of two error rates and its 95% interval.

    Attributes:
        value: the first error less the second.
        low: lower limit.
        high: upper limit.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Sample:
    """The test errors of a row's runs.

    Attributes:
        errors: a share of the test images for each seed.
        images: number of test images.
    """

    errors: Sequence[float]
    images: int

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.errors)

    def __str__(self) -> str:
        deviation = f" ± {statistics.stdev(self.errors):.4f}" if len(self.errors) > 1 else ""
        return f"{self.mean:.4f}{deviation}"


def difference(theirs: Sample, ours: Sample) -> Difference:
    """Compute the difference of two mean errors, and its 95% interval.

    Args:
        theirs: the sample to subtract from.
        ours: the sample to subtract.

    Returns:
        The difference. Its limits are those of Newcombe (1998), method 10, where each sample has one seed;
        the bound of the seeds is added in quadrature where there are more, as Zou and Donner (2008) add the
        distances to the limits of several terms.
    """
    spread = math.sqrt(1 / len(theirs.errors) + 1 / len(ours.errors))
    squares = (seeds_bound([theirs.errors, ours.errors], spread) or 0.0) ** 2
    below, above = _distances(theirs)
    ours_below, ours_above = _distances(ours)
    value = theirs.mean - ours.mean
    low = value - math.sqrt(below**2 + ours_above**2 + squares)
    return Difference(value, low, value + math.sqrt(above**2 + ours_below**2 + squares))


def _distances(sample: Sample) -> tuple[float, float]:
    """The distances from the error to the limits of Wilson's interval.

    All seeds are tested on the same images, so the number of images is that of one run.
    """
    wrong = round(sample.mean * sample.images)
    limits = binomtest(wrong, sample.images).proportion_ci(CONFIDENCE, method="wilson")
    return wrong / sample.images - float(limits.low), float(limits.high) - wrong / sample.images


def degrees_of_freedom(samples: Sequence[Sequence[float]]) -> int:
    """Return those of the standard deviation pooled over samples, of which some may be empty."""
    return sum(len(values) - 1 for values in samples if values)


def seeds_bound(samples: Sequence[Sequence[float]], spread: float) -> float | None:
    """Compute how large a difference of means the seeds alone make, at 95%.

    Args:
        samples: errors by seed, a sample for each row; some may be empty.
        spread: standard deviation of the difference, as a multiple of that of one run.

    Returns:
        The two-sided bound of Student's t for the standard deviation pooled over the samples; None if no
        sample has two values.
    """
    freedom = degrees_of_freedom(samples)
    if not freedom:
        return None
    squares = sum(statistics.variance(values) * (len(values) - 1) for values in samples if len(values) > 1)
    return float(student.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(squares / freedom) * spread
