"""Sums by torch: any dtype, any strides, in slices that stay in a core's cache.

Multiplication and addition are separate operations of torch, so that no fused multiply-add can
make an element depend on where a slice begins or on which device it is computed. What `formula` calls an exact sum
depends on neither anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

from ..errors import NumericsError
from ..formats.file_plan import OutTensor, Terms, used
from ..storage.source import OpenFiles, Stamp
from ..tensors import Category, DType, SummedSpec, c_strides
from .formula import EXACT_SIZE, Kind, Steps, real_dtype, room
from .payload import Buffer, Reader, TensorSource, torch_dtype
from .tiles import Tile
from .work_units import SLICE, Slice, divided

_DIRECT = {torch.float64, torch.float32, torch.bfloat16}  # whose conversion to float64 torch has vectorised
_FULL_RANGE = {torch.float64, torch.float32}  # narrowing to these turns what overflows into infinity
# What is kept of a float64 before it is narrowed to 16 or 8 bits: 12 of the 52 bits of the mantissa.
_DISCARDED = (1 << 40) - 1
_SPLIT = 2.0**27 + 1  # times a float64: its upper half (Dekker)
_PLACES = 1074  # binary places of float64


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch compute in the calling thread alone: the job has threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        return self.terms == ((torch.float32, 1.0),) and self.real not in _FULL_RANGE

    @property
    def exact(self) -> bool:
        return self.steps.kind is not Kind.PLAIN

    @classmethod
    def of(cls, dtypes: Sequence[DType], coefficients: Sequence[float], out: DType) -> Formula:
        """Choose the steps for terms of these dtypes and an output of that one."""
        terms = tuple((torch_dtype(real_dtype(d)), c) for d, c in zip(dtypes, coefficients, strict=True))
        real, steps = torch_dtype(real_dtype(out)), Steps.of(dtypes, coefficients, out)
        return cls(terms, 2 if out.category is Category.COMPLEX else 1, real, _overflow(real), steps)


class RowRecipe(NamedTuple):
    """How to compute one row of a tensor.

    Attributes:
        terms: the numbers of those that it sums up.
        copied: the result is the bytes of the only one.
        formula: None if bytes are copied and not looked at: torch need not know the dtype.
    """

    terms: tuple[int, ...]
    copied: bool
    formula: Formula | None


class Recipe:
    """How to compute the slices of one tensor.

    Attributes:
        sources: where to read each term.
        checked: NaN and infinity are refused.
        rows: how to compute each.
    """

    __slots__ = ("checked", "rows", "sources")

    def __init__(self, tensor: OutTensor, files: OpenFiles) -> None:
        terms = tensor.terms
        self.sources = [TensorSource(spec, files) for spec in terms]
        self.checked = tensor.finite and tensor.dtype.averaged
        self.rows: list[RowRecipe] = []
        dtypes = terms.dtypes
        for row in terms.rows:
            own = used(row)
            coefficients, its_dtypes = tuple([row[term] for term in own]), [dtypes[term] for term in own]
            copied = coefficients == (1.0,) and its_dtypes[0] is tensor.dtype
            looked_at = self.checked or not copied
            formula = Formula.of(its_dtypes, coefficients, tensor.dtype) if looked_at else None
            self.rows.append(RowRecipe(own, copied, formula))


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
        if out.dtype in _FULL_RANGE:
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


class Worker:
    """The buffers of one thread, and sums from files to bytes in them.

    Args:
        numel: elements of the results of all rows of a slice, at most.
    """

    def __init__(self, numel: int, *, allow_nonfinite: bool) -> None:
        # A complex element is two reals, hence twice the length.
        self._numel = numel
        self._reader = Reader(16 * numel)
        self._sums: list[Arithmetic] = []
        self._allow_nonfinite = allow_nonfinite

    def compute(self, slice_: Slice, recipe: Recipe) -> Iterator[tuple[int, memoryview]]:
        """Yield the number of each row, and the bytes to write for a slice; the next ones overwrite them.

        Each term is read once for all rows that are sums.

        Raises:
            NumericsError: an input is not finite, or the result overflows.
            ReadError: an input cannot be read.
        """
        if len(self._sums) != len(recipe.rows):
            self._sums = []  # not both at once
            size = 2 * EXACT_SIZE * -(-self._numel // (EXACT_SIZE * len(recipe.rows)))
            self._sums = [Arithmetic(Buffer, size) for _ in recipe.rows]
        summed = []
        for number, row in enumerate(recipe.rows):
            if row.copied or row.formula is None:
                yield number, self._copy(slice_, recipe, row, self._sums[number])
            elif row.formula.narrows:
                yield number, self._narrow(slice_, recipe, row, row.formula)
            else:
                summed.append((number, row, row.formula, self._sums[number]))
        self._add_up(slice_, recipe, [each[1:] for each in summed])
        for number, row, formula, arithmetic in summed:
            total = arithmetic.total()
            if formula.exact:
                self._decide(slice_, recipe, row, formula, total)
            # All terms have been read, so the reader's buffer is free for the result.
            buffer = self._reader.buffer
            telling = arithmetic.round(total, buffer.view(formula.real, total.numel()))
            if not self._allow_nonfinite:
                self._check(slice_, recipe, row, formula, telling)
            yield number, buffer.bytes[: slice_.nbytes]

    def _copy(self, slice_: Slice, recipe: Recipe, row: RowRecipe, arithmetic: Arithmetic) -> memoryview:
        buffer, formula = self._reader.buffer, row.formula
        self._read(recipe.sources[row.terms[0]], slice_)
        if formula is not None and recipe.checked and not self._allow_nonfinite:
            values = buffer.view(formula.real, slice_.numel * formula.reals)
            whole = values.dtype in _FULL_RANGE
            self._check(slice_, recipe, row, formula, values if whole else arithmetic.as_single(values))
        return buffer.bytes[: slice_.nbytes]

    def _narrow(self, slice_: Slice, recipe: Recipe, row: RowRecipe, formula: Formula) -> memoryview:
        self._read(recipe.sources[row.terms[0]], slice_)
        values = self._reader.buffer.view(torch.float32, slice_.numel * formula.reals)
        if not self._allow_nonfinite:
            self._check(slice_, recipe, row, formula, values)
        spare = self._reader.spare()
        spare.view(formula.real, values.numel()).copy_(values)
        return spare.bytes[: slice_.nbytes]

    def _read(self, source: TensorSource, slice_: Slice) -> None:
        if slice_.tile is None:
            self._reader.read(source, slice_.start, slice_.stop)
        else:
            self._reader.read_tile(source, slice_.tile)

    def _add_up(self, slice_: Slice, recipe: Recipe, rows: Sequence[tuple[RowRecipe, Formula, Arithmetic]]) -> None:
        for _, formula, arithmetic in rows:
            arithmetic.begin(formula, slice_.numel * formula.reals)
        for term, source in enumerate(recipe.sources):
            using = [(formula, arithmetic) for row, formula, arithmetic in rows if term in row.terms]
            if not using:
                continue
            self._read(source, slice_)
            dtype = torch_dtype(real_dtype(source.spec.dtype))
            for formula, arithmetic in using:
                arithmetic.add(self._reader.buffer.view(dtype, slice_.numel * formula.reals))

    def _decide(self, slice_: Slice, recipe: Recipe, row: RowRecipe, formula: Formula, total: torch.Tensor) -> None:
        """Replace each NaN by the sum in integers; if a term is not finite, by that of float64, infinity or NaN."""
        where = total.isnan().nonzero()[:, 0]
        if not len(where):
            return
        mean = formula.steps.kind is Kind.MEAN
        plain, exact = torch.zeros(len(where), dtype=torch.float64), [0] * len(where)
        finite = torch.ones(len(where), dtype=torch.bool)
        for term, (dtype, coefficient) in zip(row.terms, formula.terms, strict=True):
            self._read(recipe.sources[term], slice_)
            values = self._reader.buffer.view(dtype, total.numel()).to(torch.float64)[where]
            plain += values if mean else values * coefficient
            finite &= values.isfinite()
            factor, numbers = 1 if mean else _whole(coefficient), values.tolist()
            for i in finite.nonzero()[:, 0].tolist():
                exact[i] += factor * _whole(numbers[i])
        divisor = len(row.terms) << _PLACES if mean else 1 << 2 * _PLACES
        for i in finite.nonzero()[:, 0].tolist():
            plain[i] = _quotient(exact[i], divisor, odd=formula.real is not torch.float64)
        total[where] = plain

    def _check(self, slice_: Slice, recipe: Recipe, row: RowRecipe, formula: Formula, values: torch.Tensor) -> None:
        """Refuse NaN and infinity; the extremes show both, in one pass over the result."""
        low, high = (value.item() for value in torch.aminmax(values))
        if max(-low, high) < formula.limit:  # false for a NaN
            return
        tensor, reals = slice_.tensor, formula.reals
        for term, (dtype, _) in zip(row.terms, formula.terms, strict=True):
            source = recipe.sources[term]
            self._read(source, slice_)
            found = self._reader.buffer.view(dtype, values.numel()).to(torch.float64)
            bad = ~torch.isfinite(found)
            if bad.any():
                index = _index(slice_, int(bad.nonzero()[0]) // reals)
                raise NumericsError(
                    f"{source.spec.storage.path}: '{tensor.name}' holds {_word(found[bad][0].item())} at {index}. "
                    "Leave this file out, or pass `allow_nonfinite=True` if the value belongs there (a mask, say)."
                )
        raise NumericsError(
            f"the average of '{tensor.name}' overflows {tensor.dtype.name}. "
            + (
                "Choose a wider one, such as `dtype='float32'`."
                if tensor.dtype.itemsize < 4
                else "Are these the right files?"
            )
        )


def read_sum(spec: SummedSpec, name: str, stamps: Iterable[Stamp] = ()) -> torch.Tensor:
    """Compute a whole sum into new memory, as the engine does; NaN and infinity pass.

    Raises:
        ReadError: a file cannot be read, ends early, or has changed since its stamp was taken.
    """
    tensor = OutTensor(spec.dtype, spec.shape, Terms.copy(spec), name)
    found = Buffer(tensor.nbytes)
    with OpenFiles(stamps) as files:
        files.open_all(spec.paths)
        worker, recipe = Worker(SLICE, allow_nonfinite=True), Recipe(tensor, files)
        for slice_ in divided(Slice(tensor, (), 0, tensor.numel), room(tensor.terms.dtypes, tensor.dtype, SLICE)):
            for _, data in worker.compute(slice_, recipe):
                found.bytes[slice_.begin : slice_.begin + slice_.nbytes] = data
    return found.view(torch_dtype(spec.dtype), tensor.numel).view(spec.shape)


def _index(slice_: Slice, at: int) -> list[int]:
    """Return the index in its tensor of an element of a slice."""
    tile = slice_.tile or Tile((0,) * len(slice_.tensor.shape), slice_.tensor.shape)
    at = at if slice_.tile else slice_.start + at
    # torch.unravel_index would import 500 modules.
    strides = c_strides(tile.sizes)
    return [low + at // step % size for low, size, step in zip(tile.low, tile.sizes, strides, strict=True)]


def _whole(number: float) -> int:
    """Return a float64 number in units of the smallest one."""
    numerator, denominator = number.as_integer_ratio()
    return numerator << _PLACES + 1 - denominator.bit_length()


def _quotient(a: int, b: int, *, odd: bool) -> float:
    """Return a / b, correctly rounded; or to odd, as `Arithmetic.total` does for dtypes of fewer bits."""
    try:
        value = a / b  # Python rounds the division of whole numbers right
    except OverflowError:
        return math.inf if a > 0 else -math.inf
    nearest, divisor = value.as_integer_ratio()
    above = a * divisor - nearest * b
    if odd and above and math.frexp(value)[0] * 2**53 % 2 == 0:
        return math.nextafter(value, math.inf if above > 0 else -math.inf)
    return value


def _overflow(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that rounds beyond the largest value of a dtype: half a step above it."""
    info = torch.finfo(dtype)
    return info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
