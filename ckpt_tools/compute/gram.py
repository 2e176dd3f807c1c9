"""Gram matrices: the inner products of the same tensor in N checkpoints, in float64.

The last checkpoint is subtracted from the others, because the products of weights that are nearly the same would lose
what tells them apart. Differences are those of float64 values, and so are products and sums. The result does not depend
on the number of threads: a unit of work is summed in order by one thread, and the units of a tensor are added in order.

Most tensors are read and summed in C (`native`), without torch. Torch (`torch_gram`) takes the others.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from ..storage.source import LOCAL, OpenFiles, Stamp, store_of
from ..tensors import ChunkedSpec, TensorSpec, in_c_order
from . import native
from .threads import HandedOut, in_threads
from .tiles import Tile, in_storage_order, storage_orders, tiles

if TYPE_CHECKING:
    from .torch_gram import TorchProducts

UNIT = 4 << 20
"""Elements that one thread sums in order."""
BLOCK = 64 << 10
"""Elements of one checkpoint that torch takes at a time: those of eight, as float64, stay in a core's cache."""

Block = range | Tile
"""Elements in C order, or a tile."""


class Matrix(Protocol):
    """A square matrix of float64; numpy takes it without a copy."""

    def __getitem__(self, at: tuple[int, int], /) -> float: ...
    def tolist(self) -> list[list[float]]:
        """Return its rows."""


class _Unit(NamedTuple):
    """Unit of work for one thread.

    Attributes:
        tensor, number: which tensor, and which unit of it.
        specs: the tensor in every checkpoint, or a range of its elements.
        in_c: C reads and sums it.
        blocks: of its elements, summed in order.
    """

    tensor: int
    number: int
    specs: Sequence[TensorSpec]
    in_c: bool
    blocks: Sequence[Block]

    @property
    def numel(self) -> int:
        return sum(map(_numel, self.blocks))

    @property
    def paths(self) -> list[Path]:
        """The files that it reads, each once."""
        return list(dict.fromkeys([path for spec in self.specs for path in spec.paths]))


def gram(
    aligned: Sequence[Sequence[TensorSpec]],
    *,
    stamps: Iterable[Stamp] = (),
    threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Matrix]:
    """Return the inner products of the differences from the last checkpoint, tensor by tensor.

    Args:
        aligned: tensors, each as it is in every checkpoint; floating-point or complex, of one shape.
        stamps: of the files, taken when their headers were read.
        threads: workers; as many as there are cores by default.
        on_progress: called in this thread, a few times a second, with the bytes read so far.

    Returns:
        For each tensor a matrix (N, N) of float64: rows and columns are x_1 - x_N, ..., x_(N-1) - x_N, x_N. It is not
        finite where a value is not.

    Raises:
        ReadError: a file cannot be read, ends early, or changes meanwhile.
    """
    with OpenFiles(stamps) as files, ExitStack() as torch_settings:
        job = _Job(aligned, files)
        for unit in job.cut():
            files.expect(unit.paths)
        files.open_expected()
        if job.needs_torch:
            from .torch_sums import one_thread_each

            torch_settings.enter_context(one_thread_each())
        in_threads(
            lambda: _work(job),
            threads,
            job.stop,
            on_tick=None if on_progress is None else lambda: on_progress(job.bytes_done),
        )
    return [_square(*each) for each in zip(job.sums, aligned, strict=True)]


