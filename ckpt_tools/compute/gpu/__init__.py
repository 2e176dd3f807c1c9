"""GPU: weighted sums on GPUs, behind one seam: `Accelerator`.

The engine asks it who fills work units, and knows nothing else of this package. Without a GPU the answer is nobody, and
neither torch nor the staging pipeline is imported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import TYPE_CHECKING, Protocol

from ...formats.file_plan import OutTensor
from ...storage.source import OpenFiles
from ..threads import default_threads
from ..work_units import Slice, WorkUnit

if TYPE_CHECKING:
    from .pipeline import ChunkSize


class Filler(Protocol):
    """What one thread uses to fill work units on a GPU."""

    def fill(self, unit: WorkUnit) -> Sequence[WorkUnit]:
        """Fill a unit, perhaps later; return those left to the CPU."""

    def finish(self) -> Sequence[WorkUnit]:
        """Fill all that is under way; return those left to the CPU."""


class _Nobody:
    """Leaves everything to the CPU."""

    def fill(self, unit: WorkUnit) -> Sequence[WorkUnit]:
        return (unit,)

    def finish(self) -> Sequence[WorkUnit]:
        return ()


class Accelerator:
    """The GPUs that help with a job, perhaps none.

    Args:
        tensors: of the job.
        threads: workers; as many as there are cores if None.
        devices: names of the GPUs, as `devices.choose` returns them.
        memory: bytes to take on each GPU.

    Attributes:
        threads: workers; at least one for each GPU.
        host_memory: bytes of the host that each of them takes in addition.
        elements: of a slice; None to leave this to the CPU.

    Raises:
        UsageError: too little memory.
    """

    def __init__(self, tensors: Iterable[OutTensor], threads: int | None, devices: Sequence[str], memory: int) -> None:
        self.threads = max(default_threads() if threads is None else threads, len(devices))
        self._chunk: ChunkSize | None = None
        if devices:
            from .pipeline import choose_chunk  # imports torch

            self._chunk = choose_chunk(tensors, -(-self.threads // len(devices)), memory)
        self.host_memory = 0 if self._chunk is None else self._chunk.on_host
        self.elements = None if self._chunk is None else self._chunk.reals
        self._turn = cycle(devices)
        self._lock = threading.Lock()

    def filler(
        self,
        files: OpenFiles,
        done: Callable[[Slice, Sequence[int]], None],
        stop: threading.Event,
        use_torch: Callable[[], None],
    ) -> AbstractContextManager[Filler]:
        """Open what one thread uses: one GPU after the other.

        Args:
            files: the inputs, open.
            done: called with each slice written, and the CRC-32 of its row (0 if no file needs it).
            stop: when set, nothing more is done.
            use_torch: called before torch computes.
        """
        if self._chunk is None:
            return nullcontext(_Nobody())
        from .pipeline import StagingPipeline
        from .streams import Gpu

        use_torch()
        with self._lock:
            name = next(self._turn)
        return StagingPipeline(Gpu(name), self._chunk, files, done, stop)
