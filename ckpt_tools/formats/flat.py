"""Flat tensors: parameters that are ranges of them, and in several files, as seen by rows and columns."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from ..errors import CorruptError
from ..tensors import Chunk, TensorSpec, join, make_spec

Range = tuple[TensorSpec, int, int]
"""Elements of a flat tensor: (its spec, first element, number of elements)."""


class Flat:
    """Flat tensors that are one behind another, as if they were one.

    Attributes:
        numel: elements of all of them.
    """

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self._tensors = tensors
        self._begins = [0, *accumulate(tensor.numel for tensor in tensors)]
        self.numel = self._begins[-1]

    def ranges(self, start: int, stop: int) -> Iterator[Range]:
        """Yield the elements from `start` to `stop`, which are there, tensor by tensor."""
        at = bisect_right(self._begins, start) - 1
        while start < stop:
            end = min(stop, self._begins[at + 1])
            if start < end:
                yield self._tensors[at], start - self._begins[at], end - start
            start, at = end, at + 1


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a range of the elements of a tensor into boxes that are contiguous, at most two a dimension.

    Args:
        shape: of the tensor, none of it 0.
        start, stop: in elements, in C order.

    Yields:
        (index of the first element, shape), in C order.
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield (start,)[: len(shape)], (stop - start,)[: len(shape)]
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows between
    if start < first * row:
        at = first - 1
        inner = boxes(shape[1:], start - at * row, min(first * row, stop) - at * row)
        yield from (((at, *index), (1, *size)) for index, size in inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if first <= last and last * row < stop:
        yield from (((last, *index), (1, *size)) for index, size in boxes(shape[1:], 0, stop - last * row))


def from_ranges(path: Path, name: str, shape: tuple[int, ...], ranges: Iterable[Range]) -> TensorSpec:
    """Build the spec of a tensor from the ranges of flat tensors that hold its elements in C order.

    Args:
        path: the checkpoint, for messages.
        name: of the tensor, for messages.
        shape: of the tensor, not empty.

    Raises:
        CorruptError: they are not as many elements as the shape has, or differ in dtype.
    """
    chunks: list[Chunk] = []
    dtypes = {}
    at = 0
    for flat, first, count in ranges:
        dtypes[flat.dtype.name] = flat.dtype
        begin = flat.start + first
        for index, size in boxes(shape, at, at + count):
            chunks.append((index, make_spec(flat.dtype, size, flat.storage, start=begin)))
            begin += math.prod(size)
        at += count
    if at != math.prod(shape) or len(dtypes) != 1:
        raise CorruptError(
            f"{path}: '{name}' of shape {list(shape)} has {at} elements of dtype {' and '.join(dtypes) or 'none'} in "
            "the partitions. The checkpoint is damaged."
        )
    (dtype,) = dtypes.values()
    return join(path, name, dtype, shape, chunks)
