"""Norms: the distance of two vectors, their lengths and their angle, from inner products that are joined exactly."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

InnerProducts = tuple[int, int, int, int]
"""(a - b).(a - b), a.a, b.b and a.b, in units of 2^-1074, the smallest float64: integers, added in any order."""
_UNITS = 1 << 1074


@dataclass(frozen=True, slots=True)
class Norms:
    """Two vectors of finite floating-point values.

    Attributes:
        a, b: the Euclidean norms of both.
        distance: the norm of a - b.
        relative: the distance, divided by the larger norm; 0 if both are 0.
        cosine: of the angle between them; None if one is 0.
    """

    a: float
    b: float
    distance: float
    relative: float
    cosine: float | None

    @classmethod
    def of(cls, products: InnerProducts | None) -> Norms | None:
        """Return the norms; None for products that are not known, or outside of the range of float64."""
        if products is None:
            return None
        try:
            # Each is rounded once, then its root is taken.
            distance, a, b = (math.sqrt(square / _UNITS) for square in products[:3])
            product = products[3] / _UNITS
        except OverflowError:
            return None
        relative = distance / max(a, b) if a or b else 0.0
        # The products were rounded, each by itself.
        cosine = min(1.0, max(-1.0, product / a / b)) if a and b else None
        return cls(a, b, distance, relative, cosine)


def exactly(*products: float) -> InnerProducts | None:
    """Return `InnerProducts` from numbers in that order; None if one is beyond the range of float64."""
    if not all(map(math.isfinite, products)):
        return None
    gap, a, b, ab = map(_whole, products)
    return gap, a, b, ab


def _whole(value: float) -> int:
    above, below = value.as_integer_ratio()  # a power of 2
    return above << (_UNITS.bit_length() - below.bit_length())


def added(found: Iterable[InnerProducts | None]) -> InnerProducts | None:
    """Return the inner products of vectors that are joined from others; None if those of one are not known."""
    gap = a = b = ab = 0
    for each in found:
        if each is None:
            return None
        gap, a, b, ab = gap + each[0], a + each[1], b + each[2], ab + each[3]
    return gap, a, b, ab
