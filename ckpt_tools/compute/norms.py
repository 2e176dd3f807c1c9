"""Norms: the distance of two vectors, their lengths and their angle, from sums of squares that are joined exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Squares = tuple[int, int, int]
"""The sums of (a - b)^2, a^2 and b^2, in units of 2^-1074, the smallest float64: integers, added in any order."""
_UNIT = 1074


@dataclass(frozen=True, slots=True)
class Apart:
    """How far two vectors of finite floating-point values are apart.

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
    if not all(map(math.isfinite, (gap, a, b))):
        return None
    one, two, three = (above * ((1 << _UNIT) // below) for above, below in map(float.as_integer_ratio, (gap, a, b)))
    return one, two, three


def added(found: Iterable[Squares | None]) -> Squares | None:
    """Return the squares of vectors that are joined from others; None if one of them is not known."""
    gap = a = b = 0
    for each in found:
        if each is None:
            return None
        gap, a, b = gap + each[0], a + each[1], b + each[2]
    return gap, a, b


def apart(found: Squares) -> Apart:
    """Return distance, norms and angle. The cosine is from 2 a.b = a.a + b.b - (a - b).(a - b)."""
    gap, a, b = found
    distance, norm_a, norm_b = (math.isqrt(square << _UNIT) / (1 << _UNIT) for square in found)
    # The sums were rounded, each by itself.
    cosine = min(1.0, max(-1.0, (a + b - gap) / (2 * math.isqrt(a * b)))) if a and b else None
    return Apart(distance, norm_a, norm_b, distance / max(norm_a, norm_b) if a or b else 0.0, cosine)
