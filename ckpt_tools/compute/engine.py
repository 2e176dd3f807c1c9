"""The engine: fills output files with their tensors, batch by batch, in several threads at once.

Each thread takes a batch, reads it from every input in turn, adds it up in float64, rounds once, and writes it at its
offset, in blocks small enough to stay in a cache. An input byte crosses memory once, private memory depends on the
number of threads alone, and the threads run side by side, for reading, adding, checksums and writing all release the
interpreter lock.

Plain tensors go through C (`native`), without torch, or through GPUs (`lanes`); all others through torch (`summing`),
as does what is not finite, for torch finds where it stands.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, groupby
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ..formats.file_plan import OutTensor, SumKind
from ..storage.opened import OpenFiles
from ..storage.source import Stamp
from ..storage.staged import reserve, write_at
from ..tensors import c_strides
from . import native
from .batches import MEMORY, PIECE, Band, Batch, OutFile, Part, apart, cut, divided, orders_of
from .crc32 import combine
from .gpu import Accelerator
from .gpu.devices import GPU_MEMORY
from .threads import in_threads
from .tiles import Tile, rows

if TYPE_CHECKING:
    from .torch_sums import Recipe, Worker


_ZEROS = 512 << 10  # bytes of one write
_WORTH_STARTING = 1 << 20  # bytes for which it is worth to wake the disk up: a millisecond of its time


def memory_needed(
    tensors: Iterable[OutTensor],
    threads: int | None = None,
    devices: Sequence[str] = (),
    gpu_memory: int = GPU_MEMORY,
) -> int:
    """Return the private bytes of the host that a run holds in buffers, whatever the size of the model.

    Where torch is needed only for tensors that turn out not to be finite, its buffers come on top.

    Raises:
        UsageError: so little memory of the GPUs is too little.
    """
    tensors = list(tensors)
    tiled = [tensor for tensor in tensors if tensor.kind is None and tensor.data is None]
    kinds = groupby(tensor.kind for tensor in tensors if tensor.kind is not None)
    each = native.MEMORY if all(native.knows(kind) for kind, _ in kinds) else MEMORY
    if tiled:
        each = max(each, native.MEMORY + native.TILE_SCRATCH if all(map(_tiled_by_native, tiled)) else MEMORY)
    gpus = Accelerator(tensors, threads, devices, gpu_memory)
    return gpus.threads * (each + gpus.host_memory)


def run(
    outputs: Sequence[OutFile],
    *,
    stamps: Iterable[Stamp] = (),
    threads: int | None = None,
    piece: int | None = None,
    allow_nonfinite: bool = False,
    devices: Sequence[str] = (),
    gpu_memory: int = GPU_MEMORY,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Fill output files with their tensors and with what stands around them.

    Args:
        outputs: files of the planned size, open for writing.
        stamps: of the inputs, taken when their headers were read.
        threads: workers; as many as there are cores by default.
        piece: elements a worker handles at a time, in whatever way; the best for each way by default. Changes no byte
            of the output.
        allow_nonfinite: let NaN and infinity pass, in the inputs and in the output.
        devices: that share the sums, as `devices.choose` returns them; the CPU if there are none.
        gpu_memory: bytes to take on each.
        on_progress: called in this thread, a few times a second, with the bytes read and written so far.

    Raises:
        UsageError: too little memory of the GPUs.
        NumericsError: an input is not finite, or a result overflows its dtype; names tensor and file.
        ReadError: an input cannot be read, ends early, or changes meanwhile.
        WriteError: the output cannot be written.
    """
    with OpenFiles(stamps) as files, ExitStack() as torch_settings:
        for out in outputs:
            reserve(out.fd, 0, out.plan.size, out.plan.name)
        places = chain.from_iterable(tensor.places for out in outputs for tensor, _ in out.plan.slots)
        # By identity first: twins share one tuple of all their files. The dict keeps the others alive, and so apart.
        files.open_all(chain.from_iterable({id(paths): paths for _, paths in places}.values()))
        tensors = (tensor for out in outputs for tensor, _ in out.plan.slots)
        gpus = Accelerator(tensors, threads, devices, gpu_memory)
        other = piece or PIECE

        def tile(kind: SumKind, one_order: bool) -> int:
            largest = native.largest_tile(kind, one_order) if native.knows(kind) else other
            return min(largest, piece or largest)

        each = piece or gpus.elements or native.PIECE
        batches = list(cut(outputs, piece=each, other=other, tile=tile))
        job = _Job(batches, files, piece or PIECE, allow_nonfinite, gpus, torch_settings)
        with job.disk.at_work(job.stop):
            in_threads(
                lambda: _work(job),
                gpus.threads,
                job.stop,
                on_tick=None if on_progress is None else lambda: on_progress(job.moved),
            )
        files.check_unchanged()
    for out in outputs:
        plan = out.plan
        crcs = {tensor: job.checksum(tensor) for tensor, _ in plan.slots} if plan.needs_crc else {}
        around = plan.patches(crcs)
        if plan.head is not None:
            for tensor, offset in plan.slots:
                if (out.fd, offset) not in job.headed:
                    head = plan.head(offset, crcs.get(tensor, 0))
                    around.append((offset - len(head), head))
        for offset, data in around:
            write_at(out.fd, memoryview(data), offset, plan.name)


