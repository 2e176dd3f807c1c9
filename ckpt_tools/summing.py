"""Sums by torch: any dtype, any strides, in pieces that stay in a core's cache.

Multiplication and addition are separate operations of torch, so that no fused multiply-add can
make an element depend on where a piece begins or on which device it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .errors import NumericsError
from .formats.opened import OpenFiles
from .formats.output import OutTensor
from .payload import Buffer, Reader, Source, torch_dtype
from .pieces import Part
from .tensors import DTYPES, DType, Kind

_DIRECT = {torch.float64, torch.float32, torch.bfloat16}  # whose conversion to float64 torch has vectorised
_FULL_RANGE = {torch.float64, torch.float32}  # narrowing to these turns what overflows into infinity
_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
# What is kept of a float64 before it is narrowed to 16 or 8 bits: 12 of the 52 bits of the mantissa.
_DISCARDED = (1 << 40) - 1


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch compute in the thread that asks, for ours are the parallelism."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Recipe:
    """What the pieces of one tensor have in common.

    Attributes:
        terms: (where to read, coefficient, its real dtype), in the order of summation.
        reals: floating-point numbers an element: 2 for complex.
        real: their dtype in the output.
        checked: NaN and infinity in it are refused.
        common: the coefficient, where all are equal: the sum is then multiplied once, instead of every term.
        limit: magnitude from which on a sum overflows that dtype.
        anchored: sum up differences from the first term. The products of float64 values are rounded, so
            that N equal values would sum up to a neighbour; x_1 + sum c_i (x_i - x_1) is the same average,
            and exact when all are equal. Narrower dtypes have bits to spare and need no such care.
    """

    __slots__ = ("anchored", "checked", "common", "limit", "real", "reals", "terms")

    def __init__(self, tensor: OutTensor, files: OpenFiles) -> None:
        self.checked = tensor.finite and tensor.dtype.averaged
        # What is only copied is never computed with, so torch need not know its dtype.
        known = tensor.data is None and (self.checked or not tensor.copied)
        self.terms = [
            (Source(spec, files), c, torch_dtype(real_dtype(spec.dtype)) if known else torch.uint8)
            for spec, c in tensor.terms
        ]
        self.reals = 2 if tensor.dtype.kind is Kind.COMPLEX else 1
        self.real = torch_dtype(real_dtype(tensor.dtype)) if known else torch.uint8
        self.limit = _overflow(self.real) if known else math.inf
        wide = any(dtype is torch.float64 for _, _, dtype in self.terms)
        # float64 has no room for a sum larger than its average.
        coefficients = {c for _, c in tensor.terms}
        self.common = coefficients.pop() if not wide and len(coefficients) == 1 else None
        self.anchored = wide and abs(math.fsum(c for _, c in tensor.terms) - 1.0) <= 1e-12


class Worker:
    """One thread's buffers, and the arithmetic on them."""

    def __init__(self, piece: int, *, allow_nonfinite: bool) -> None:
        # A complex element is two reals, hence twice the length.
        self._reader = Reader(16 * piece)
        self._sum = Buffer(16 * piece)
        self._term = Buffer(16 * piece)
        self._single = Buffer(8 * piece)
        self._first: Buffer | None = None
        self._allow_nonfinite = allow_nonfinite

    def compute(self, piece: Part, recipe: Recipe) -> memoryview:
        """Return the bytes to write for a piece of at most `PIECE` elements; the next call overwrites them.

        Raises:
            NumericsError: an input is not finite, or the result overflows.
            ReadError: an input cannot be read.
        """
        if piece.tensor.copied:
            nbytes = self._reader.read(recipe.terms[0][0], piece.start, piece.stop)
            if recipe.checked and not self._allow_nonfinite:
                values = self._reader.buffer.view(recipe.real, (piece.stop - piece.start) * recipe.reals)
                self._check(piece, recipe, values if values.dtype in _FULL_RANGE else self._as_single(values))
            return self._reader.buffer.bytes[:nbytes]
        total = self._add_up(piece, recipe)
        narrow = self._narrow(total, recipe.real)
        if not self._allow_nonfinite:
            self._check(piece, recipe, narrow if narrow.dtype in _FULL_RANGE else total)
        return self._term.bytes[: narrow.numel() * narrow.element_size()]

    def _add_up(self, piece: Part, recipe: Recipe) -> torch.Tensor:
        count = (piece.stop - piece.start) * recipe.reals
        total = self._sum.view(torch.float64, count)
        if recipe.anchored:
            self._add_up_differences(piece, recipe, total)
        else:
            self._add_up_products(piece, recipe, total)
        return total

    def _add_up_products(self, piece: Part, recipe: Recipe, total: torch.Tensor) -> None:
        term = self._term.view(torch.float64, total.numel())
        target = total
        for source, coefficient, dtype in recipe.terms:
            self._reader.read(source, piece.start, piece.stop)
            self._widen(dtype, target)
            if recipe.common is None:
                target.mul_(coefficient)
            if target is term:
                total.add_(term)
            target = term
        if recipe.common is not None:
            total.mul_(recipe.common)

    def _add_up_differences(self, piece: Part, recipe: Recipe, total: torch.Tensor) -> None:
        self._first = self._first or Buffer(len(self._sum.bytes))
        term = self._term.view(torch.float64, total.numel())
        first = self._first.view(torch.float64, total.numel())
        total.zero_()
        target = first
        for source, coefficient, dtype in recipe.terms:
            self._reader.read(source, piece.start, piece.stop)
            self._widen(dtype, target)
            if target is term:
                total.add_(term.sub_(first).mul_(coefficient))
            target = term
        # Where nothing differs the first value itself, for a sum would lose the sign of a zero.
        torch.where(total == 0, first, first + total, out=total)
        finite = torch.isfinite(total)
        if not finite.all():
            # The difference of two infinities is none, and that of two large numbers may overflow.
            self._add_up_products(piece, recipe, first)
            torch.where(finite, total, first, out=total)

    def _widen(self, dtype: torch.dtype, target: torch.Tensor) -> None:
        """Bring what the reader holds into a float64 tensor; exact for every dtype."""
        source = self._reader.buffer.view(dtype, target.numel())
        target.copy_(source if dtype in _DIRECT else self._as_single(source))

    def _as_single(self, values: torch.Tensor) -> torch.Tensor:
        return self._single.view(torch.float32, values.numel()).copy_(values)

    def _narrow(self, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Round float64 once to the output's dtype, to nearest, ties to even; into the term buffer."""
        out = self._term.view(dtype, total.numel())
        if dtype in (torch.float64, torch.float32):
            return out.copy_(total)
        # torch narrows by way of float32, which rounds twice. Rounding to odd at 12 bits first makes the
        # later roundings right (Boldo and Melquiond 2008): cut, and set the last kept bit if anything was lost.
        bits = total.view(torch.int64)
        sticky = torch.bitwise_and(bits, _DISCARDED, out=self._term.view(torch.int64, total.numel()))
        sticky.add_(_DISCARDED).bitwise_or_(bits).bitwise_and_(~_DISCARDED)
        single = self._single.view(torch.float32, total.numel())
        single.copy_(sticky.view(torch.float64))
        return out.copy_(single)

    def _check(self, piece: Part, recipe: Recipe, values: torch.Tensor) -> None:
        """Refuse NaN and infinity; the extremes tell both, at the price of one pass over the result."""
        low, high = (value.item() for value in torch.aminmax(values))
        if max(-low, high) < recipe.limit:  # false for a NaN
            return
        tensor, reals = piece.tensor, recipe.reals
        for source, _, dtype in recipe.terms:
            self._reader.read(source, piece.start, piece.stop)
            found = self._reader.buffer.view(dtype, values.numel()).to(torch.float64)
            bad = ~torch.isfinite(found)
            if bad.any():
                at = torch.tensor(piece.start + int(bad.nonzero()[0]) // reals)
                index = [int(i) for i in torch.unravel_index(at, tensor.shape)] if tensor.shape else []
                raise NumericsError(
                    f"{source.spec.storage.path}: '{tensor.name}' holds {_word(found[bad][0].item())} at {index}. "
                    "Leave this file out, or pass --allow-nonfinite if the value belongs there (a mask, say)."
                )
        raise NumericsError(
            f"the average of '{tensor.name}' overflows {tensor.dtype.name}. "
            + (
                "Choose a wider one, such as --dtype float32."
                if tensor.dtype.itemsize < 4
                else "Are these the right files?"
            )
        )


def real_dtype(dtype: DType) -> DType:
    """Return the dtype of the numbers that an element consists of: its own, or that of a complex one's parts."""
    return DTYPES[_REAL.get(dtype.name, dtype.name)]


def _overflow(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that rounds beyond the largest value of a dtype: half a step above it."""
    info = torch.finfo(dtype)
    return info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
