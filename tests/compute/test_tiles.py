"""Tiles: tensors in another order than the output are summed, copied and compared as if they were contiguous."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from crafting import random_tensor, raw_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.compute import engine, native
from ckpt_tools.compute import torch_sums as summing
from ckpt_tools.compute.compare import compare
from ckpt_tools.compute.tiles import Tile, cut_tile, packed_strides, rows, storage_order, storage_orders, tiles
from ckpt_tools.compute.work_units import OutFile
from ckpt_tools.errors import CorruptError, NumericsError
from ckpt_tools.formats.file_plan import Computed, FilePlan, OutTensor, Payload, Terms
from ckpt_tools.tensors import DTYPES, Category, Storage, TensorSpec, c_strides, make_spec

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
RELAXED = settings(max_examples=25)


def numbers(dtype: str, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Make a tensor of finite numbers."""
    kind = getattr(torch, dtype)
    if not (kind.is_floating_point or kind.is_complex):
        return random_tensor(dtype, tuple(shape), seed)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(list(shape), generator=generator, dtype=torch.complex64 if kind.is_complex else torch.float32)
    return wide.to(kind)


@st.composite
def strides_of(draw: st.DrawFn, shape: Sequence[int], *, gaps: bool = True) -> tuple[int, ...]:
    """Draw strides of a storage that has the axes in any order, with gaps behind some."""
    strides, extent = [0] * len(shape), 1
    for axis in draw(st.permutations(range(len(shape)))):
        strides[axis] = extent + (draw(st.integers(0, 3)) if gaps and extent > 1 else 0)
        extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        extent = max(extent, strides[axis] * shape[axis])
    return tuple(strides)


def stored(path: Path, values: torch.Tensor, strides: Sequence[int], *, big_endian: bool = False) -> TensorSpec:
    """Write a tensor with these strides, and return where it stands."""
    count = 1 + sum((n - 1) * step for n, step in zip(values.shape, strides, strict=True))
    base = torch.zeros(count * values.element_size(), dtype=torch.uint8).view(values.dtype)
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size())
    if integers is None:
        base.as_strided(values.shape, strides).copy_(values)
    else:  # bit by bit, for dtypes that torch cannot copy
        base.view(integers).as_strided(values.shape, strides).copy_(values.view(integers))
    dtype = DTYPES[str(values.dtype).removeprefix("torch.")]
    raw = bytearray(raw_bytes(base))
    if big_endian:
        for i in range(dtype.word // 2):
            j = dtype.word - 1 - i
            raw[i :: dtype.word], raw[j :: dtype.word] = raw[j :: dtype.word], raw[i :: dtype.word]
    path.write_bytes(b"before" + raw)
    return make_spec(dtype, tuple(values.shape), Storage(path, 6, len(raw), big_endian), stride=tuple(strides))


def written(path: Path, terms: Sequence[tuple[TensorSpec, float]], out: str, **options: Any) -> bytes:
    """Sum tensors by the engine; return the bytes, of which the checksum was right."""
    tensor = OutTensor(DTYPES[out], terms[0][0].shape, Terms.of(terms), "w")
    crcs: list[int] = []

    def keep(found: Sequence[int]) -> bytes:
        crcs.extend(found)
        return b""

    segments = Payload(tensor, 3), Computed(3 + tensor.nbytes, 0, (tensor,), keep)
    plan = FilePlan("out", 3 + tensor.nbytes, segments)
    with (path / "out").open("w+b") as file:
        file.truncate(plan.size)
        engine.run([OutFile(plan, file.fileno())], **options)
        data = file.read()[3:]
    assert crcs == [zlib.crc32(data)]
    return data


# ---- geometry ----

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)


