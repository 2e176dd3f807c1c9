"""Pieces: what a job is cut into, and what may be summed in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .formats.output import FilePlan, OutTensor
from .tensors import DType

PIECE = 128 * 1024
"""Elements that torch handles at a time: few enough that its buffers (2.5 MB for float32) stay in a shared
cache, enough that the price of a call and of passing the interpreter lock on is small beside the work."""
MEMORY = PIECE * 88
"""Private bytes that a thread needs for that, at most."""
SMALL = 64 * 1024
"""Bytes in an input up to which a tensor is small: calls cost as much as moving it."""
_GATHERED = 64 * 1024  # elements of small tensors that are summed in one go, about
_MANY = 1024  # small tensors that are


@dataclass(frozen=True, slots=True)
class OutFile:
    """An output file being written: its plan, and a descriptor open for writing."""

    plan: FilePlan
    fd: int


class Kind(NamedTuple):
    """What tensors have in common that are summed in one go. All stand contiguous in every input, little endian.

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


class Part(NamedTuple):
    """Elements [start, stop) of a tensor, in C order.

    Attributes:
        out: the file they go to.
        tensor: what they are part of.
        offset: of the whole tensor in that file, in bytes.
        start, stop: in elements.
    """

    out: OutFile
    tensor: OutTensor
    offset: int
    start: int
    stop: int

    @property
    def position(self) -> int:
        """Where the part begins in its file."""
        return self.offset + self.start * self.tensor.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.tensor.dtype.itemsize

    @property
    def moved(self) -> int:
        """Bytes to read and to write."""
        read = sum([dtype.itemsize for dtype in self.tensor.dtypes])
        return (self.stop - self.start) * (read + self.tensor.dtype.itemsize)


class Batch(NamedTuple):
    """What a thread does in one go: a part, or small tensors of one kind that go to one file.

    Attributes:
        kind: of the parts; None where the part must be put together first.
        parts: in the order of the file.
        small: these are small tensors, whole.
    """

    kind: Kind | None
    parts: tuple[Part, ...]
    small: bool = False


def kind_of(tensor: OutTensor) -> Kind | None:
    """Tell what a tensor may be summed together with; None if its elements do not simply stand in line."""
    if not tensor.terms:
        return None
    for spec, _ in tensor.places:  # a chunked one is not contiguous
        if not spec.contiguous or (spec.storage.big_endian and spec.dtype.word > 1):
            return None
    return Kind(
        tensor.dtypes,
        tensor.coefficients,
        tensor.dtype,
        tensor.copied,
        tensor.finite and tensor.dtype.averaged,
    )


def cut(outputs: Iterable[OutFile], *, piece: int, alone: int) -> Iterator[Batch]:
    """Cut a job into batches: large tensors into pieces, small ones gathered by kind.

    Args:
        piece: elements of a part.
        alone: elements of a part that must be put together first.
    """
    for out in outputs:
        gathered: dict[Kind, list[Part]] = {}
        elements: dict[Kind, int] = {}
        for tensor, offset in out.plan.slots:
            kind, numel = kind_of(tensor), tensor.numel
            if kind is None or numel >= piece or not _is_small(kind, numel):
                size = alone if kind is None else piece
                for start in range(0, numel, size):
                    yield Batch(kind, (Part(out, tensor, offset, start, min(start + size, numel)),))
            elif numel:
                parts = gathered.setdefault(kind, [])
                parts.append(Part(out, tensor, offset, 0, numel))
                elements[kind] = elements.get(kind, 0) + numel
                if elements[kind] >= _GATHERED or len(parts) >= _MANY:
                    yield Batch(kind, tuple(gathered.pop(kind)), small=True)
                    del elements[kind]
        for kind, parts in gathered.items():
            yield Batch(kind, tuple(parts), small=True)


def _is_small(kind: Kind, numel: int) -> bool:
    return numel * max(dtype.itemsize for dtype in kind.dtypes) <= SMALL