class _Job:
    """What the workers share."""

    def __init__(self, aligned: Sequence[Sequence[TensorSpec]], files: OpenFiles) -> None:
        self.files = files
        local = all(store_of(path) is LOCAL for specs in aligned for spec in specs for path in spec.paths)
        known = native.gram_knows if local else lambda specs: False
        self._pieces = [[(piece, known(piece)) for piece in _pieces(specs)] for specs in aligned]
        self.needs_torch = not all(in_c for pieces in self._pieces for _, in_c in pieces)
        self.sums = [memoryview(bytearray(8 * _padded(len(specs)) ** 2)).cast("d") for specs in aligned]
        self.stop = threading.Event()
        self.bytes_done = 0
        self._lock = threading.Lock()
        self.units = HandedOut(self.cut(), self.stop)
        self._waiting: list[dict[int, memoryview[float]]] = [{} for _ in aligned]  # for the units before them
        self._added = [0] * len(aligned)

    def cut(self) -> Iterator[_Unit]:
        """Cut the tensors into units."""
        for i, pieces in enumerate(self._pieces):
            number = count()
            for specs, in_c in pieces:
                if in_c:
                    blocks: Iterable[Block] = _ranges(specs[0].numel, UNIT)
                elif (orders := storage_orders(specs)) is not None:
                    blocks = tiles(specs[0].shape, orders, BLOCK)
                else:
                    blocks = _ranges(specs[0].numel, BLOCK)
                for unit in _together(blocks):
                    yield _Unit(i, next(number), specs, in_c, unit)

    def done(self, unit: _Unit, products: memoryview[float]) -> None:
        """Add the products of a unit to those of its tensor, after those of the units before."""
        with self._lock:
            self.bytes_done += unit.numel * sum([spec.dtype.itemsize for spec in unit.specs])
            waiting, total = self._waiting[unit.tensor], self.sums[unit.tensor]
            waiting[unit.number] = products
            while (found := waiting.pop(self._added[unit.tensor], None)) is not None:
                self._added[unit.tensor] += 1
                for at, each in enumerate(found):
                    total[at] += each


def _numel(block: Block) -> int:
    return block.numel if isinstance(block, Tile) else len(block)


def _together(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Put blocks together to units of work."""
    unit: list[Block] = []
    numel = 0
    for block in blocks:
        unit.append(block)
        numel += _numel(block)
        if numel >= UNIT:
            yield unit
            unit, numel = [], 0
    if unit:
        yield unit


def _ranges(numel: int, size: int) -> Iterator[range]:
    return (range(at, min(at + size, numel)) for at in range(0, numel, size))


def _pieces(specs: Sequence[TensorSpec]) -> Sequence[Sequence[TensorSpec]]:
    """Cut tensors in chunks in C order where a chunk ends; return others as they stand in storage, if strides agree."""
    if not any(isinstance(spec, ChunkedSpec) for spec in specs):
        return [[*map(in_storage_order, specs)] if len({spec.stride for spec in specs}) == 1 else specs]
    stored = [[chunk for _, chunk in spec.as_chunks] for spec in specs]
    plain = all(type(chunk) is TensorSpec and chunk.contiguous for chunks in stored for chunk in chunks)
    if not plain or not all(map(in_c_order, specs)):
        return [specs]
    ends = [[*accumulate(chunk.numel for chunk in chunks)] for chunks in stored]
    edges = sorted({0}.union(*ends))
    return [[_part(*each, start, stop) for each in zip(stored, ends, strict=True)] for start, stop in pairwise(edges)]


def _part(chunks: Sequence[TensorSpec], ends: Sequence[int], start: int, stop: int) -> TensorSpec:
    """Return elements [start, stop), which are in one chunk, as a tensor."""
    number = bisect_right(ends, start)
    chunk = chunks[number]
    first = chunk.start + start - (ends[number] - chunk.numel)
    return TensorSpec(chunk.dtype, (stop - start,), (1,), first, chunk.storage)


def _padded(n: int) -> int:
    return -(-n // 4) * 4


def _square(sums: memoryview[float], specs: Sequence[TensorSpec]) -> Matrix:
    """Return the whole matrix of sums whose upper triangle is filled."""
    n, width = len(specs), _padded(len(specs))
    whole = memoryview(bytearray(8 * n * n)).cast("d", (n, n))
    for i in range(n):
        for j in range(i, n):
            whole[i, j] = whole[j, i] = sums[i * width + j]
    return cast(Matrix, whole)  # a memoryview, whose type knows of one axis only


def _work(job: _Job) -> None:
    scratch = bytearray()
    by_torch: TorchProducts | None = None
    for unit in job.units:
        specs = unit.specs
        memory = bytearray(8 * _padded(len(specs)) ** 2)
        paths = unit.paths
        with job.files.using(paths):
            if unit.in_c:
                if len(scratch) < (needed := native.gram_scratch(len(specs))):
                    scratch = bytearray(needed)
                for block in unit.blocks:
                    if isinstance(block, range):  # tiles are for torch
                        native.gram(specs, block.start, block.stop, job.files, memory, scratch)
            else:
                if by_torch is None:
                    from .torch_gram import TorchProducts

                    by_torch = TorchProducts(job.files)
                by_torch.add(specs, unit.blocks, memory)
        job.files.used(paths)
        job.done(unit, memoryview(memory).cast("d"))
