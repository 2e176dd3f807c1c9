"""Streams: work that a device does in order, beside other work; and a CPU that stands in for a device."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Wait in this thread until the device is there; at once if it was never recorded."""


class Stream(Protocol):
    """Work that a device does in the order in which it is handed over."""

    def record_event(self, event: Any) -> object:
        """Let an event stand for all work handed over so far."""

    def wait_event(self, event: Any) -> object:
        """Let all later work wait for an event."""

    def synchronize(self) -> None:
        """Wait in this thread until all is done."""


class Device(Protocol):
    """What a pipeline needs of a device."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """Take memory on the device.

        Raises:
            torch.cuda.OutOfMemoryError: there is not so much.
        """

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Take memory of the host that the device can copy from and to by itself."""

    def stream(self) -> Stream:
        """Make a stream."""

    def event(self) -> Event:
        """Make an event."""

    def using(self, stream: Stream) -> AbstractContextManager[object]:
        """Hand the work of a block over to a stream."""

    def release(self) -> None:
        """Give back memory that nothing holds any more."""


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
            except RuntimeError:  # the system lets no more be pinned; copies from common memory are slower, not wrong
                return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def event(self) -> Event:
        # Who waits for it sleeps, and the other threads read meanwhile.
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def using(self, stream: Any) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def release(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


class Cpu:
    """The CPU in place of a GPU: everything is done at once, and nothing is to be waited for."""

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
    """A stream or an event of what is done already."""

    def record_event(self, event: Event) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def synchronize(self) -> None:
        pass


def opened(name: str) -> Device:
    """Return the device of a name: `cpu`, or `cuda:0`."""
    return Cpu() if name == "cpu" else Cuda(name)


def bytes_of(memory: torch.Tensor) -> memoryview:
    """Return host memory as bytes, to read into and to write from; valid as long as the tensor is."""
    return memoryview((ctypes.c_ubyte * memory.nbytes).from_address(memory.data_ptr()))
