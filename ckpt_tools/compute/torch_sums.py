"""Sums by torch: any dtype, any strides, in slices that stay in a core's cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..errors import NumericsError
from ..formats.file_plan import OutTensor, Terms, used
from ..storage.source import OpenFiles, Stamp
from ..tensors import SummedSpec, c_strides
from .payload import Buffer, Reader, TensorSource, torch_dtype
from .summation import EXACT_SIZE, Kind, real_dtype, room
from .tiles import Tile
from .torch_arithmetic import FULL_RANGE, Arithmetic, Formula
from .work_units import SLICE, Slice, divided

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
            whole = values.dtype in FULL_RANGE
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


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
