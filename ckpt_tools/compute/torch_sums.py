"""Sums by torch: any dtype, any strides, in slices that stay in a core's cache.

Multiplication and addition are separate operations of torch, so that no fused multiply-add can
make an element depend on where a slice begins or on which device it is computed.
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
from .formula import Steps, real_dtype
from .payload import Buffer, Reader, TensorSource, torch_dtype
from .tiles import Tile
from .work_units import SLICE, Slice, divided

_DIRECT = {torch.float64, torch.float32, torch.bfloat16}  # whose conversion to float64 torch has vectorised
_FULL_RANGE = {torch.float64, torch.float32}  # narrowing to these turns what overflows into infinity
# What is kept of a float64 before it is narrowed to 16 or 8 bits: 12 of the 52 bits of the mantissa.
_DISCARDED = (1 << 40) - 1


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
        common, anchored: see `Steps`.
    """

    terms: tuple[tuple[torch.dtype, float], ...]
    reals: int
    real: torch.dtype
    limit: float
    common: float | None
    anchored: bool

    @property
    def narrows(self) -> bool:
        """True if a float32 value is the sum, so that one rounding by torch is all there is to do."""
        return self.terms == ((torch.float32, 1.0),) and self.real not in _FULL_RANGE and not self.anchored

    @classmethod
    def of(cls, dtypes: Sequence[DType], coefficients: Sequence[float], out: DType) -> Formula:
        """Choose the steps for terms of these dtypes and an output of that one."""
        terms = tuple((torch_dtype(real_dtype(d)), c) for d, c in zip(dtypes, coefficients, strict=True))
        real = torch_dtype(real_dtype(out))
        common, anchored = Steps.of(dtypes, coefficients)
        return cls(terms, 2 if out.category is Category.COMPLEX else 1, real, _overflow(real), common, anchored)


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
    """Weighted sums in scratch memory of one device: all steps that a bit of a result depends on, in their order.

    `csrc/sum.c` takes the same steps; change both together. `tests/compute/test_native.py` compares the bytes.

    Args:
        scratch: allocates scratch memory of so many bytes.
        reals: floating-point numbers in a sum, at most.
    """

    BYTES = 8 + 8 + 8 + 4
    """Bytes of scratch memory for each real."""

    def __init__(self, scratch: Callable[[int], Scratch], reals: int) -> None:
        self._sum = scratch(8 * reals)
        self._term = scratch(8 * reals)
        self._first = scratch(8 * reals)
        self._single = scratch(4 * reals)

    def begin(self, formula: Formula, count: int) -> None:
        """Start a sum of `count` reals."""
        self._formula = formula
        self._coefficients = iter(formula.terms)
        self._total = self._sum.view(torch.float64, count)
        self._begun = False

    def add(self, values: torch.Tensor) -> None:
        """Add the values of the next term, given in its real dtype."""
        _, coefficient = next(self._coefficients)
        total, begun = self._total, self._begun
        self._begun = True
        if self._formula.anchored:
            target = (self._term if begun else self._first).view(torch.float64, total.numel())
            self._widen(values, target)
            if begun:
                total.add_(target.sub_(self._first.view(torch.float64, total.numel())).mul_(coefficient))
            else:
                total.zero_()
            return
        target = self._term.view(torch.float64, total.numel()) if begun else total
        self._widen(values, target)
        if self._formula.common is None:
            target.mul_(coefficient)
        if begun:
            total.add_(target)

    def total(self) -> torch.Tensor:
        """Return the sum of all terms in float64; NaN or infinity where differences overflowed on the way."""
        total, count = self._total, self._total.numel()
        if self._formula.anchored:
            # The first value itself where nothing differs: a sum would lose the sign of a zero.
            first, same = self._first.view(torch.float64, count), self._single.view(torch.bool, count)
            both = torch.add(first, total, out=self._term.view(torch.float64, count))
            torch.where(torch.eq(total, 0, out=same), first, both, out=total)
        elif self._formula.common is not None:
            total.mul_(self._formula.common)
        return total

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
        sticky = torch.bitwise_and(bits, _DISCARDED, out=self._term.view(torch.int64, total.numel()))
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
            size = -(-2 * self._numel // len(recipe.rows))
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
            if formula.anchored:
                finite = torch.isfinite(total)
                if not finite.all():
                    # The difference of two infinities is NaN, and that of two large numbers may overflow.
                    kept = total.clone()
                    self._add_up(slice_, recipe, [(row, formula._replace(anchored=False), arithmetic)])
                    total = arithmetic.total()
                    total.copy_(torch.where(finite, kept, total))
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
        for slice_ in divided(Slice(tensor, (), 0, tensor.numel), SLICE):
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


def _overflow(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that rounds beyond the largest value of a dtype: half a step above it."""
    info = torch.finfo(dtype)
    return info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
