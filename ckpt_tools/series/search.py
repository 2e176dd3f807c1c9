"""Search: the best value of one option, by golden section (Kiefer 1953, doi.org/10.1090/S0002-9939-1953-0055639-3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from ..errors import UsageError

_GOLDEN = (math.sqrt(5) - 1) / 2
Scale = tuple[Callable[[float], float], Callable[[float], float]]
"""From the values of an option to those on which equal distances mean alike, and back."""

LOG: Scale = (math.log, math.exp)
SCALES: dict[str, Scale] = {
    # An average of decay d reaches 1 / (1 - d) updates back.
    "decay": (lambda d: -math.log1p(-d), lambda x: -math.expm1(-x)),
}
"""Option to its scale; `LOG` for the others."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best of what was evaluated.

    Attributes:
        value: of the option.
        score: at it.
        at_edge: it is the lowest or the highest value that was evaluated, so that the optimum may lie beyond.
        unimodal: scores rise up to it and fall from it on, on what was evaluated.
        bracket: the optimum lies within, if there is one only.
    """

    value: float
    score: float
    at_edge: bool
    unimodal: bool
    bracket: tuple[float, float]


def golden_section(
    low: float, high: float, *, evaluations: int = 8, scale: Scale = LOG
) -> Generator[list[float], Sequence[float], Optimum]:
    """Search for the value with the highest score.

    A generator, so that the values of a round can be evaluated together: it yields values, and is sent their scores;
    NaN counts as the lowest. The first round has two values, each further one has one. After n evaluations, the
    optimum of a unimodal score is known to 0.618^(n - 1) of the range, on the scale.

    Args:
        low, high: bounds of the value.
        evaluations: in all, three or more.
        scale: see `SCALES`.

    Returns:
        What was found, by ``return``.

    Raises:
        UsageError: bounds or a number that allow no search.

    Example:
        >>> search = golden_section(1, 100)
        >>> asked = next(search)
        >>> try:
        ...     while True:
        ...         asked = search.send([-abs(value - 20) for value in asked])
        ... except StopIteration as stop:
        ...     optimum = stop.value
        >>> 18 < optimum.value < 22
        True
    """
    to, back = scale
    try:
        a, b = to(low), to(high)
    except ValueError:
        a = b = 0.0
    if not (a < b < math.inf and evaluations >= 3):
        raise UsageError(f"a search from {low:g} to {high:g} in {evaluations} evaluations has nothing to find.")
    scores: dict[float, float] = {}
    left, right = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    while len(scores) < evaluations:
        new = [x for x in (left, right) if x not in scores]
        found = yield [back(x) for x in new]
        scores |= {x: -math.inf if math.isnan(score) else score for x, score in zip(new, found, strict=True)}
        if len(scores) == evaluations:
            break
        if scores[left] >= scores[right]:
            b, left, right = right, right - _GOLDEN * (right - a), left
        else:
            a, left, right = left, right, left + _GOLDEN * (b - left)
    return _optimum(scores, back, (back(a), back(b)))


def _optimum(scores: dict[float, float], back: Callable[[float], float], ends: tuple[float, float]) -> Optimum:
    places = sorted(scores)
    found = [scores[x] for x in places]
    i = max(range(len(found)), key=found.__getitem__)
    rises = all(a <= b for a, b in zip(found[:i], found[1 : i + 1], strict=True))
    falls = all(a >= b for a, b in zip(found[i:-1], found[i + 1 :], strict=True))
    bracket = (back(places[i - 1]) if i else ends[0], back(places[i + 1]) if i + 1 < len(places) else ends[1])
    return Optimum(back(places[i]), found[i], i in (0, len(places) - 1), rises and falls, bracket)
