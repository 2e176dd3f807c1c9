"""Lanes: weighted sums on a device, with reading, copying, adding and writing under way at once.

A thread owns a lane. It reads term after term into a ring of pinned buffers; a stream copies each to the device, a
second one adds it up there, a third brings results back, and the thread writes a result while the next is computed.
All memory is taken at the start. The steps of a sum are those of `summing.Arithmetic`, so that the bytes are the CPU's.
What is not finite is left to the CPU, which says where it is, or lets it pass: NaNs differ from device to device.
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
from ...formats.file_plan import OutTensor, SumKind
from ...storage.source import OpenFiles, read_at
from ...storage.staged import write_at
from .. import native
from ..batches import Batch, Part
from ..torch_sums import Arithmetic, Formula, real_dtype
from .streams import Device, Event, bytes_of

RING = 3
"""Terms under way to the device at once: one is read, one is copied, one is added."""
RESULTS = 2
"""Results: one is computed, one is written."""
MOST = 4 << 20
"""Reals of a load, at most: 16 MB of float32 keep a bus busy; more would only take longer to begin and to end."""
LEAST = 4096
"""Reals of a load, at least: with fewer, a device only costs time."""
_ALIGNED = 256


@dataclass(frozen=True, slots=True)
class Size:
    """What a lane holds.

    Attributes:
        reals: of a load: floating-point numbers that are summed in one go; a power of two.
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
    def half(self) -> Size:
        return Size(self.reals // 2, self.read, self.written)


def fits(kind: SumKind | None) -> bool:
    """True if a lane can sum a batch of this kind."""
    return kind is not None and not kind.copied and kind.out.averaged and all(d.averaged for d in kind.dtypes)


def sized(tensors: Iterable[OutTensor], lanes: int, memory: int) -> Size | None:
    """Choose what each of some lanes on one device holds; None if they have nothing to do.

    Args:
        tensors: of the job.
        lanes: on one device.
        memory: bytes on that device, for all of them.

    Raises:
        UsageError: too little memory.
    """
    kinds = [kind for kind in dict.fromkeys(tensor.kind for tensor in tensors) if kind is not None and fits(kind)]
    if not kinds:
        return None
    read = max(real_dtype(dtype).itemsize for kind in kinds for dtype in kind.dtypes)
    size = Size(MOST, read, max(real_dtype(kind.out).itemsize for kind in kinds))
    while size.reals >= LEAST:
        if size.on_device * lanes <= memory:
            return size
        size = size.half
    least = Size(LEAST, size.read, size.written).on_device * lanes
    raise UsageError(
        f"`gpu_memory={memory}`: {lanes} thread{'s need' if lanes > 1 else ' needs'} at least "
        f"{-(-least // 10**6)}MB on a GPU. "
        "Give more, or fewer `threads`."
    )


class Lane:
    """What one thread holds on one device; a context manager.

    Args:
        device: does the sums.
        size: the memory to take; less, if the device has not so much.
        files: the inputs, open.
        done: called with each part written, and its CRC-32 (0 if its file needs none).
        stop: when set, the lane does no more.
    """

    def __init__(
        self, device: Device, size: Size, files: OpenFiles, done: Callable[[Part, int], None], stop: threading.Event
    ) -> None:
        self._device, self._files, self._done, self._stop = device, files, done, stop
        self._in, self._sum, self._out = device.stream(), device.stream(), device.stream()
        self._size: Size = size
        self._memory: _Memory | None = None
        self._under_way: deque[tuple[Batch, float, _Result]] = deque()  # loads handed to the device, with their limits

    def __enter__(self) -> Lane:
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def fill(self, batch: Batch) -> list[Batch]:
        """Sum a batch; the last of its results is written in the next call.

        Returns:
            What is left to the CPU, of this batch or an earlier one.

        Raises:
            ReadError: an input cannot be read, or ends early.
            WriteError: the output cannot be written.
        """
        left: list[Batch] = []
        waiting = deque([batch])
        while waiting and not self._stop.is_set():
            batch = waiting.popleft()
            kind = batch.kind
            if self._memory is None or kind is None or not fits(kind):
                left.append(batch)
                continue
            formula = Formula.of(kind.dtypes, kind.coefficients, kind.out)
            load, rest = take(batch.parts, self._size.reals // formula.reals)
            if rest:
                waiting.appendleft(Batch(kind, rest))
            try:
                self._hand_over(self._memory, Batch(kind, load), formula)
            except torch.cuda.OutOfMemoryError:
                again = [Batch(kind, load)]
            else:
                while len(self._under_way) >= RESULTS:
                    left += self._write()
                continue
            # Outside of the handler, for the exception holds on to the memory that is to be given back.
            again = [*(each for each, _, _ in self._under_way), *again]
            self._give_back()
            self._size = self._size.half
            self._take()
            waiting.extendleft(reversed(again))
        return left

    def finish(self) -> list[Batch]:
        """Write what is still under way, and return what is left to the CPU."""
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

    def _hand_over(self, memory: _Memory, batch: Batch, formula: Formula) -> None:
        count = sum(part.stop - part.start for part in batch.parts) * formula.reals
        memory.arithmetic.begin(formula, count)
        for term, (dtype, _) in enumerate(formula.terms):
            if self._stop.is_set():
                return
            slot = next(memory.ring)
            nbytes = count * dtype.itemsize
            slot.copied.synchronize()
            self._read(batch.parts, term, slot.bytes)
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
        self._under_way.append((batch, formula.limit, result))

    def _read(self, parts: Sequence[Part], term: int, target: memoryview) -> None:
        """Bring a term of some parts into a buffer, one part behind the other."""
        at = 0
        for part in parts:
            spec, _ = part.tensor.terms[term]
            path, item = spec.storage.path, spec.dtype.itemsize
            end = at + (part.stop - part.start) * item
            read_at(self._files[path], target[at:end], spec.begin + part.start * item, path)
            at = end

    def _write(self) -> list[Batch]:
        """Write the oldest result; one that is not finite is left to the CPU."""
        batch, limit, result = self._under_way.popleft()
        result.fetched.synchronize()
        low, high = result.extremes_host.tolist()
        if not max(-low, high) < limit:  # true for a NaN
            return [batch]
        at = 0
        for part in batch.parts:
            data = result.bytes[at : at + part.nbytes]
            at += part.nbytes
            crc = native.crc32(data) if part.out.plan.needs_checksums else 0
            write_at(part.out.fd, data, part.position, part.out.plan.name)
            self._done(part, crc)
        return []


def take(parts: Sequence[Part], elements: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Divide parts into those of so many elements together, at most, and the rest; the last one may be cut."""
    room = elements
    for i, part in enumerate(parts):
        if part.stop - part.start > room:
            middle = part.start + room
            head = (part._replace(stop=middle),) if room else ()
            return (*parts[:i], *head), (part._replace(start=middle), *parts[i + 1 :])
        room -= part.stop - part.start
    return tuple(parts), ()


class _Memory:
    """All that a lane takes: one block on the device, for allocators round up, and buffers of the host."""

    def __init__(self, device: Device, size: Size) -> None:
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
    """Memory of a device, of which slices are cut."""

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
    """A term on its way to the device.

    Attributes:
        host, bytes: where it is read to; free once `copied`.
        staged: where it is on the device; free once `added`.
    """

    def __init__(self, device: Device, staged: torch.Tensor) -> None:
        self.staged = staged
        self.host = device.pinned(staged.nbytes)
        self.bytes = bytes_of(self.host)
        self.copied: Event = device.event()
        self.added: Event = device.event()


class _Result:
    """A result on its way back.

    Attributes:
        staged, extremes: on the device, once `summed`.
        host, bytes, extremes_host: once `fetched`.
    """

    def __init__(self, device: Device, staged: torch.Tensor, extremes: torch.Tensor) -> None:
        self.staged, self.extremes = staged, extremes
        self.host, self.extremes_host = device.pinned(staged.nbytes), device.pinned(16).view(torch.float64)
        self.bytes = bytes_of(self.host)
        self.summed: Event = device.event()
        self.fetched: Event = device.event()
