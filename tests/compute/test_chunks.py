"""Tensors in chunks: any piece of any tiling is what the whole tensor has there, and nothing else is a tiling."""

from __future__ import annotations

import itertools
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from crafting import random_tensor, raw_bytes, same
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.compute.payload import OpenFiles, Reader, TensorSource, read_tensor
from ckpt_tools.errors import CorruptError
from ckpt_tools.tensors import DTYPES, Chunk, ChunkedSpec, Storage, TensorSpec, join, make_spec

RELAXED = settings(max_examples=60)
Box = tuple[tuple[int, ...], tuple[int, ...]]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """Draw a shape and boxes that fill it: (index of the first element, sizes), in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=4)))
    tiles: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(1, 9))):
        begin, sizes = tiles.pop(draw(st.integers(0, len(tiles) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[axis]))  # 0 makes an empty one, as a process without a share has
        for start, size in ((0, cut), (cut, sizes[axis] - cut)):
            tiles.append(
                (
                    (*begin[:axis], begin[axis] + start, *begin[axis + 1 :]),
                    (*sizes[:axis], size, *sizes[axis + 1 :]),
                )
            )
    return shape, draw(st.permutations(tiles))


def stored(folder: Path, whole: torch.Tensor, tiles: list[Box], *, transposed: bool, big_endian: bool) -> list[Chunk]:
    """Write each box to a file of its own."""
    parts = []
    for number, (begin, sizes) in enumerate(tiles):
        box = whole[tuple(slice(b, b + s) for b, s in zip(begin, sizes, strict=True))]
        rows = (box.permute(*reversed(range(box.dim()))) if transposed else box).contiguous()
        raw = np.frombuffer(raw_bytes(rows), f"<u{whole.itemsize}")
        path = folder / str(number)
        path.write_bytes(b"before" + (raw.byteswap() if big_endian else raw).tobytes())
        storage = Storage(path, 6, rows.nbytes, big_endian)
        stride = tuple(reversed(rows.stride())) if transposed else rows.stride()
        parts.append((begin, make_spec(DTYPES[str(whole.dtype)[6:]], sizes, storage, stride=stride)))
    return parts


@RELAXED
@given(tilings(), st.sampled_from(["float32", "int8", "bfloat16", "float64"]), st.booleans(), st.booleans(), st.data())
def test_reader_reads_any_slice_of_a_chunked_tensor(
    tmp_path: Path,
    tiling: tuple[tuple[int, ...], list[Box]],
    dtype: str,
    transposed: bool,
    big_endian: bool,
    data: st.DataObject,
) -> None:
    shape, tiles = tiling
    whole = random_tensor(dtype, shape, seed=len(tiles))
    parts = stored(tmp_path, whole, tiles, transposed=transposed, big_endian=big_endian)
    spec = join(tmp_path, "w", DTYPES[dtype], shape, parts)
    start = data.draw(st.integers(0, spec.numel))
    stop = data.draw(st.integers(start, spec.numel))
    reader = Reader((stop - start + data.draw(st.integers(0, 100))) * spec.dtype.itemsize)

    with OpenFiles() as files:
        files.open_all(spec.paths)
        nbytes = reader.read(TensorSource(spec, files), start, stop)
    assert bytes(reader.buffer.bytes[:nbytes]) == raw_bytes(whole.reshape(-1)[start:stop])
    assert same(read_tensor(spec), whole)
    assert spec == join(tmp_path, "w", DTYPES[dtype], shape, parts[::-1])


@RELAXED
@given(st.data())
def test_join_accepts_only_boxes_that_cover_each_element_once(tmp_path: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    parts = []
    covered = np.zeros(shape, int)
    for _ in range(data.draw(st.integers(1, 5))):
        begin = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        sizes = tuple(data.draw(st.integers(0, size - b)) for size, b in zip(shape, begin, strict=True))
        parts.append((begin, make_spec(DTYPES["int8"], sizes, Storage(tmp_path, 0, math.prod(sizes)))))
        covered[tuple(slice(b, b + s) for b, s in zip(begin, sizes, strict=True))] += 1

    if (covered == 1).all():
        assert join(tmp_path, "w", DTYPES["int8"], shape, parts).shape == shape
    else:
        with pytest.raises(CorruptError, match=r"'w' of shape .* is not the sum of its \d chunks"):
            join(tmp_path, "w", DTYPES["int8"], shape, parts)


def part(begin: tuple[int, ...], sizes: tuple[int, ...], *, big_endian: bool = False) -> Chunk:
    storage = Storage(Path("file"), 0, math.prod(sizes), big_endian)
    return begin, make_spec(DTYPES["int8"], sizes, storage)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part((0, 0), (2, 3)), part((1, 0), (2, 3))], r"those at \[0, 0\] and \[1, 0\] overlap"),
        ([part((0, 0), (2, 3))], "3 elements are in no chunk"),
        ([part((0, 0), (2, 3)), part((2, 0), (2, 3))], r"one of shape \[2, 3\] at \[2, 0\] reaches beyond it"),
        ([part((0, 0), (3, 3)), part((3, 1), (0, 3))], r"one of shape \[0, 3\] at \[3, 1\] reaches beyond it"),
        ([part((0,), (9,))], r"one has the offset \[0\]"),
        ([part((0, 0), (2, 3)), part((-1, 0), (1, 3))], r"one has the offset \[-1, 0\]"),
        ([part((0, 0), (2, 3)), part((2, 0), (1, 3), big_endian=True)], "they differ in byte order"),
    ],
)
def test_join_says_what_is_wrong_with_chunks(parts: list[Chunk], message: str) -> None:
    with pytest.raises(CorruptError, match=message):
        join(Path("run"), "w", DTYPES["int8"], (3, 3), parts)


def test_join_takes_any_grid_and_refuses_what_takes_long_to_tell() -> None:
    grid = [part(at, (1, 1, 1)) for at in product(range(12), repeat=3)]
    assert join(Path("run"), "w", DTYPES["int8"], (12, 12, 12), grid).shape == (12, 12, 12)
    with pytest.raises(CorruptError, match=r"those at \[3, 4, 5\] and \[3, 4, 5\] overlap"):
        join(Path("run"), "w", DTYPES["int8"], (12, 12, 12), [*grid, part((3, 4, 5), (1, 1, 1))])
    # Each cut takes one row or one column off.
    peeled = [part((n, n), (1, 500 - n)) for n in range(500)] + [part((n + 1, n), (499 - n, 1)) for n in range(499)]
    with pytest.raises(CorruptError, match="lie so irregularly"):
        join(Path("run"), "w", DTYPES["int8"], (500, 500), peeled)


def test_join_rejects_a_scalar_in_two_chunks() -> None:
    with pytest.raises(CorruptError, match=r"those at \[\] and \[\] overlap"):
        join(Path("run"), "w", DTYPES["int8"], (), [part((), ()), part((), ())])


def test_join_of_one_chunk_is_the_tensor_itself() -> None:
    alone = part((0, 0), (3, 3))
    assert join(Path("run"), "w", DTYPES["int8"], (3, 3), [alone, part((3, 0), (0, 3))]) is alone[1]
    assert join(Path("run"), "w", DTYPES["int8"], (0, 3), [part((0, 0), (0, 2)), part((0, 2), (0, 1))]).shape == (0, 3)


def test_as_chunks_of_a_plain_tensor_is_the_tensor_itself() -> None:
    spec = part((0, 0), (3, 3))[1]
    assert spec.as_chunks == (((0, 0), spec),)


def test_join_tells_thousands_of_chunks_apart_along_any_axis(tmp_path: Path) -> None:
    # A comparison of all pairs would take minutes.
    (tmp_path / "file").write_bytes(bytes(range(200)) * 100)
    for axis in range(2):
        shape = (20_000, 1) if axis == 0 else (1, 20_000)
        parts = []
        for number in range(20_000):
            begin = (number, 0) if axis == 0 else (0, number)
            parts.append(
                (begin, TensorSpec(DTYPES["uint8"], (1, 1), (1, 1), number, Storage(tmp_path / "file", 0, 20_000)))
            )
        spec = join(tmp_path, "w", DTYPES["uint8"], shape, parts)
        assert isinstance(spec, ChunkedSpec)
        assert len(spec.chunks) == 20_000


def test_reader_needs_no_more_memory_than_the_slice_of_a_chunked_tensor(tmp_path: Path) -> None:
    shape = (64, 64)
    whole = random_tensor("float32", shape)
    tiles = [((i, j), (16, 32)) for i, j in itertools.product(range(0, 64, 16), range(0, 64, 32))]
    spec = join(
        tmp_path, "w", DTYPES["float32"], shape, stored(tmp_path, whole, tiles, transposed=True, big_endian=False)
    )
    reader = Reader(4 * 10)
    with OpenFiles() as files:
        files.open_all(spec.paths)
        source = TensorSource(spec, files)
        for start in range(0, spec.numel - 10, 10):
            reader.read(source, start, start + 10)
            assert bytes(reader.buffer.bytes) == raw_bytes(whole.reshape(-1)[start : start + 10])
