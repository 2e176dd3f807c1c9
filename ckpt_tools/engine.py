"""The CPU engine: weighted sums of tensors, piece by piece, in float64.

Each worker thread takes a piece small enough to stay in its cache, reads it from every input in
turn, adds it up, rounds once, and writes it at its offset. An input byte crosses memory once,
private memory depends on the piece and the thread count alone, and the threads run side by side,
for reading, adding, checksums and writing all release the interpreter lock.

Multiplication and addition are separate operations of torch, so that no fused multiply-add can
make an element depend on where a piece begins or on which device it is computed.
"""

from __future__ import annotations

import math
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch

from .errors import NumericsError, UsageError, WriteError
from .formats.crc32 import combine
from .formats.output import FilePlan, OutTensor
from .payload import Buffer, OpenFiles, Reader, torch_dtype
from .tensors import DTYPES, DType, Kind

PIECE = 64 * 1024
"""Elements a worker handles at a time; its two float64 buffers of them stay in the cache."""

_DIRECT = {"float64", "float32", "bfloat16"}  # whose conversion to float64 torch has vectorised
_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
# What is kept of a float64 before it is narrowed to 16 or 8 bits: 12 of the 52 bits of the mantissa.
_DISCARDED = (1 << 40) - 1


@dataclass(frozen=True, slots=True)
class OutFile:
    """An output file being written: its plan, and a descriptor open for writing."""

    plan: FilePlan
    fd: int


@dataclass(slots=True)
class Totals:
    """What a run has moved so far, in bytes."""

    read: int = 0
    written: int = 0


def default_threads() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_needed(threads: int, piece: int = PIECE) -> int:
    """Return the private bytes that a run holds in buffers, whatever the size of the model."""
    return threads * piece * 36


