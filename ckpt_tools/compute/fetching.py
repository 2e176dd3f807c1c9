"""Fetching: which bytes of remote inputs a work unit reads, so that they are there when it begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event

from ..storage.ahead import MEMORY, Need, RangeSource, ReadAhead
from ..storage.source import LOCAL, OpenFiles, Stamp, store_of
from ..tensors import ChunkedSpec, ScaledSpec, TensorSpec
from . import native
from .tiles import Tile
from .work_units import WorkUnit


class Fetching:
    """Has the payload of work units fetched ahead of them; see `ReadAhead`.

    Args:
        numbered: the units in their order, each with the number by which the other methods know it.
    """

    def __init__(self, files: OpenFiles, numbered: Iterable[tuple[int, WorkUnit]], keep: Path | None) -> None:
        listed = [*numbered]
        self._places = {number: place for place, (number, _) in enumerate(listed)}
        inputs = max((len(unit.slices[0].tensor.terms) for _, unit in listed), default=1)
        self.ahead = ReadAhead(
            files,
            lambda place: needed(listed[place][1]),
            len(listed),
            inputs=inputs,
            keep=keep,
            address_of=native.reads_memory(),
        )

    @classmethod
    def of(
        cls,
        files: OpenFiles,
        numbered: Callable[[], Iterable[tuple[int, WorkUnit]]],
        keep: Path | None,
        stack: ExitStack,
    ) -> Fetching | None:
        """Begin to fetch, until the stack ends; None if all inputs are local."""
        if not any_remote(files):
            return None
        found = cls(files, numbered(), keep)
        stack.enter_context(found.ahead)
        return found

    def wait(self, number: int, stop: Event) -> bool:
        """Wait for what a unit reads; see `ReadAhead.wait`."""
        return self.ahead.wait(self._places[number], stop)

    def done(self, number: int) -> None:
        """Let go what no other unit reads."""
        self.ahead.done(self._places[number])


def any_remote(files: OpenFiles) -> bool:
    """Return True if an open file comes by requests."""
    return any(isinstance(source, RangeSource) for _, source in files.items())


def memory_ahead(stamps: Iterable[Stamp]) -> int:
    """Return the bytes of host memory in which payload waits for the sums, at most; none if all inputs are local."""
    return 0 if all(store_of(stamp.path) is LOCAL for stamp in stamps) else MEMORY


def needed(unit: WorkUnit) -> Iterator[Need]:
    """Yield the bytes that a work unit reads."""
    for slice_ in unit.slices:
        for spec, places in slice_.tensor.terms.inputs:
            for path, begin, end in needed_of(spec, slice_.start, slice_.stop, slice_.tile):
                if type(spec) is TensorSpec:
                    for other, shift in places:
                        yield other, begin + shift, end + shift
                else:
                    yield path, begin, end


def needed_of(spec: TensorSpec, start: int, stop: int, tile: Tile | None = None) -> Iterator[Need]:
    """Yield the bytes of elements [start, stop) of a tensor in C order, or of a tile of it."""
    if type(spec) is TensorSpec:
        yield spec.storage.path, *_range(spec, start, stop, tile)
    else:
        yield from _of_parts(spec, start, stop)


def _range(spec: TensorSpec, start: int, stop: int, tile: Tile | None) -> tuple[int, int]:
    """Return the bytes from the first to the last element in a tensor that one file has."""
    item = spec.dtype.itemsize
    if tile is not None:
        first = tile.begin(spec.stride)
        span = sum((size - 1) * step for size, step in zip(tile.sizes, spec.stride, strict=True))
        return spec.begin + first * item, spec.begin + (first + span + 1) * item
    if spec.contiguous:
        return spec.begin + start * item, spec.begin + stop * item
    return spec.begin, spec.begin + spec.extent


def _of_parts(spec: TensorSpec, start: int, stop: int) -> Iterator[Need]:
    """Yield the bytes of elements [start, stop) in C order of a tensor that is stored in parts: rows of its chunks."""
    if isinstance(spec, ScaledSpec):
        yield from _of_parts(spec.codes, start, stop)
        yield from _of_parts(spec.scales, 0, spec.scales.numel)
        return
    row = max(math.prod(spec.shape[1:]), 1)
    first, last = start // row, -(-stop // row)
    for index, chunk in spec.as_chunks:
        path, begin, end = chunk.storage.path, chunk.begin, chunk.begin + chunk.extent
        if isinstance(spec, ChunkedSpec) and chunk.shape:
            low, high = max(first - index[0], 0), min(last - index[0], chunk.shape[0])
            if low >= high:
                continue
            if chunk.contiguous:
                width = chunk.nbytes // chunk.shape[0]
                begin, end = begin + low * width, begin + high * width
        elif chunk.contiguous:
            begin, end = begin + start * chunk.dtype.itemsize, begin + stop * chunk.dtype.itemsize
        yield path, begin, end
