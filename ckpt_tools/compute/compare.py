"""Comparing: how far pairs of tensors are apart, slice by slice, in float64.

Worker threads read a slice of both sides; if the bytes are the same, only its norm is left to compute. Each thread has
two buffers for reading and three for computing, whatever the size of the tensors.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from ..storage.ahead import Need, ReadAhead
from ..storage.source import OpenFiles, Stamp
from ..tensors import Category, DType, TensorSpec
from .fetching import any_remote, needed_of
from .norms import InnerProducts, added, exactly
from .payload import Buffer, Reader, TensorSource, torch_dtype
from .summation import real_dtype
from .threads import HandedOut, in_threads
from .tiles import Tile, in_storage_order, storage_orders, tiles
from .torch_sums import one_thread_each
from .work_units import SLICE

_DIRECT = (torch.float64, torch.float32, torch.bfloat16)  # whose conversion to float64 torch has vectorised
_LARGEST, _TINIEST = sys.float_info.max, math.ulp(0.0)


Portion = range | Tile
"""A slice of a tensor: elements in C order, or a tile."""


@dataclass(frozen=True, slots=True)
class Distance:
    """The distance between two tensors; a complex element counts as two values.

    Attributes:
        values: number of values.
        same_bytes: every byte is the same.
        differing: number of values that differ. NaN equals NaN, and 0 equals -0.
        beyond: number of values that differ by more than the tolerance.
        nonfinite: number of differing values with NaN or infinity on either side; no tolerance covers them.
        max_abs: the largest |a - b| over finite values, capped at the largest float64; None for packed codes, which are
            not numbers.
        max_rel: the largest |a - b| / max(|a|, |b|) over finite values; None for packed codes.
        products: over finite values; None for integers and packed codes, and beyond the range of float64. Those of a
            slice are rounded, so slices of other sizes may give other last digits.
    """

    values: int
    same_bytes: bool = True
    differing: int = 0
    beyond: int = 0
    nonfinite: int = 0
    max_abs: float | None = 0.0
    max_rel: float | None = 0.0
    products: InnerProducts | None = field(default=(0, 0, 0, 0), compare=False)

    def joined(self, other: Distance) -> Distance:
        """Return the distance over the values of both."""
        return Distance(
            self.values + other.values,
            self.same_bytes and other.same_bytes,
            self.differing + other.differing,
            self.beyond + other.beyond,
            self.nonfinite + other.nonfinite,
            _larger(self.max_abs, other.max_abs),
            _larger(self.max_rel, other.max_rel),
            added((self.products, other.products)),
        )


def _larger(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(a, b)


def over_nothing(pairs: Iterable[tuple[TensorSpec, TensorSpec]]) -> list[Distance]:
    """Return the distances of pairs over no values, to be joined with others."""
    return [Distance(0, a.dtype is b.dtype) for a, b in pairs]


def compare(
    pairs: Sequence[tuple[TensorSpec, TensorSpec]],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    stamps: Iterable[Stamp] = (),
    threads: int | None = None,
    slice_size: int = SLICE,
    part: tuple[int, int] = (1, 1),
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Distance]:
    """Compare pairs of tensors of one shape and of comparable dtypes.

    Args:
        rtol, atol: floating-point values may differ by atol + rtol * |b|, as in torch.allclose; integers by nothing.
        stamps: of the files, taken when their headers were read.
        threads: workers; as many as there are cores by default.
        slice_size: elements a worker handles at a time. Changes no result but the last digits of `products`.
        part: (i, n): compare only the i-th of n parts of all slices, from 1 on. The distances of all parts, joined, are
            those of the whole, for they are counts, maxima and exact sums.
        on_progress: called in this thread, a few times a second, with (bytes read so far, bytes of the part).

    Returns:
        A distance a pair, in order.

    Raises:
        ReadError: a file cannot be read, ends early, or changes meanwhile.
    """
    with OpenFiles(stamps) as files, ExitStack() as stack:
        files.open_all(path for pair in pairs for spec in pair for path in spec.paths)
        job = _Job([_Pair(a, b, files) for a, b in pairs], slice_size, rtol, atol, part)
        if any_remote(files):
            ahead = stack.enter_context(_fetched_ahead(job, files))
            job = _Job([_Pair(a, b, files) for a, b in pairs], slice_size, rtol, atol, part, ahead)  # reads from it
        show, total = on_progress, 0 if on_progress is None else job.nbytes
        tick = None if show is None else lambda: show(job.bytes_done, total)
        if tick is not None:
            tick()
        with one_thread_each():
            in_threads(lambda: _work(job), threads, job.stop, on_tick=tick)
        files.check_unchanged()
    return job.found


class _Pair:
    """How to read and compare the slices of one pair of tensors.

    Attributes:
        orders: axis orders to cut tiles for; None to compare elements in C order.
        item: bytes of an element, in both.
        nbytes: of both.
    """

    __slots__ = ("a", "b", "category", "item", "nbytes", "orders", "reals", "same_dtype")

    def __init__(self, a: TensorSpec, b: TensorSpec, files: OpenFiles) -> None:
        if a.stride == b.stride:
            a, b = in_storage_order(a), in_storage_order(b)
        self.orders = storage_orders([a, b])
        self.a, self.b = TensorSource(a, files), TensorSource(b, files)
        self.item = a.dtype.itemsize + b.dtype.itemsize
        self.nbytes = self.item * math.prod(a.shape)
        self.same_dtype = a.dtype is b.dtype
        categories = {a.dtype.category, b.dtype.category}
        unsigned = [dtype for dtype in (a.dtype, b.dtype) if dtype.name == "uint64"]
        # int64 has no room for all of uint64, so that a pair of the two is compared as float64.
        exact = categories == {Category.INTEGER} and len(unsigned) != 1
        self.category = (
            Category.PACKED if Category.PACKED in categories else Category.INTEGER if exact else Category.FLOAT
        )
        self.reals = 2 if Category.COMPLEX in categories else 1


@dataclass(slots=True)
class _Job:
    """What the workers share."""

    pairs: Sequence[_Pair]
    slice_size: int
    rtol: float
    atol: float
    part: tuple[int, int]
    ahead: ReadAhead | None = None
    bytes_done: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    found: list[Distance] = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    slices: HandedOut[tuple[int, tuple[int, Portion]]] = field(init=False)

    def __post_init__(self) -> None:
        self.found = over_nothing([(pair.a.spec, pair.b.spec) for pair in self.pairs])
        self.slices = HandedOut(enumerate(self._cut_part()), self.stop)

    @property
    def nbytes(self) -> int:
        """Bytes of all slices of the part."""
        return sum(self._size(i, portion) for i, portion in self._cut_part())

    def _size(self, pair: int, portion: Portion) -> int:
        return self.pairs[pair].item * (portion.numel if isinstance(portion, Tile) else len(portion))

    def _cut_part(self) -> Iterator[tuple[int, Portion]]:
        """Yield (number of a pair, a slice of it) for those whose middle, in bytes, lies in the part."""
        index, count = self.part
        total, done = sum(pair.nbytes for pair in self.pairs), 0
        begin, end = 2 * total * (index - 1), 2 * total * index  # of twice the middle, times `count`
        for i, pair in enumerate(self.pairs):
            if 2 * (done + pair.nbytes) * count > begin and 2 * done * count < end:
                at = done
                for portion in _cut(pair, self.slice_size):
                    size = self._size(i, portion)
                    if begin <= (2 * at + size) * count < end:
                        yield i, portion
                    at += size
            done += pair.nbytes

    def done(self, pair: int, distance: Distance, read: int) -> None:
        with self._lock:
            self.bytes_done += read
            self.found[pair] = self.found[pair].joined(distance)


def _cut(pair: _Pair, numel: int) -> Iterator[Portion]:
    """Cut a pair into slices of at most so many elements."""
    shape = pair.a.spec.shape
    if pair.orders is not None:
        yield from tiles(shape, pair.orders, numel)
        return
    whole = math.prod(shape)
    yield from (range(start, min(start + numel, whole)) for start in range(0, whole, numel))


def _fetched_ahead(job: _Job, files: OpenFiles) -> ReadAhead:
    """Return what has the slices of a job fetched ahead of it, in their order."""
    slices = [(job.pairs[i], portion) for _, (i, portion) in job.slices]

    def needs(number: int) -> Iterator[Need]:
        pair, portion = slices[number]
        for side in (pair.a, pair.b):
            if isinstance(portion, Tile):
                yield from needed_of(side.spec, 0, 0, portion)
            else:
                yield from needed_of(side.spec, portion.start, portion.stop)

    return ReadAhead(files, needs, len(slices), inputs=2)


def _work(job: _Job) -> None:
    worker = _Worker(job.slice_size, job.rtol, job.atol)
    for number, (i, portion) in job.slices:
        if job.ahead is not None and not job.ahead.wait(number, job.stop):
            return
        job.done(i, *worker.compare(job.pairs[i], portion))
        if job.ahead is not None:
            job.ahead.done(number)


class _Worker:
    """One thread's buffers, and the arithmetic on them."""

    def __init__(self, slice_size: int, rtol: float, atol: float) -> None:
        # A complex element is two reals, hence twice the length.
        self._a, self._b = Reader(16 * slice_size), Reader(16 * slice_size)
        self._wide = [Buffer(16 * slice_size) for _ in range(3)]
        self._rtol, self._atol = rtol, atol

    def compare(self, pair: _Pair, portion: Portion) -> tuple[Distance, int]:
        """Return (the distance over a slice, bytes read)."""
        if isinstance(portion, Tile):
            count = portion.numel
            nbytes, more = self._a.read_tile(pair.a, portion), self._b.read_tile(pair.b, portion)
        else:
            count = len(portion)
            nbytes, more = (
                reader.read(source, portion.start, portion.stop)
                for reader, source in ((self._a, pair.a), (self._b, pair.b))
            )
        read = nbytes + more
        if pair.same_dtype and self._same_bytes(nbytes):
            return Distance(count * pair.reals, products=self._same_products(pair, count * pair.reals)), read
        if pair.category is Category.PACKED:
            return self._codes(nbytes, pair.a.item), read
        if pair.category is Category.INTEGER:
            return self._integers(pair, count), read
        return self._floats(pair, count * pair.reals), read

    def _same_bytes(self, nbytes: int) -> bool:
        # By torch, which lets go of the interpreter and takes eight bytes at a time; memoryviews do neither.
        words = nbytes // 8
        a, b = (reader.buffer for reader in (self._a, self._b))
        rest = slice(words * 8, nbytes)
        return bytes(a.bytes[rest]) == bytes(b.bytes[rest]) and torch.equal(
            a.view(torch.int64, words), b.view(torch.int64, words)
        )

    def _codes(self, nbytes: int, item: int) -> Distance:
        a, b = (reader.buffer.view(torch.uint8, nbytes).view(-1, item) for reader in (self._a, self._b))
        differing = int((a != b).any(1).count_nonzero())
        return Distance(len(a), False, differing, differing, 0, None, None, None)

    def _integers(self, pair: _Pair, count: int) -> Distance:
        a, b, gap = (buffer.view(torch.int64, count) for buffer in self._wide)
        unsigned = _whole(self._a, pair.a.spec.dtype, a)
        _whole(self._b, pair.b.spec.dtype, b)
        # Differences wrap around where they do not fit, and are right as unsigned numbers.
        torch.sub(a, b, out=gap)
        torch.where(a > b, gap, -gap, out=gap)
        differing = int(gap.count_nonzero())
        apart = gap.double() + (gap < 0) * 2.0**64
        largest = torch.maximum(*(((v.double() + 2.0**63) if unsigned else v.double()).abs_() for v in (a, b)))
        relative = apart / largest.clamp_(min=1)
        return Distance(count, False, differing, differing, 0, apart.max().item(), relative.max().item(), None)

    def _same_products(self, pair: _Pair, count: int) -> InnerProducts | None:
        """Return the inner products of a slice whose bytes are the same in both."""
        if pair.category is not Category.FLOAT:
            return None
        values = self._widened(self._a, pair.a, self._wide[0], count)
        found = values.dot(values).item()
        if not math.isfinite(found):
            values.nan_to_num_(0.0, 0.0, 0.0)
            found = values.dot(values).item()
        return exactly(0.0, found, found, found)

    def _widened(self, reader: Reader, source: TensorSource, wide: Buffer, count: int) -> torch.Tensor:
        """Return what was read, as float64."""
        values = reader.buffer.view(torch_dtype(real_dtype(source.spec.dtype)), count)
        return wide.view(torch.float64, count).copy_(values if values.dtype in _DIRECT else _as_single(values))

    def _floats(self, pair: _Pair, count: int) -> Distance:
        a, b = (
            self._widened(reader, source, wide, count)
            for reader, source, wide in zip((self._a, self._b), (pair.a, pair.b), self._wide, strict=False)
        )
        gap = self._wide[2].view(torch.float64, count)
        torch.sub(a, b, out=gap).abs_()
        nonfinite = 0
        if not math.isfinite(gap.max().item()):  # a NaN among them is the largest
            usual = a.isfinite() & b.isfinite()
            nonfinite = int((~(usual | (a == b) | (a.isnan() & b.isnan()))).count_nonzero())
            for values in (a, b, gap):
                values.masked_fill_(~usual, 0)
            gap.clamp_(max=_LARGEST)  # of values near the limits of float64, whose difference is beyond them
        return self._measure(a, b, gap, nonfinite)

    def _measure(self, a: torch.Tensor, b: torch.Tensor, gap: torch.Tensor, nonfinite: int) -> Distance:
        """Measure finite values by their differences; overwrites all three."""
        largest = gap.max().item()
        found = exactly(gap.dot(gap).item(), a.dot(a).item(), b.dot(b).item(), a.dot(b).item())
        differing = beyond = int(gap.count_nonzero())
        if differing and found is not None and not found[0]:
            found = None  # the squares of the differences are below the range of float64
        b.abs_()
        if differing and (self._rtol or self._atol):
            beyond = int((gap > (b * self._rtol).add_(self._atol)).count_nonzero())
        scale = torch.maximum(a.abs_(), b, out=a).clamp_(min=_TINIEST)
        return Distance(
            values=gap.numel(),
            same_bytes=False,
            differing=differing + nonfinite,
            beyond=beyond + nonfinite,
            nonfinite=nonfinite,
            max_abs=largest,
            max_rel=gap.div_(scale).max().item(),
            products=found,
        )


def _as_single(values: torch.Tensor) -> torch.Tensor:
    """Widen by way of float32, which holds every narrower float; integers, which it does not hold, stay."""
    return values.to(torch.float32) if values.is_floating_point() else values


def _whole(reader: Reader, dtype: DType, target: torch.Tensor) -> bool:
    """Bring integers into int64, in their order; uint64 moved down by 2^63, which is said by True."""
    if dtype.name == "uint64":
        torch.bitwise_xor(reader.buffer.view(torch.int64, target.numel()), -(2**63), out=target)
        return True
    # A byte that a file says is a bool may hold more than 0 and 1.
    stored = torch.uint8 if dtype.name == "bool" else torch_dtype(dtype)
    target.copy_(reader.buffer.view(stored, target.numel()))
    return False