def run(
    outputs: Sequence[OutFile],
    *,
    threads: int | None = None,
    piece: int = PIECE,
    allow_nonfinite: bool = False,
    on_progress: Callable[[Totals], None] | None = None,
) -> Totals:
    """Fill output files with their tensors and with what stands around them.

    Args:
        outputs: files of the planned size, open for writing.
        threads: workers; as many as there are cores by default.
        piece: elements a worker handles at a time. Changes no byte of the output.
        allow_nonfinite: let NaN and infinity pass, in the inputs and in the output.
        on_progress: called in this thread, a few times a second.

    Raises:
        NumericsError: an input is not finite, or a result overflows its dtype; names tensor and file.
        ReadError: an input cannot be read, ends early, or changes meanwhile.
        WriteError: the output cannot be written.
    """
    threads = default_threads() if threads is None else threads
    if threads < 1 or piece < 1:
        raise UsageError(f"--threads {threads}: must be 1 or more.")
    job = _Job(outputs, piece, allow_nonfinite)
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)  # our own threads are the parallelism
    try:
        with OpenFiles() as files, ThreadPoolExecutor(threads, thread_name_prefix="ckpt") as pool:
            for path in {spec.storage.path for out in outputs for tensor, _ in out.plan.slots for spec, _ in tensor.terms}:
                files.open(path)
            pending = {pool.submit(_work, job, files) for _ in range(threads)}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.1)
                    if on_progress is not None:
                        on_progress(job.totals)
                    for future in done:
                        future.result()
            finally:
                job.stop.set()
            files.check_unchanged()
    finally:
        torch.set_num_threads(intra_op)
    for out in outputs:
        crcs = {tensor: job.checksum(tensor) for tensor, _ in out.plan.slots} if out.plan.needs_crc else {}
        for offset, data in out.plan.patches(crcs):
            write_at(out.fd, memoryview(data), offset)
            job.totals.written += len(data)
    return job.totals


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of some bytes at an offset.

    Raises:
        WriteError: disk full, or another failure of the system.
    """
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            raise WriteError(f"writing failed: {error.strerror}. Nothing was left at the target; free some space or choose another -o.") from error


@dataclass(frozen=True, slots=True)
class _Piece:
    out: OutFile
    tensor: OutTensor
    offset: int  # of the tensor in the output file
    start: int  # elements
    stop: int


@dataclass(slots=True)
class _Job:
    """What the workers share."""

    outputs: Sequence[OutFile]
    piece: int
    allow_nonfinite: bool
    totals: Totals = field(default_factory=Totals)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _pieces: Iterator[_Piece] = field(init=False)
    _crcs: dict[OutTensor, dict[int, tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pieces = self._cut()

    def _cut(self) -> Iterator[_Piece]:
        for out in self.outputs:
            for tensor, offset in out.plan.slots:
                for start in range(0, tensor.numel, self.piece):
                    yield _Piece(out, tensor, offset, start, min(start + self.piece, tensor.numel))

    def next(self) -> _Piece | None:
        """Hand out the next piece; None when there is none, or when the job is stopped."""
        with self.lock:
            return None if self.stop.is_set() else next(self._pieces, None)

    def done(self, piece: _Piece, read: int, written: int, crc: int | None) -> None:
        with self.lock:
            self.totals.read += read
            self.totals.written += written
            if crc is not None:
                self._crcs.setdefault(piece.tensor, {})[piece.start] = (crc, written)

    def checksum(self, tensor: OutTensor) -> int:
        total = 0
        for _, (crc, length) in sorted(self._crcs.get(tensor, {}).items()):
            total = combine(total, crc, length)
        return total


def _work(job: _Job, files: OpenFiles) -> None:
    try:
        worker = _Worker(files, job.piece, allow_nonfinite=job.allow_nonfinite)
        while (piece := job.next()) is not None:
            read, data = worker.compute(piece.tensor, piece.start, piece.stop)
            crc = zlib.crc32(data) if piece.out.plan.needs_crc else None
            write_at(piece.out.fd, data, piece.offset + piece.start * piece.tensor.dtype.itemsize)
            job.done(piece, read, len(data), crc)
    except BaseException:
        job.stop.set()
        raise


class _Worker:
    """One thread's buffers, and the arithmetic on them."""

    def __init__(self, files: OpenFiles, piece: int, *, allow_nonfinite: bool) -> None:
        # A complex element is two reals, hence twice the length.
        self._reader = Reader(files, 16 * piece)
        self._sum = Buffer(16 * piece)
        self._term = Buffer(16 * piece)
        self._single = Buffer(8 * piece)
        self._first: Buffer | None = None
        self._piece = piece
        self._allow_nonfinite = allow_nonfinite

    def compute(self, out: OutTensor, start: int, stop: int) -> tuple[int, memoryview]:
        """Return (bytes read, bytes to write) for elements [start, stop); the next call overwrites the latter."""
        if out.copied:
            nbytes = self._reader.read(out.terms[0][0], start, stop)
            return nbytes, self._reader.buffer.bytes[:nbytes]
        total, read = self._add_up(out, start, stop)
        narrow = self._narrow(total, out.dtype)
        if not self._allow_nonfinite:
            self._check(out, start, stop, total, narrow)
        return read, self._term.bytes[: narrow.numel() * narrow.element_size()]

    def _add_up(self, out: OutTensor, start: int, stop: int) -> tuple[torch.Tensor, int]:
        count = (stop - start) * _reals(out.dtype)
        total = self._sum.view(torch.float64, count)
        term = self._term.view(torch.float64, count)
        first = self._anchor(out, count)
        read = 0
        for i, (spec, coefficient) in enumerate(out.terms):
            read += self._reader.read(spec, start, stop)
            target = term if i else total
            self._widen(spec.dtype, target)
            if first is not None:
                if i == 0:
                    first.copy_(total)
                    total.zero_()
                    continue
                target.sub_(first)
            target.mul_(coefficient)
            if i:
                total.add_(term)
        if first is not None:
            # Where nothing differs the first value itself, for the sign of a zero is lost in a sum.
            torch.where(total == 0, first, first + total, out=total)
        return total, read

    def _anchor(self, out: OutTensor, count: int) -> torch.Tensor | None:
        """Return room for the first term, where the sum is of differences from it.

        The products of float64 values are rounded, so that N equal values would sum up to a neighbour;
        x_1 + sum c_i (x_i - x_1) is the same average, and exact when all are equal. Narrower dtypes
        have bits to spare and need no such care.
        """
        wide = all(_component(spec.dtype) == "float64" for spec, _ in out.terms)
        if not wide or abs(math.fsum(c for _, c in out.terms) - 1.0) > 1e-12:
            return None
        self._first = self._first or Buffer(16 * self._piece)
        return self._first.view(torch.float64, count)

    def _widen(self, dtype: DType, target: torch.Tensor) -> None:
        """Bring what the reader holds into a float64 tensor; exact for every dtype."""
        name = _component(dtype)
        source = self._reader.tensor(DTYPES[name], target.numel())
        if name not in _DIRECT:
            single = self._single.view(torch.float32, target.numel())
            single.copy_(source)
            source = single
        target.copy_(source)

    def _narrow(self, total: torch.Tensor, dtype: DType) -> torch.Tensor:
        """Round float64 once to the output's dtype, to nearest, ties to even; into the term buffer."""
        component = torch_dtype(DTYPES[_component(dtype)])
        out = self._term.view(component, total.numel())
        if component in (torch.float64, torch.float32):
            return out.copy_(total)
        # torch narrows by way of float32, which rounds twice. Rounding to odd at 12 bits first makes the
        # later roundings right (Boldo and Melquiond 2008): cut, and set the last kept bit if anything was lost.
        bits = total.view(torch.int64)
        sticky = torch.bitwise_and(bits, _DISCARDED, out=self._term.view(torch.int64, total.numel()))
        sticky.add_(_DISCARDED).bitwise_or_(bits).bitwise_and_(~_DISCARDED)
        single = self._single.view(torch.float32, total.numel())
        single.copy_(sticky.view(torch.float64))
        return out.copy_(single)

    def _check(self, out: OutTensor, start: int, stop: int, total: torch.Tensor, narrow: torch.Tensor) -> None:
        """Refuse NaN and infinity; the extremes tell both, at the price of one pass over the sum."""
        low, high = (value.item() for value in torch.aminmax(total))
        if math.isfinite(low) and math.isfinite(high) and max(-low, high) <= torch.finfo(narrow.dtype).max:
            return
        for spec, _ in out.terms:
            self._reader.read(spec, start, stop)
            values = self._reader.tensor(DTYPES[_component(spec.dtype)], total.numel()).to(torch.float64)
            bad = ~torch.isfinite(values)
            if bad.any():
                at = int(bad.nonzero()[0]) // _reals(spec.dtype)
                index = [int(i) for i in torch.unravel_index(torch.tensor(start + at), spec.shape)] if spec.shape else []
                raise NumericsError(
                    f"{spec.storage.path}: '{out.name}' holds {_word(values[bad][0].item())} at {index}. "
                    "Leave this file out, or pass --allow-nonfinite if the value belongs there (a mask, say)."
                )
        if not torch.isfinite(narrow.to(torch.float32) if narrow.element_size() < 4 else narrow).all():
            raise NumericsError(
                f"the average of '{out.name}' overflows {out.dtype.name} (it reaches {max(-low, high):.4g}). "
                "Choose a wider one, such as --dtype float32."
            )


def _component(dtype: DType) -> str:
    return _REAL.get(dtype.name, dtype.name)


def _reals(dtype: DType) -> int:
    return 2 if dtype.kind is Kind.COMPLEX else 1


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"


def needs(outputs: Sequence[FilePlan]) -> Mapping[str, int]:
    """Return what a run of these plans reads and writes, in bytes."""
    read = sum(spec.nbytes for plan in outputs for tensor, _ in plan.slots for spec, _ in tensor.terms)
    return {"read": read, "written": sum(plan.size for plan in outputs)}