class _Disk:
    """Lets the disk begin with what is written, beside the workers, whom a disk that is busy would hold up."""

    def __init__(self) -> None:
        self._ranges: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()
        self._small: Counter[int] = Counter()  # bytes by file that came in parts not worth it each

    def written(self, part: Part) -> None:
        fd, position, nbytes = part.out.fd, part.position, part.nbytes
        if part.band is not None:
            part.band.missing -= part.numel
            if part.band.missing:
                return
            position, nbytes = part.band.position, part.band.nbytes
        if nbytes < _WORTH_STARTING:
            self._small[fd] += nbytes
            if self._small[fd] < 4 * _WORTH_STARTING:
                return
            position = nbytes = self._small[fd] = 0  # all of the file
        self._ranges.put((fd, position, nbytes))

    @contextmanager
    def at_work(self, stop: threading.Event) -> Iterator[None]:
        def begin() -> None:
            while (told := self._ranges.get()) is not None:
                if not stop.is_set():  # for nothing else is worth waiting for the disk
                    native.start_disk(*told)

        thread = threading.Thread(target=begin, name="ckpt-disk")
        try:
            with suppress(RuntimeError):  # no more threads: the sync does it all
                thread.start()
            yield
        finally:
            self._ranges.put(None)
            if thread.ident is not None:
                thread.join()


