"""The engine: fills output files with their tensors, in several threads at once.

Each thread takes a work unit, reads its slices from every input in turn, adds them up in float64, rounds once, and
writes the result at its offset, in blocks small enough to stay in a cache. Each input byte crosses memory once, also
where several files are written that differ in their coefficients (`OutFile.row`): a block has a sum for each of them.
Private memory depends on the number of threads and, up to `MOST_ROWS`, of such files. Threads run in parallel: reading,
adding, checksums and writing all release the interpreter lock.

Most slices are summed in C (`native`), without torch, or on GPUs (`gpu`). Torch (`torch_sums`) takes the others, and
those with NaN or infinity, for it finds the first one, and the rare ones with a sum that two float64 numbers cannot
decide (`formula`).
"""

from __future__ import annotations

import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import NumericsError
from ..formats.file_plan import FilePlan, GroupKey, OutTensor
from ..storage import page_cache
from ..storage.pace import Pace
from ..storage.source import OpenFiles, Stamp
from ..storage.staged import reserve, write_at
from ..tensors import c_strides
from . import native
from .crc32 import combine
from .fetching import Fetching
from .gpu import Accelerator
from .gpu.devices import GPU_MEMORY
from .shares import Share, SliceSum
from .summation import room
from .threads import in_threads
from .tiles import Tile, rows
from .work_units import (
    MEMORY,
    MOST_ROWS,
    SLICE,
    Band,
    OutFile,
    Slice,
    Target,
    WorkUnit,
    cut,
    divided,
    in_rows,
    of_tensors,
    orders_of,
    pieces,
)

if TYPE_CHECKING:
    from .follower import Follower
    from .torch_sums import Recipe, Worker


_ZEROS = 512 << 10  # bytes of one write
_NOTE = 400  # bytes, with what Python adds
_UNDER_WAY = 256 << 20  # bytes that a disk may have to write
_MOST_UNDER_WAY = 128  # ranges of them
_WORTH_STARTING = 1 << 20  # bytes that are worth a call to start the disk: it needs a millisecond for them


def memory_needed(
    tensors: Iterable[OutTensor],
    threads: int | None = None,
    devices: Sequence[str] = (),
    gpu_memory: int = GPU_MEMORY,
) -> int:
    """Return the private bytes of host memory that a run takes for buffers; they do not depend on the model's size.

    Torch's buffers come on top if it is needed only for tensors that turn out to hold NaN or infinity.

    Raises:
        UsageError: `gpu_memory` is too little.
    """
    # A GPU sums one row at a time.
    parts = (part for tensor in tensors for part in in_rows(tensor, 1 if devices else MOST_ROWS))
    keyed = [(piece, piece.group_key) for part in parts for piece in pieces(part)]
    tiled = [tensor for tensor, key in keyed if key is None and tensor.data is None]
    keys = dict.fromkeys(key for _, key in keyed if key is not None)
    rows = max((len(key.rows) for key in (*keys, *[tensor.tile_key for tensor in tiled])), default=1)
    by_torch = not (all(map(native.knows, keys)) and all(map(_tiled_by_native, tiled)))
    each = max(native.memory(rows, tiles=bool(tiled)), MEMORY) if by_torch else native.memory(rows, tiles=bool(tiled))
    gpus = Accelerator([tensor for tensor, _ in keyed], threads, devices, gpu_memory)
    return gpus.threads * (each + gpus.host_memory)


