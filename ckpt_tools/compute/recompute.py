"""Recomputing: tensors in a file compared with the weighted sums that they should be, slice by slice.

By torch in every case: the engine gives the same bytes, whichever way it takes. A sample takes some of the slices, and
reads no others.
"""

from __future__ import annotations

import random
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

import torch

from ..formats.file_plan import OutTensor
from ..storage.source import OpenFiles, Stamp
from ..tensors import TensorSpec
from .payload import Reader, TensorSource
from .threads import HandedOut, in_threads
from .torch_sums import Recipe, Worker, one_thread_each
from .work_units import SLICE, Slice

SAMPLED = 16 * 1024
"""Elements of a slice of a sample."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a tensor in a file agrees with what it should be.

    Attributes:
        compared: number of elements that were compared.
        differing: number of them whose bytes differ.
        first: number of the first of these in C order; None if there is none.
    """

    compared: int = 0
    differing: int = 0
    first: int | None = None

    def joined(self, other: Agreement) -> Agreement:
        """Return the agreement over the elements of both."""
        found = [each for each in (self.first, other.first) if each is not None]
        return Agreement(
            self.compared + other.compared, self.differing + other.differing, min(found) if found else None
        )


def agreements(
    pairs: Sequence[tuple[OutTensor, TensorSpec]],
    *,
    share: float = 1.0,
    seed: int = 0,
    stamps: Iterable[Stamp] = (),
    threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Agreement]:
    """Compute tensors, and compare them with those in a file bit for bit.

    Args:
        pairs: (what it should be, where it is), of one dtype and shape.
        share: of the slices to compare, more than 0 and at most 1; each slice is equally likely to be among them.
        seed: of the choice.
        stamps: of the files, taken when their headers were read.
        threads: workers; as many as there are cores by default.
        on_progress: called in this thread, a few times a second, with (bytes compared, bytes to compare).

    Returns:
        One for each pair, in order.

    Raises:
        ReadError: a file cannot be read, ends early, or changes meanwhile.
    """
    found = [Agreement() for _ in pairs]
    slices = [*_chosen([wanted.numel for wanted, _ in pairs], share, seed)]
    items = [wanted.dtype.itemsize for wanted, _ in pairs]
    total = sum((stop - start) * items[i] for i, start, stop in slices)
    lock, stop_all = threading.Lock(), threading.Event()
    waiting = HandedOut(slices, stop_all)
    with OpenFiles(stamps) as files, one_thread_each():
        files.open_all(path for wanted, _ in pairs for _, places in wanted.terms.inputs for path, _ in places)
        files.open_all(path for _, spec in pairs for path in spec.paths)

        def work() -> None:
            worker, reader = Worker(SLICE, allow_nonfinite=True), Reader(16 * SLICE)
            recipe: tuple[int, Recipe, TensorSource] | None = None
            for i, start, stop in waiting:
                wanted, spec = pairs[i]
                if recipe is None or recipe[0] != i:
                    recipe = i, Recipe(wanted, files), TensorSource(spec, files)
                nbytes = reader.read(recipe[2], start, stop)
                if wanted.data is None:
                    ((_, data),) = worker.compute(Slice(wanted, (), start, stop), recipe[1])
                else:
                    item = wanted.dtype.itemsize
                    data = memoryview(bytearray(wanted.data[start * item : stop * item]))
                agreement = _agreement(data, reader.buffer.bytes[:nbytes], start, stop - start)
                with lock:
                    found[i] = found[i].joined(agreement)

        def show() -> None:
            if on_progress is not None:
                on_progress(sum(each.compared * item for each, item in zip(found, items, strict=True)), total)

        show()
        in_threads(work, threads, stop_all, on_tick=show)
        files.check_unchanged()
    return found


def _chosen(sizes: Sequence[int], share: float, seed: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number of a tensor, first element, element after the last) of each slice to compare, in order."""
    step = SLICE if share == 1 else SAMPLED
    ends = [*accumulate(-(-size // step) for size in sizes)]
    count = ends[-1] if ends else 0
    numbers: Iterable[int] = range(count)
    if share < 1:
        numbers = sorted(random.Random(seed).sample(range(count), ceil(share * count)))
    for number in numbers:
        i = bisect_right(ends, number)
        start = (number - (ends[i - 1] if i else 0)) * step
        yield i, start, min(start + step, sizes[i])


def _agreement(wanted: memoryview, stored: memoryview, start: int, count: int) -> Agreement:
    a, b = (torch.frombuffer(each, dtype=torch.uint8) for each in (wanted, stored))
    if torch.equal(a, b):
        return Agreement(count)
    differing = (a != b).view(count, -1).any(1)
    return Agreement(count, int(differing.count_nonzero()), start + int(differing.nonzero()[0]))
