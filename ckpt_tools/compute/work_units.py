"""Work units: what a job is cut into, and the slices of tensors that they consist of.

Output files that differ in their coefficients alone share their tensors, each of which has a row of coefficients for
each file (`OutTensor`). Such a tensor is cut once. A slice has a target for each file, so that its inputs are read once
for all of them. Rows that are equal are summed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..formats.file_plan import Computed, FilePlan, GroupKey, OutTensor
from ..tensors import Category, Chunk, ChunkedSpec, Storage, TensorSpec, c_strides, in_c_order
from .summation import exact
from .tiles import Axes, Tile, cut_tile, storage_order, storage_orders, tiles

SLICE = 128 * 1024
"""Elements that torch handles at a time: few enough that its buffers (2.5 MB for float32) stay in a shared
cache, enough that the price of a call and of passing the interpreter lock on is small beside the work."""
MEMORY = SLICE * 98
"""Private bytes that a thread needs for that, at most."""
SMALL = 64 * 1024
"""Bytes in an input up to which a tensor is small: calls cost as much as moving it."""
# Bytes of small tensors in a work unit, at most one tensor more; narrow ones count as four bytes an element, because of
# their sums. `native.scratch` has to hold them.
_GATHERED = 256 * 1024
_MANY = 1024  # small tensors in a work unit, at most
MOST_ROWS = 32
"""Rows that a slice has at most: a job with more reads its inputs once for so many, and its memory stays bounded."""


@dataclass(frozen=True, slots=True, eq=False)
class OutFile:
    """An output file being written.

    Attributes:
        plan: its layout.
        fd: a descriptor open for writing.
        row: the row of coefficients that it takes of each tensor that has more than one.
    """

    plan: FilePlan
    fd: int
    row: int = 0


class Target(NamedTuple):
    """A place to which a tensor goes.

    Attributes:
        out: the file.
        offset: of the whole tensor in it, in bytes.
        row: the row of the tensor's terms that is written there.
        header: the segment before the tensor, if both are written together where it is small.
    """

    out: OutFile
    offset: int
    row: int = 0
    header: Computed | None = None


@dataclass(slots=True)
class Band:
    """Adjacent bytes of a tensor to which several tiles write, row by row, in each of its targets.

    Zeros are written to it first, for the page cache keeps bytes that come row by row in small folios, which cost more.
    The disk starts with it when all tiles are done, for a page under way to the disk cannot be written to.

    Attributes:
        begin: its first byte in the tensor.
        nbytes: its length.
        missing: elements not written yet.
        cleared: the zeros are written.
    """

    begin: int
    nbytes: int
    missing: int
    cleared: bool = False


class Slice(NamedTuple):
    """Elements [start, stop) of a tensor, in C order; or a tile of it, which begins and ends there.

    Attributes:
        tensor: the whole tensor.
        targets: where it goes.
        start, stop: in elements.
        tile: None for all elements from start to stop.
        band: of the tile, if there are others in it.
    """

    tensor: OutTensor
    targets: tuple[Target, ...]
    start: int
    stop: int
    tile: Tile | None = None
    band: Band | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start if self.tile is None else self.tile.numel

    @property
    def nbytes(self) -> int:
        """Length of the result of a row."""
        return self.numel * self.tensor.dtype.itemsize

    @property
    def begin(self) -> int:
        """The byte of the tensor at which it begins."""
        return self.start * self.tensor.dtype.itemsize

    @property
    def end(self) -> int:
        """The byte of the tensor at which it ends."""
        return self.stop * self.tensor.dtype.itemsize

    @property
    def before(self) -> int:
        """Bytes of the whole tensor before this one, which is a piece of it."""
        return self.tensor.before * self.tensor.dtype.itemsize if isinstance(self.tensor, Piece) else 0

    @property
    def needs_checksums(self) -> bool:
        """True if a target needs its CRC-32."""
        return any([target.out.plan.needs_checksums for target in self.targets])

    @property
    def bytes_moved(self) -> int:
        """Bytes to read from all inputs and to write."""
        return self.numel * (self.tensor.terms.width + self.tensor.dtype.itemsize * len(self.targets))


class WorkUnit(NamedTuple):
    """Unit of work for one thread: a slice, or several small ones with the same group key, files and rows.

    Attributes:
        key: of the slices; None for a slice that only torch can read.
        slices: in the order of the file.
        small: the slices are whole tensors, and small.
    """

    key: GroupKey | None
    slices: tuple[Slice, ...]
    small: bool = False

    @property
    def bytes_moved(self) -> int:
        """Bytes to read from all inputs and to write."""
        return sum([slice_.bytes_moved for slice_ in self.slices])

    @property
    def bytes_read(self) -> int:
        """Bytes to read from all inputs."""
        return sum([slice_.numel * slice_.tensor.terms.width for slice_ in self.slices])

    @property
    def paths(self) -> list[Path]:
        """The files that it reads, each once."""
        # By identity first: tensors of a shared template have one tuple of files.
        terms = {id(own.files or own.specs): own for own in [slice_.tensor.terms for slice_ in self.slices]}
        return list(dict.fromkeys([path for each in terms.values() for path in each.paths]))


@dataclass(frozen=True, slots=True, eq=False)
class CoalescedRange(OutTensor):
    """Tensors with the same group key, adjacent in every input and in the output, as one tensor.

    Attributes:
        members: the tensors, each with its targets.
    """

    members: tuple[tuple[OutTensor, tuple[Target, ...]], ...] = ()


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


Placed = tuple[OutTensor, tuple[Target, ...]]


def to_be_written(outputs: Sequence[OutFile], most_rows: int) -> Iterator[Iterator[Placed]]:
    """Yield, for each output file, the tensors that are in none before it, and where each of them goes.

    Args:
        most_rows: of a tensor, at most; one with more is yielded several times.
    """
    if not any(out.row for out in outputs):
        for out in outputs:
            yield ((tensor, (target,)) for tensor, target in _targets(out))
        return
    targets: dict[OutTensor, list[Target]] = {}
    for out in outputs:
        for tensor, target in _targets(out):
            targets.setdefault(tensor, []).append(target)
    for out in outputs:
        own = dict.fromkeys([tensor for tensor, _ in out.plan.payloads if tensor in targets])
        yield (each for tensor in own for each in _by_rows(tensor, targets.pop(tensor), most_rows))


def _targets(out: OutFile) -> Iterator[tuple[OutTensor, Target]]:
    for (tensor, offset), header in out.plan.with_headers():
        yield tensor, Target(out, offset, out.row, header)


def in_rows(tensor: OutTensor, most: int) -> list[OutTensor]:
    """Divide a tensor as `to_be_written` does if every row is written."""
    targets = [Target(_NOWHERE, 0, row) for row in range(max(len(tensor.terms.rows), 1))]
    return [part for part, _ in _by_rows(tensor, targets, most)]


_NOWHERE = OutFile(FilePlan("", 0, ()), -1)


def _by_rows(tensor: OutTensor, targets: Sequence[Target], most: int) -> Iterator[Placed]:
    """Divide a tensor into tensors of some of its rows, none of which is there twice.

    Rows of dtypes that are not summed are copies of different inputs, and have a tensor each.
    """
    terms = tensor.terms
    if len(terms.rows) <= 1:
        yield tensor, tuple([target._replace(row=0) for target in targets])
        return
    goes: dict[tuple[float, ...], list[Target]] = {}
    of_row: dict[tuple[float, ...], int] = {}
    for target in targets:
        row = terms.rows[target.row]
        goes.setdefault(row, []).append(target)
        of_row.setdefault(row, target.row)
    if not (tensor.dtype.averaged and all([dtype.averaged for dtype in terms.dtypes])):
        most = 1
    rows = list(goes)
    for begin in range(0, len(rows), most):
        some = rows[begin : begin + most]
        own = terms.of_these([of_row[row] for row in some])
        part = tensor if own is terms else replace(tensor, terms=own)
        yield part, tuple([target._replace(row=i) for i, row in enumerate(some) for target in goes[row]])


def coalesced(
    tensors: Iterable[Placed],
) -> Iterator[tuple[OutTensor, tuple[Target, ...], GroupKey | None]]:
    """Yield (tensor or piece, targets, group key); those adjacent in every file are coalesced if they need no CRC."""
    members: list[Placed] = []
    before: GroupKey | None = None
    ends: _Edges = []  # of the last tensor that can have a neighbour
    parts = (part for whole, targets in tensors for part in _placed(whole, targets))
    for tensor, targets in parts:
        key = tensor.group_key
        begins: _Edges = []
        if key is not None and not any([target.out.plan.needs_checksums for target in targets]):
            begins = [(at, (out, row)) for out, at, row, _ in targets]
            begins += [(spec.begin, paths) for spec, paths in tensor.terms.inputs]
        if members and not (begins and begins == ends and key == before):
            yield *_joined(members), before
            members = []
        members.append((tensor, targets))
        before = key
        if begins:
            sizes = [tensor.nbytes] * len(targets) + [spec.nbytes for spec, _ in tensor.terms.inputs]
            ends = [(begin + size, place) for (begin, place), size in zip(begins, sizes, strict=True)]
    if members:
        yield *_joined(members), before


# Where a tensor begins, or ends: (byte, file and row) in each target, then (byte, files) in the inputs.
_Edges = list[tuple[int, object]]


def _placed(tensor: OutTensor, targets: tuple[Target, ...]) -> Iterator[Placed]:
    for part in pieces(tensor):
        if isinstance(part, Piece):
            shift = part.before * part.dtype.itemsize
            yield part, tuple([each._replace(offset=each.offset + shift, header=None) for each in targets])
        else:
            yield part, targets


def _joined(members: Sequence[Placed]) -> Placed:
    first, targets = members[0]
    if len(members) == 1:
        return first, targets
    numel = sum([tensor.numel for tensor, _ in members])

    def whole(spec: TensorSpec) -> TensorSpec:
        storage = Storage(spec.storage.path, spec.begin, numel * spec.dtype.itemsize, spec.storage.big_endian)
        return TensorSpec(spec.dtype, (numel,), (1,), 0, storage)

    terms = replace(first.terms, specs=tuple(map(whole, first.terms.specs)))
    return CoalescedRange(first.dtype, (numel,), terms, first.name, first.finite, members=tuple(members)), targets


def of_tensors(slice_: Slice) -> Iterator[Slice]:
    """Yield the slice of each whole tensor in a coalesced range, or of that of a piece; any other slice as it is."""
    tensor, targets = slice_.tensor, slice_.targets
    if isinstance(tensor, Piece):
        before = tensor.before
        targets = tuple([each._replace(offset=each.offset - before * tensor.dtype.itemsize) for each in targets])
        yield Slice(tensor.whole, targets, before + slice_.start, before + slice_.stop)
        return
    if slice_.tile is not None or not isinstance(tensor, CoalescedRange):
        yield slice_
        return
    for member, own in tensor.members:
        before = (own[0].offset - targets[0].offset) // member.dtype.itemsize
        start, stop = max(slice_.start - before, 0), min(slice_.stop - before, member.numel)
        if start < stop:
            yield from of_tensors(Slice(member, own, start, stop))


@dataclass(slots=True)
class _Gathered:
    """Small tensors with the same group key and the same files, and their size as `_GATHERED` counts it."""

    widest: int  # bytes of an element of a term
    rows: int
    slices: list[Slice] = field(default_factory=list)
    size: int = 0


def cut(
    outputs: Sequence[OutFile],
    *,
    slice_size: int,
    other: int,
    tile: Callable[[GroupKey, bool], int] | None = None,
    most_rows: int = MOST_ROWS,
) -> Iterator[WorkUnit]:
    """Cut a job into work units: large tensors into slices, small ones gathered by group key.

    Args:
        slice_size: elements of a slice with a group key, at most.
        other: elements of any other slice, at most.
        tile: from (group key, True if all terms have one order) to the elements of a tile; `other` if not given.
        most_rows: of coefficients, that a slice has at most.
    """
    for tensors in to_be_written(outputs, most_rows):
        keys: dict[object, _Gathered] = {}
        for tensor, targets, key in coalesced(tensors):
            numel = tensor.numel
            if key is None:
                orders = orders_of(tensor)
                if orders is None:
                    yield from _slices(tensor, targets, None, other)
                    continue
                swapped = any(spec.swapped for spec in tensor.terms.specs)
                numel = other if tile is None or swapped else tile(tensor.tile_key, one_order(tensor))
                slices = [tile_slice(tensor, targets, each) for each in tiles(tensor.shape, orders, numel)]
                for slice_ in _in_bands(slices):
                    yield WorkUnit(None if swapped else tensor.tile_key, (slice_,))
                continue
            one = len(targets) == 1
            alike = (key, targets[0].out) if one else (key, *[(target.out, target.row) for target in targets])
            gathered = keys.get(alike)
            if gathered is None:
                gathered = keys[alike] = _Gathered(_widest(key), len(key.rows))
            if (
                numel >= slice_size or numel * max(gathered.widest, 2) * gathered.rows > SMALL
            ):  # two bytes: for the sums of 8-bit floats
                yield from _slices(tensor, targets, key, slice_size)
            elif numel:
                gathered.slices.append(Slice(tensor, targets, 0, numel))
                gathered.size += numel * max(gathered.widest, 4) * gathered.rows
                if gathered.size >= _GATHERED or len(gathered.slices) >= _MANY:
                    yield WorkUnit(key, tuple(gathered.slices), small=True)
                    gathered.slices, gathered.size = [], 0
        for gathered in keys.values():
            if gathered.slices:
                key = gathered.slices[0].tensor.group_key
                yield WorkUnit(key, tuple(gathered.slices), small=True)


def _widest(key: GroupKey) -> int:
    """Return the bytes of the widest element of a term; of an exact sum, half of what is kept for it."""
    if not key.copied and exact(key.dtypes, key.out):
        return 16 * (2 if key.out.category is Category.COMPLEX else 1)
    return max(dtype.itemsize for dtype in key.dtypes)


def orders_of(tensor: OutTensor) -> list[Axes] | None:
    """Return the axis orders of a tensor's terms and of C order; None if it is not cut into tiles."""
    return storage_orders(tensor.terms.specs) if tensor.terms else None


def one_order(tensor: OutTensor) -> bool:
    """Return True if all terms have the same axis order."""
    return len({storage_order(tensor.shape, spec.stride) for spec in tensor.terms.specs}) == 1


def tile_slice(tensor: OutTensor, targets: tuple[Target, ...], tile: Tile) -> Slice:
    """Make the slice for a tile of a tensor."""
    strides = c_strides(tensor.shape)
    return Slice(tensor, targets, tile.begin(strides), tile.last(strides) + 1, tile)


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
        band = Band(own[0].begin, (end - own[0].start) * item, missing) if len(own) > 1 else None
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
            yield tile_slice(slice_.tensor, slice_.targets, tile)._replace(band=slice_.band)


def _slices(tensor: OutTensor, targets: tuple[Target, ...], key: GroupKey | None, size: int) -> Iterator[WorkUnit]:
    for start in range(0, tensor.numel, size):
        yield WorkUnit(key, (Slice(tensor, targets, start, min(start + size, tensor.numel)),))