def notes_needed(plans: Iterable[FilePlan]) -> int:
    """Return the bytes of memory, about, for the checksums of slices that a run keeps for the ends of files."""
    plans = [plan for plan in plans if plan.needs_checksums]
    slices = sum([1 + tensor.numel // native.SLICE for plan in plans for tensor, _ in plan.payloads])
    return slices * _NOTE


def run(
    outputs: Sequence[OutFile],
    *,
    stamps: Iterable[Stamp] = (),
    threads: int | None = None,
    slice_size: int | None = None,
    allow_nonfinite: bool = False,
    devices: Sequence[str] = (),
    gpu_memory: int = GPU_MEMORY,
    share: Share | None = None,
    cache: Path | None = None,
    pace: Pace | None = None,
    follower: Follower | None = None,
    drop_cache: bool = False,
    complete: Callable[[], Sequence[FilePlan]] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Fill output files with their tensors and with the bytes around them.

    Args:
        outputs: files of the planned size, open for writing. Those that differ in `row` share their tensors: each input
            is read once for `MOST_ROWS` of them.
        stamps: of the inputs, taken when their headers were read.
        threads: workers; as many as there are cores by default.
        slice_size: elements a worker handles at a time; the best number for each way by default. Changes no byte of the
            output.
        allow_nonfinite: let NaN and infinity pass, in the inputs and in the output.
        devices, gpu_memory: see `Accelerator`.
        cache: a folder in which what is fetched of remote inputs stays.
        share: the work units to do, without GPUs, which would cut the job otherwise; all of them if None.
        pace: at which the inputs are read.
        follower: of what is read of them.
        drop_cache: let the system drop the pages of results that are on the disk.
        complete: called when all tensors are written; returns plans of which the bytes around them are written instead.
        on_progress: called in this thread, first with 0, then a few times a second, with the bytes read and written.

    Raises:
        UsageError: `gpu_memory` is too little.
        NumericsError: an input is not finite, or a result overflows its dtype; names the file and the first such tensor
            in the order of the output.
        ReadError: an input cannot be read, ends early, or changes meanwhile.
        WriteError: the output cannot be written.
    """
    with OpenFiles(stamps) as files, ExitStack() as torch_settings:
        for out in outputs:
            reserve(out.fd, 0, out.plan.size, out.plan.name)
        tensors = (piece for out in outputs for tensor, _ in out.plan.payloads for piece in pieces(tensor))
        gpus = Accelerator(tensors, threads, devices, gpu_memory)
        other = slice_size or SLICE

        def tile(key: GroupKey, one_order: bool) -> int:
            largest = native.largest_tile(key, one_order) if native.knows(key) else other
            return min(largest, slice_size or largest)

        each = slice_size or gpus.elements or native.SLICE
        # A GPU sums one row at a time.
        most_rows = MOST_ROWS if gpus.elements is None else 1

        def units() -> Iterator[WorkUnit]:
            """Cut the job; drawn anew each time, for in a large one all units take more memory than the plan."""
            return cut(outputs, slice_size=each, other=other, tile=tile, most_rows=most_rows)

        todo = None
        if share is not None:
            todo = frozenset(share.todo(array("Q", (unit.bytes_moved for unit in units()))))
        own = partial(_chosen, units, todo)
        for _, unit in own():
            files.expect(unit.paths)
        files.open_expected()
        numbers = {out: number for number, out in enumerate(outputs)}
        log = None if share is None else _Log()
        disk = _Disk(drop_cache)
        # A GPU tells when it has read a unit, but not which.
        fetching = None if devices else Fetching.of(files, own, cache, torch_settings)
        job = _Job(
            own(), files, other, allow_nonfinite, gpus, torch_settings, numbers, disk, pace, follower, log, fetching
        )

        def tick() -> None:
            if on_progress is not None:
                on_progress(job.bytes_done)
            if share is not None:
                share.done(*job.noted())

        if on_progress is not None:
            on_progress(0)
        with job.disk.at_work(job.stop):
            in_threads(
                lambda: _work(job),
                gpus.threads,
                job.stop,
                on_tick=None if on_progress is None and share is None else tick,
            )
            if job.refused is not None:
                raise job.refused[1]
    if share is not None:
        share.done(*job.noted())
        share.flush()
        if not share.completes:
            return
        job.know(outputs, share.sums())
    for out, plan in zip(outputs, [out.plan for out in outputs] if complete is None else complete(), strict=True):
        crcs = {tensor: job.checksum(out, at) for tensor, at in plan.payloads} if plan.needs_checksums else {}
        for segment in plan.computed:
            if id(segment) not in job.written_early:
                data = segment.make([crcs[tensor] for tensor in segment.needs])
                write_at(out.fd, memoryview(data), segment.offset, plan.name)


def _chosen(units: Callable[[], Iterator[WorkUnit]], todo: Collection[int] | None) -> Iterator[tuple[int, WorkUnit]]:
    """Yield the units to do, all if None, and their numbers."""
    numbered = enumerate(units())
    return numbered if todo is None else (each for each in numbered if each[0] in todo)


class _Disk:
    """Starts to write results to the disk, in a thread of its own: a busy disk would hold the workers up."""

    def __init__(self, drops: bool) -> None:
        self._ranges: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()
        self._drops = drops  # pages that are on the disk
        self._started: deque[tuple[int, int, int]] = deque()
        self._small: Counter[int] = Counter()  # by file: bytes in slices below `_WORTH_STARTING`

    def written(self, slice_: Slice) -> None:
        begin, nbytes = slice_.begin, slice_.nbytes
        if slice_.band is not None:
            slice_.band.missing -= slice_.numel
            if slice_.band.missing:
                return
            begin, nbytes = slice_.band.begin, slice_.band.nbytes
        for out, offset, _, _ in slice_.targets:
            if nbytes >= _WORTH_STARTING:
                self._ranges.put((out.fd, offset + begin, nbytes))
                continue
            self._small[out.fd] += nbytes
            if self._small[out.fd] >= 4 * _WORTH_STARTING:
                self._small[out.fd] = 0
                self._ranges.put((out.fd, 0, 0))  # the whole file

    @contextmanager
    def at_work(self, stop: threading.Event) -> Iterator[None]:
        def begin() -> None:
            while (told := self._ranges.get()) is not None:
                if not stop.is_set():  # a job that failed does not wait for the disk
                    native.start_disk(*told)
                    self._drop(told)

        thread = threading.Thread(target=begin, name="ckpt-disk")
        try:
            with suppress(RuntimeError):  # no more threads: the final sync writes everything
                thread.start()
            yield
        finally:
            self._ranges.put(None)
            if thread.ident is not None:
                thread.join()

    def _drop(self, started: tuple[int, int, int]) -> None:
        """Drop what was started long enough ago to be on the disk; what is not yet goes when all is synced."""
        if self._drops:
            self._started.append(started)
            while sum([nbytes for _, _, nbytes in self._started]) > _UNDER_WAY or len(self._started) > _MOST_UNDER_WAY:
                page_cache.drop(*self._started.popleft())


@dataclass(slots=True)
class _Log:
    """What a share is told of next."""

    units: list[int] = field(default_factory=list)
    sums: list[SliceSum] = field(default_factory=list)


_Position = tuple[int, int]  # number of an output file, byte in it


@dataclass(slots=True)
class _Job:
    """What the workers share."""

    waiting: Iterator[tuple[int, WorkUnit]]
    files: OpenFiles
    torch_slice: int  # elements that torch handles at a time
    allow_nonfinite: bool
    gpus: Accelerator
    torch_settings: ExitStack
    numbers: dict[OutFile, int]  # of the outputs
    disk: _Disk
    pace: Pace | None = None
    follower: Follower | None = None
    log: _Log | None = None
    fetching: Fetching | None = None  # of remote inputs
    bytes_done: int = 0  # read and written
    refused: tuple[_Position, NumericsError] | None = None  # the first one in the order of the output
    written_early: set[int] = field(default_factory=set)  # computed segments that went out with small tensors, by id
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _uses_torch: bool = False
    # By place of a tensor and end in bytes: the CRC-32 of a slice; of a tile, what it adds to that of all bytes up to
    # its end.
    _crcs: dict[tuple[OutFile, int], dict[int, int]] = field(default_factory=dict)

    def next_unit(self) -> tuple[int, WorkUnit] | None:
        """Return the next work unit and its number; None if there is none, or if the job is stopped.

        Once a value is refused, only what comes before it counts: the first one is the same for any number of threads.
        """
        with self._lock:
            for number, unit in self.waiting:
                if self.stop.is_set():
                    return None
                if self.refused and all(self._position(slice_) > self.refused[0] for slice_ in unit.slices):
                    if self.fetching is not None:
                        self.fetching.done(number)
                    continue
                band = unit.slices[0].band
                # Other tiles of a band may be another process's, and be written.
                if band is not None and not band.cleared and self.log is None:
                    _clear(unit.slices[0].targets, band)
                return number, unit
            return None

    def refuse(self, slice_: Slice, error: NumericsError) -> None:
        """Record that a slice has a value that is refused."""
        with self._lock:
            position = self._position(slice_)
            if self.refused is None or position < self.refused[0]:
                self.refused = position, error

    def _position(self, slice_: Slice) -> _Position:
        out, offset, _, _ = slice_.targets[0]
        return self.numbers[out], offset + slice_.begin

    def use_torch(self) -> None:
        """Let torch compute in the calling thread until the run ends; most jobs do without torch."""
        with self._lock:
            if not self._uses_torch:
                from .torch_sums import one_thread_each

                self.torch_settings.enter_context(one_thread_each())
                self._uses_torch = True

    def done(self, slice_: Slice, crcs: Sequence[int]) -> None:
        self.all_done([(slice_, crcs)])

    def all_done(self, written: Sequence[tuple[Slice, Sequence[int]]]) -> None:
        """Record slices that are written to all their targets, and the checksums of their rows."""
        with self._lock:
            self.bytes_done += sum([slice_.bytes_moved for slice_, _ in written])
            for slice_, crcs in written:
                self.disk.written(slice_)
                for out, offset, row, _ in slice_.targets:
                    if out.plan.needs_checksums:
                        before = slice_.before
                        self._crcs.setdefault((out, offset - before), {})[before + slice_.end] = crcs[row]
                        if self.log is not None:
                            at = self.numbers[out], offset - before, before + slice_.end
                            self.log.sums.append(SliceSum(*at, crcs[row]))

    def unit_done(self, number: int, unit: WorkUnit) -> None:
        """Record a unit that was filled; in a share not if the job is refused: its slice may be why."""
        if self.follower is not None:
            self.follower.read(unit)
        self.files.used(unit.paths)
        if self.log is not None:
            with self._lock:
                if self.refused is None:
                    self.log.units.append(number)

    def noted(self) -> tuple[list[int], list[SliceSum]]:
        """Return the units of a share that were done since the last call, and the new checksums."""
        if self.log is None:
            return [], []
        with self._lock:
            noted = self.log.units, self.log.sums
            self.log.units, self.log.sums = [], []
            return noted

    def know(self, outputs: Sequence[OutFile], sums: Iterable[SliceSum]) -> None:
        """Take over the checksums of slices that other runs have filled."""
        for file, offset, end, crc in sums:
            self._crcs.setdefault((outputs[file], offset), {})[end] = crc

    def checksum(self, out: OutFile, offset: int) -> int:
        """Return the CRC-32 of the tensor at a place."""
        total = before = 0
        for end, crc in sorted(self._crcs.get((out, offset), {}).items()):
            total = combine(total, crc, end - before) if before else crc
            before = end
        return total


def _clear(targets: Sequence[Target], band: Band) -> None:
    """Write zeros to a band, in few calls."""
    zeros = memoryview(bytes(min(_ZEROS, band.nbytes)))
    for out, offset, _, _ in targets:
        end = offset + band.begin + band.nbytes
        for position in range(offset + band.begin, end, _ZEROS):
            write_at(out.fd, zeros[: end - position], position, out.plan.name)
    band.cleared = True


def _work(job: _Job) -> None:
    with _Cpu(job) as cpu, job.gpus.filler(job.files, job.done, job.stop, job.use_torch) as gpu:
        while (taken := job.next_unit()) is not None:
            number, unit = taken
            if job.pace is not None:
                job.pace.take(unit.bytes_read, job.stop)
            if job.follower is not None:
                job.follower.wait(job.stop)
            if job.fetching is not None and not job.fetching.wait(number, job.stop):
                return
            for left in gpu.fill(unit):
                cpu.fill(left)
            if job.fetching is not None:
                job.fetching.done(number)
            job.unit_done(number, unit)
        for left in gpu.finish():
            cpu.fill(left)


class _Cpu:
    """Fills work units in one thread, in C where that can be and by torch otherwise; a context manager.

    It owns the buffers for that.
    """

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._scratch = {False: bytearray(), True: bytearray()}  # True: for tiles
        self._worker: Worker | None = None
        self._recipe: tuple[OutTensor, Recipe] | None = None
        self._held = ExitStack()  # the files of the recipe

    def __enter__(self) -> _Cpu:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def fill(self, unit: WorkUnit) -> None:
        left: Sequence[Slice] = unit.slices
        tile = unit.slices[0].tile
        if unit.key is not None and native.knows(unit.key, 0 if tile is None else len(tile.sizes)):
            paths = unit.paths
            with self._job.files.using(paths):
                if self._job.files.known_to_c(paths):
                    left = self._fill_by_native(unit.key, unit, tile)
        for slice_ in left:
            for own in of_tensors(slice_):
                try:
                    self._fill_by_torch(own)
                except NumericsError as error:
                    self._job.refuse(own, error)
                    return

    def _fill_by_native(self, key: GroupKey, unit: WorkUnit, tile: Tile | None) -> Sequence[Slice]:
        scratch = self._memory(len(key.rows), tiles=tile is not None)
        if tile is not None:
            return self._fill_tile(key, unit.slices[0], tile, scratch)
        return (self._fill_small if unit.small else self._fill_large)(key, unit.slices, scratch)

    def _memory(self, rows: int, *, tiles: bool) -> bytearray:
        needed = native.scratch(rows, tiles=tiles)
        if len(self._scratch[tiles]) < needed:
            self._scratch[tiles] = bytearray()  # not both at once
            self._scratch[tiles] = bytearray(needed)
        return self._scratch[tiles]

    def _fill_large(self, key: GroupKey, slices: Sequence[Slice], scratch: bytearray) -> Sequence[Slice]:
        """Fill slices, and return those left to torch: with NaN, infinity, or a sum that C cannot decide."""
        left = []
        for slice_ in slices:
            crcs, bad = native.fill(key, slice_, self._job.files, scratch)
            if bad:
                left.append(slice_)
            else:
                self._job.done(slice_, crcs)
        return left

    def _fill_small(self, key: GroupKey, parts: Sequence[Slice], scratch: bytearray) -> Sequence[Slice]:
        """Fill small slices of the same files, and return those left to torch, as `_fill_large` does.

        Neighbours in a file are written at once, with what stands between them.
        """
        data, crcs, bad = native.pack(key, parts, self._job.files, scratch)
        count, nbytes = len(parts), len(data) // len(key.rows)
        for i, (out, _, row, _) in enumerate(parts[0].targets):
            places = [part.targets[i] for part in parts]
            own, its_crcs = data[row * nbytes : (row + 1) * nbytes], crcs[row * count : (row + 1) * count]
            self._write_small(out, parts, places, own, its_crcs, bad)
        self._job.all_done([(part, crcs[i::count]) for i, part in enumerate(parts) if not bad[i]])
        return [part for part, refused in zip(parts, bad, strict=True) if refused]

    def _write_small(
        self,
        out: OutFile,
        parts: Sequence[Slice],
        places: Sequence[Target],
        data: memoryview,
        crcs: Sequence[int],
        bad: Sequence[int],
    ) -> None:
        run: list[bytes | memoryview] = []
        run_begin = run_end = at = 0
        for part, place, crc, refused in zip(parts, places, crcs, bad, strict=True):
            nbytes = part.nbytes
            header = b"" if place.header is None else place.header.make((crc,))
            position = place.offset - len(header)
            if refused or position != run_end:
                write_at(out.fd, memoryview(b"".join(run)), run_begin, out.plan.name)
                run, run_begin, run_end = [], position, position
            if not refused:
                run += (header, data[at : at + nbytes])
                run_end = place.offset + nbytes
                if place.header is not None:
                    self._job.written_early.add(id(place.header))
            at += nbytes
        write_at(out.fd, memoryview(b"".join(run)), run_begin, out.plan.name)

    def _fill_tile(self, key: GroupKey, slice_: Slice, tile: Tile, scratch: bytearray) -> Sequence[Slice]:
        """Fill a tile, and return it if it is left to torch, as `_fill_large` does."""
        crcs, bad = native.fill_tile(key, slice_, tile, self._job.files, scratch)
        if bad:
            return [slice_]
        self._job.done(slice_, crcs)
        return []

    def _fill_by_torch(self, slice_: Slice) -> None:
        """Fill any slice; refuse NaN and infinity by their index, or let them pass."""
        count = max(len(slice_.tensor.terms.rows), 1)
        terms, dtype = slice_.tensor.terms, slice_.tensor.dtype
        for each in divided(slice_, max(room(terms.dtypes, dtype, self._job.torch_slice // count), 1)):
            crcs = [0] * count
            for row, data in self._results(each):
                for target in each.targets:
                    if target.row == row:
                        crcs[row] = self._write_rows(each, target, data)
            self._job.done(each, crcs)

    def _write_rows(self, slice_: Slice, target: Target, data: memoryview) -> int:
        """Write a slice, and return its CRC-32 if it is needed; of a tile, what it adds to that of all bytes before."""
        name, wanted = target.out.plan.name, slice_.needs_checksums
        position, item = target.offset + slice_.begin, slice_.tensor.dtype.itemsize
        row, begins = slice_.numel, [0]  # all elements are adjacent
        if slice_.tile is not None:
            row, begins = rows(slice_.tile.sizes, c_strides(slice_.tensor.shape))
        nbytes, crc, before = row * item, 0, 0
        for i, begin in enumerate(begins):
            own = data[i * nbytes : (i + 1) * nbytes]
            write_at(target.out.fd, own, position + begin * item, name)
            if wanted:
                crc = combine(crc, native.crc32(own), (begin - before) * item)
            before = begin
        return crc

    def _results(self, slice_: Slice) -> Iterator[tuple[int, memoryview]]:
        """Yield the number of each row, and its bytes, which the next ones overwrite."""
        tensor = slice_.tensor
        if tensor.data is not None:
            yield 0, memoryview(tensor.data)[slice_.begin : slice_.end]
            return
        from .torch_sums import Recipe, Worker

        if self._worker is None:
            self._job.use_torch()
            self._worker = Worker(self._job.torch_slice, allow_nonfinite=self._job.allow_nonfinite)
        if self._recipe is None or self._recipe[0] is not tensor:
            self._recipe = None
            self._held.close()
            self._held.enter_context(self._job.files.using(tensor.terms.paths))
            self._recipe = tensor, Recipe(tensor, self._job.files)
        yield from self._worker.compute(slice_, self._recipe[1])


def _tiled_by_native(tensor: OutTensor) -> bool:
    """Return True if the tiles of a tensor are summed in C."""
    swapped = any(spec.swapped for spec in tensor.terms.specs)
    fits = not swapped and native.knows(tensor.tile_key, len(tensor.shape))
    return fits and orders_of(tensor) is not None
