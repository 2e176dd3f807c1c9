"""Ranges of flat tensors, cut into boxes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.errors import CorruptError
from ckpt_tools.formats.flat import Flat, boxes, from_ranges
from ckpt_tools.tensors import DTYPES, Storage, TensorSpec, in_c_order, make_spec

SHAPES = st.lists(st.integers(1, 4), max_size=5).map(tuple)
FLOAT32 = DTYPES["float32"]


def tensor(name: str, numel: int, before: int = 0) -> TensorSpec:
    return make_spec(FLOAT32, (numel,), Storage(Path(name), 0, 4 * (before + numel)), start=before)


@given(SHAPES, st.data())
def test_boxes_fill_a_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = np.arange(numel).reshape(shape)
    found = [
        whole[tuple(slice(first, first + size) for first, size in zip(index, sizes, strict=True))].reshape(-1)
        for index, sizes in boxes(shape, start, stop)
    ]
    assert np.array_equal(np.concatenate([np.zeros(0, int), *found]), np.arange(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_ranges_of_flat_tensors_are_those_of_one(sizes: list[int], data: st.DataObject) -> None:
    whole = Flat([tensor(str(i), size, before=i) for i, size in enumerate(sizes)])
    assert whole.numel == sum(sizes)
    start = data.draw(st.integers(0, whole.numel))
    stop = data.draw(st.integers(start, whole.numel))
    numbers = [(i, at) for i, size in enumerate(sizes) for at in range(size)]
    found = [
        (int(each.storage.path.name), first + n)
        for each, first, count in whole.ranges(start, stop)
        for n in range(count)
    ]
    assert found == numbers[start:stop]


def test_a_tensor_from_ranges_has_its_chunks_in_order() -> None:
    pieces = [(tensor("a", 7, before=2), 3, 4), (tensor("b", 8), 0, 8)]
    made = from_ranges(Path("folder"), "w", (3, 4), pieces)
    assert (made.shape, made.dtype, in_c_order(made)) == ((3, 4), FLOAT32, True)
    assert [(index, each.shape, each.begin, each.storage.path.name) for index, each in made.as_chunks] == [
        ((0, 0), (1, 4), 20, "a"),
        ((1, 0), (2, 4), 0, "b"),
    ]
    assert from_ranges(Path("folder"), "w", (2, 4), pieces[1:]) == make_spec(FLOAT32, (2, 4), pieces[1][0].storage)


@pytest.mark.parametrize(
    ("ranges", "has"),
    [
        ([(tensor("a", 5), 0, 5)], "5 elements of dtype float32"),
        ([(tensor("a", 7), 0, 7)], "7 elements of dtype float32"),
        ([], "0 elements of dtype none"),
        (
            [(tensor("a", 3), 0, 3), (make_spec(DTYPES["float16"], (3,), Storage(Path("b"), 0, 6)), 0, 3)],
            "6 elements of dtype float32 and float16",
        ),
    ],
)
def test_ranges_that_are_no_tensor_are_refused(ranges: list[tuple[TensorSpec, int, int]], has: str) -> None:
    with pytest.raises(CorruptError, match=rf"folder: 'w' of shape \[2, 3\] has {re.escape(has)} in the part"):
        from_ranges(Path("folder"), "w", (2, 3), ranges)
