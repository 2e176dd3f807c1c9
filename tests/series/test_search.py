"""Golden section, on curves whose optimum is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from scipy.optimize import minimize_scalar

from ckpt_tools.errors import UsageError
from ckpt_tools.series.search import LOG, SCALES, Optimum, Scale, golden_section

Curve = Callable[[float], float]


def searched(curve: Curve, low: float, high: float, evaluations: int = 8, scale: Scale = LOG) -> tuple[Optimum, int]:
    """Search, and count what was evaluated."""
    search = golden_section(low, high, evaluations=evaluations, scale=scale)
    asked, count = next(search), 0
    while True:
        count += len(asked)
        try:
            asked = search.send([curve(value) for value in asked])
        except StopIteration as stop:
            return stop.value, count


CURVES: list[Curve] = [
    lambda x: -((math.log(x) - math.log(7)) ** 2),
    lambda x: -abs(math.log(x / 20)),
    lambda x: -((x - 50) ** 2),
    lambda x: x * math.exp(-x / 30),
    lambda x: 1 / (1 + (math.log(x) - 1) ** 2),
    lambda x: -math.sqrt(abs(x - 3)),
    lambda x: -math.cosh(math.log(x) - 2),
    lambda x: math.sin(math.log(x) / math.log(100) * math.pi),
    lambda x: -max(0.2 * math.log(x / 12), math.log(12 / x)),
    lambda x: -(x / 40 + 40 / x),
]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("evaluations", [8, 14])
def test_the_optimum_of_a_unimodal_curve_is_found_within_the_tolerance(curve: Curve, evaluations: int) -> None:
    found, count = searched(curve, 1, 100, evaluations)
    exact = math.exp(minimize_scalar(lambda x: -curve(math.exp(x)), bounds=(0, math.log(100)), method="bounded").x)
    tolerance = ((math.sqrt(5) - 1) / 2) ** (evaluations - 1) * math.log(100)
    assert abs(math.log(found.value / exact)) <= tolerance
    assert found.bracket[0] <= exact * (1 + 1e-4)
    assert exact <= found.bracket[1] * (1 + 1e-4)
    assert found.unimodal
    assert count == evaluations
    assert found.score == curve(found.value)


@pytest.mark.parametrize(("curve", "edge"), [(lambda x: x, 100), (lambda x: -x, 1)])
def test_an_optimum_at_the_edge_is_told(curve: Curve, edge: float) -> None:
    found, _ = searched(curve, 1, 100)
    assert found.at_edge
    assert edge in [pytest.approx(end) for end in found.bracket]


def test_an_optimum_inside_is_not_at_the_edge() -> None:
    assert not searched(CURVES[0], 1, 100)[0].at_edge


def test_a_curve_with_several_hills_is_told() -> None:
    found, _ = searched(lambda x: math.sin(8 * math.log(x)), 1, 100)
    assert not found.unimodal


def test_decays_are_spread_by_how_far_they_reach_back() -> None:
    found, _ = searched(lambda d: -abs(math.log((1 - d) / 0.01)), 0.5, 0.9999, 14, SCALES["decay"])
    assert found.value == pytest.approx(0.99, abs=0.001)


def test_nan_is_worse_than_any_score() -> None:
    found, _ = searched(lambda x: math.nan if x > 30 else x, 1, 100)
    assert 10 < found.value <= 30


@pytest.mark.parametrize(
    ("low", "high", "n"), [(5, 5, 8), (7, 3, 8), (0, 9, 8), (-1, 9, 8), (1, 9, 2), (1, math.inf, 8)]
)
def test_bounds_that_allow_no_search_are_refused(low: float, high: float, n: int) -> None:
    with pytest.raises(UsageError, match="nothing to find"):
        next(golden_section(low, high, evaluations=n))
