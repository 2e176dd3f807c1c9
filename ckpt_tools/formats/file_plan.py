"""File plans: which tensors an output file holds and how each is computed, and which bytes go where.

A writer is a pure function from tensors to a `FilePlan`: an ordered list of segments. A segment is the payload of a
tensor, or bytes that are computed, from checksums of tensors if need be. The engine fills the payloads in any order
and writes the computed segments once it knows the checksums.
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
"""Files with identical headers: the path of each, and by how many bytes its payload begins later than in the first."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedTerms:
    """Terms of one tensor in files with identical headers; the spec of each is made when it is asked for.

    Attributes:
        spec: of the tensor in the template, the file whose header was parsed for all.
        files: in the order of summation; one tuple for all tensors of a file.
        coefficients: float64, one a file; likewise.
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
    """Terms as one tuple of tensors, and one of coefficients that all tensors of a job share.

    Attributes:
        specs: in the order of summation.
        coefficients: float64, one a tensor.
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
        dtypes: of the terms.
        coefficients: of the terms.
        out: dtype of the result.
        copied: the one term is the result, byte for byte.
        checked: NaN and infinity in it are refused.
    """

    dtypes: tuple[DType, ...]
    coefficients: tuple[float, ...]
    out: DType
    copied: bool
    checked: bool


# One object for all tensors with equal keys: there are few keys, and many tensors.
_group_key = lru_cache(maxsize=1024)(GroupKey)


@dataclass(frozen=True, slots=True, eq=False)
class OutTensor:
    """A tensor of an output file: a weighted sum of tensors of the inputs.

    Compared by identity: two names that hold the same OutTensor are tied.

    Attributes:
        dtype: of the output.
        shape: of the output and of every term.
        terms: (input tensor, float64 coefficient), in the order of summation. One term of
            coefficient 1 and of the output's dtype is copied, byte for byte. Empty where `data` is given.
        name: for messages.
        finite: refuse NaN and infinity in it; False for what stands beside the weights.
        data: the bytes themselves, for a tensor that no input holds.
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
        """Bytes of the inputs that go into an element."""
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
        """The tensor of the last input, or this one where there is no input."""
        if type(self.terms) is SharedTerms:
            return self.terms.spec
        return self.terms[-1][0] if self.terms else self

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """Of the terms."""
        return self.terms.specs if type(self.terms) is Terms else [spec for spec, _ in self.terms]

    @property
    def places(self) -> Sequence[tuple[TensorSpec, Files]]:
        """Return (spec, files that have a term there) in the order of the terms."""
        if type(self.terms) is SharedTerms:
            return ((self.terms.spec, self.terms.files),)
        return [(spec, tuple([(path, 0) for path in spec.paths])) for spec in self.specs]

    @property
    def copied(self) -> bool:
        """True if the bytes of the one input are the bytes of the output."""
        return len(self.terms) == 1 and self.terms[0][1] == 1.0 and self.terms[0][0].dtype is self.dtype

    @property
    def verbatim(self) -> bool:
        """True if its bytes stand in one run in an input, as they are to be written, and need no look at them."""
        spec = self.terms[0][0] if self.copied else None
        if spec is None or (self.finite and self.dtype.averaged):
            return False
        return spec.contiguous and not spec.swapped

    @property
    def group_key(self) -> GroupKey | None:
        """Its key if it may share a work unit: it is contiguous in every input, and little endian; None otherwise."""
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
        """Its key wherever its elements stand in the inputs; only for a tensor that has terms."""
        checked = self.finite and self.dtype.averaged
        return _group_key(self.dtypes, self.coefficients, self.dtype, self.copied, checked)


class Payload(NamedTuple):
    """A segment of an output file: the elements of a tensor.

    Attributes:
        tensor: one tensor may have several payloads.
        offset: of the first byte in the file.
    """

    tensor: OutTensor
    offset: int


class Computed(NamedTuple):
    """A segment of an output file whose bytes follow from checksums, or from nothing at all.

    Attributes:
        offset: of the first byte in the file.
        nbytes: its length, which is known beforehand.
        needs: tensors whose CRC-32 it depends on.
        make: takes these checksums, in the same order, and returns the bytes.
    """

    offset: int
    nbytes: int
    needs: tuple[OutTensor, ...]
    make: Callable[[Sequence[int]], bytes]


def constant(offset: int, data: bytes) -> Computed:
    """Return the segment of bytes that are known beforehand."""
    return Computed(offset, len(data), (), lambda _: data)


Segment = Payload | Computed


@dataclass(frozen=True, eq=False)
class FilePlan:
    """One output file: what its bytes are, from first to last.

    Attributes:
        name: file name.
        size: bytes in all.
        segments: in the order of their offsets, without overlap; bytes between them are zero.
    """

    name: str
    size: int
    segments: tuple[Segment, ...]

    @cached_property
    def payloads(self) -> tuple[Payload, ...]:
        """The segments that are tensors."""
        return tuple([each for each in self.segments if type(each) is Payload])

    @cached_property
    def computed(self) -> tuple[Computed, ...]:
        """The other segments."""
        return tuple([each for each in self.segments if type(each) is Computed])

    @cached_property
    def needs_checksums(self) -> bool:
        """True if a segment depends on the checksum of a tensor."""
        return any(each.needs for each in self.computed)

    def with_headers(self) -> Iterator[tuple[Payload, Computed | None]]:
        """Yield each payload, and the segment right before it where that depends on this tensor alone.

        So both can be written in one go as soon as the tensor is known.
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
    """Plan a file of which all bytes are known."""
    return FilePlan(name, len(data), (constant(0, data),))


def joined(name: str, parts: Sequence[tuple[int, FilePlan]]) -> FilePlan:
    """Put plans into one file.

    Args:
        parts: (offset, plan), in ascending order.
    """
    segments = tuple(
        segment._replace(offset=start + segment.offset) for start, plan in parts for segment in plan.segments
    )
    return FilePlan(name, max((start + plan.size for start, plan in parts), default=0), segments)
