"""Significance: whether one model is better than another on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import torch
from torch import Tensor

from ..errors import DataError, UsageError

RESAMPLES = 4000
_AT_ONCE = 1 << 22  # values drawn at a time


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference and its confidence interval.

    Attributes:
        difference: mean of a - b.
        low, high: of the interval.
    """

    difference: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """True if the interval excludes 0."""
        return not self.low <= 0 <= self.high


def mcnemar(right_a: Tensor, right_b: Tensor) -> float:
    """Return the p-value of McNemar's exact test, two-sided: how likely such a difference is by chance.

    Of the samples that one model alone has right, each model should have half: the binomial distribution (McNemar 1947,
    doi.org/10.1007/BF02295996).

    Args:
        right_a, right_b: bool [N], whether each model has each sample right.

    Raises:
        DataError: other samples.
    """
    _check(right_a, right_b)
    only_a = int((right_a & ~right_b).sum())
    only_b = int((right_b & ~right_a).sum())
    n, fewer = only_a + only_b, min(only_a, only_b)
    term = total = 1  # binomial coefficients up to `fewer`
    for i in range(fewer):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, float(Fraction(2 * total, 2**n)))


def paired_interval(
    a: Tensor, b: Tensor, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the bootstrap interval of the mean difference on the same samples (percentiles; Efron 1979).

    Args:
        a, b: float [N], a value of each model for each sample, such as its loss.
        confidence: between 0 and 1.
        seed: of the resamples; the same seed gives the same interval.

    Raises:
        DataError: other samples, or none.
        UsageError: a confidence that is none.
    """
    _check(a, b)
    if not 0 < confidence < 1:
        raise UsageError(f"a confidence of {confidence} does not lie between 0 and 1.")
    differences = a.double().cpu() - b.double().cpu()
    n = len(differences)
    generator = torch.Generator().manual_seed(seed)
    means = []
    rows = max(1, _AT_ONCE // n)
    for begin in range(0, resamples, rows):
        drawn = torch.randint(n, (min(rows, resamples - begin), n), generator=generator)
        means.append(differences[drawn].mean(dim=1))
    tail = (1 - confidence) / 2
    low, high = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(math.fsum(differences.tolist()) / n, low, high)


def mean_intervals(
    values: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[tuple[float, float]]:
    """Return the bootstrap interval of the mean of each row (percentiles; Efron 1979), from the same resamples for all.

    Args:
        values: float [K, N], a value of each of K models for each of N samples.
        confidence: between 0 and 1.
        seed: of the resamples; the same seed gives the same intervals.
    """
    rows = values.double().cpu()
    n = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    means = []
    at_once = max(1, _AT_ONCE // n)
    for begin in range(0, resamples, at_once):
        count = min(at_once, resamples - begin)
        drawn = torch.randint(n, (count, n), generator=generator)
        # How often each sample is in a resample: a product of matrices gives the means of all models together.
        times = torch.zeros(count, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        means.append(times @ rows.T / n)
    tail = (1 - confidence) / 2
    ends = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return [(low, high) for low, high in ends.T.tolist()]


def share_interval(right: Tensor, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of the share of samples that are right (Wilson 1927, doi.org/10.2307/2276774).

    Unlike resamples, it says something where all are right, or none.

    Args:
        right: bool [N].
        confidence: between 0 and 1.
    """
    n, share = len(right), float(right.double().mean())
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _check(a: Tensor, b: Tensor) -> None:
    if a.dim() != 1 or a.shape != b.shape or not len(a):
        raise DataError(f"the models were evaluated on {list(a.shape)} and {list(b.shape)} samples, not on the same.")
