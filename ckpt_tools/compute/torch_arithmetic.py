"""Arithmetic of torch: the steps of a weighted sum, on whichever device its values are.

Multiplication and addition are separate operations of torch, so that no fused multiply-add can make an element depend
on where a slice begins or on which device it is computed. What `summation` calls an exact sum depends on neither
anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from ..tensors import Category, DType
from .payload import torch_dtype
from .summation import EXACT_SIZE, Kind, Steps, real_dtype

FULL_RANGE = {torch.float64, torch.float32}
"""Narrowing to these turns what overflows into infinity."""
_DIRECT = {torch.float64, torch.float32, torch.bfloat16}  # whose conversion to float64 torch has vectorised
# What is kept of a float64 before it is narrowed to 16 or 8 bits: 12 of the 52 bits of the mantissa.
_DISCARDED = (1 << 40) - 1
_SPLIT = 2.0**27 + 1  # times a float64: its upper half (Dekker)


class Formula(NamedTuple):
    """How torch computes a weighted sum.

    Attributes:
        terms: (real dtype, coefficient), in the order of summation.
        reals: floating-point numbers an element: 2 for complex.
        real: their dtype in the output.
        limit: magnitude from which on a sum overflows that dtype.
        steps: how the terms are added up.
    """

    terms: tuple[tuple[torch.dtype, float], ...]
    reals: int
    real: torch.dtype
    limit: float
    steps: Steps

    @property
    def narrows(self) -> bool:
        """True if a float32 value is the sum, so that one rounding by torch is all there is to do."""
        return self.terms == ((torch.float32, 1.0),) and self.real not in FULL_RANGE

    @property
    def exact(self) -> bool:
        return self.steps.kind is not Kind.PLAIN

    @classmethod
    def of(cls, dtypes: Sequence[DType], coefficients: Sequence[float], out: DType) -> Formula:
        """Choose the steps for terms of these dtypes and an output of that one."""
        terms = tuple((torch_dtype(real_dtype(d)), c) for d, c in zip(dtypes, coefficients, strict=True))
        real, steps = torch_dtype(real_dtype(out)), Steps.of(dtypes, coefficients, out)
        return cls(terms, 2 if out.category is Category.COMPLEX else 1, real, _overflow(real), steps)


class Scratch(Protocol):
    """Memory on a device, as tensors of any dtype."""

    def view(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Return the first `count` elements as a 1-d tensor of a dtype; nothing is copied."""


