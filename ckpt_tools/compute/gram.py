"""Gram matrices: the inner products of the same tensor in N checkpoints, in float64.

A block of all N is read and widened; the last is subtracted from the others, because the products of weights that are
nearly the same would lose what tells them apart. The result does not depend on the number of threads: a unit of work is
summed in order by one thread, and the units of a tensor are added in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..storage.source import OpenFiles, Stamp
from ..tensors import DType, TensorSpec
from . import native
from .formula import real_dtype
from .payload import Buffer, Reader, TensorSource, torch_dtype
from .threads import in_threads
from .tiles import Tile, in_storage_order, storage_orders, tiles
from .torch_sums import one_thread_each

BLOCK = 64 << 10
"""Elements of one checkpoint in a block: those of eight, as float64, stay in a core's cache."""
UNIT = 16 << 20
"""Elements that one thread sums in order."""

_Portion = range | Tile


@dataclass(frozen=True, slots=True)
class _Rows:
    """One tensor in every checkpoint.

    Attributes:
        orders: axis orders to cut tiles for; None to read elements in C order.
    """

    sources: Sequence[TensorSource]
    orders: Sequence[tuple[int, ...]] | None

    @classmethod
    def of(cls, specs: Sequence[TensorSpec], files: OpenFiles) -> _Rows:
        if len({spec.stride for spec in specs}) == 1:
            specs = [in_storage_order(spec) for spec in specs]
        return cls([TensorSource(spec, files) for spec in specs], storage_orders(specs))

    @property
    def reals(self) -> int:
        """Real numbers in an element: 2 for complex dtypes."""
        dtype = self.sources[0].spec.dtype
        return dtype.itemsize // real_dtype(dtype).itemsize

    def units(self) -> Iterator[list[_Portion]]:
        """Cut into units of work, each a list of blocks."""
        unit: list[_Portion] = []
        for portion in self._blocks():
            unit.append(portion)
            if len(unit) * BLOCK >= UNIT:
                yield unit
                unit = []
        if unit:
            yield unit

    def _blocks(self) -> Iterator[_Portion]:
        spec = self.sources[0].spec
        if self.orders is not None:
            yield from tiles(spec.shape, self.orders, BLOCK)
        else:
            yield from (range(at, min(at + BLOCK, spec.numel)) for at in range(0, spec.numel, BLOCK))


def gram(
    aligned: Sequence[Sequence[TensorSpec]],
    *,
    stamps: Iterable[Stamp] = (),
    threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
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
    with OpenFiles(stamps) as files:
        files.open_all(path for specs in aligned for spec in specs for path in spec.paths)
        job = _Job([_Rows.of(specs, files) for specs in aligned])
        with one_thread_each():
            in_threads(
                lambda: _work(job),
                threads,
                job.stop,
                on_tick=None if on_progress is None else lambda: on_progress(job.bytes_done),
            )
        files.check_unchanged()
    return job.sums()


class _Job:
    """What the workers share."""

    def __init__(self, rows: Sequence[_Rows]) -> None:
        self.rows = rows
        self.stop = threading.Event()
        self.bytes_done = 0
        self._lock = threading.Lock()
        self._units = ((i, k, unit) for i, each in enumerate(rows) for k, unit in enumerate(each.units()))
        self._found: list[dict[int, torch.Tensor]] = [{} for _ in rows]

    def next(self) -> tuple[int, int, list[_Portion]] | None:
        with self._lock:
            return None if self.stop.is_set() else next(self._units, None)

    def read(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_done += nbytes

    def done(self, i: int, k: int, products: torch.Tensor) -> None:
        with self._lock:
            self._found[i][k] = products

    def sums(self) -> list[torch.Tensor]:
        sums = []
        for rows, found in zip(self.rows, self._found, strict=True):
            total = torch.zeros(len(rows.sources), len(rows.sources), dtype=torch.float64)
            for k in sorted(found):
                total += found[k]
            sums.append(total)
        return sums


def _work(job: _Job) -> None:
    worker = _Worker(job.rows)
    while (found := job.next()) is not None:
        i, k, unit = found
        job.done(i, k, worker.products(job.rows[i], unit, job.read))


class _Worker:
    """One thread's buffers, and the arithmetic on them."""

    def __init__(self, rows: Sequence[_Rows]) -> None:
        largest = max((source.item for each in rows for source in each.sources), default=1)
        self._readers = [Reader(largest * BLOCK) for _ in range(max((len(each.sources) for each in rows), default=1))]

    def products(self, rows: _Rows, unit: Sequence[_Portion], read: Callable[[int], None]) -> torch.Tensor:
        """Return the inner products of a unit."""
        n = len(rows.sources)
        padded = -(-n // 4) * 4
        memory = bytearray(8 * padded * padded)
        sums = torch.frombuffer(memory, dtype=torch.float64).view(padded, padded)
        readers = self._readers[:n]
        buffers = tuple(reader.buffer.bytes for reader in readers)
        dtypes = tuple(real_dtype(source.spec.dtype).name for source in rows.sources)
        for portion in unit:
            count = (portion.numel if isinstance(portion, Tile) else len(portion)) * rows.reals
            nbytes = 0
            for reader, source in zip(readers, rows.sources, strict=True):
                if isinstance(portion, Tile):
                    nbytes += reader.read_tile(source, portion)
                else:
                    nbytes += reader.read(source, portion.start, portion.stop)
            if not native.gram(dtypes, buffers, count, memory):
                sums[:n, :n] += _products([r.buffer for r in readers], [s.spec.dtype for s in rows.sources], count)
            read(nbytes)
        upper = sums[:n, :n].triu()
        return upper + upper.triu(1).T


def _products(buffers: Sequence[Buffer], dtypes: Sequence[DType], count: int) -> torch.Tensor:
    """Return what C adds, computed by torch."""
    wide = torch.empty(len(buffers), count, dtype=torch.float64)
    for row, buffer, dtype in zip(wide, buffers, dtypes, strict=True):
        values = buffer.view(torch_dtype(real_dtype(dtype)), count)
        row.copy_(values if values.dtype in _DIRECT else values.float())
    wide[:-1] -= wide[-1]
    return (wide @ wide.T).triu()


_DIRECT = (torch.float64, torch.float32, torch.bfloat16)  # whose conversion to float64 torch has vectorised
