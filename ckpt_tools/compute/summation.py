"""Summation: which steps a weighted sum takes, whether C, torch or a GPU computes it.

The value of an element is defined by its inputs alone: sum c_i x_i, with the coefficients as they are in float64. If
all coefficients are 1/N in float64, it is the mean, sum x_i / N; and if they sum up to 1 but for rounding, the average
of equal values is that value.

- *Exact* sums, of float64 and of 8-bit floats, are that value, correctly rounded: to nearest, ties to even. A sum is
  kept in two float64 numbers, `high` and `low`, and a bound of what has been lost (`csrc/exact.c`, `Arithmetic`).
  Nearly always this decides the rounding, often because nothing at all is lost. Where it does not, the result is NaN at
  first, and torch's way computes the element in integers. So the bytes depend on no order of operations.
- Plain sums, of float32, bfloat16 and float16, add float64 products up and round once. They differ from the exact value
  by at most half a step of the result and (N + 1) 2^-53 sum |c_i x_i|. A mean is exact unless its values are further
  apart than float64 can hold together: a factor of 2^28 / N in float32. The order of operations is fixed.

T. Ogita, S. Rump, S. Oishi, Accurate Sum and Dot Product (2005), whose Dot2 has the same error-free steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from ..tensors import DTYPES, DType

EXACT_SIZE = 3
"""Plain sums that take as much of torch's scratch memory as an exact one."""
_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
_PLAIN = {"float32", "bfloat16", "float16"}
_SCALE = 300  # binary places: a product of any float64 number has no bit below its smallest one then
_LEAST = -300  # lowest bit of a coefficient for which that holds
_LOST = 2.0**-1000  # more than what all products lose that do have bits below


class Kind(IntEnum):
    """How the terms of a row are added up."""

    PLAIN = 0
    SUM = 1
    """Exact."""
    AVERAGE = 2
    """Exact, and the coefficients sum up to 1 but for rounding: where all values are equal, that value."""
    MEAN = 3
    """Exact; the sum of all values is divided by their number."""


class Steps(NamedTuple):
    """The steps of a weighted sum that depend on dtypes and coefficients.

    Attributes:
        kind: how the terms are added up.
        factors: each value is multiplied by the one of its term.
        last: the sum is multiplied by it at the end, or, of kind MEAN, divided by it.
        lost: what a sum has lost already before the first term, at most.
    """

    kind: Kind
    factors: tuple[float, ...]
    last: float
    lost: float

    @classmethod
    def of(cls, dtypes: Sequence[DType], coefficients: Sequence[float], out: DType) -> Steps:
        """Choose the steps for terms of these dtypes, with these coefficients, and an output of that dtype."""
        n = len(coefficients)
        equal = len(set(coefficients)) == 1
        if not exact(dtypes, out) or tuple(coefficients) == (1.0,):
            if equal:
                return cls(Kind.PLAIN, (1.0,) * n, coefficients[0], 0.0)
            return cls(Kind.PLAIN, tuple(coefficients), 1.0, 0.0)
        if equal and coefficients[0] == 1 / n:
            return cls(Kind.MEAN, (1.0,) * n, float(n), 0.0)
        kind = Kind.AVERAGE if abs(math.fsum(coefficients) - 1.0) <= 1e-12 else Kind.SUM
        lost = 0.0 if all(_lowest_bit(c) >= _LEAST for c in coefficients) else _LOST
        return cls(kind, tuple([c * 2.0**_SCALE for c in coefficients]), 2.0**-_SCALE, lost)


def exact(dtypes: Sequence[DType], out: DType) -> bool:
    """Return True if sums of these dtypes are exact, and not plain."""
    return not all(real_dtype(dtype).name in _PLAIN for dtype in (out, *dtypes))


def room(dtypes: Sequence[DType], out: DType, size: int) -> int:
    """Return how many sums of these dtypes torch has room for, where it has room for `size` plain ones."""
    return size // EXACT_SIZE if exact(dtypes, out) else size


def real_dtype(dtype: DType) -> DType:
    """Return the dtype of the real numbers in an element: its own, or that of a complex number's two parts."""
    return DTYPES[_REAL.get(dtype.name, dtype.name)]


def _lowest_bit(number: float) -> int:
    """Return the exponent of the lowest bit that is set in a number other than 0."""
    numerator, denominator = number.as_integer_ratio()
    return 1 - denominator.bit_length() if denominator > 1 else (numerator & -numerator).bit_length() - 1