class Arithmetic:
    """Weighted sums in scratch memory of one device.

    `csrc/sum.c` takes the same steps for plain sums; change both together. `tests/compute/test_native_sums.py` compares
    the bytes.

    Args:
        scratch: allocates scratch memory of so many bytes.
        reals: floating-point numbers in a plain sum, at most; in an exact one, see `room`.
    """

    BYTES = 8 + 8 + 8 + 4
    """Bytes of scratch memory for each real."""

    def __init__(self, scratch: Callable[[int], Scratch], reals: int) -> None:
        self._blocks = [scratch(8 * reals) for _ in range(3)]
        self._single = scratch(4 * reals)
        self._high: torch.Tensor
        self._low: torch.Tensor
        self._lost: torch.Tensor
        self._first: torch.Tensor

    def begin(self, formula: Formula, count: int) -> None:
        """Start a sum of `count` reals."""
        self._formula = formula
        self._factors = iter(formula.steps.factors)
        self._count = count
        self._begun = False
        if formula.exact:
            size = EXACT_SIZE * count
            views = [block.view(torch.float64, size) for block in self._blocks]
            self._free = [view[at : at + count] for view in views for at in range(0, size, count or 1)]
        else:
            self._free = [block.view(torch.float64, count) for block in self._blocks]

    def add(self, values: torch.Tensor) -> None:
        """Add the values of the next term, given in its real dtype."""
        factor, begun = next(self._factors), self._begun
        self._begun = True
        x = self._free.pop()
        self._widen(values, x)
        if self._formula.exact:
            self._add_exactly(x, factor, begun=begun)
            return
        if factor != 1.0:
            x.mul_(factor)
        if begun:
            self._free.append(x)
            self._high.add_(x)
        else:
            self._high = x

    def total(self) -> torch.Tensor:
        """Return the sum of all terms in float64, such that `round` rounds it right; NaN where that is not decided."""
        last = self._formula.steps.last
        if not self._formula.exact:
            return self._high if last == 1.0 else self._high.mul_(last)
        # As csrc/exact.c, but for the products.
        kind, mean = self._formula.steps.kind, self._formula.steps.kind is Kind.MEAN
        high, low = self._two_sum(self._high, self._low, keeps_zero=True)
        if mean:
            quotient, rest = torch.div(high, last, out=self._free.pop()), high
            self._subtract_product(rest, quotient, last)
            rest, lost = self._two_sum(rest, low)
            self._lose(lost)
            low = torch.div(rest, last, out=self._free.pop())
            self._subtract_product(rest, low, last)
            self._lose(rest)
            high, low = self._two_sum(quotient, low, keeps_zero=True)
        size, width, other = (self._free.pop() for _ in range(3))
        is_open, a, b, c = self._masks()
        torch.abs(low, out=size)
        torch.mul(self._lost, 2, out=width).add_(size.mul_(2.0**-51))
        width.mul_(torch.ne(self._lost, 0, out=b))
        if self._formula.real is torch.float64:
            torch.ne(torch.add(low, width, out=other).add_(high), high, out=is_open)
            torch.ne(torch.sub(low, width, out=other).add_(high), high, out=a)
            is_open.bitwise_or_(a)
            torch.abs(high, out=size)
            torch.lt(size, 2.0**-960 if mean else 2.0**-700, out=a)
            is_open.bitwise_or_(a.bitwise_and_(b.bitwise_or_(torch.ne(high, 0, out=c))))
        else:
            torch.le(torch.abs(low, out=size), width, out=is_open).bitwise_and_(b)
            is_open.bitwise_or_(torch.lt(torch.abs(high, out=size), math.inf, out=a).bitwise_not_())
            self._round_to_odd(high, low, size.view(torch.int64), width.view(torch.int64))
        if not mean:
            high.mul_(last)
        high.masked_fill_(is_open, math.nan)
        if kind is Kind.AVERAGE:
            torch.where(torch.eq(self._first, self._first, out=a), self._first, high, out=high)
        self._free.append(other)
        return high

    def _add_exactly(self, x: torch.Tensor, factor: float, *, begun: bool) -> None:
        kind = self._formula.steps.kind
        if not begun:
            self._low, self._lost = self._free.pop().zero_(), self._free.pop().fill_(self._formula.steps.lost)
            if kind is Kind.AVERAGE:
                self._first = self._free.pop().copy_(x)
        elif kind is Kind.AVERAGE:
            self._first.masked_fill_(torch.ne(self._first, x, out=self._masks()[0]), math.nan)
        lost = None
        if kind is not Kind.MEAN:
            x, lost = self._product(x, factor)
        if not begun:
            self._high = x
            if lost is not None:
                self._free.append(self._low)
                self._low = lost
            return
        self._high, of_sum = self._two_sum(self._high, x)
        for each in (of_sum, lost):
            if each is not None:
                self._low, of_low = self._two_sum(self._low, each)
                self._lose(of_low)

    def _two_sum(
        self, a: torch.Tensor, b: torch.Tensor, *, keeps_zero: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a + b, and what rounding loses of it (Knuth), in place of both; with the sign of a zero, if asked."""
        total, part = self._free.pop(), self._free.pop()
        torch.add(a, b, out=total)
        if keeps_zero:
            torch.where(torch.eq(b, 0, out=self._masks()[0]), a, total, out=total)
        torch.sub(total, a, out=part)
        b.sub_(part)
        torch.sub(total, part, out=part)
        a.sub_(part).add_(b)
        self._free += (b, part)
        return total, a

    def _product(self, x: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x times a factor, and what rounding loses of it (Dekker), in place of x."""
        product, upper, lost = (self._free.pop() for _ in range(3))
        torch.mul(x, factor, out=product)
        self._split(x, upper, lost)
        f_upper = _SPLIT * factor - (_SPLIT * factor - factor)
        f_lower = factor - f_upper
        x.sub_(upper)
        torch.mul(upper, f_upper, out=lost).sub_(product)
        lost.add_(upper.mul_(f_lower))
        lost.add_(torch.mul(x, f_upper, out=upper)).add_(x.mul_(f_lower))
        self._free += (x, upper)
        return product, lost

    def _subtract_product(self, a: torch.Tensor, x: torch.Tensor, n: float) -> None:
        """Subtract n x from a, which is its rest: exact for a whole number n of 26 bits."""
        upper, lower = self._free.pop(), self._free.pop()
        self._split(x, upper, lower)
        torch.sub(x, upper, out=lower)
        a.sub_(upper.mul_(n)).sub_(lower.mul_(n))
        self._free += (upper, lower)

    def _split(self, x: torch.Tensor, upper: torch.Tensor, other: torch.Tensor) -> None:
        """Put the upper half of the bits of x into `upper`."""
        torch.mul(x, _SPLIT, out=upper)
        torch.sub(upper, x, out=other)
        upper.sub_(other)

    def _lose(self, lost: torch.Tensor) -> None:
        self._lost.add_(lost.abs_())
        self._free.append(lost)

    def _round_to_odd(self, high: torch.Tensor, low: torch.Tensor, step: torch.Tensor, even: torch.Tensor) -> None:
        """Move an even `high` by a unit towards `low`: a later rounding to fewer bits is as if it were the only one."""
        _, a, b, _ = self._masks()
        bits = high.view(torch.int64)
        step.copy_(torch.eq(torch.gt(high, 0, out=a), torch.gt(low, 0, out=b), out=a)).mul_(2).sub_(1)
        step.mul_(torch.ne(low, 0, out=a)).mul_(torch.bitwise_and(bits, 1, out=even).bitwise_xor_(1))
        bits.add_(step)

    def _masks(self) -> list[torch.Tensor]:
        view = self._single.view(torch.bool, 4 * self._count)
        return [view[i * self._count : (i + 1) * self._count] for i in range(4)]

    def round(self, total: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Round float64 once to the output's dtype, to nearest, ties to even.

        Returns:
            Values whose extremes show whether a result is NaN, infinite, or beyond its dtype.
        """
        if out.dtype in FULL_RANGE:
            return out.copy_(total)
        # torch narrows by way of float32, which rounds twice. Rounding to odd at 12 bits first makes the
        # later roundings right (Boldo and Melquiond 2008): cut, and set the last kept bit if anything was lost.
        bits = total.view(torch.int64)
        sticky = torch.bitwise_and(bits, _DISCARDED, out=self._free[-1].view(torch.int64))
        sticky.add_(_DISCARDED).bitwise_or_(bits).bitwise_and_(~_DISCARDED)
        out.copy_(self.as_single(sticky.view(torch.float64)))
        return total

    def as_single(self, values: torch.Tensor) -> torch.Tensor:
        """Return values as float32: torch has no other operations on the narrowest dtypes."""
        return self._single.view(torch.float32, values.numel()).copy_(values)

    def _widen(self, values: torch.Tensor, target: torch.Tensor) -> None:
        """Copy values into a float64 tensor; exact for every dtype."""
        target.copy_(values if values.dtype in _DIRECT else self.as_single(values))


def _overflow(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that rounds beyond the largest value of a dtype: half a step above it."""
    info = torch.finfo(dtype)
    return info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)
