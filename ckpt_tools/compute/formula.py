"""Formulas: which steps a weighted sum takes, whether C, torch or a GPU computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..tensors import DTYPES, DType

_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


class Steps(NamedTuple):
    """The steps of a weighted sum that depend on dtypes and coefficients.

    Attributes:
        common: the coefficient, if all are equal: the sum is multiplied by it once, instead of every term.
        anchored: sum up differences from the first term. The products of float64 values are rounded, so
            that N equal values would sum up to a neighbour; x_1 + sum c_i (x_i - x_1) is the same average,
            and exact if all are equal. Narrower dtypes have bits to spare and do not need this.
    """

    common: float | None
    anchored: bool

    @classmethod
    def of(cls, dtypes: Sequence[DType], coefficients: Sequence[float]) -> Steps:
        """Choose the steps for terms of these dtypes, with these coefficients."""
        wide = any(real_dtype(dtype).name == "float64" for dtype in dtypes)
        # float64 has no room for a sum larger than its average.
        common = coefficients[0] if not wide and len(set(coefficients)) == 1 else None
        return cls(common, wide and abs(math.fsum(coefficients) - 1.0) <= 1e-12)


def real_dtype(dtype: DType) -> DType:
    """Return the dtype of the real numbers in an element: its own, or that of a complex number's two parts."""
    return DTYPES[_REAL.get(dtype.name, dtype.name)]
