"""Norms: the distance of two vectors, their lengths and their angle, from sums of squares that are joined exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Squares = tuple[int, int, int]
"""The sums of (a - b)^2, a^2 and b^2, in units of 2^-1074, the smallest float64: integers, added in any order."""
_UNITS = 1 << 1074


@dataclass(frozen=True, slots=True)
class Apart:
    """How far two vectors of finite floating-point values are apart; squares below 2^-1074 count as 0.

    Attributes:
        distance: the Euclidean norm of a - b.
        norm_a, norm_b: the norms of both.
        relative: the distance, divided by the larger norm; 0 if both are 0.
        cosine: of the angle between them; None if one is 0.
    """

    distance: float
    norm_a: float
    norm_b: float
    relative: float
    cosine: float | None


def squares(gap: float, a: float, b: float) -> Squares | None:
    """Return sums of squares as integers; None if one is beyond the range of float64."""
    if not (math.isfinite(gap) and math.isfinite(a) and math.isfinite(b)):
        return None
    return _whole(gap), _whole(a), _whole(b)


def _whole(value: float) -> int:
    above, below = value.as_integer_ratio()  # a power of 2
    return above << (_UNITS.bit_length() - below.bit_length())


def added(found: Iterable[Squares | None]) -> Squares | None:
    """Return the squares of vectors that are joined from others; None if one of them is not known."""
    gap = a = b = 0
    for each in found:
        if each is None:
            return None
        gap, a, b = gap + each[0], a + each[1], b + each[2]
    return gap, a, b


def apart(found: Squares | None) -> Apart | None:
    """Return distance, norms and angle; None for squares that are not known, or beyond the range of float64.

    The cosine is from 2 a.b = a.a + b.b - (a - b).(a - b).
    """
    if found is None:
        return None
    gap, a, b = found
    try:
        distance, norm_a, norm_b = (math.sqrt(square / _UNITS) for square in found)  # rounded once, then the root
        product = (a + b - gap) / (2 * _UNITS)
    except OverflowError:
        return None
    relative = distance / max(norm_a, norm_b) if a or b else 0.0
    # The sums were rounded, each by itself.
    cosine = min(1.0, max(-1.0, product / norm_a / norm_b)) if a and b else None
    return Apart(distance, norm_a, norm_b, relative, cosine)
