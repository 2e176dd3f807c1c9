"""Tests and intervals, against scipy and against simulated samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.evaluation.significance import mcnemar, mean_intervals, paired_interval, share_interval


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return torch.tensor(a), torch.tensor(b)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60), st.integers(1, 9))
def test_mcnemar_is_the_binomial_test_of_the_discordant(both: int, only_a: int, only_b: int, neither: int) -> None:
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(*outcomes(both, only_a, only_b, neither)) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_is_exact_for_many_samples() -> None:
    expected = stats.binomtest(10_200, 20_000).pvalue
    assert mcnemar(*outcomes(0, 10_200, 9_800, 0)) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 400), st.integers(0, 400), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_interval_of_a_share_is_the_score_interval_of_scipy(n: int, right: int, confidence: float) -> None:
    right = min(right, n)
    expected = stats.binomtest(right, n).proportion_ci(confidence, method="wilson")
    found = share_interval(torch.arange(n) < right, confidence=confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_is_that_of_scipy_within_the_noise_of_resampling() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.exponential(1, 300), generator.exponential(1.1, 300)
    found = paired_interval(torch.from_numpy(a), torch.from_numpy(b))
    expected = stats.bootstrap((a - b,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
    assert found.difference == pytest.approx(float(np.mean(a - b)), rel=1e-12)
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.04 * width)
    assert found.high == pytest.approx(expected.high, abs=0.04 * width)


def test_a_95_percent_interval_covers_the_truth_95_times_in_100() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for i in range(600):
        noise = generator.standard_normal(200)
        a = generator.exponential(1, 200) + 0.1 + noise
        found = paired_interval(torch.from_numpy(a), torch.from_numpy(noise + 1.0), resamples=1000, seed=i)
        covered += found.low <= 0.1 <= found.high
    assert 0.93 <= covered / 600 <= 0.97


def test_the_same_seed_gives_the_same_interval() -> None:
    a, b = torch.rand(50), torch.rand(50)
    assert paired_interval(a, b, seed=3) == paired_interval(a, b, seed=3)
    assert paired_interval(a, b, seed=3) != paired_interval(a, b, seed=4)


def test_a_difference_is_shown_only_where_the_interval_leaves_zero_out() -> None:
    a = torch.linspace(0, 1, 100)
    assert paired_interval(a + 0.5, a).shown
    assert not paired_interval(a, a.flip(0)).shown
    assert not paired_interval(a, a).shown


def test_other_samples_and_no_confidence_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[3\] and \[4\] samples"):
        mcnemar(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
    with pytest.raises(DataError, match="not on the same"):
        paired_interval(torch.ones(0), torch.ones(0))
    with pytest.raises(UsageError, match="confidence of 95"):
        paired_interval(torch.ones(3), torch.ones(3), confidence=95)


def test_the_intervals_of_means_are_those_of_scipy_and_are_the_same_alone_and_together() -> None:
    generator = np.random.default_rng(1)
    values = generator.exponential(1, (3, 400)) * np.array([[1.0], [5.0], [0.1]])
    found = mean_intervals(torch.from_numpy(values), resamples=8000, seed=5)
    for row, (low, high) in zip(values, found, strict=True):
        expected = stats.bootstrap((row,), np.mean, method="percentile", n_resamples=20_000, rng=2).confidence_interval
        width = expected.high - expected.low
        assert (low, high) == (
            pytest.approx(expected.low, abs=0.05 * width),
            pytest.approx(expected.high, abs=0.05 * width),
        )
        assert mean_intervals(torch.from_numpy(row[None]), resamples=8000, seed=5)[0] == pytest.approx((low, high))
