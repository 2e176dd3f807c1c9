"""Work units: what a job is cut into, and the slices of tensors that they consist of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..formats.file_plan import Computed, FilePlan, Files, GroupKey, OutTensor
from ..tensors import Chunk, ChunkedSpec, Storage, TensorSpec, c_strides, in_c_order
from .tiles import Axes, Tile, cut_tile, storage_order, storage_orders, tiles

SLICE = 128 * 1024
"""Elements that torch handles at a time: few enough that its buffers (2.5 MB for float32) stay in a shared
cache, enough that the price of a call and of passing the interpreter lock on is small beside the work."""
MEMORY = SLICE * 98
"""Private bytes that a thread needs for that, at most."""
SMALL = 64 * 1024
"""Bytes in an input up to which a tensor is small: calls cost as much as moving it."""
# Bytes of small tensors in a work unit, at most one tensor more; narrow ones count as four bytes an element, because of
# their sums. `native.SCRATCH` has to hold them.
_GATHERED = 256 * 1024
_MANY = 1024  # small tensors in a work unit, at most


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


class Slice(NamedTuple):
    """Elements [start, stop) of a tensor, in C order; or a tile of it, which begins and ends there.

    Attributes:
        out: the file they go to.
        tensor: the whole tensor.
        offset: of the whole tensor in that file, in bytes.
        start, stop: in elements.
        tile: None for all elements from start to stop.
        band: of the tile, if there are others in it.
        header: of a whole tensor, the segment before it that is written together with it.
    """

    out: OutFile
    tensor: OutTensor
    offset: int
    start: int
    stop: int
    tile: Tile | None = None
    band: Band | None = None
    header: Computed | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start if self.tile is None else self.tile.numel

    @property
    def position(self) -> int:
        """Offset of the first element in the file, in bytes."""
        return self.offset + self.start * self.tensor.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.numel * self.tensor.dtype.itemsize

    @property
    def end(self) -> tuple[OutTensor, int]:
        """The tensor that it is a slice of, whole, and the byte of it at which it ends."""
        whole, before = (self.tensor.whole, self.tensor.before) if isinstance(self.tensor, Piece) else (self.tensor, 0)
        return whole, (before + self.stop) * self.tensor.dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        """Bytes to read from all inputs and to write."""
        return self.numel * (self.tensor.terms.width + self.tensor.dtype.itemsize)


class WorkUnit(NamedTuple):
    """Unit of work for one thread: a slice, or several small ones with the same group key.

    Attributes:
        key: of the slices; None for a slice that only torch can read.
        slices: in the order of the file.
        small: the slices are whole tensors, and small.
    """

    key: GroupKey | None
    slices: tuple[Slice, ...]
    small: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class CoalescedRange(OutTensor):
    """Tensors with the same group key, adjacent in every input and in the output, as one tensor.

    Attributes:
        members: the tensors, each with its offset in the output.
    """

    members: tuple[tuple[OutTensor, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Piece(OutTensor):
    """Elements of a tensor that are in one range of bytes in each input, as a tensor of their own.

    Attributes:
        whole: the tensor.
        before: elements of it before these.
    """

    whole: OutTensor = field(kw_only=True)
    before: int = field(kw_only=True)


def pieces(tensor: OutTensor) -> Sequence[OutTensor]:
    """Cut a tensor whose inputs are chunks in C order where a chunk ends; return any other tensor as it is."""
    specs = tensor.terms.specs
    if not any(type(spec) is ChunkedSpec for spec in specs):
        return (tensor,)
    if not all(
        in_c_order(spec) and not spec.swapped and all(c.contiguous for _, c in spec.as_chunks) for spec in specs
    ):
        return (tensor,)
    stored = [_ranges(spec.as_chunks) for spec in specs]
    found: list[OutTensor] = []
    start = 0
    at = [0] * len(stored)  # the range of each input
    begins = [0] * len(stored)  # where it begins, in elements
    while start < tensor.numel:
        stop = min(begin + ranges[i].numel for ranges, i, begin in zip(stored, at, begins, strict=True))
        own = tuple(
            TensorSpec(each.dtype, (stop - start,), (1,), each.start + start - begin, each.storage)
            for each, begin in ((ranges[i], begin) for ranges, i, begin in zip(stored, at, begins, strict=True))
        )
        terms = replace(tensor.terms, specs=own)
        found.append(
            Piece(tensor.dtype, (stop - start,), terms, tensor.name, tensor.finite, whole=tensor, before=start)
        )
        for k, ranges in enumerate(stored):
            if begins[k] + ranges[at[k]].numel == stop:
                at[k], begins[k] = at[k] + 1, stop
        start = stop
    return found


def _ranges(chunks: Sequence[Chunk]) -> list[TensorSpec]:
    """Return chunks as flat tensors, those that are one behind another in a file as one."""
    found: list[TensorSpec] = []
    for _, chunk in chunks:
        begin, numel, item = chunk.begin, chunk.numel, chunk.dtype.itemsize
        if found and found[-1].storage.path == chunk.storage.path and found[-1].begin + found[-1].nbytes == begin:
            begin, numel = found[-1].begin, found.pop().numel + numel
        storage = Storage(chunk.storage.path, begin, numel * item, chunk.storage.big_endian)
        found.append(TensorSpec(chunk.dtype, (numel,), (1,), 0, storage))
    return found


def coalesced(plan: FilePlan) -> Iterator[tuple[OutTensor, int, GroupKey | None]]:
    """Yield (tensor or piece, offset, group key); those adjacent in every file are coalesced unless a CRC is needed."""
    members: list[tuple[OutTensor, int]] = []
    before: GroupKey | None = None
    ends: _Edges = []  # of the last tensor that can have a neighbour
    parts = (
        (part, offset + (part.before * part.dtype.itemsize if isinstance(part, Piece) else 0))
        for tensor, offset in plan.payloads
        for part in pieces(tensor)
    )
    for tensor, offset in parts:
        key = tensor.group_key
        begins: _Edges = []
        if key is not None and not plan.needs_checksums:
            begins = [(offset, None), *[(spec.begin, paths) for spec, paths in tensor.terms.inputs]]
        if members and not (begins and begins == ends and key == before):
            yield *_joined(members), before
            members = []
        members.append((tensor, offset))
        before = key
        if begins:
            sizes = [tensor.nbytes, *[spec.nbytes for spec, _ in tensor.terms.inputs]]
            ends = [(begin + size, paths) for (begin, paths), size in zip(begins, sizes, strict=True)]
    if members:
        yield *_joined(members), before


# Where a tensor begins, or ends: (byte, None) in the output, then (byte, files) in the inputs.
_Edges = list[tuple[int, Files | None]]


def _joined(members: Sequence[tuple[OutTensor, int]]) -> tuple[OutTensor, int]:
    first, offset = members[0]
    if len(members) == 1:
        return first, offset
    numel = sum([tensor.numel for tensor, _ in members])

    def whole(spec: TensorSpec) -> TensorSpec:
        storage = Storage(spec.storage.path, spec.begin, numel * spec.dtype.itemsize, spec.storage.big_endian)
        return TensorSpec(spec.dtype, (numel,), (1,), 0, storage)

    terms = replace(first.terms, specs=tuple(map(whole, first.terms.specs)))
    return CoalescedRange(first.dtype, (numel,), terms, first.name, first.finite, members=tuple(members)), offset


def of_tensors(slice_: Slice) -> Iterator[Slice]:
    """Yield the slice of each whole tensor in a coalesced range, or of that of a piece; any other slice as it is."""
    if isinstance(slice_.tensor, Piece):
        before = slice_.tensor.before
        offset = slice_.offset - before * slice_.tensor.dtype.itemsize
        yield Slice(slice_.out, slice_.tensor.whole, offset, before + slice_.start, before + slice_.stop)
        return
    if slice_.tile is not None or not isinstance(slice_.tensor, CoalescedRange):
        yield slice_
        return
    for tensor, offset in slice_.tensor.members:
        before = (offset - slice_.offset) // tensor.dtype.itemsize
        start, stop = max(slice_.start - before, 0), min(slice_.stop - before, tensor.numel)
        if start < stop:
            yield from of_tensors(Slice(slice_.out, tensor, offset, start, stop))


@dataclass(slots=True)
class _Gathered:
    """Small tensors with the same group key, and their size as `_GATHERED` counts it."""

    widest: int  # bytes of an element of a term
    slices: list[Slice] = field(default_factory=list)
    size: int = 0


def cut(
    outputs: Iterable[OutFile], *, slice_size: int, other: int, tile: Callable[[GroupKey, bool], int] | None = None
) -> Iterator[WorkUnit]:
    """Cut a job into work units: large tensors into slices, small ones gathered by group key.

    Args:
        slice_size: elements of a slice with a group key, at most.
        other: elements of any other slice, at most.
        tile: from (group key, True if all terms have one order) to the elements of a tile; `other` if not given.
    """
    for out in outputs:
        keys: dict[GroupKey, _Gathered] = {}
        headers = {payload.offset: header for payload, header in out.plan.with_headers() if header is not None}
        for tensor, offset, key in coalesced(out.plan):
            numel = tensor.numel
            if key is None:
                orders = orders_of(tensor)
                if orders is None:
                    yield from _slices(out, tensor, offset, None, other)
                    continue
                swapped = any(spec.swapped for spec in tensor.terms.specs)
                numel = other if tile is None or swapped else tile(tensor.tile_key, one_order(tensor))
                slices = [tile_slice(out, tensor, offset, each) for each in tiles(tensor.shape, orders, numel)]
                for slice_ in _in_bands(slices):
                    yield WorkUnit(None if swapped else tensor.tile_key, (slice_,))
                continue
            gathered = keys.get(key)
            if gathered is None:
                gathered = keys[key] = _Gathered(max(dtype.itemsize for dtype in key.dtypes))
            if (
                numel >= slice_size or numel * max(gathered.widest, 2) > SMALL
            ):  # two bytes: for the sums of 8-bit floats
                yield from _slices(out, tensor, offset, key, slice_size)
            elif numel:
                header = None if isinstance(tensor, Piece) else headers.get(offset)
                gathered.slices.append(Slice(out, tensor, offset, 0, numel, header=header))
                gathered.size += numel * max(gathered.widest, 4)
                if gathered.size >= _GATHERED or len(gathered.slices) >= _MANY:
                    yield WorkUnit(key, tuple(gathered.slices), small=True)
                    gathered.slices, gathered.size = [], 0
        for key, gathered in keys.items():
            if gathered.slices:
                yield WorkUnit(key, tuple(gathered.slices), small=True)


def orders_of(tensor: OutTensor) -> list[Axes] | None:
    """Return the axis orders of a tensor's terms and of C order; None if it is not cut into tiles."""
    return storage_orders(tensor.terms.specs) if tensor.terms else None


