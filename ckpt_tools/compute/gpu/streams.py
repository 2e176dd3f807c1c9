"""Streams: queues of work on a GPU, in parallel with each other."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager

import torch


class Gpu:
    """A GPU by its name, such as `cuda:0`; tests put others in its place."""

    def __init__(self, name: str) -> None:
        self._device = torch.device(name)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Allocate memory on the GPU.

        Raises:
            torch.cuda.OutOfMemoryError: not enough memory.
        """
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Allocate host memory that the GPU can copy from and to by itself."""
        with torch.cuda.device(self._device):
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # no more memory may be pinned; copies from ordinary memory are slower, not wrong
                return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def event(self) -> torch.cuda.Event:
        # A thread that waits for it sleeps, and the other threads read meanwhile.
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def using(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """Queue the work of a `with` block on a stream."""
        return torch.cuda.stream(stream)

    def release(self) -> None:
        """Return unused memory to the GPU."""
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()


def bytes_of(memory: torch.Tensor) -> memoryview:
    """Return host memory as bytes, to read into and to write from; valid as long as the tensor is."""
    return memoryview((ctypes.c_ubyte * memory.nbytes).from_address(memory.data_ptr()))
