"""File plans: the layout of an output file, and how each of its tensors is computed.

A writer is a pure function from tensors to a `FilePlan`: an ordered list of segments. A segment is the payload of a
tensor, or bytes computed from checksums of tensors. The engine writes the payloads in any order, and the computed
segments once it has the checksums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from ..tensors import DType, TensorSpec, c_strides

Files = tuple[tuple[Path, int], ...]
"""Files with identical headers: (path, bytes by which its payload starts later than in the first file)."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedTerms:
    """Terms of one tensor in files with identical headers; each spec is made on access.

    Attributes:
        spec: of the tensor in the template.
        files: in the order of summation; one tuple, shared by all tensors of a file.
        coefficients: float64, one per file; shared as well.
    """

    spec: TensorSpec
    files: Files
    coefficients: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[TensorSpec, float]:
        return self.spec.relocated(*self.files[index]), self.coefficients[index]

    def __iter__(self) -> Iterator[tuple[TensorSpec, float]]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """Terms whose coefficients are one tuple for all tensors of a job.

    Attributes:
        specs: in the order of summation.
        coefficients: float64, one per spec.
    """

    specs: tuple[TensorSpec, ...]
    coefficients: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, index: int) -> tuple[TensorSpec, float]:
        return self.specs[index], self.coefficients[index]

    def __iter__(self) -> Iterator[tuple[TensorSpec, float]]:
        return zip(self.specs, self.coefficients, strict=True)


class GroupKey(NamedTuple):
    """How the elements of a tensor are computed; tensors with equal keys may share a work unit.

    Attributes:
        dtypes, coefficients: of the terms.
        out: dtype of the result.
        copied: the result is the bytes of the only term.
        checked: refuse NaN and infinity in the result.
    """

    dtypes: tuple[DType, ...]
    coefficients: tuple[float, ...]
    out: DType
    copied: bool
    checked: bool


# Equal keys are one object: there are few keys and many tensors.
_group_key = lru_cache(maxsize=1024)(GroupKey)


@dataclass(frozen=True, slots=True, eq=False)
class OutTensor:
    """A tensor of an output file: a weighted sum of tensors of the inputs.

    Compared by identity: two names with the same OutTensor are tied.

    Attributes:
        dtype: of the output.
        shape: of the output and of every term.
        terms: (input tensor, float64 coefficient), in the order of summation. A single term of
            coefficient 1 and of the output's dtype is copied byte for byte. Empty if `data` is given.
        name: for messages.
        finite: refuse NaN and infinity; False for tensors that are not weights.
        data: the bytes of a tensor that no input has.
    """

    dtype: DType
    shape: tuple[int, ...]
    terms: tuple[tuple[TensorSpec, float], ...] | SharedTerms | Terms
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
    def dtypes(self) -> tuple[DType, ...]:
        """Of the terms."""
        if type(self.terms) is SharedTerms:
            return (self.terms.spec.dtype,) * len(self.terms)
        return tuple([spec.dtype for spec in self.specs])

    @property
    def width(self) -> int:
        """Bytes of the inputs read for each element."""
        if type(self.terms) is SharedTerms:
            return self.terms.spec.dtype.itemsize * len(self.terms.files)
        return sum([spec.dtype.itemsize for spec in self.specs])

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Of the terms."""
        if type(self.terms) is tuple:
            return tuple([coefficient for _, coefficient in self.terms])
        return self.terms.coefficients  # type: ignore[union-attr]

    @property
    def origin(self) -> object:
        """The tensor of the last input, or this one if there is no input."""
        if type(self.terms) is SharedTerms:
            return self.terms.spec
        return self.terms[-1][0] if self.terms else self

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """Of the terms."""
        return self.terms.specs if type(self.terms) is Terms else [spec for spec, _ in self.terms]

    @property
    def places(self) -> Sequence[tuple[TensorSpec, Files]]:
        """(spec, files with a term at this place), in the order of the terms."""
        if type(self.terms) is SharedTerms:
            return ((self.terms.spec, self.terms.files),)
        return [(spec, tuple([(path, 0) for path in spec.paths])) for spec in self.specs]

    @property
    def copied(self) -> bool:
        """True if the output is the bytes of its only input."""
        return len(self.terms) == 1 and self.terms[0][1] == 1.0 and self.terms[0][0].dtype is self.dtype

    @property
    def verbatim(self) -> bool:
        """True if a byte range of an input can be copied to the output without decoding or checks."""
        spec = self.terms[0][0] if self.copied else None
        if spec is None or (self.finite and self.dtype.averaged):
            return False
        return spec.contiguous and not spec.swapped

    @property
    def group_key(self) -> GroupKey | None:
        """Its key if it may share a work unit, being contiguous and little endian in every input; else None."""
        if not self.terms:
            return None
        strides = c_strides(self.shape)
        for spec in [self.terms.spec] if type(self.terms) is SharedTerms else self.specs:
            plain = type(spec) is TensorSpec and (spec.stride == strides or spec.contiguous)
            if not plain or (spec.storage.big_endian and spec.swapped):
                return None
        return self.tile_key

    @property
    def tile_key(self) -> GroupKey:
        """Its key whatever its strides and byte order; only for a tensor with terms."""
        checked = self.finite and self.dtype.averaged
        return _group_key(self.dtypes, self.coefficients, self.dtype, self.copied, checked)


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
