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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch

from .errors import NumericsError, WriteError
from .formats.crc32 import combine
from .formats.header import Stamp
from .formats.opened import OpenFiles
from .formats.output import FilePlan, OutTensor
from .payload import Buffer, Reader, Source, torch_dtype
from .tensors import DTYPES, DType, Kind

PIECE = 128 * 1024
"""Elements a worker handles at a time: few enough that its buffers (2.5 MB for float32) stay in a shared
cache, enough that the price of a call and of passing the interpreter lock on is small beside the work."""

_DIRECT = {torch.float64, torch.float32, torch.bfloat16}  # whose conversion to float64 torch has vectorised
_FULL_RANGE = {torch.float64, torch.float32}  # narrowing to these turns what overflows into infinity
_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
# What is kept of a float64 before it is narrowed to 16 or 8 bits: 12 of the 52 bits of the mantissa.
_DISCARDED = (1 << 40) - 1


@dataclass(frozen=True, slots=True)
class OutFile:
    """An output file being written: its plan, and a descriptor open for writing."""

    plan: FilePlan
    fd: int


def default_threads() -> int:
    """Count the cores that this process may use; 16 at most, for each has its buffers, and disks end sooner."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def memory_needed(threads: int | None = None) -> int:
    """Return the private bytes that a run holds in buffers, whatever the size of the model."""
    return (default_threads() if threads is None else threads) * PIECE * 88  # bytes an element: see _Worker


def run(
    outputs: Sequence[OutFile],
    *,
    stamps: Iterable[Stamp] = (),
    threads: int | None = None,
    piece: int = PIECE,
    allow_nonfinite: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Fill output files with their tensors and with what stands around them.

    Args:
        outputs: files of the planned size, open for writing.
        stamps: of the inputs, taken when their headers were read.
        threads: workers; as many as there are cores by default.
        piece: elements a worker handles at a time. Changes no byte of the output.
        allow_nonfinite: let NaN and infinity pass, in the inputs and in the output.
        on_progress: called in this thread, a few times a second, with the bytes read and written so far.

    Raises:
        NumericsError: an input is not finite, or a result overflows its dtype; names tensor and file.
        ReadError: an input cannot be read, ends early, or changes meanwhile.
        WriteError: the output cannot be written.
    """
    with OpenFiles(stamps) as files:
        files.open_all(spec for out in outputs for tensor, _ in out.plan.slots for spec, _ in tensor.terms)
        job = _Job(outputs, files, piece, allow_nonfinite)
        in_threads(
            lambda: _work(job),
            threads,
            job.stop,
            on_tick=None if on_progress is None else lambda: on_progress(job.moved),
        )
        files.check_unchanged()
    for out in outputs:
        crcs = {tensor: job.checksum(tensor) for tensor, _ in out.plan.slots} if out.plan.needs_crc else {}
        for offset, data in out.plan.patches(crcs):
            write_at(out.fd, memoryview(data), offset, out.plan.name)


def in_threads(
    work: Callable[[], None], threads: int | None, stop: threading.Event, *, on_tick: Callable[[], None] | None = None
) -> None:
    """Run a function in several threads at once, where torch has no threads of its own, until all have returned.

    Args:
        work: called in each; sets `stop` where it fails.
        threads: how many; `default_threads` if None.
        stop: set at the end, and when the caller is interrupted.
        on_tick: called in this thread, a few times a second.
    """
    threads = default_threads() if threads is None else threads
    intra_op = torch.get_num_threads()
    torch.set_num_threads(1)  # our own threads are the parallelism
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="ckpt") as pool:
            pending = {pool.submit(work) for _ in range(threads)}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.1)
                    if on_tick is not None:
                        on_tick()
                    for future in done:
                        future.result()
            finally:
                stop.set()
    finally:
        torch.set_num_threads(intra_op)


def write_at(fd: int, data: memoryview, offset: int, name: str) -> None:
    """Write all of some bytes at an offset.

    Raises:
        WriteError: disk full, or another failure of the system.
    """
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            raise WriteError(
                f"{name}: writing failed: {error.strerror}. Nothing was left at the target. "
                "Free some space or choose another place with -o."
            ) from error


