"""What is to be written: tensors by their recipe, and files by their plan.

A writer is a pure function from recipes to a `FilePlan`: how long the file is, where each
payload goes, and which bytes stand around the payloads. The engine fills the payloads in, in
any order, small ones with the heads before them; the rest is patched in at the end, when all
checksums are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..tensors import DType, TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class TwinTerms:
    """Terms at one place of several files whose headers are equal; the spec of each is made when it is asked for.

    Attributes:
        spec: of one of them.
        paths: the files, in the order of summation; one tuple for all tensors of a job.
        coefficients: float64, one a file; likewise.
    """

    spec: TensorSpec
    paths: tuple[Path, ...]
    coefficients: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[TensorSpec, float]:
        return self.spec.moved(self.paths[index]), self.coefficients[index]

    def __iter__(self) -> Iterator[tuple[TensorSpec, float]]:
        return map(self.__getitem__, range(len(self)))


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
    terms: tuple[tuple[TensorSpec, float], ...] | TwinTerms
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
        if type(self.terms) is TwinTerms:
            return (self.terms.spec.dtype,) * len(self.terms)
        return tuple([spec.dtype for spec, _ in self.terms])

    @property
    def width(self) -> int:
        """Bytes of the inputs that go into an element."""
        if type(self.terms) is TwinTerms:
            return self.terms.spec.dtype.itemsize * len(self.terms.paths)
        return sum([spec.dtype.itemsize for spec, _ in self.terms])

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Of the terms."""
        if type(self.terms) is TwinTerms:
            return self.terms.coefficients
        return tuple([coefficient for _, coefficient in self.terms])

    @property
    def places(self) -> Sequence[tuple[TensorSpec, tuple[Path, ...]]]:
        """Where the terms stand, in order: a place, and the files that have a term there (chunks have their own)."""
        if type(self.terms) is TwinTerms:
            return ((self.terms.spec, self.terms.paths),)
        return [(spec, spec.paths) for spec, _ in self.terms]

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
        for spec, _ in self.places:  # a chunked one is not contiguous
            if not spec.contiguous or spec.swapped:
                return None
        return self.tile_key

    @property
    def tile_key(self) -> GroupKey:
        """Its key wherever its elements stand in the inputs; only for a tensor that has terms."""
        checked = self.finite and self.dtype.averaged
        return _group_key(self.dtypes, self.coefficients, self.dtype, self.copied, checked)


@dataclass(frozen=True, slots=True, eq=False)
class FilePlan:
    """One output file.

    Attributes:
        name: file name.
        size: bytes in all.
        slots: (tensor, offset of its first byte); a tensor may have several.
        patches: from CRC-32 by tensor to (offset, bytes) of all that is neither payload nor head.
        needs_crc: True if `patches` and `head` look at the checksums; always where there are heads.
        head: from the offset of a slot and the CRC-32 of its tensor to what stands right before its payload, where that
            is of its own: so many small tensors can be written in one go.
    """

    name: str
    size: int
    slots: tuple[tuple[OutTensor, int], ...]
    patches: Callable[[Mapping[OutTensor, int]], list[tuple[int, bytes]]]
    needs_crc: bool
    head: Callable[[int, int], bytes] | None = None