@RELAXED
@given(data=st.data(), shape=shapes, numel=st.integers(1, 600))
def test_tiles_hold_each_element_once_and_no_more_than_allowed(
    data: st.DataObject, shape: tuple[int, ...], numel: int
) -> None:
    orders = [storage_order(shape, data.draw(strides_of(shape))) or () for _ in range(data.draw(st.integers(1, 3)))]
    seen = []
    for tile in tiles(shape, orders, numel):
        assert 0 < tile.numel <= numel
        for inner in cut_tile(tile, orders, max(numel // 3, 1)):
            assert 0 < inner.numel <= max(numel // 3, 1)
            ranges = [range(low, low + size) for low, size in zip(inner.low, inner.sizes, strict=True)]
            seen += itertools.product(*ranges)
    assert sorted(seen) == list(itertools.product(*map(range, shape)))


def test_tiles_of_a_transposed_matrix_have_long_rows_in_both_orders() -> None:
    for tile in tiles((6000, 6000), [(0, 1), (1, 0)], 1 << 20):
        assert min(tile.sizes) >= 1000


def test_tiles_of_a_convolution_in_channels_last_order_are_whole_filters() -> None:
    (first, *_) = tiles((64, 512, 3, 3), [(0, 1, 2, 3), (0, 2, 3, 1)], 100_000)
    assert first == Tile((0, 0, 0, 0), (16, 512, 3, 3))


@RELAXED
@given(data=st.data(), shape=shapes)
def test_rows_gives_each_element_of_a_box_in_the_order_of_storage(data: st.DataObject, shape: tuple[int, ...]) -> None:
    strides = data.draw(strides_of(shape))
    places = sorted(
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*map(range, shape))
    )
    row, begins = rows(shape, strides)
    assert [begin + i for begin in begins for i in range(row)] == places
    packed = packed_strides(shape, strides)
    assert sorted(
        sum(i * s for i, s in zip(index, packed, strict=True)) for index in itertools.product(*map(range, shape))
    ) == list(range(math.prod(shape)))


@pytest.mark.parametrize(
    ("shape", "strides", "order"),
    [
        ((4, 5), (5, 1), (0, 1)),
        ((4, 5), (1, 4), (1, 0)),
        ((4, 5), (1, 7), (1, 0)),  # a gap behind each column
        ((4, 1, 5), (1, 99, 4), (2, 0)),
        ((4, 5), (0, 1), None),  # expanded
        ((4, 5), (1, 3), None),  # overlapping
        ((4, 5), (10, 2), None),  # every second element
        ((4, 5), (2, 8), None),
        ((1, 1), (3, 5), ()),
    ],
)
def test_storage_order_is_that_of_tensors_with_rows(
    shape: tuple[int, ...], strides: tuple[int, ...], order: tuple[int, ...] | None
) -> None:
    assert storage_order(shape, strides) == order


def test_storage_orders_gives_no_tiles_to_tensors_in_c_order(tmp_path: Path) -> None:
    def spec(*strides: int) -> TensorSpec:
        return TensorSpec(DTYPES["float32"], (4, 5), strides, 0, Storage(tmp_path, 0, 1000))

    assert storage_orders([spec(5, 1), spec(9, 1)]) is None
    assert storage_orders([spec(5, 1), spec(1, 4)]) == [(0, 1), (1, 0)]
    assert storage_orders([spec(0, 1), spec(1, 4)]) is None


# ---- sums and copies ----

COPIED = [name for name, dtype in DTYPES.items() if dtype.category is not Category.PACKED]


@RELAXED
@given(data=st.data(), shape=shapes, dtype=st.sampled_from(COPIED))
def test_run_copies_a_tensor_in_any_order_as_a_contiguous_one(
    tmp_path: Path, way: str, data: st.DataObject, shape: tuple[int, ...], dtype: str
) -> None:
    values = numbers(dtype, shape, seed=math.prod(shape))
    spec = stored(tmp_path / "0", values, data.draw(strides_of(shape)), big_endian=data.draw(st.booleans()))
    options = {
        "threads": data.draw(st.integers(1, 3)),
        "slice_size": data.draw(st.one_of(st.none(), st.integers(1, 90))),
    }
    assert written(tmp_path, [(spec, 1.0)], dtype, **options) == raw_bytes(values)


FLOATS = ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
COMPLEX = ["complex128", "complex64", "complex32"]


@RELAXED
@given(data=st.data(), shape=shapes, n=st.integers(1, 6))
def test_run_sums_tensors_in_any_order_as_contiguous_ones(
    tmp_path: Path, way: str, data: st.DataObject, shape: tuple[int, ...], n: int
) -> None:
    dtypes = data.draw(st.sampled_from([FLOATS, COMPLEX]))
    out = data.draw(st.sampled_from(dtypes))
    strides = data.draw(strides_of(shape))
    coefficients = [1 / n] * n if data.draw(st.booleans()) else [0.1 * (i + 1) for i in range(n)]
    terms, plain = [], []
    for i, coefficient in enumerate(coefficients):
        dtype = data.draw(st.sampled_from([out, *dtypes]))
        values = numbers(dtype, shape, seed=i)
        strides = strides if data.draw(st.booleans()) else data.draw(strides_of(shape))
        swapped = data.draw(st.integers(0, 9)) == 0
        terms.append((stored(tmp_path / f"{i}", values, strides, big_endian=swapped), coefficient))
        plain.append((stored(tmp_path / f"{i}.plain", values, c_strides(shape)), coefficient))
    options = {
        "threads": data.draw(st.integers(1, 3)),
        "slice_size": data.draw(st.one_of(st.none(), st.integers(1, 90))),
    }
    assert written(tmp_path, terms, out, **options) == written(tmp_path, plain, out)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float8_e5m2", "complex128"])
@pytest.mark.parametrize("orders", [[(1, 0)] * 5, [(1, 0), (0, 1), (1, 0), (0, 1), (1, 0)]], ids=["same", "mixed"])
def test_run_sums_large_transposed_matrices_as_contiguous_ones(
    tmp_path: Path, way: str, dtype: str, orders: list[tuple[int, int]]
) -> None:
    """Larger than a tile, with sizes that leave a rest; in one slice and in many."""
    shape = (1187, 1301) if dtype == "float32" else (613, 421)
    terms, plain = [], []
    for i, order in enumerate(orders):
        values = numbers(dtype, shape, seed=i)
        strides = (1, shape[0]) if order == (1, 0) else c_strides(shape)
        terms.append((stored(tmp_path / f"{i}", values, strides), 0.2))
        plain.append((stored(tmp_path / f"{i}.plain", values, c_strides(shape)), 0.2))
    expected = written(tmp_path, plain, dtype)
    assert written(tmp_path, terms, dtype, threads=2) == expected
    assert written(tmp_path, terms, dtype, threads=2, slice_size=77_777) == expected


def test_run_sums_tiles_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native._native is None:
        pytest.skip("installed without a C compiler")
    values = [numbers("float32", (50, 70), seed=i) for i in range(3)]
    terms = [(stored(tmp_path / f"{i}", each, (1, 50)), 0.25) for i, each in enumerate(values)]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(summing, "Worker", refuse)
    total = sum(each.double() for each in values)
    assert isinstance(total, torch.Tensor)
    assert written(tmp_path, terms, "float32") == raw_bytes((total * 0.25).float())


def test_run_leaves_a_tensor_with_too_many_axes_for_c_to_torch(tmp_path: Path, way: str) -> None:
    values = numbers("float32", (2, 3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4), seed=0)
    strides = (6, 1, 3, *[0] * 14, 12)
    spec = stored(tmp_path / "0", values, strides)
    assert written(tmp_path, [(spec, 1.0)], "float32") == raw_bytes(values)


@pytest.mark.parametrize("slice_size", [None, 64])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "complex64"])
def test_run_names_a_nan_in_a_tile_by_its_index_or_lets_it_pass(
    tmp_path: Path, way: str, dtype: str, slice_size: int | None
) -> None:
    rounds = []
    for strides in ((1, 30), c_strides((30, 40))):
        terms = []
        for i in range(2):
            values = numbers(dtype, (30, 40), seed=i)
            if i:
                values[17, 23] = math.nan
            terms.append((stored(tmp_path / f"{i}.pth", values, strides), 0.5))
        for chosen in (terms, [(terms[1][0], 1.0)]):  # summed, and copied
            with pytest.raises(NumericsError, match=r"1\.pth: 'w' holds NaN at \[17, 23\]"):
                written(tmp_path, chosen, dtype, slice_size=slice_size)
        rounds.append(written(tmp_path, terms, dtype, slice_size=slice_size, allow_nonfinite=True))
    assert rounds[0] == rounds[1]


