"""Pieces: what a job is cut into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..formats.file_plan import FilePlan, OutTensor, SumKind, TwinTerms
from ..tensors import Storage, TensorSpec, c_strides
from .tiles import Axes, Tile, cut_tile, storage_order, storage_orders, tiles

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


@dataclass(slots=True)
class Band:
    """Adjacent bytes of the output to which several tiles write, row by row.

    Zeros are written to it first, for the page cache keeps bytes that come row by row in small folios, which cost more.
    The disk starts with it when all tiles are done, for a page under way to the disk cannot be written to.

    Attributes:
        position: of its first byte in the file.
        nbytes: its length.
        missing: elements not written yet.
        cleared: the zeros are written.
    """

    position: int
    nbytes: int
    missing: int
    cleared: bool = False


class Part(NamedTuple):
    """Elements [start, stop) of a tensor, in C order; or a tile of it, which begins and ends there.

    Attributes:
        out: the file they go to.
        tensor: what they are part of.
        offset: of the whole tensor in that file, in bytes.
        start, stop: in elements.
        tile: None for all elements from start to stop.
        band: of the tile, if there are others in it.
    """

    out: OutFile
    tensor: OutTensor
    offset: int
    start: int
    stop: int
    tile: Tile | None = None
    band: Band | None = None

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return self.stop - self.start if self.tile is None else self.tile.numel

    @property
    def position(self) -> int:
        """Where the part begins in its file."""
        return self.offset + self.start * self.tensor.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.numel * self.tensor.dtype.itemsize

    @property
    def moved(self) -> int:
        """Bytes to read and to write."""
        return self.numel * (self.tensor.width + self.tensor.dtype.itemsize)


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
    """Yield what is in the slots of a file, and its kind; neighbours as one where no checksum of each is wanted."""
    members: list[tuple[OutTensor, int]] = []
    before: SumKind | None = None
    ends: _Edges = []  # of the last that can have a neighbour
    for tensor, offset in plan.slots:
        kind = tensor.kind
        begins: _Edges = []
        if kind is not None and not plan.needs_crc:
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
_Edges = list[tuple[int, tuple[Path, ...] | None]]


def _joined(members: Sequence[tuple[OutTensor, int]]) -> tuple[OutTensor, int]:
    first, offset = members[0]
    if len(members) == 1:
        return first, offset
    numel = sum([tensor.numel for tensor, _ in members])

    def whole(spec: TensorSpec) -> TensorSpec:
        storage = Storage(spec.storage.path, spec.begin, numel * spec.dtype.itemsize, spec.storage.big_endian)
        return TensorSpec(spec.dtype, (numel,), (1,), 0, storage)

    terms = first.terms
    if isinstance(terms, TwinTerms):
        all_terms: tuple[tuple[TensorSpec, float], ...] | TwinTerms = replace(terms, spec=whole(terms.spec))
    else:
        all_terms = tuple((whole(spec), coefficient) for spec, coefficient in terms)
    return Run(first.dtype, (numel,), all_terms, first.name, first.finite, members=tuple(members)), offset


def apart(part: Part) -> Iterator[Part]:
    """Yield the parts of the tensors themselves."""
    if part.tile is not None or not isinstance(part.tensor, Run):
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


def cut(
    outputs: Iterable[OutFile], *, piece: int, other: int, tile: Callable[[SumKind, bool], int] | None = None
) -> Iterator[Batch]:
    """Cut a job into batches: large tensors into pieces, small ones gathered by kind.

    Args:
        piece: elements of a part of some kind, at most.
        other: elements of a part of no kind.
        tile: elements of a tile of some kind, and whether all terms have one order; `other` if not given.
    """
    for out in outputs:
        kinds: dict[SumKind, _Gathered] = {}
        for tensor, offset, kind in runs(out.plan):
            numel = tensor.numel
            if kind is None:
                orders = orders_of(tensor)
                if orders is None:
                    yield from _pieces(out, tensor, offset, None, other)
                    continue
                swapped = any(spec.swapped for spec, _ in tensor.places)
                numel = other if tile is None or swapped else tile(tensor.formula, one_order(tensor))
                parts = [tile_part(out, tensor, offset, each) for each in tiles(tensor.shape, orders, numel)]
                for part in _in_bands(parts):
                    yield Batch(None if swapped else tensor.formula, (part,))
                continue
            gathered = kinds.get(kind)
            if gathered is None:
                gathered = kinds[kind] = _Gathered(max(dtype.itemsize for dtype in kind.dtypes))
            if numel >= piece or numel * max(gathered.widest, 2) > SMALL:  # two bytes: for the sums of 8-bit floats
                yield from _pieces(out, tensor, offset, kind, piece)
            elif numel:
                gathered.parts.append(Part(out, tensor, offset, 0, numel))
                gathered.size += numel * max(gathered.widest, 4)
                if gathered.size >= _GATHERED or len(gathered.parts) >= _MANY:
                    yield Batch(kind, tuple(gathered.parts), small=True)
                    gathered.parts, gathered.size = [], 0
        for kind, gathered in kinds.items():
            if gathered.parts:
                yield Batch(kind, tuple(gathered.parts), small=True)


def orders_of(tensor: OutTensor) -> list[Axes] | None:
    """Return the orders in which its elements stand in the inputs and in the output; None if tiles are no use."""
    return storage_orders([spec for spec, _ in tensor.places]) if tensor.terms else None


def one_order(tensor: OutTensor) -> bool:
    """True if all terms have one order."""
    return len({storage_order(tensor.shape, spec.stride) for spec, _ in tensor.places}) == 1


def tile_part(out: OutFile, tensor: OutTensor, offset: int, tile: Tile) -> Part:
    """Make the part of a tile of a tensor."""
    strides = c_strides(tensor.shape)
    return Part(out, tensor, offset, tile.begin(strides), tile.last(strides) + 1, tile)


def _in_bands(parts: Sequence[Part]) -> Iterator[Part]:
    """Yield the tiles of a tensor; those that write to the same bytes with their band."""
    begin = 0
    while begin < len(parts):
        stop, end = begin, parts[begin].stop
        while stop < len(parts) and parts[stop].start < end:
            end = max(end, parts[stop].stop)
            stop += 1
        own = parts[begin:stop]
        item, missing = own[0].tensor.dtype.itemsize, sum([part.numel for part in own])
        band = Band(own[0].position, (end - own[0].start) * item, missing) if len(own) > 1 else None
        yield from [part._replace(band=band) for part in own]
        begin = stop


def divided(part: Part, numel: int) -> Iterator[Part]:
    """Yield parts of a part, of at most so many elements."""
    if part.tile is None:
        for start in range(part.start, part.stop, numel):
            yield part._replace(start=start, stop=min(start + numel, part.stop))
    elif part.tile.numel <= numel:
        yield part
    else:
        for tile in cut_tile(part.tile, orders_of(part.tensor) or [], numel):
            yield tile_part(part.out, part.tensor, part.offset, tile)._replace(band=part.band)


def _pieces(out: OutFile, tensor: OutTensor, offset: int, kind: SumKind | None, size: int) -> Iterator[Batch]:
    for start in range(0, tensor.numel, size):
        yield Batch(kind, (Part(out, tensor, offset, start, min(start + size, tensor.numel)),))