class _Recipe:
    """What the pieces of one tensor have in common.

    Attributes:
        terms: (where to read, coefficient, its real dtype), in the order of summation.
        reals: floating-point numbers an element: 2 for complex.
        real: their dtype in the output.
        checked: NaN and infinity in it are refused.
        common: the coefficient, where all are equal: the sum is then multiplied once, instead of every term.
        limit: magnitude from which on a sum overflows that dtype.
        anchored: sum up differences from the first term. The products of float64 values are rounded, so
            that N equal values would sum up to a neighbour; x_1 + sum c_i (x_i - x_1) is the same average,
            and exact when all are equal. Narrower dtypes have bits to spare and need no such care.
    """

    __slots__ = ("anchored", "checked", "common", "limit", "real", "reals", "terms")

    def __init__(self, tensor: OutTensor, files: OpenFiles) -> None:
        self.checked = tensor.finite and tensor.dtype.averaged
        # What is only copied is never computed with, so torch need not know its dtype.
        known = tensor.data is None and (self.checked or not tensor.copied)
        self.terms = [
            (Source(spec, files), c, torch_dtype(real_dtype(spec.dtype)) if known else torch.uint8)
            for spec, c in tensor.terms
        ]
        self.reals = 2 if tensor.dtype.kind is Kind.COMPLEX else 1
        self.real = torch_dtype(real_dtype(tensor.dtype)) if known else torch.uint8
        self.limit = _overflow(self.real) if known else math.inf
        wide = any(dtype is torch.float64 for _, _, dtype in self.terms)
        # float64 has no room for a sum larger than its average.
        coefficients = {c for _, c in tensor.terms}
        self.common = coefficients.pop() if not wide and len(coefficients) == 1 else None
        self.anchored = wide and abs(math.fsum(c for _, c in tensor.terms) - 1.0) <= 1e-12


@dataclass(frozen=True, slots=True)
class _Piece:
    out: OutFile
    tensor: OutTensor
    recipe: _Recipe
    offset: int  # of the tensor in the output file
    start: int  # elements
    stop: int