def test_run_rejects_a_file_that_ends_within_a_tile(tmp_path: Path, way: str) -> None:
    spec = stored(tmp_path / "0", numbers("float32", (300, 400)), (1, 300))
    os.truncate(tmp_path / "0", 100_000)
    with pytest.raises(CorruptError, match="0: ends before its tensors do"):
        written(tmp_path, [(spec, 0.5)], "float32")


def test_memory_needed_counts_tiles(tmp_path: Path, way: str) -> None:
    values = numbers("float32", (30, 40))
    needed = [
        engine.memory_needed([OutTensor(spec.dtype, spec.shape, Terms((spec, spec), ((0.5, 0.5),)), "w")], threads=2)
        for spec in (stored(tmp_path / "0", values, (1, 30)), stored(tmp_path / "1", values, (40, 1)))
    ]
    assert needed[0] - needed[1] == (2 * native.scratch(1, tiles=True) if way == "native" else 0)


# ---- comparison ----


@RELAXED
@given(data=st.data(), shape=shapes, dtype=st.sampled_from(["float32", "bfloat16", "int64", "complex64", "float64"]))
def test_compare_measures_tensors_in_any_order_as_contiguous_ones(
    tmp_path: Path, data: st.DataObject, shape: tuple[int, ...], dtype: str
) -> None:
    a, b = numbers(dtype, shape, seed=1), numbers(dtype, shape, seed=2)
    b.view(-1)[::2] = a.view(-1)[::2]
    one = data.draw(strides_of(shape))
    other = one if data.draw(st.booleans()) else data.draw(strides_of(shape))
    swapped = data.draw(st.booleans())
    pair = stored(tmp_path / "a", a, one), stored(tmp_path / "b", b, other, big_endian=swapped)
    plain = stored(tmp_path / "a.plain", a, c_strides(shape)), stored(tmp_path / "b.plain", b, c_strides(shape))
    slice_size = data.draw(st.integers(1, 500))
    assert compare([pair], slice_size=slice_size, rtol=0.1) == compare([plain], rtol=0.1)
