"""Digests: the SHA-256 of each tensor, and whether its values are finite, for one read of it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..storage.source import OpenFiles, Stamp
from ..tensors import Category, TensorSpec, c_strides
from .payload import Reader, TensorSource, torch_dtype
from .summation import real_dtype
from .threads import HandedOut, in_threads
from .torch_sums import one_thread_each

_BLOCK = 1 << 20
"""Bytes read at a time."""


@dataclass(frozen=True, slots=True)
class Digest:
    """What was found in a tensor.

    Attributes:
        sha256: of its elements in C order, little endian, in hexadecimal digits; empty if it was not asked for.
        nans, infinities: number of elements; a complex one counts where either part is NaN, or infinite.
        first: the index of the first of these; None if there are none.
    """

    sha256: str
    nans: int = 0
    infinities: int = 0
    first: tuple[int, ...] | None = None


def digests(
    specs: Sequence[TensorSpec],
    *,
    hashed: bool,
    stamps: Iterable[Stamp] = (),
    threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Digest]:
    """Read tensors once, and look at every value.

    Args:
        hashed: compute SHA-256, too.
        stamps: of the files, taken when their headers were read.
        threads: workers; as many as there are cores by default.
        on_progress: called in this thread, a few times a second, with the bytes read so far.

    Returns:
        One each, in order.

    Raises:
        ReadError: a file cannot be read, ends early, or changes meanwhile.
    """
    found: list[Digest | None] = [None] * len(specs)
    lock, stop, done = threading.Lock(), threading.Event(), [0]
    # The largest first: a tensor is hashed in one thread.
    waiting = HandedOut(sorted(range(len(specs)), key=lambda i: -specs[i].nbytes), stop)
    with OpenFiles(stamps) as files, one_thread_each():
        files.open_all(path for spec in specs for path in spec.paths)

        def count(nbytes: int) -> None:
            with lock:
                done[0] += nbytes

        def work() -> None:
            reader = Reader(_BLOCK)
            for i in waiting:
                found[i] = _digest(TensorSource(specs[i], files), reader, hashed, stop, count)

        on_tick = None if on_progress is None else lambda: on_progress(done[0])
        in_threads(work, threads, stop, on_tick=on_tick)
        files.check_unchanged()
    return [each for each in found if each is not None]


def _digest(
    source: TensorSource, reader: Reader, hashed: bool, stop: threading.Event, count: Callable[[int], None]
) -> Digest:
    spec, item = source.spec, source.item
    hasher = hashlib.sha256()
    powers = spec.dtype.name == "float8_e8m0fnu"
    floating = powers or spec.dtype.category in (Category.FLOAT, Category.COMPLEX)
    nans = infinities = 0
    first: tuple[int, ...] | None = None
    step = _BLOCK // item
    for start in range(0, spec.numel, step):
        if stop.is_set():
            break
        size = min(step, spec.numel - start)
        count(reader.read(source, start, start + size))
        if hashed:
            hasher.update(reader.buffer.bytes[: size * item])
        if floating:
            reals = 2 if spec.dtype.category is Category.COMPLEX else 1
            if powers:  # one code is NaN, none is infinite; not every torch knows the dtype
                codes = reader.buffer.view(torch.uint8, size)
                values = torch.zeros(size).masked_fill_(codes == 0xFF, torch.nan)
            else:
                values = reader.buffer.view(torch_dtype(real_dtype(spec.dtype)), size * reals)
                values = values.to(torch.float32) if values.itemsize < 4 else values  # torch tests no narrower ones
            if bool(torch.isfinite(values).all()):
                continue
            values = values.view(size, reals)
            nan, infinite = values.isnan().any(1), values.isinf().any(1)
            nans += int(nan.count_nonzero())
            infinities += int((infinite & ~nan).count_nonzero())
            if first is None:
                first = index_of(spec.shape, start + int((nan | infinite).nonzero()[0]))
    return Digest(hasher.hexdigest() if hashed else "", nans, infinities, first)


def index_of(shape: tuple[int, ...], element: int) -> tuple[int, ...]:
    """Return the index of an element that is given by its number in C order."""
    return tuple(element // step % size for size, step in zip(shape, c_strides(shape), strict=True))
