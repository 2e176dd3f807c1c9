"""Payload: any piece of any view is what torch's as_strided gives."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafting import TORCH_DTYPES, random_tensor, raw_bytes, same
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.compute.payload import Reader, TensorSource, boxes, read_tensor, torch_dtype
from ckpt_tools.errors import CorruptError, ReadError
from ckpt_tools.storage.local import raise_file_limit
from ckpt_tools.storage.source import OpenFiles
from ckpt_tools.tensors import DTYPES, Category, DType, Storage, TensorSpec, make_spec

pytestmark = pytest.mark.filterwarnings("ignore:B?Complex.* support is experimental")
RELAXED = settings(max_examples=60)


@st.composite
def layouts(draw: st.DrawFn, *, wide: int = 60) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Draw (shape, stride, start): overlapping, gappy, permuted or dense."""
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    dense = []
    step = 1
    for size in reversed(shape):
        dense.append(step)
        step *= size
    any_steps = st.lists(st.integers(0, wide), min_size=len(shape), max_size=len(shape))
    stride = tuple(draw(st.one_of(st.just(dense[::-1]), st.permutations(dense), any_steps)))
    return shape, stride, draw(st.integers(0, 40))


def file_of(
    path: Path, spec_of: DType, layout: tuple[tuple[int, ...], tuple[int, ...], int], *, before: int = 0
) -> tuple[TensorSpec, torch.Tensor]:
    """Write a file that such a view looks into; return its spec, and what torch makes of it."""
    shape, stride, start = layout
    count = start + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    base = random_tensor(spec_of.name, (count,), seed=count)
    path.write_bytes(bytes(before) + raw_bytes(base))
    storage = Storage(path, before, count * spec_of.itemsize)
    return make_spec(spec_of, shape, storage, stride=stride, start=start), torch.as_strided(base, shape, stride, start)


@RELAXED
@given(layouts(), st.sampled_from(["float32", "int8", "bfloat16", "float64", "complex128"]), st.data())
def test_reader_reads_any_slice_of_any_view_as_as_strided_does(
    tmp_path: Path, layout: tuple[tuple[int, ...], tuple[int, ...], int], dtype: str, data: st.DataObject
) -> None:
    spec, oracle = file_of(tmp_path / "file", DTYPES[dtype], layout, before=data.draw(st.integers(0, 9)))
    start = data.draw(st.integers(0, spec.numel))
    stop = data.draw(st.integers(start, spec.numel))
    slack = data.draw(st.integers(0, 3000))  # a buffer as small as the piece, or one to gather in
    reader = Reader((stop - start + slack) * spec.dtype.itemsize)

    with OpenFiles() as files:
        files.open(spec.storage.path)
        nbytes = reader.read(TensorSource(spec, files), start, stop)
    assert bytes(reader.buffer.bytes[:nbytes]) == raw_bytes(oracle.reshape(-1)[start:stop])


@RELAXED
@given(layouts(wide=9000))
def test_read_tensor_reads_views_far_wider_than_the_buffer(
    tmp_path: Path, layout: tuple[tuple[int, ...], tuple[int, ...], int]
) -> None:
    spec, oracle = file_of(tmp_path / "file", DTYPES["int16"], layout)

    assert same(read_tensor(spec), oracle)


@RELAXED
@given(layouts(), st.data())
def test_boxes_gives_each_element_of_a_slice_once_and_in_order(
    layout: tuple[tuple[int, ...], tuple[int, ...], int], data: st.DataObject
) -> None:
    shape, stride, _ = layout
    positions = [
        sum(i * s for i, s in zip(index, stride, strict=True)) for index in itertools.product(*map(range, shape))
    ]
    start = data.draw(st.integers(0, len(positions)))
    stop = data.draw(st.integers(start, len(positions)))

    named: list[int] = []
    for first, sizes, strides in boxes(shape, stride, start, stop):
        assert math.prod(sizes) > 0
        named += [
            first + sum(i * s for i, s in zip(at, strides, strict=True)) for at in itertools.product(*map(range, sizes))
        ]
    assert named == positions[start:stop]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5)])
def test_boxes_gives_at_most_two_boxes_a_dimension(shape: tuple[int, ...]) -> None:
    stride = tuple(reversed([7**i for i in range(len(shape))]))
    numel = math.prod(shape)

    for start, stop in itertools.combinations(range(numel + 1), 2):
        assert len(list(boxes(shape, stride, start, stop))) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])
def test_read_tensor_reads_every_dtype_in_either_byte_order(dtype: str, big_endian: bool, tmp_path: Path) -> None:
    kind = DTYPES[dtype]
    word = kind.itemsize // 2 if kind.category is Category.COMPLEX else kind.itemsize
    for shape, stride, start in [
        ((4, 5), (5, 1), 0),
        ((5, 4), (1, 5), 2),
        ((0, 3), (3, 1), 0),
        ((), (), 3),
        ((2, 2), (0, 3), 1),
    ]:
        count = 30
        base = random_tensor(dtype, (count,))
        raw = np.frombuffer(raw_bytes(base), f"<u{word}")
        (tmp_path / "file").write_bytes((raw.byteswap() if big_endian else raw).tobytes())
        spec = make_spec(
            kind, shape, Storage(tmp_path / "file", 0, count * kind.itemsize, big_endian), stride=stride, start=start
        )

        assert same(read_tensor(spec), torch.as_strided(base, shape, stride, start))