@dataclass(slots=True)
class _Job:
    """What the workers share."""

    batches: Sequence[Batch]
    files: OpenFiles
    piece: int  # elements that torch handles at a time
    allow_nonfinite: bool
    gpus: Accelerator
    torch_settings: ExitStack
    moved: int = 0  # bytes read and written
    headed: set[tuple[int, int]] = field(default_factory=set)  # files, and slots whose heads are written
    stop: threading.Event = field(default_factory=threading.Event)
    disk: _Disk = field(default_factory=_Disk)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _uses_torch: bool = False
    _waiting: Iterator[Batch] = field(init=False)
    # By tensor and end, in bytes: the CRC-32 of a part; of a tile, what it adds to that of all bytes up to its end.
    _crcs: dict[OutTensor, dict[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = iter(self.batches)

    def next_batch(self) -> Batch | None:
        """Hand out the next batch; None when there is none, or when the job is stopped."""
        with self._lock:
            batch = None if self.stop.is_set() else next(self._waiting, None)
            band = batch.parts[0].band if batch is not None else None
            if batch is not None and band is not None and not band.cleared:
                _clear(batch.parts[0].out, band)
            return batch

    def use_torch(self) -> None:
        """Let torch, from now to the end of the run, compute in the thread that asks; most jobs have no need of it."""
        with self._lock:
            if not self._uses_torch:
                from .torch_sums import one_thread_each

                self.torch_settings.enter_context(one_thread_each())
                self._uses_torch = True

    def done(self, part: Part, crc: int) -> None:
        self.all_done([(part, crc)])

    def all_done(self, written: Sequence[tuple[Part, int]]) -> None:
        """Take note of parts that are written, and of their checksums."""
        with self._lock:
            self.moved += sum([part.moved for part, _ in written])
            for part, crc in written:
                self.disk.written(part)
                if part.out.plan.needs_crc:
                    self._crcs.setdefault(part.tensor, {})[part.stop * part.tensor.dtype.itemsize] = crc

    def checksum(self, tensor: OutTensor) -> int:
        total = before = 0
        for end, crc in sorted(self._crcs.get(tensor, {}).items()):
            total = combine(total, crc, end - before) if before else crc
            before = end
        return total


def _clear(out: OutFile, band: Band) -> None:
    """Write zeros to a band, in long pieces."""
    zeros = memoryview(bytes(min(_ZEROS, band.nbytes)))
    end = band.position + band.nbytes
    for position in range(band.position, end, _ZEROS):
        write_at(out.fd, zeros[: end - position], position, out.plan.name)
    band.cleared = True


def _work(job: _Job) -> None:
    try:
        cpu = _Cpu(job)
        with job.gpus.filler(job.files, job.done, job.stop, job.use_torch) as gpu:
            while (batch := job.next_batch()) is not None:
                for left in gpu.fill(batch):
                    cpu.fill(left)
            for left in gpu.finish():
                cpu.fill(left)
    except BaseException:
        job.stop.set()
        raise


class _Cpu:
    """Fills batches in one thread, and has the buffers for it: in C what is plain and finite, by torch all else."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._scratch = bytearray()
        self._tile_scratch = bytearray()
        self._worker: Worker | None = None
        self._recipe: tuple[OutTensor, Recipe] | None = None

    def fill(self, batch: Batch) -> None:
        left: Sequence[Part] = batch.parts
        tile = batch.parts[0].tile
        if batch.kind is not None and native.knows(batch.kind, 0 if tile is None else len(tile.sizes)):
            if tile is not None:
                left = self._fill_tile(batch.kind, batch.parts[0], tile)
            else:
                self._scratch = self._scratch or bytearray(native.SCRATCH)
                left = (self._fill_small if batch.small else self._fill_large)(batch.kind, batch.parts)
        for part in left:
            for own in apart(part):
                self._fill_by_torch(own)

    def _fill_large(self, kind: SumKind, parts: Sequence[Part]) -> Sequence[Part]:
        """Fill parts, and return those in which NaN or infinity was found."""
        left = []
        for part in parts:
            crc, bad = native.fill(kind, part, self._job.files, self._scratch)
            if bad:
                left.append(part)
            else:
                self._job.done(part, crc)
        return left

    def _fill_small(self, kind: SumKind, parts: Sequence[Part]) -> Sequence[Part]:
        """Fill small parts of one file, and return those in which NaN or infinity was found.

        Neighbours in the file are written at once, with what stands between them.
        """
        data, crcs, bad = native.pack(kind, parts, self._job.files, self._scratch)
        out = parts[0].out
        run: list[bytes | memoryview] = []
        run_begin = run_end = at = 0
        written = []
        for part, crc, refused in zip(parts, crcs, bad, strict=True):
            nbytes = part.nbytes
            head = out.plan.head(part.position, crc) if out.plan.head is not None else b""
            position = part.position - len(head)
            if refused or position != run_end:
                write_at(out.fd, memoryview(b"".join(run)), run_begin, out.plan.name)
                run, run_begin, run_end = [], position, position
            if not refused:
                run += (head, data[at : at + nbytes])
                run_end = part.position + nbytes
                written.append((part, crc))
                if head:
                    self._job.headed.add((out.fd, part.position))
            at += nbytes
        write_at(out.fd, memoryview(b"".join(run)), run_begin, out.plan.name)
        self._job.all_done(written)
        return [part for part, refused in zip(parts, bad, strict=True) if refused]

    def _fill_tile(self, kind: SumKind, part: Part, tile: Tile) -> Sequence[Part]:
        """Fill a tile, and return it if NaN or infinity was found in it."""
        self._tile_scratch = self._tile_scratch or bytearray(native.TILE_SCRATCH)
        crc, bad = native.fill_tile(kind, part, tile, self._job.files, self._tile_scratch)
        if bad:
            return [part]
        self._job.done(part, crc)
        return []

    def _fill_by_torch(self, part: Part) -> None:
        """Fill a part of any kind; find what is not finite, and where, or let it pass."""
        for piece in divided(part, self._job.piece):
            data = self._bytes(piece)
            crc = self._write_rows(piece, piece.tile, data) if piece.tile else self._write(piece.position, piece, data)
            self._job.done(piece, crc)

    def _write(self, position: int, piece: Part, data: memoryview) -> int:
        """Write bytes, and return their CRC-32 if it is needed."""
        write_at(piece.out.fd, data, position, piece.out.plan.name)
        return native.crc32(data) if piece.out.plan.needs_crc else 0

    def _write_rows(self, piece: Part, tile: Tile, data: memoryview) -> int:
        """Write a tile, and return what it adds to the CRC-32 of all bytes up to its end."""
        row, begins = rows(tile.sizes, c_strides(piece.tensor.shape))
        item = piece.tensor.dtype.itemsize
        nbytes, crc, before = row * item, 0, 0
        for i, begin in enumerate(begins):
            own = self._write(piece.position + begin * item, piece, data[i * nbytes : (i + 1) * nbytes])
            crc = combine(crc, own, (begin - before) * item)
            before = begin
        return crc

    def _bytes(self, piece: Part) -> memoryview:
        tensor, item = piece.tensor, piece.tensor.dtype.itemsize
        if tensor.data is not None:
            return memoryview(tensor.data)[piece.start * item : piece.stop * item]
        from .torch_sums import Recipe, Worker

        if self._worker is None:
            self._job.use_torch()
            self._worker = Worker(self._job.piece, allow_nonfinite=self._job.allow_nonfinite)
        if self._recipe is None or self._recipe[0] is not tensor:
            self._recipe = tensor, Recipe(tensor, self._job.files)
        return self._worker.compute(piece, self._recipe[1])


def _tiled_by_native(tensor: OutTensor) -> bool:
    """True if tiles of a tensor are summed in C."""
    swapped = any(spec.swapped for spec, _ in tensor.places)
    fits = not swapped and native.knows(tensor.formula, len(tensor.shape))
    return fits and orders_of(tensor) is not None
