"""Pieces: what a job is cut into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..formats.file_plan import Computed, FilePlan, Files, OutTensor, SharedTerms, SumKind
from ..tensors import Storage, TensorSpec

PIECE = 128 * 1024
"""Elements that torch handles at a time: few enough that its buffers (2.5 MB for float32) stay in a shared
cache, enough that the price of a call and of passing the interpreter lock on is small beside the work."""
MEMORY = PIECE * 88
"""Private bytes that a thread needs for that, at most."""
SMALL = 64 * 1024
"""Bytes in an input up to which a tensor is small: calls cost as much as moving it."""
# Bytes of small tensors that are summed in one go, at most one tensor more; narrow ones count as four bytes an element,
# for their sums. `native.SCRATCH` has to hold them.
_GATHERED = 256 * 1024
_MANY = 1024  # small tensors that are


@dataclass(frozen=True, slots=True)
class OutFile:
    """An output file being written: its plan, and a descriptor open for writing."""

    plan: FilePlan
    fd: int


class Part(NamedTuple):
    """Elements [start, stop) of a tensor, in C order.

    Attributes:
        out: the file they go to.
        tensor: what they are part of.
        offset: of the whole tensor in that file, in bytes.
        start, stop: in elements.
        header: of a whole tensor, the segment before it that is written together with it.
    """

    out: OutFile
    tensor: OutTensor
    offset: int
    start: int
    stop: int
    header: Computed | None = None

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
        return (self.stop - self.start) * (self.tensor.width + self.tensor.dtype.itemsize)


class Batch(NamedTuple):
    """What a thread does in one go: parts of one kind; a single one, unless they are small or go through a device.

    Attributes:
        kind: of the parts; None where the part must be put together first.
        parts: in the order of the file.
        small: these are small tensors, whole.
    """

    kind: SumKind | None
    parts: tuple[Part, ...]
    small: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Run(OutTensor):
    """Tensors of one kind that follow each other without a gap, in every input and in the output, as one of them.

    Attributes:
        members: the tensors, each with its offset in the output.
    """

    members: tuple[tuple[OutTensor, int], ...] = ()


def runs(plan: FilePlan) -> Iterator[tuple[OutTensor, int, SumKind | None]]:
    """Yield (tensor, offset, group key) for each payload; coalesce neighbours that need no checksum each."""
    members: list[tuple[OutTensor, int]] = []
    before: SumKind | None = None
    ends: _Edges = []  # of the last that can have a neighbour
    for tensor, offset in plan.payloads:
        kind = tensor.kind
        begins: _Edges = []
        if kind is not None and not plan.needs_checksums:
            begins = [(offset, None), *[(spec.begin, paths) for spec, paths in tensor.places]]
        if members and not (begins and begins == ends and kind == before):
            yield *_joined(members), before
            members = []
        members.append((tensor, offset))
        before = kind
        if begins:
            sizes = [tensor.nbytes, *[spec.nbytes for spec, _ in tensor.places]]
            ends = [(begin + size, paths) for (begin, paths), size in zip(begins, sizes, strict=True)]
    if members:
        yield *_joined(members), before


# Where a tensor begins, or ends, in the output and then in its inputs: a byte, and in which files.
_Edges = list[tuple[int, Files | None]]


def _joined(members: Sequence[tuple[OutTensor, int]]) -> tuple[OutTensor, int]:
    first, offset = members[0]
    if len(members) == 1:
        return first, offset
    numel = sum([tensor.numel for tensor, _ in members])

    def whole(spec: TensorSpec) -> TensorSpec:
        storage = Storage(spec.storage.path, spec.begin, numel * spec.dtype.itemsize, spec.storage.big_endian)
        return TensorSpec(spec.dtype, (numel,), (1,), 0, storage)

    terms = first.terms
    if isinstance(terms, SharedTerms):
        all_terms: tuple[tuple[TensorSpec, float], ...] | SharedTerms = replace(terms, spec=whole(terms.spec))
    else:
        all_terms = tuple((whole(spec), coefficient) for spec, coefficient in terms)
    return Run(first.dtype, (numel,), all_terms, first.name, first.finite, members=tuple(members)), offset


def apart(part: Part) -> Iterator[Part]:
    """Yield the parts of the tensors themselves."""
    if not isinstance(part.tensor, Run):
        yield part
        return
    for tensor, offset in part.tensor.members:
        before = (offset - part.offset) // tensor.dtype.itemsize
        start, stop = max(part.start - before, 0), min(part.stop - before, tensor.numel)
        if start < stop:
            yield Part(part.out, tensor, offset, start, stop)


@dataclass(slots=True)
class _Gathered:
    """Small tensors of one kind, and how much they are, as `_GATHERED` counts."""

    widest: int  # bytes of an element of a term
    parts: list[Part] = field(default_factory=list)
    size: int = 0


def cut(outputs: Iterable[OutFile], *, piece: int, other: int) -> Iterator[Batch]:
    """Cut a job into batches: large tensors into pieces, small ones gathered by kind.

    Args:
        piece: elements of a part of some kind, at most.
        other: elements of a part of no kind.
    """
    for out in outputs:
        kinds: dict[SumKind, _Gathered] = {}
        headers = {payload.offset: header for payload, header in out.plan.with_headers() if header is not None}
        for tensor, offset, kind in runs(out.plan):
            numel = tensor.numel
            if kind is None:
                yield from _pieces(out, tensor, offset, None, other)
                continue
            gathered = kinds.get(kind)
            if gathered is None:
                gathered = kinds[kind] = _Gathered(max(dtype.itemsize for dtype in kind.dtypes))
            if numel >= piece or numel * gathered.widest > SMALL:
                yield from _pieces(out, tensor, offset, kind, piece)
            elif numel:
                gathered.parts.append(Part(out, tensor, offset, 0, numel, headers.get(offset)))
                gathered.size += numel * max(gathered.widest, 4)
                if gathered.size >= _GATHERED or len(gathered.parts) >= _MANY:
                    yield Batch(kind, tuple(gathered.parts), small=True)
                    gathered.parts, gathered.size = [], 0
        for kind, gathered in kinds.items():
            if gathered.parts:
                yield Batch(kind, tuple(gathered.parts), small=True)


def _pieces(out: OutFile, tensor: OutTensor, offset: int, kind: SumKind | None, size: int) -> Iterator[Batch]:
    for start in range(0, tensor.numel, size):
        yield Batch(kind, (Part(out, tensor, offset, start, min(start + size, tensor.numel)),))