def test_read_tensor_does_not_read_the_gaps_of_a_sparse_view(tmp_path: Path) -> None:
    # One element in 2**20, of a sparse file of 64 GB: reading what lies between would take minutes.
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(64 << 30)
        for i in range(64):
            file.seek(i << 30)
            file.write(bytes([i + 1]))
    spec = make_spec(DTYPES["uint8"], (64,), Storage(path, 0, 64 << 30), stride=(1 << 30,))

    assert read_tensor(spec).tolist() == list(range(1, 65))


def test_read_tensor_returns_memory_of_its_own(tmp_path: Path) -> None:
    spec, oracle = file_of(tmp_path / "file", DTYPES["float32"], ((3, 3), (3, 1), 0))
    first, second = read_tensor(spec), read_tensor(spec)
    first.zero_()

    assert same(second, oracle)
    assert raw_bytes(oracle) == spec.storage.path.read_bytes()


def test_read_tensor_rejects_a_truncated_file_without_a_signal(tmp_path: Path) -> None:
    spec, _ = file_of(tmp_path / "file", DTYPES["float32"], ((300, 3), (3, 1), 0))
    os.truncate(spec.storage.path, 1000)

    with pytest.raises(CorruptError, match="ends before its tensors do"):
        read_tensor(spec)


def test_read_tensor_names_a_missing_file(tmp_path: Path) -> None:
    spec, _ = file_of(tmp_path / "file", DTYPES["float32"], ((3,), (1,), 0))
    spec.storage.path.unlink()

    with pytest.raises(ReadError, match=r"file: no such file"):
        read_tensor(spec)


def test_read_tensor_names_a_file_that_cannot_be_read_at_an_offset(tmp_path: Path) -> None:
    spec = make_spec(DTYPES["uint8"], (1,), Storage(tmp_path, 0, 1))  # a folder opens, but does not read

    with pytest.raises(ReadError, match=r"reading failed \(Is a directory"):
        read_tensor(spec)


@pytest.mark.parametrize("change", ["content", "size"])
def test_check_unchanged_notices_a_file_that_changed(change: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    with OpenFiles() as files:
        files.open(path)
        files.check_unchanged()
        os.utime(path, ns=(1, 1)) if change == "content" else os.truncate(path, 3)
        with pytest.raises(CorruptError, match="changed while it was read"):
            files.check_unchanged()


def test_open_files_close_each_file_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    with OpenFiles() as files:
        files.open(path)
        fd = files.handle(path)
        files.open(path)
        assert files.handle(path) == fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_torch_dtype_names_a_dtype_that_this_torch_lacks() -> None:
    with pytest.raises(ReadError, match="has no dtype float2_e1m0. Install a newer torch"):
        torch_dtype(DType("float2_e1m0", 1, Category.FLOAT))


def test_raise_file_limit_raises_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        opened = sum(1 for _ in Path("/dev/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 100, hard))
        raise_file_limit(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == opened + 100
        raise_file_limit(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == opened + 264
        raise_file_limit(10**9)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"shape": (2, 2), "stride": (1,)}, "claims shape"),
        ({"shape": (-1,), "stride": (1,)}, "claims shape"),
        ({"shape": (2,), "stride": (-1,)}, "claims shape"),
        ({"shape": (2,), "stride": (1,), "start": -1}, "claims shape"),
        ({"shape": (2.0,), "stride": (1,)}, "claims shape"),
        ({"shape": (True,), "stride": (1,)}, "claims shape"),
        ({"shape": (5,), "stride": (1,)}, "reaches beyond its storage of 16 bytes"),
        ({"shape": (2,), "stride": (4,)}, "reaches beyond its storage of 16 bytes"),
        ({"shape": (1,), "stride": (1,), "start": 4}, "reaches beyond its storage of 16 bytes"),
        ({"shape": (1 << 62, 1 << 62), "stride": (0, 1)}, "claims shape"),
    ],
)
def test_make_spec_rejects_a_tensor_outside_its_storage(numbers: dict[str, Any], message: str, tmp_path: Path) -> None:
    make: Callable[..., TensorSpec] = make_spec
    with pytest.raises(CorruptError, match=message):
        make(DTYPES["float32"], numbers.pop("shape"), Storage(tmp_path / "a", 0, 16), **numbers)


@RELAXED
@given(layouts())
def test_tensor_spec_contiguous_agrees_with_torch(layout: tuple[tuple[int, ...], tuple[int, ...], int]) -> None:
    shape, stride, start = layout
    spec = TensorSpec(DTYPES["uint8"], shape, stride, start, Storage(Path("a"), 0, 1))
    count = start + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))

    assert spec.contiguous == torch.empty(count, dtype=torch.uint8).as_strided(shape, stride, start).is_contiguous()