def one_order(tensor: OutTensor) -> bool:
    """Return True if all terms have the same axis order."""
    return len({storage_order(tensor.shape, spec.stride) for spec in tensor.terms.specs}) == 1


def tile_slice(out: OutFile, tensor: OutTensor, offset: int, tile: Tile) -> Slice:
    """Make the slice for a tile of a tensor."""
    strides = c_strides(tensor.shape)
    return Slice(out, tensor, offset, tile.begin(strides), tile.last(strides) + 1, tile)


def _in_bands(slices: Sequence[Slice]) -> Iterator[Slice]:
    """Give tiles that write to the same range of the output their band."""
    begin = 0
    while begin < len(slices):
        stop, end = begin, slices[begin].stop
        while stop < len(slices) and slices[stop].start < end:
            end = max(end, slices[stop].stop)
            stop += 1
        own = slices[begin:stop]
        item, missing = own[0].tensor.dtype.itemsize, sum([slice_.numel for slice_ in own])
        band = Band(own[0].position, (end - own[0].start) * item, missing) if len(own) > 1 else None
        yield from [slice_._replace(band=band) for slice_ in own]
        begin = stop


def divided(slice_: Slice, numel: int) -> Iterator[Slice]:
    """Divide a slice into slices of at most `numel` elements."""
    if slice_.tile is None:
        for start in range(slice_.start, slice_.stop, numel):
            yield slice_._replace(start=start, stop=min(start + numel, slice_.stop))
    elif slice_.tile.numel <= numel:
        yield slice_
    else:
        for tile in cut_tile(slice_.tile, orders_of(slice_.tensor) or [], numel):
            yield tile_slice(slice_.out, slice_.tensor, slice_.offset, tile)._replace(band=slice_.band)


def _slices(out: OutFile, tensor: OutTensor, offset: int, key: GroupKey | None, size: int) -> Iterator[WorkUnit]:
    for start in range(0, tensor.numel, size):
        yield WorkUnit(key, (Slice(out, tensor, offset, start, min(start + size, tensor.numel)),))