@dataclass(slots=True)
class _Job:
    """What the workers share."""

    outputs: Sequence[OutFile]
    files: OpenFiles
    piece: int
    allow_nonfinite: bool
    moved: int = 0  # bytes read and written
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _pieces: Iterator[_Piece] = field(init=False)
    _crcs: dict[OutTensor, dict[int, tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pieces = self._cut()

    def _cut(self) -> Iterator[_Piece]:
        for out in self.outputs:
            for tensor, offset in out.plan.slots:
                recipe = _Recipe(tensor, self.files)
                for start in range(0, tensor.numel, self.piece):
                    yield _Piece(out, tensor, recipe, offset, start, min(start + self.piece, tensor.numel))

    def next(self) -> _Piece | None:
        """Hand out the next piece; None when there is none, or when the job is stopped."""
        with self.lock:
            return None if self.stop.is_set() else next(self._pieces, None)

    def done(self, piece: _Piece, read: int, written: int, crc: int | None) -> None:
        with self.lock:
            self.moved += read + written
            if crc is not None:
                self._crcs.setdefault(piece.tensor, {})[piece.start] = (crc, written)

    def checksum(self, tensor: OutTensor) -> int:
        total = 0
        for _, (crc, length) in sorted(self._crcs.get(tensor, {}).items()):
            total = combine(total, crc, length)
        return total


def _work(job: _Job) -> None:
    try:
        worker = _Worker(job.piece, allow_nonfinite=job.allow_nonfinite)
        while (piece := job.next()) is not None:
            read, data = worker.compute(piece)
            crc = zlib.crc32(data) if piece.out.plan.needs_crc else None
            write_at(piece.out.fd, data, piece.offset + piece.start * piece.tensor.dtype.itemsize, piece.out.plan.name)
            job.done(piece, read, len(data), crc)
    except BaseException:
        job.stop.set()
        raise


class _Worker:
    """One thread's buffers, and the arithmetic on them."""

    def __init__(self, piece: int, *, allow_nonfinite: bool) -> None:
        # A complex element is two reals, hence twice the length.
        self._reader = Reader(16 * piece)
        self._sum = Buffer(16 * piece)
        self._term = Buffer(16 * piece)
        self._single = Buffer(8 * piece)
        self._first: Buffer | None = None
        self._allow_nonfinite = allow_nonfinite

    def compute(self, piece: _Piece) -> tuple[int, memoryview]:
        """Return (bytes read, bytes to write) for a piece; the next call overwrites the latter."""
        if piece.tensor.data is not None:
            item = piece.tensor.dtype.itemsize
            return 0, memoryview(piece.tensor.data)[piece.start * item : piece.stop * item]
        if piece.tensor.copied:
            nbytes = self._reader.read(piece.recipe.terms[0][0], piece.start, piece.stop)
            if piece.recipe.checked and not self._allow_nonfinite:
                values = self._reader.buffer.view(piece.recipe.real, (piece.stop - piece.start) * piece.recipe.reals)
                self._check(piece, values if values.dtype in _FULL_RANGE else self._as_single(values))
            return nbytes, self._reader.buffer.bytes[:nbytes]
        total, read = self._add_up(piece)
        narrow = self._narrow(total, piece.recipe.real)
        if not self._allow_nonfinite:
            self._check(piece, narrow if narrow.dtype in _FULL_RANGE else total)
        return read, self._term.bytes[: narrow.numel() * narrow.element_size()]

    def _add_up(self, piece: _Piece) -> tuple[torch.Tensor, int]:
        count = (piece.stop - piece.start) * piece.recipe.reals
        total = self._sum.view(torch.float64, count)
        if piece.recipe.anchored:
            return total, self._add_up_differences(piece, total)
        return total, self._add_up_products(piece, total)

    def _add_up_products(self, piece: _Piece, total: torch.Tensor) -> int:
        recipe, start, stop = piece.recipe, piece.start, piece.stop
        term = self._term.view(torch.float64, total.numel())
        read = 0
        target = total
        for source, coefficient, dtype in recipe.terms:
            read += self._reader.read(source, start, stop)
            self._widen(dtype, target)
            if recipe.common is None:
                target.mul_(coefficient)
            if target is term:
                total.add_(term)
            target = term
        if recipe.common is not None:
            total.mul_(recipe.common)
        return read

    def _add_up_differences(self, piece: _Piece, total: torch.Tensor) -> int:
        self._first = self._first or Buffer(len(self._sum.bytes))
        term = self._term.view(torch.float64, total.numel())
        first = self._first.view(torch.float64, total.numel())
        read = 0
        total.zero_()
        target = first
        for source, coefficient, dtype in piece.recipe.terms:
            read += self._reader.read(source, piece.start, piece.stop)
            self._widen(dtype, target)
            if target is term:
                total.add_(term.sub_(first).mul_(coefficient))
            target = term
        # Where nothing differs the first value itself, for a sum would lose the sign of a zero.
        torch.where(total == 0, first, first + total, out=total)
        finite = torch.isfinite(total)
        if not finite.all():
            # The difference of two infinities is none, and that of two large numbers may overflow.
            self._add_up_products(piece, first)
            torch.where(finite, total, first, out=total)
        return read

    def _widen(self, dtype: torch.dtype, target: torch.Tensor) -> None:
        """Bring what the reader holds into a float64 tensor; exact for every dtype."""
        source = self._reader.buffer.view(dtype, target.numel())
        target.copy_(source if dtype in _DIRECT else self._as_single(source))

    def _as_single(self, values: torch.Tensor) -> torch.Tensor:
        return self._single.view(torch.float32, values.numel()).copy_(values)

    def _narrow(self, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Round float64 once to the output's dtype, to nearest, ties to even; into the term buffer."""
        out = self._term.view(dtype, total.numel())
        if dtype in (torch.float64, torch.float32):
            return out.copy_(total)
        # torch narrows by way of float32, which rounds twice. Rounding to odd at 12 bits first makes the
        # later roundings right (Boldo and Melquiond 2008): cut, and set the last kept bit if anything was lost.
        bits = total.view(torch.int64)
        sticky = torch.bitwise_and(bits, _DISCARDED, out=self._term.view(torch.int64, total.numel()))
        sticky.add_(_DISCARDED).bitwise_or_(bits).bitwise_and_(~_DISCARDED)
        single = self._single.view(torch.float32, total.numel())
        single.copy_(sticky.view(torch.float64))
        return out.copy_(single)

    def _check(self, piece: _Piece, values: torch.Tensor) -> None:
        """Refuse NaN and infinity; the extremes tell both, at the price of one pass over the result."""
        low, high = (value.item() for value in torch.aminmax(values))
        if max(-low, high) < piece.recipe.limit:  # false for a NaN
            return
        tensor, reals = piece.tensor, piece.recipe.reals
        for source, _, dtype in piece.recipe.terms:
            self._reader.read(source, piece.start, piece.stop)
            found = self._reader.buffer.view(dtype, values.numel()).to(torch.float64)
            bad = ~torch.isfinite(found)
            if bad.any():
                at = torch.tensor(piece.start + int(bad.nonzero()[0]) // reals)
                index = [int(i) for i in torch.unravel_index(at, tensor.shape)] if tensor.shape else []
                raise NumericsError(
                    f"{source.spec.storage.path}: '{tensor.name}' holds {_word(found[bad][0].item())} at {index}. "
                    "Leave this file out, or pass --allow-nonfinite if the value belongs there (a mask, say)."
                )
        raise NumericsError(
            f"the average of '{tensor.name}' overflows {tensor.dtype.name}. "
            + (
                "Choose a wider one, such as --dtype float32."
                if tensor.dtype.itemsize < 4
                else "Are these the right files?"
            )
        )


def real_dtype(dtype: DType) -> DType:
    """Return the dtype of the numbers that an element consists of: its own, or that of a complex one's parts."""
    return DTYPES[_REAL.get(dtype.name, dtype.name)]


def _overflow(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that rounds beyond the largest value of a dtype: half a step above it."""
    info = torch.finfo(dtype)
    return info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
