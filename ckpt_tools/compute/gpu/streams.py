"""Streams: queues of work on a device, in parallel with each other; and a CPU in place of a device, for tests."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Block this thread until the device has reached the event; return at once if it was never recorded."""


class Stream(Protocol):
    """A queue of work on a device, done in order."""

    def record_event(self, event: Any) -> object:
        """Mark the end of all work queued so far with an event."""

    def wait_event(self, event: Any) -> object:
        """Make all work queued later wait for an event."""

    def synchronize(self) -> None:
        """Block this thread until all work is done."""


class Device(Protocol):
    """What a pipeline needs of a device."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Allocate memory on the device.

        Raises:
            torch.cuda.OutOfMemoryError: not enough memory.
        """

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Allocate host memory that the device can copy from and to by itself."""

    def stream(self) -> Stream:
        """Make a stream."""

    def event(self) -> Event:
        """Make an event."""

    def using(self, stream: Stream) -> AbstractContextManager[object]:
        """Queue the work of a `with` block on a stream."""

    def release(self) -> None:
        """Return unused memory to the device."""


class Cuda:
    """A GPU."""

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        with torch.cuda.device(self._device):
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # no more memory may be pinned; copies from ordinary memory are slower, not wrong
                return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def event(self) -> Event:
        # A thread that waits for it sleeps, and the other threads read meanwhile.
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def using(self, stream: Any) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def release(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


class Cpu:
    """The CPU in place of a GPU: all work is done when it is queued."""

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> Stream:
        return _Done()

    def event(self) -> Event:
        return _Done()

    def using(self, stream: Stream) -> AbstractContextManager[object]:
        return nullcontext()

    def release(self) -> None:
        pass


class _Done:
    """A stream or an event whose work is already done."""

    def record_event(self, event: Event) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass


def opened(name: str) -> Device:
    """Return the device with a name such as `cpu` or `cuda:0`."""
    return Cpu() if name == "cpu" else Cuda(name)


def bytes_of(memory: torch.Tensor) -> memoryview:
    """Return host memory as bytes, to read into and to write from; valid as long as the tensor is."""
    return memoryview((ctypes.c_ubyte * memory.nbytes).from_address(memory.data_ptr()))
