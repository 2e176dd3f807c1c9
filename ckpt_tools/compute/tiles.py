"""Tiles: boxes of tensors whose elements stand in another order in an input than in the output.

Transposed and channels-last tensors are such. Element by element, or row by row of the output, they would be read in
calls of some bytes each. A tile is a box that has long rows of adjacent elements in every input and in the output, too:
it is read in the order of the input, permuted in a core's cache, and written in the order of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ..tensors import TensorSpec


class Tile(NamedTuple):
    """A box of a tensor.

    Attributes:
        low: index of its first element.
        sizes: elements along each axis.
    """

    low: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def begin(self, strides: Sequence[int]) -> int:
        """Return where the first element stands in a storage with these strides."""
        return sum([at * step for at, step in zip(self.low, strides, strict=True)])

    def last(self, strides: Sequence[int]) -> int:
        """Return where the last element stands in a storage with these strides."""
        return self.begin(strides) + sum([(n - 1) * step for n, step in zip(self.sizes, strides, strict=True)])


Axes = tuple[int, ...]


def storage_order(shape: Sequence[int], strides: Sequence[int]) -> Axes | None:
    """Return the axes longer than 1, from the outermost in storage to the innermost.

    None if elements overlap, or if those along the innermost axis are not adjacent: such a tensor has no rows.
    """
    axes = sorted([axis for axis, size in enumerate(shape) if size > 1], key=lambda axis: -strides[axis])
    extent = 1
    for axis in reversed(axes):
        if strides[axis] < extent or (extent == 1 and strides[axis] != 1):
            return None
        extent += (shape[axis] - 1) * strides[axis]
    return tuple(axes)


def storage_orders(specs: Sequence[TensorSpec]) -> list[Axes] | None:
    """Return the distinct orders of tensors of one shape and of C order; None if tiles would be of no use to them.

    That is if one of them has no rows, or if all are in C order, with gaps or without.
    """
    shape = specs[0].shape
    if any(type(spec) is not TensorSpec for spec in specs):
        return None
    in_c_order = tuple([axis for axis, size in enumerate(shape) if size > 1])
    orders = {in_c_order: True}
    for strides in dict.fromkeys([spec.stride for spec in specs]):
        order = storage_order(shape, strides)
        if order is None:
            return None
        orders[order] = True
    return list(orders) if len(orders) > 1 and 0 not in shape else None


def in_storage_order(spec: TensorSpec) -> TensorSpec:
    """Return the elements of a tensor as they stand one behind the other in storage; itself if there are gaps.

    For tensors of the same strides, where the place of an element does not matter.
    """
    if type(spec) is not TensorSpec or spec.contiguous or storage_order(spec.shape, spec.stride) is None:
        return spec
    if sum([(n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True)]) + 1 != spec.numel:
        return spec
    return TensorSpec(spec.dtype, (spec.numel,), (1,), spec.start, spec.storage)


def tiles(shape: Sequence[int], orders: Sequence[Axes], numel: int) -> Iterator[Tile]:
    """Cut a tensor into tiles of at most so many elements, with rows as long as may be in each of these orders."""
    sizes = _tile_sizes(shape, orders, numel)
    for low in product(*[range(0, n, size) for n, size in zip(shape, sizes, strict=True)]):
        yield Tile(low, tuple([min(size, n - at) for at, size, n in zip(low, sizes, shape, strict=True)]))


def cut_tile(tile: Tile, orders: Sequence[Axes], numel: int) -> Iterator[Tile]:
    """Cut a tile into tiles of at most so many elements."""
    for inner in tiles(tile.sizes, orders, numel):
        yield Tile(tuple([a + b for a, b in zip(tile.low, inner.low, strict=True)]), inner.sizes)


def _tile_sizes(shape: Sequence[int], orders: Sequence[Axes], numel: int) -> list[int]:
    sizes = [1] * len(shape)
    share = max(int(numel ** (1 / len(orders))), 1)  # elements of a row; each order takes a factor as large as this
    for order in orders:
        row = 1
        for axis in reversed(order):
            sizes[axis] = min(shape[axis], max(sizes[axis], share // row, 1))
            row *= sizes[axis]
            if sizes[axis] < shape[axis] or row >= share:
                break
    for axis in reversed(range(len(shape))):  # what is left
        sizes[axis] = min(shape[axis], sizes[axis] * max(numel // math.prod(sizes), 1))
    # As many tiles, of the same size.
    return [-(-n // -(-n // size)) for n, size in zip(shape, sizes, strict=True)]


def rows(sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, list[int]]:
    """Find the rows of adjacent elements of a box in a storage.

    Returns:
        (elements of a row, where each row begins after the first element, in order of storage).
    """
    outer = sorted([(step, size) for size, step in zip(sizes, strides, strict=True) if size > 1], reverse=True)
    row = 1
    while outer and outer[-1][0] == row:
        row *= outer.pop()[1]
    begins = [0]
    for step, size in outer:
        begins = [begin + i * step for begin in begins for i in range(size)]
    return row, begins


def packed_strides(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Return the strides of a box without gaps, in the order of a storage with these strides."""
    packed, step = [0] * len(sizes), 1
    for axis in sorted(range(len(sizes)), key=lambda axis: strides[axis]):
        if sizes[axis] > 1:
            packed[axis] = step
            step *= sizes[axis]
    return packed
