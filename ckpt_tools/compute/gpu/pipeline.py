"""Staging pipeline: weighted sums on a device, with reading, copying, adding and writing at the same time.

Each thread has a pipeline of its own. It reads one term after the other, a chunk at a time, into a ring of pinned
buffers. One stream copies each chunk to the device, a second one adds it up there, a third copies results back, and
the thread writes a result while the next is computed. All memory is taken at the start. The steps of a sum are those of
`torch_arithmetic.Arithmetic`, so that the bytes are those of the CPU. Chunks with NaN or infinity, or with an exact sum
that is not decided, are left to the CPU, which names the first one, or lets them pass: NaNs differ from device to
device. A work unit has one row of coefficients, for the engine divides tensors with more.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType

import torch

from ...errors import UsageError
from ...formats.file_plan import GroupKey, OutTensor
from ...storage.source import OpenFiles, read_at
from ...storage.staged import write_at
from .. import native
from ..summation import real_dtype, room
from ..torch_arithmetic import Arithmetic, Formula
from ..work_units import Slice, WorkUnit
from .streams import Gpu, bytes_of

RING = 3
"""Terms on their way to the device: one is read, one is copied, one is added."""
RESULTS = 2
"""Results on their way back: one is computed, one is written."""
MOST = 4 << 20
"""Reals of a chunk, at most: 16 MB of float32 keep a bus busy; more would only take longer to start and to finish."""
LEAST = 4096
"""Reals of a chunk, at least: with fewer, a device only costs time."""
_ALIGNED = 256


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """Size of the chunks of a pipeline, and so of its memory.

    Attributes:
        reals: floating-point numbers in a chunk; a power of two.
        read: bytes of the widest real in an input.
        written: bytes of the widest real in the output.
    """

    reals: int
    read: int
    written: int

    @property
    def on_device(self) -> int:
        """Bytes on the device."""
        slices = 4 + RING + 2 * RESULTS
        return self.reals * (Arithmetic.BYTES + RING * self.read + RESULTS * self.written) + slices * _ALIGNED

    @property
    def on_host(self) -> int:
        """Bytes of pinned memory."""
        return self.reals * (RING * self.read + RESULTS * self.written)

    @property
    def half(self) -> ChunkSize:
        return ChunkSize(self.reals // 2, self.read, self.written)


def fits(key: GroupKey | None) -> bool:
    """Return True if a pipeline can sum work units with this key, of one row."""
    return key is not None and not key.copied and key.out.averaged and all(d.averaged for d in key.dtypes)


def choose_chunk(tensors: Iterable[OutTensor], pipelines: int, memory: int) -> ChunkSize | None:
    """Choose the chunks of the pipelines on one device; None if they have nothing to do.

    Args:
        tensors: of the job.
        pipelines: number of them on one device.
        memory: bytes on that device, for all of them.

    Raises:
        UsageError: too little memory.
    """
    keys = [key for key in dict.fromkeys(tensor.group_key for tensor in tensors) if key is not None and fits(key)]
    if not keys:
        return None
    read = max(real_dtype(dtype).itemsize for key in keys for dtype in key.dtypes)
    size = ChunkSize(MOST, read, max(real_dtype(key.out).itemsize for key in keys))
    while size.reals >= LEAST:
        if size.on_device * pipelines <= memory:
            return size
        size = size.half
    least = ChunkSize(LEAST, size.read, size.written).on_device * pipelines
    raise UsageError(
        f"`gpu_memory={memory}`: {pipelines} thread{'s need' if pipelines > 1 else ' needs'} at least "
        f"{-(-least // 10**6)}MB on a GPU. "
        "Give more, or fewer `threads`."
    )


class StagingPipeline:
    """The memory and streams that one thread has on one device; a context manager.

    Args:
        device: computes the sums.
        size: of a chunk; halved until the device has enough memory.
        files: the inputs, open.
        done: called with each slice written, and the CRC-32 of its row (0 if no file needs it).
        stop: when set, the pipeline does nothing more.
    """

    def __init__(
        self,
        device: Gpu,
        size: ChunkSize,
        files: OpenFiles,
        done: Callable[[Slice, Sequence[int]], None],
        stop: threading.Event,
    ) -> None:
        self._device, self._files, self._done, self._stop = device, files, done, stop
        self._in, self._sum, self._out = device.stream(), device.stream(), device.stream()
        self._size: ChunkSize = size
        self._memory: _Memory | None = None
        self._under_way: deque[tuple[WorkUnit, float, _Result]] = (
            deque()
        )  # chunks handed to the device, with their limits

    def __enter__(self) -> StagingPipeline:
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def fill(self, unit: WorkUnit) -> list[WorkUnit]:
        """Sum a work unit; its last results are written in the next call.

        Returns:
            Work units left to the CPU, from this call or an earlier one.

        Raises:
            ReadError: an input cannot be read, or ends early.
            WriteError: the output cannot be written.
        """
        left: list[WorkUnit] = []
        waiting = deque([unit])
        while waiting and not self._stop.is_set():
            unit = waiting.popleft()
            key = unit.key
            if self._memory is None or key is None or unit.slices[0].tile is not None or not fits(key):
                left.append(unit)
                continue
            formula = Formula.of(key.dtypes, key.rows[0], key.out)
            chunk, rest = take(unit.slices, room(key.dtypes, key.out, self._size.reals) // formula.reals)
            if rest:
                waiting.appendleft(WorkUnit(key, rest))
            handed = WorkUnit(key, chunk)
            try:
                with self._files.using(handed.paths):
                    self._hand_over(self._memory, handed, formula)
            except torch.cuda.OutOfMemoryError:
                again = [handed]
            else:
                while len(self._under_way) >= RESULTS:
                    left += self._write()
                continue
            # Not in the handler: the exception holds on to the memory that is to be given back.
            again = [*(each for each, _, _ in self._under_way), *again]
            self._give_back()
            self._size = self._size.half
            self._take()
            waiting.extendleft(reversed(again))
        return left

    def finish(self) -> list[WorkUnit]:
        """Write all results still under way, and return the work units left to the CPU."""
        left = []
        while self._under_way and not self._stop.is_set():
            left += self._write()
        return left

    def _take(self) -> None:
        while self._size.reals >= LEAST:
            try:
                with self._device.using(self._sum):
                    self._memory = _Memory(self._device, self._size)
                return
            except torch.cuda.OutOfMemoryError:
                self._device.release()
                self._size = self._size.half

    def _give_back(self) -> None:
        for stream in (self._in, self._sum, self._out):
            stream.synchronize()
        self._under_way.clear()
        self._memory = None
        self._device.release()

    def _hand_over(self, memory: _Memory, unit: WorkUnit, formula: Formula) -> None:
        count = sum(slice_.stop - slice_.start for slice_ in unit.slices) * formula.reals
        memory.arithmetic.begin(formula, count)
        for term, (dtype, _) in enumerate(formula.terms):
            if self._stop.is_set():
                return
            slot = next(memory.ring)
            nbytes = count * dtype.itemsize
            slot.copied.synchronize()
            self._read(unit.slices, term, slot.bytes)
            with self._device.using(self._in):
                self._in.wait_event(slot.added)
                slot.staged[:nbytes].copy_(slot.host[:nbytes], non_blocking=True)
                self._in.record_event(slot.copied)
            with self._device.using(self._sum):
                self._sum.wait_event(slot.copied)
                memory.arithmetic.add(slot.staged[:nbytes].view(dtype))
                self._sum.record_event(slot.added)
        result = next(memory.results)
        nbytes = count * formula.real.itemsize
        with self._device.using(self._sum):
            rounded = result.staged[:nbytes].view(formula.real)
            telling = memory.arithmetic.round(memory.arithmetic.total(), rounded)
            for at, extreme in enumerate(torch.aminmax(telling)):
                result.extremes[at].copy_(extreme)
            self._sum.record_event(result.summed)
        with self._device.using(self._out):
            self._out.wait_event(result.summed)
            result.host[:nbytes].copy_(result.staged[:nbytes], non_blocking=True)
            result.extremes_host.copy_(result.extremes, non_blocking=True)
            self._out.record_event(result.fetched)
        self._under_way.append((unit, formula.limit, result))

    def _read(self, slices: Sequence[Slice], term: int, target: memoryview) -> None:
        """Read a term of some slices into a buffer, one behind the other."""
        at = 0
        for slice_ in slices:
            spec = slice_.tensor.terms[term]
            path, item = spec.storage.path, spec.dtype.itemsize
            end = at + (slice_.stop - slice_.start) * item
            read_at(self._files[path], target[at:end], spec.begin + slice_.start * item, path)
            at = end

    def _write(self) -> list[WorkUnit]:
        """Write the oldest result; one with NaN or infinity is left to the CPU."""
        unit, limit, result = self._under_way.popleft()
        result.fetched.synchronize()
        low, high = result.extremes_host.tolist()
        if not max(-low, high) < limit:  # true for a NaN
            return [unit]
        at = 0
        for slice_ in unit.slices:
            data = result.bytes[at : at + slice_.nbytes]
            at += slice_.nbytes
            crc = native.crc32(data) if slice_.needs_checksums else 0
            for target in slice_.targets:
                write_at(target.out.fd, data, target.offset + slice_.begin, target.out.plan.name)
            self._done(slice_, (crc,))
        return []


def take(slices: Sequence[Slice], elements: int) -> tuple[tuple[Slice, ...], tuple[Slice, ...]]:
    """Divide slices into those with at most so many elements together, and the rest; the last one may be cut."""
    room = elements
    for i, slice_ in enumerate(slices):
        if slice_.stop - slice_.start > room:
            middle = slice_.start + room
            head = (slice_._replace(stop=middle),) if room else ()
            return (*slices[:i], *head), (slice_._replace(start=middle), *slices[i + 1 :])
        room -= slice_.stop - slice_.start
    return tuple(slices), ()


class _Memory:
    """All memory of a pipeline: one block on the device, because allocators round up, and buffers of the host."""

    def __init__(self, device: Gpu, size: ChunkSize) -> None:
        block = _Block(device.empty(size.on_device))
        self.arithmetic = Arithmetic(block.cut, size.reals)
        slots = [_Slot(device, block.cut(size.reals * size.read).memory) for _ in range(RING)]
        results = [
            _Result(device, block.cut(size.reals * size.written).memory, block.cut(16).view(torch.float64, 2))
            for _ in range(RESULTS)
        ]
        self.ring: Iterator[_Slot] = cycle(slots)
        self.results: Iterator[_Result] = cycle(results)


class _Block:
    """A block of device memory that is handed out part by part."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._used = 0

    def cut(self, nbytes: int) -> _Block:
        start = self._used
        self._used += -(-nbytes // _ALIGNED) * _ALIGNED
        return _Block(self.memory[start : start + nbytes])

    def view(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        return self.memory[: count * dtype.itemsize].view(dtype)


class _Slot:
    """A buffer of the ring: a term on its way to the device.

    Attributes:
        host, bytes: where it is read to; free once `copied`.
        staged: where it is on the device; free once `added`.
    """

    def __init__(self, device: Gpu, staged: torch.Tensor) -> None:
        self.staged = staged
        self.host = device.pinned(staged.nbytes)
        self.bytes = bytes_of(self.host)
        self.copied = device.event()
        self.added = device.event()


class _Result:
    """A result on its way back.

    Attributes:
        staged, extremes: on the device, once `summed`.
        host, bytes, extremes_host: once `fetched`.
    """

    def __init__(self, device: Gpu, staged: torch.Tensor, extremes: torch.Tensor) -> None:
        self.staged, self.extremes = staged, extremes
        self.host, self.extremes_host = device.pinned(staged.nbytes), device.pinned(16).view(torch.float64)
        self.bytes = bytes_of(self.host)
        self.summed = device.event()
        self.fetched = device.event()
