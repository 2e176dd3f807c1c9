"""Payload: read the values of a tensor into reused buffers.

Nothing is mapped into memory: a truncated file is an error here, not a signal, and reading costs no page faults.
"""

from __future__ import annotations

import math
import mmap
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import torch

from ..errors import ReadError
from ..storage.source import OpenFiles, Stamp, read_at
from ..tensors import ChunkedSpec, DType, ScaledSpec, SummedSpec, TensorSpec, c_strides, is_dense
from .tiles import Tile, packed_strides, rows

# Elements are moved as integers of their size, so that no move depends on what a dtype supports.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
_WORTH = 16 * 1024  # reading so many bytes costs no more than the call itself


class TensorSource:
    """A tensor of an open file, with all that a read needs worked out once."""

    __slots__ = ("base", "chunks", "contiguous", "file", "item", "scaled", "spec", "swapped")

    def __init__(self, spec: TensorSpec, files: OpenFiles) -> None:
        if isinstance(spec, SummedSpec):
            raise TypeError("a sum has no bytes; Terms takes it apart")
        self.spec = spec
        self.chunks = _Chunks(spec, files) if isinstance(spec, ChunkedSpec) else None
        self.scaled = _Scaled(spec, files) if isinstance(spec, ScaledSpec) else None
        self.file = files[spec.paths[0]]
        self.item = spec.dtype.itemsize
        self.base = spec.begin
        self.contiguous = spec.contiguous
        self.swapped = spec.swapped


class _Chunks:
    """The boxes of a chunked tensor, found by their begin along its first axis."""

    __slots__ = ("_begins", "_longest", "_parts", "gaps")

    def __init__(self, spec: ChunkedSpec, files: OpenFiles) -> None:
        if any(chunk.computed for _, chunk in spec.chunks):
            raise TypeError("a chunk has bytes of its own")
        self._parts = [(offsets, TensorSource(chunk, files)) for offsets, chunk in spec.chunks]  # in order of offsets
        self._begins = [offsets[0] for offsets, _ in self._parts]
        self._longest = max(chunk.shape[0] for _, chunk in spec.chunks)
        self.gaps = sum(chunk.numel for _, chunk in spec.chunks) < spec.numel

    def within(self, low: tuple[int, ...], high: tuple[int, ...]) -> Iterator[tuple[TensorSource, tuple[Cut, ...]]]:
        """Yield each chunk that has elements in the box [low, high), and the cut along each axis: (begin, end, offset).

        Begin and end count in the whole tensor, as the offset of the chunk does.
        """
        first = bisect_left(self._begins, low[0] - self._longest + 1)
        for offsets, source in self._parts[first : bisect_left(self._begins, high[0])]:
            cuts = tuple(
                (max(a, offset), min(b, offset + size), offset)
                for a, b, offset, size in zip(low, high, offsets, source.spec.shape, strict=True)
            )
            if all(begin < end for begin, end, _ in cuts):
                yield source, cuts


Cut = tuple[int, int, int]


