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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain, cycle, groupby
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ..formats.file_plan import OutTensor, SumKind
from ..storage.source import OpenFiles, Stamp
from ..storage.staged import reserve, write_at
from . import native
from .batches import MEMORY, PIECE, Batch, OutFile, Part, apart, cut
from .crc32 import combine
from .gpu.devices import GPU_MEMORY
from .threads import default_threads, in_threads

if TYPE_CHECKING:
    from .gpu.lanes import Lane, Size
    from .torch_sums import Recipe, Worker


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
    kinds = groupby(tensor.kind for tensor in tensors if tensor.data is None)
    each = native.MEMORY if all(native.knows(kind) for kind, _ in kinds) else MEMORY
    size = _size(tensors, threads, devices, gpu_memory)
    return _workers(threads, devices) * (each + (size.on_host if size else 0))


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
        places = chain.from_iterable(tensor.places for out in outputs for tensor, _ in out.plan.payloads)
        # By identity first: tensors of a shared template have one tuple of files. The dict keeps all tuples alive.
        shared = {id(each): each for _, each in places}
        files.open_all(path for each in shared.values() for path, _ in each)
        size = _size((tensor for out in outputs for tensor, _ in out.plan.payloads), threads, devices, gpu_memory)
        batches = list(cut(outputs, piece=piece or (size.reals if size else native.PIECE), other=piece or PIECE))
        job = _Job(batches, files, piece or PIECE, allow_nonfinite, size, devices, torch_settings)
        with job.disk.at_work(job.stop):
            in_threads(
                lambda: _work(job),
                _workers(threads, devices),
                job.stop,
                on_tick=None if on_progress is None else lambda: on_progress(job.moved),
            )
        files.check_unchanged()
    for out in outputs:
        plan = out.plan
        crcs = {tensor: job.checksum(tensor) for tensor, _ in plan.payloads} if plan.needs_checksums else {}
        for segment in plan.computed:
            if id(segment) not in job.written_early:
                data = segment.make([crcs[tensor] for tensor in segment.needs])
                write_at(out.fd, memoryview(data), segment.offset, plan.name)


class _Disk:
    """Lets the disk begin with what is written, beside the workers, whom a disk that is busy would hold up."""

    def __init__(self) -> None:
        self._ranges: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()
        self._small: Counter[int] = Counter()  # bytes by file that came in parts not worth it each

    def written(self, fd: int, position: int, nbytes: int) -> None:
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
    size: Size | None  # of a lane on a device
    devices: Sequence[str]
    torch_settings: ExitStack
    moved: int = 0  # bytes read and written
    written_early: set[int] = field(default_factory=set)  # computed segments that went out with small tensors, by id
    stop: threading.Event = field(default_factory=threading.Event)
    disk: _Disk = field(default_factory=_Disk)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _uses_torch: bool = False
    has_descriptors: bool = field(init=False)  # of the inputs, which the C extension reads from
    _waiting: Iterator[Batch] = field(init=False)
    _turn: Iterator[str] = field(init=False)
    _crcs: dict[OutTensor, dict[int, tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = iter(self.batches)
        self.has_descriptors = self.files.have_descriptors
        self._turn = cycle(self.devices)

    def next_batch(self) -> Batch | None:
        """Hand out the next batch; None when there is none, or when the job is stopped."""
        with self._lock:
            return None if self.stop.is_set() else next(self._waiting, None)

    def use_torch(self) -> None:
        """Let torch, from now to the end of the run, compute in the thread that asks; most jobs have no need of it."""
        with self._lock:
            if not self._uses_torch:
                from .torch_sums import one_thread_each

                self.torch_settings.enter_context(one_thread_each())
                self._uses_torch = True

    def lane(self) -> AbstractContextManager[Lane | None]:
        """Open a lane for one thread, on one device after the other; None where the CPU does it all."""
        if self.size is None:
            return nullcontext()
        from .gpu.lanes import Lane
        from .gpu.streams import opened

        self.use_torch()
        with self._lock:
            name = next(self._turn)
        return Lane(opened(name), self.size, self.files, self.done, self.stop)

    def done(self, part: Part, crc: int) -> None:
        self.all_done([(part, crc)])

    def all_done(self, written: Sequence[tuple[Part, int]]) -> None:
        """Take note of parts that are written, and of their checksums."""
        with self._lock:
            self.moved += sum([part.moved for part, _ in written])
            for part, crc in written:
                self.disk.written(part.out.fd, part.position, part.nbytes)
                if part.out.plan.needs_checksums:
                    self._crcs.setdefault(part.tensor, {})[part.start] = (crc, part.nbytes)

    def checksum(self, tensor: OutTensor) -> int:
        total = 0
        for start, (crc, length) in sorted(self._crcs.get(tensor, {}).items()):
            total = combine(total, crc, length) if start else crc
        return total


def _work(job: _Job) -> None:
    try:
        cpu = _Cpu(job)
        with job.lane() as lane:
            while (batch := job.next_batch()) is not None:
                for left in [batch] if lane is None else lane.fill(batch):
                    cpu.fill(left)
            for left in [] if lane is None else lane.finish():
                cpu.fill(left)
    except BaseException:
        job.stop.set()
        raise


class _Cpu:
    """Fills batches in one thread, and has the buffers for it: in C what is plain and finite, by torch all else."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._scratch = bytearray()
        self._worker: Worker | None = None
        self._recipe: tuple[OutTensor, Recipe] | None = None

    def fill(self, batch: Batch) -> None:
        left: Sequence[Part] = batch.parts
        if batch.kind is not None and self._job.has_descriptors and native.knows(batch.kind):
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
            header = b"" if part.header is None else part.header.make((crc,))
            position = part.position - len(header)
            if refused or position != run_end:
                write_at(out.fd, memoryview(b"".join(run)), run_begin, out.plan.name)
                run, run_begin, run_end = [], position, position
            if not refused:
                run += (header, data[at : at + nbytes])
                run_end = part.position + nbytes
                written.append((part, crc))
                if part.header is not None:
                    self._job.written_early.add(id(part.header))
            at += nbytes
        write_at(out.fd, memoryview(b"".join(run)), run_begin, out.plan.name)
        self._job.all_done(written)
        return [part for part, refused in zip(parts, bad, strict=True) if refused]

    def _fill_by_torch(self, part: Part) -> None:
        """Fill a part of any kind; find what is not finite, and where, or let it pass."""
        for start in range(part.start, part.stop, self._job.piece):
            piece = part._replace(start=start, stop=min(start + self._job.piece, part.stop))
            data = self._bytes(piece)
            crc = native.crc32(data) if piece.out.plan.needs_checksums else 0
            write_at(piece.out.fd, data, piece.position, piece.out.plan.name)
            self._job.done(piece, crc)

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


def _workers(threads: int | None, devices: Sequence[str]) -> int:
    """Count the threads of a job: no device goes without one."""
    return max(default_threads() if threads is None else threads, len(devices))


def _size(tensors: Iterable[OutTensor], threads: int | None, devices: Sequence[str], gpu_memory: int) -> Size | None:
    """Choose what the lane of a thread holds; None where there is no device, or nothing for it to do."""
    if not devices:
        return None
    from .gpu.lanes import sized  # imports torch

    return sized(tensors, -(-_workers(threads, devices) // len(devices)), gpu_memory)
