"""File plans: the layout of an output file, and how each of its tensors is computed.

A writer is a pure function from tensors to a `FilePlan`: an ordered list of segments. A segment is the payload of a
tensor, or bytes computed from checksums of tensors. The engine writes the payloads in any order, and the computed
segments once it has the checksums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from ..tensors import DType, SummedSpec, TensorSpec, c_strides

Files = tuple[tuple[Path, int], ...]
"""Files with identical headers: (path, bytes by which its payload starts later than in the first file)."""


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """The terms of weighted sums, in the order of summation, and the rows of coefficients: a sum for each row.

    Attributes:
        specs: one per term; where `files` is given, the one in the first of them.
        rows: float64, one coefficient per term; one tuple for all tensors with the same ones. A row leaves out the
            terms of coefficient 0; see `used`. Each term is in a row.
        files: the terms are this tensor in files with identical headers; one tuple for all tensors of the files.
    """

    specs: tuple[TensorSpec, ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()
    files: Files = ()

    @classmethod
    def of(cls, terms: Iterable[tuple[TensorSpec, float]]) -> Terms:
        """Make those of one row from pairs of spec and coefficient; a sum among them gives its own terms."""
        specs, row = zip(*terms, strict=True)
        return cls.of_rows(specs, (row,))

    @classmethod
    def of_rows(cls, specs: Iterable[TensorSpec], rows: Iterable[Sequence[float]]) -> Terms:
        """Make those that some row uses; a sum among them gives its own terms."""
        columns: list[tuple[TensorSpec, tuple[float, ...]]] = []
        for spec, column in zip(specs, zip(*rows, strict=True), strict=True):
            if type(spec) is SummedSpec:
                columns += [(each, tuple([c * factor or 0.0 for c in column])) for each, factor in spec.terms]
            else:
                columns.append((spec, tuple([c or 0.0 for c in column])))  # -0.0 would change the result
        apart, coefficients = zip(*columns, strict=True)
        whole = cls(apart, tuple(zip(*coefficients, strict=True)))
        return whole.of_these(range(len(whole.rows)))

    @classmethod
    def copy(cls, spec: TensorSpec) -> Terms:
        """Return the terms whose sum is this tensor; one, unless it is a sum itself."""
        return cls.of([(spec, 1.0)]) if type(spec) is SummedSpec else cls((spec,), ((1.0,),))

    def of_these(self, rows: Sequence[int]) -> Terms:
        """Return the terms of some of the rows, without those that none of them uses."""
        chosen = tuple([self.rows[row] for row in rows])
        terms = sorted({term for row in chosen for term in used(row)})
        if len(terms) == len(self) and len(rows) == len(self.rows):
            return self
        return Terms(
            self.specs if self.files else tuple([self.specs[term] for term in terms]),
            tuple([tuple([row[term] for term in terms]) for row in chosen]),
            _files_at(self.files, tuple(terms)) if self.files else (),
        )

    def __len__(self) -> int:
        return len(self.files or self.specs)

    def __getitem__(self, index: int) -> TensorSpec:
        return self.specs[0].relocated(*self.files[index]) if self.files else self.specs[index]

    def __iter__(self) -> Iterator[TensorSpec]:
        return map(self.__getitem__, range(len(self)))

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """One per term."""
        if self.files:
            return (self.specs[0].dtype,) * len(self.files)
        return tuple([spec.dtype for spec in self.specs])

    @property
    def width(self) -> int:
        """Bytes read for each element of the sum."""
        if self.files:
            return self.specs[0].width * len(self.files)
        return sum([spec.width for spec in self.specs])

    @property
    def paths(self) -> list[Path]:
        """The files that have the terms; one may be there several times."""
        if self.files:
            return [path for path, _ in self.files]
        return [path for spec in self.specs for path in spec.paths]

    @property
    def inputs(self) -> Sequence[tuple[TensorSpec, Files]]:
        """(spec, the files that have it), in the order of the terms."""
        if self.files:
            return ((self.specs[0], self.files),)
        return [(spec, tuple([(path, 0) for path in spec.paths])) for spec in self.specs]


def used(row: Sequence[float]) -> tuple[int, ...]:
    """Return the terms that a row sums up: those whose coefficient is not 0, or the last if all are 0."""
    return tuple([term for term, coefficient in enumerate(row) if coefficient != 0]) or (len(row) - 1,)


@lru_cache(maxsize=1024)
def _files_at(files: Files, terms: tuple[int, ...]) -> Files:
    return tuple([files[term] for term in terms])


class GroupKey(NamedTuple):
    """How the elements of a tensor are computed; tensors with equal keys may share a work unit.

    Attributes:
        dtypes, rows: of the terms; a result for each row.
        out: dtype of the results.
        copied: the result is the bytes of the only term.
        checked: refuse NaN and infinity in the results.
    """

    dtypes: tuple[DType, ...]
    rows: tuple[tuple[float, ...], ...]
    out: DType
    copied: bool
    checked: bool


_COPY = ((1.0,),)  # the rows of a copy

# Equal keys are one object: there are few keys and many tensors.
_group_key = lru_cache(maxsize=1024)(GroupKey)


@dataclass(frozen=True, slots=True, eq=False)
class OutTensor:
    """A tensor of an output file: a weighted sum of tensors of the inputs.

    Compared by identity: two names with the same OutTensor are tied. Output files that differ in their coefficients
    alone share their tensors: these have a row for each file. One with a single row is the same in all of them.

    Attributes:
        dtype: of the output.
        shape: of the output and of every term.
        terms: a single one of coefficient 1 and of the output's dtype is copied byte for byte. None if `data` is given.
        name: for messages.
        finite: refuse NaN and infinity; False for tensors that are not weights.
        data: the bytes of a tensor that no input has.
    """

    dtype: DType
    shape: tuple[int, ...]
    terms: Terms
    name: str
    finite: bool = True
    data: bytes | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def origin(self) -> object:
        """The tensor of the last input, or this one if there is no input."""
        return self.terms.specs[-1] if self.terms else self

    @property
    def copied(self) -> bool:
        """True if the output is the bytes of its only input."""
        return self.terms.rows == _COPY and self.terms.specs[0].dtype is self.dtype

    @property
    def verbatim(self) -> bool:
        """True if a byte range of an input can be copied to the output without decoding or checks."""
        if not self.copied or (self.finite and self.dtype.averaged):
            return False
        spec = self.terms[0]
        return spec.contiguous and not spec.swapped

    @property
    def group_key(self) -> GroupKey | None:
        """Its key if it may share a work unit, being contiguous and little endian in every input; else None."""
        strides = c_strides(self.shape)
        for spec in self.terms.specs:
            plain = type(spec) is TensorSpec and (spec.stride == strides or spec.contiguous)
            if not plain or (spec.storage.big_endian and spec.swapped):
                return None
        return self.tile_key if self.terms else None

    @property
    def tile_key(self) -> GroupKey:
        """Its key whatever its strides and byte order; only for a tensor with terms."""
        checked = self.finite and self.dtype.averaged
        return _group_key(self.terms.dtypes, self.terms.rows, self.dtype, self.copied, checked)


class Payload(NamedTuple):
    """The segment with the elements of a tensor; a tensor may have several. `offset`: in bytes from the file start."""

    tensor: OutTensor
    offset: int


class Computed(NamedTuple):
    """A segment with constant bytes, or bytes computed from checksums.

    Attributes:
        offset: in bytes from the start of the file.
        nbytes: its length.
        needs: tensors whose CRC-32 it depends on.
        make: from these checksums, in the same order, to the bytes.
    """

    offset: int
    nbytes: int
    needs: tuple[OutTensor, ...]
    make: Callable[[Sequence[int]], bytes]


def constant(offset: int, data: bytes) -> Computed:
    """Return a segment with these bytes."""
    return Computed(offset, len(data), (), lambda _: data)


Segment = Payload | Computed


@dataclass(frozen=True, eq=False)
class FilePlan:
    """The layout of an output file.

    Attributes:
        name: file name.
        size: in bytes.
        segments: by offset, without overlap; bytes between them are zero.
    """

    name: str
    size: int
    segments: tuple[Segment, ...]

    @cached_property
    def payloads(self) -> tuple[Payload, ...]:
        """The payload segments."""
        return tuple([each for each in self.segments if type(each) is Payload])

    @cached_property
    def computed(self) -> tuple[Computed, ...]:
        """The computed segments."""
        return tuple([each for each in self.segments if type(each) is Computed])

    @cached_property
    def needs_checksums(self) -> bool:
        """True if a segment depends on the checksum of a tensor."""
        return any(each.needs for each in self.computed)

    def with_headers(self) -> Iterator[tuple[Payload, Computed | None]]:
        """Yield each payload with the segment directly before it, if that depends on this tensor alone.

        Such a pair can be written in one call.
        """
        before: Segment | None = None
        for segment in self.segments:
            if type(segment) is Payload:
                header = None
                if type(before) is Computed and before.needs == (segment.tensor,):
                    header = before if before.offset + before.nbytes == segment.offset else None
                yield segment, header
            before = segment


def whole_file(name: str, data: bytes) -> FilePlan:
    """Plan a file with these bytes."""
    return FilePlan(name, len(data), (constant(0, data),))


def joined(name: str, plans: Sequence[tuple[int, FilePlan]]) -> FilePlan:
    """Join plans, given as (offset, plan) in ascending order, into one file."""
    segments = tuple(
        segment._replace(offset=start + segment.offset) for start, plan in plans for segment in plan.segments
    )
    return FilePlan(name, max((start + plan.size for start, plan in plans), default=0), segments)