class _Scaled:
    """Codes of an open file, what each code stands for, and their scales, all of which are in memory.

    Attributes:
        codes: where to read them.
        values: float32, for each code from 0 to 255.
    """

    __slots__ = ("_grid", "_spec", "codes", "values")

    def __init__(self, spec: ScaledSpec, files: OpenFiles) -> None:
        self._spec = spec
        self.codes = TensorSource(spec.codes, files)
        self.values = torch.arange(256, dtype=torch.uint8).view(torch_dtype(spec.codes.dtype)).to(torch.float32)
        scales = spec.scales
        reader = Reader(scales.nbytes)
        reader.read(TensorSource(scales, files), 0, scales.numel)
        grid = reader.buffer.view(torch_dtype(scales.dtype), scales.numel).to(torch.float32)
        self._grid = grid.view(-1, scales.shape[-1] if scales.numel > 1 else 1)

    def multiply(self, values: torch.Tensor, start: int) -> None:
        """Multiply values, which begin with this element in C order, by their scales."""
        if self._grid.numel() == 1:
            values.mul_(self._grid[0])
            return
        width = self._spec.shape[-1]
        row, column = divmod(start, width)
        at, end = 0, values.numel()
        while at < end:
            rows = (end - at) // width if column == 0 else 0
            size = rows * width if rows else min(width - column, end - at)
            part = values[at : at + size].view(max(rows, 1), -1)
            for first, last, scales in self._scales(row, len(part)):
                part[first:last].mul_(scales if scales.shape[1] == 1 else scales[:, column : column + part.shape[1]])
            at, row, column = at + size, row + max(rows, 1), 0

    def _scales(self, row: int, rows: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (first row, last row, their scales, one for all columns or one for each), counted from a row."""
        shape, block = self._spec.shape, self._spec.block
        number = torch.arange(row, row + rows)
        of_row = torch.zeros_like(number)
        for size, step, each, on_grid in zip(
            shape[:-1], c_strides(shape[:-1]), block[:-1], self._spec.scales.shape[:-1], strict=True
        ):
            of_row.mul_(on_grid).add_(number // step % size // each)
        if self._grid.shape[1] == 1:
            yield 0, rows, self._grid[of_row]
            return
        which, counts = torch.unique_consecutive(of_row, return_counts=True)
        if 2 * len(which) > rows:  # many rows that differ
            yield 0, rows, self._each_column(of_row)
            return
        at = 0
        for each, count in zip(self._each_column(which), counts.tolist(), strict=True):
            yield at, at + count, each[None]
            at += count

    def _each_column(self, of_row: torch.Tensor) -> torch.Tensor:
        return self._grid[of_row].repeat_interleave(self._spec.block[-1], 1)[:, : self._spec.shape[-1]]


class Buffer:
    """Page-aligned private memory, as bytes and as tensors of any dtype."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        self.bytes = memoryview(self._memory)[:nbytes]
        self._views: dict[torch.dtype, torch.Tensor] = {}

    def view(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Return the first `count` elements as a 1-d tensor of a dtype; nothing is copied."""
        view = self._views.get(dtype)
        # Kept from call to call: most slices have one size, and making a view costs as much as a small sum.
        if view is None or view.numel() != count:
            # frombuffer refuses a count of 0.
            view = torch.frombuffer(self._memory, dtype=dtype, count=max(count, 1))[:count]
            self._views[dtype] = view
        return view


class Reader:
    """Reads slices of tensors into one buffer, which the next read overwrites; each thread has its own."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = Buffer(nbytes)
        self._gathered: Buffer | None = None
        self._codes: Reader | None = None

    def read(self, source: TensorSource, start: int, stop: int) -> int:
        """Read elements [start, stop) of a tensor to the start of the buffer, in C order and native byte order.

        Returns:
            Bytes read.

        Raises:
            CorruptError: the file ends before them.
        """
        nbytes = (stop - start) * source.item
        if source.contiguous:
            _read(source, start, self.buffer.bytes[:nbytes])
        elif source.chunks is not None:
            self._join(source, source.chunks, start, stop)
        elif source.scaled is not None:
            self._scale(source.scaled, start, stop)
        else:
            self._gather(source, start, stop)
        self._swap(source, nbytes)
        return nbytes

    def read_tile(self, source: TensorSource, tile: Tile) -> int:
        """Read a tile of a tensor to the start of the buffer, in C order and native byte order.

        Each row of the tile in storage is read in one call; see `storage_order` for the tensors that have rows.

        Returns:
            Bytes read.

        Raises:
            CorruptError: the file ends before them.
        """
        strides, item, count = source.spec.stride, source.item, tile.numel
        packed = packed_strides(tile.sizes, strides)
        direct = is_dense(tile.sizes, tuple(packed))
        target = self.buffer if direct else self.spare()
        row, begins = rows(tile.sizes, strides)
        first = tile.begin(strides)
        for at, begin in enumerate(begins):
            _read(source, first + begin, target.bytes[at * row * item : (at + 1) * row * item])
        if not direct:
            found = target.view(_BITS[item], count).as_strided(tile.sizes, packed)
            self.buffer.view(_BITS[item], count).view(tile.sizes).copy_(found)
        self._swap(source, count * item)
        return count * item

    def spare(self) -> Buffer:
        """Return a second buffer of the same size, which the next read overwrites, too."""
        if self._gathered is None:
            self._gathered = Buffer(len(self.buffer.bytes))
        return self._gathered

    def _swap(self, source: TensorSource, nbytes: int) -> None:
        if source.swapped:
            words = self.buffer.view(torch.uint8, nbytes).view(-1, source.spec.dtype.word)
            words.copy_(words.flip(1))

    def _gather(self, source: TensorSource, start: int, stop: int) -> None:
        """Read elements of a view with gaps or permuted strides, box by box."""
        spec, item = source.spec, source.item
        out = self.buffer.view(_BITS[item], stop - start)
        done = 0
        for first, sizes, strides in boxes(spec.shape, spec.stride, start, stop):
            count = math.prod(sizes)
            self._read_box(source, first, sizes, strides, out[done : done + count].view(sizes))
            done += count

    def _join(self, source: TensorSource, chunks: _Chunks, start: int, stop: int) -> None:
        """Read elements of a chunked tensor, from each chunk that has some of them."""
        spec, item = source.spec, source.item
        out = self.buffer.view(_BITS[item], stop - start)
        if chunks.gaps:
            out.zero_()
        done = 0
        for first, sizes, _ in boxes(spec.shape, spec.stride, start, stop):
            sizes = (1,) * (len(spec.shape) - len(sizes)) + sizes  # a box within a row has fewer axes
            low = tuple(first // step % size for step, size in zip(spec.stride, spec.shape, strict=True))
            high = tuple(a + size for a, size in zip(low, sizes, strict=True))
            count = math.prod(sizes)
            box = out[done : done + count].view(sizes)
            for chunk, cuts in chunks.within(low, high):
                target = box[tuple(slice(begin - a, end - a) for a, (begin, end, _) in zip(low, cuts, strict=True))]
                strides = chunk.spec.stride
                at = sum((begin - offset) * step for (begin, _, offset), step in zip(cuts, strides, strict=True))
                part = tuple(end - begin for begin, end, _ in cuts)
                if target.is_contiguous() and is_dense(part, strides):
                    to = target.storage_offset() * item
                    _read(chunk, at, self.buffer.bytes[to : to + math.prod(part) * item])
                else:
                    self._read_box(chunk, at, part, strides, target)
            done += count

    def _scale(self, scaled: _Scaled, start: int, stop: int) -> None:
        """Read codes, look their values up, and multiply these by their scales."""
        count = stop - start
        if self._codes is None or len(self._codes.buffer.bytes) < count:
            self._codes = Reader(count)
        self._codes.read(scaled.codes, start, stop)
        index = self.spare().view(torch.int32, count)
        index.copy_(self._codes.buffer.view(torch.uint8, count))
        values = self.buffer.view(torch.float32, count)
        torch.index_select(scaled.values, 0, index, out=values)
        scaled.multiply(values, start)

    def _read_box(
        self, source: TensorSource, first: int, sizes: tuple[int, ...], strides: tuple[int, ...], out: torch.Tensor
    ) -> None:
        item = source.item
        extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        dense = math.prod(sizes) * 8 >= extent
        if extent * item <= len(self.buffer.bytes) and (dense or extent * item <= _WORTH):
            gathered = self.spare()
            _read(source, first, gathered.bytes[: extent * item])
            out.copy_(gathered.view(_BITS[item], extent).as_strided(sizes, strides))
            return
        # Too wide, or mostly gaps: halve it along the axis that spans most.
        axis = max(range(len(sizes)), key=lambda i: (sizes[i] - 1) * strides[i])
        half = sizes[axis] // 2
        for begin, size in ((0, half), (half, sizes[axis] - half)):
            part = (*sizes[:axis], size, *sizes[axis + 1 :])
            self._read_box(source, first + begin * strides[axis], part, strides, out.narrow(axis, begin, size))


def _read(source: TensorSource, start: int, target: memoryview) -> None:
    read_at(source.file, target, source.base + start * source.item, source.spec.storage.path)


def boxes(
    shape: tuple[int, ...], stride: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cut elements [start, stop), counted in C order, into boxes.

    Yields:
        (first element, sizes, strides) of each box, in elements, in C order.
    """
    if start >= stop:
        return
    if not shape:
        yield 0, (), ()
        return
    inner = math.prod(shape[1:])
    row, skipped = divmod(start, inner)
    last_row, rest = divmod(stop, inner)
    if skipped:
        end = rest if row == last_row else inner
        for first, sizes, strides in boxes(shape[1:], stride[1:], skipped, end):
            yield row * stride[0] + first, sizes, strides
        if row == last_row:
            return
        row += 1
    if row < last_row:
        yield row * stride[0], (last_row - row, *shape[1:]), stride
    for first, sizes, strides in boxes(shape[1:], stride[1:], 0, rest):
        yield last_row * stride[0] + first, sizes, strides


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return the torch dtype of the same name.

    Raises:
        ReadError: the installed torch is too old to have it.
    """
    found = getattr(torch, dtype.name, None)
    if not isinstance(found, torch.dtype):
        raise ReadError(f"torch {torch.__version__} has no dtype {dtype.name}. Install a newer torch.")
    return found


def read_tensor(spec: TensorSpec, stamps: Iterable[Stamp] = ()) -> torch.Tensor:
    """Read a whole tensor into new memory, contiguous.

    Raises:
        ReadError: the file cannot be read, ends early, or has changed since its stamp was taken.
    """
    with OpenFiles(stamps) as files:
        files.open_all(spec.paths)
        reader = Reader(spec.nbytes)
        reader.read(TensorSource(spec, files), 0, spec.numel)
        # The buffer belongs to this tensor alone from here on.
        return reader.buffer.view(torch_dtype(spec.dtype), spec.numel).view(spec.shape)
