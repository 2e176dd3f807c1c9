"""Rows: files that differ in their coefficients alone are written together, each with the bytes of a run of its own."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import FLOATS
from crafting import raw_bytes
from fake_gpu import Cpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_tools.compute import engine, native
from ckpt_tools.compute.gpu import pipeline, streams
from ckpt_tools.compute.work_units import MOST_ROWS, OutFile
from ckpt_tools.errors import NumericsError, WriteError
from ckpt_tools.formats.file_plan import Computed, FilePlan, OutTensor, Payload, Segment, Terms, used
from ckpt_tools.tensors import DTYPES, Storage, SummedSpec, TensorSpec, c_strides, make_spec

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
RELAXED = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
COMPLEX = ["complex128", "complex64", "complex32"]
WHOLE = ["int64", "uint8", "bool"]
Row = tuple[float, ...]


def numbers(dtype: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Finite numbers, some of them zeros of either sign."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(list(shape), generator=generator, dtype=torch.complex64 if kind.is_complex else torch.float64)
    flat = wide.reshape(-1)
    flat[::7], flat[3::11] = 0.0, -0.0
    return wide.to(kind)


class Inputs:
    """Files with all tensors one behind the other; each tensor has its own strides."""

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [folder / f"in-{i}" for i in range(count)]
        self.content = [bytearray(b"12345678") for _ in range(count)]
        self.values: list[list[torch.Tensor]] = []

    def add(self, values: Sequence[torch.Tensor], strides: Sequence[int], gap: int = 0) -> list[TensorSpec]:
        """Append a tensor to every file; return where each stands."""
        specs = []
        for path, content, each in zip(self.paths, self.content, values, strict=True):
            flat = torch.empty(each.numel() * each.element_size(), dtype=torch.uint8).view(each.dtype)
            flat.as_strided(each.shape, list(strides)).copy_(each)
            dtype = DTYPES[str(each.dtype).removeprefix("torch.")]
            content += bytes(gap)
            storage = Storage(path, len(content), each.numel() * dtype.itemsize)
            content += raw_bytes(flat)
            specs.append(make_spec(dtype, tuple(each.shape), storage, stride=tuple(strides)))
        self.values.append(list(values))
        return specs

    def save(self) -> None:
        for path, content in zip(self.paths, self.content, strict=True):
            path.write_bytes(content)


def planned(name: str, tensors: Sequence[OutTensor], begin: int, *, crc: bool, kept: list[int]) -> FilePlan:
    """Plan a file with these tensors one behind the other; `kept` receives their checksums."""
    segments: list[Segment] = []
    at = begin

    def local(crcs: Sequence[int]) -> bytes:
        return crcs[0].to_bytes(8, "little")

    def keep(crcs: Sequence[int]) -> bytes:
        kept.extend(crcs)
        return b""

    for tensor in tensors:
        if crc:
            segments.append(Computed(at, 8, (tensor,), local))
            at += 8
        segments.append(Payload(tensor, at))
        at += tensor.nbytes
    if crc:
        segments.append(Computed(at, 0, tuple(tensors), keep))
    return FilePlan(name, at, tuple(segments))


Job = Sequence[tuple[Sequence[OutTensor], int, int]]
"""Files: (tensors, row, first byte)."""


def run(folder: Path, files: Job, *, crc: bool, **options: Any) -> list[bytes]:
    """Write files; return the bytes of each from its first byte on, whose checksums were right."""
    with ExitStack() as stack:
        outputs, checksums = [], []
        for i, (tensors, row, begin) in enumerate(files):
            checksums.append([])
            plan = planned(f"out-{i}", tensors, begin, crc=crc, kept=checksums[-1])
            file = stack.enter_context((folder / f"out-{i}").open("w+b"))
            file.truncate(plan.size)
            outputs.append(OutFile(plan, file.fileno(), row))
        engine.run(outputs, **options)
        found = [os.pread(out.fd, out.plan.size, 0) for out in outputs]
    for out, data, crcs in zip(outputs, found, checksums, strict=True):
        expected = [zlib.crc32(data[at : at + tensor.nbytes]) for tensor, at in out.plan.payloads]
        assert crcs == (expected if crc else [])
    return [data[begin:] for data, (_, _, begin) in zip(found, files, strict=True)]


def one_row(tensor: OutTensor, row: int) -> OutTensor:
    """The tensor of a run with this row alone, from pairs as every single average makes them."""
    terms = tensor.terms
    if len(terms.rows) <= 1:
        return tensor
    pairs = [(spec, c) for spec, c in zip(terms, terms.rows[row], strict=True) if c != 0] or [
        (terms[len(terms) - 1], 0.0)
    ]
    alone = Terms(tuple(spec for spec, _ in pairs), (tuple(c for _, c in pairs),))
    return OutTensor(tensor.dtype, tensor.shape, alone, tensor.name, tensor.finite, tensor.data)


def alone(folder: Path, files: Job, **options: Any) -> list[bytes]:
    return [run(folder, [([one_row(t, row) for t in tensors], 0, at)], **options)[0] for tensors, row, at in files]


COEFFICIENTS = st.sampled_from([0.0, 0.0, 0.0, 1.0, 0.25, -0.5, 1 / 3, 0.1, -1.0, 2.5, 1e-9])


@st.composite
def rows_of(draw: st.DrawFn, n: int, most: int = 6) -> list[Row]:
    """Rows as rules make them: any, uniform over some, one checkpoint alone, normalized, some of them twice."""
    rows = []
    for _ in range(draw(st.integers(2, most))):
        style = draw(st.sampled_from(["any", "uniform", "one", "normalized", "again"]))
        row = draw(st.lists(COEFFICIENTS, min_size=n, max_size=n))
        if style == "uniform":
            last = draw(st.integers(1, n))
            row = [0.0] * (n - last) + [1 / last] * last
        elif style == "one":
            row = [float(i == draw(st.integers(0, n - 1))) for i in range(n)] if n == 1 else [0.0] * n
            row[draw(st.integers(0, n - 1))] = 1.0
        elif style == "normalized":
            row = [abs(c) + 0.125 for c in row]
            row = [c / math.fsum(row) for c in row]
        rows.append(rows[-1] if style == "again" and rows else tuple(row))
    return rows


SHAPES = st.sampled_from([(), (1,), (0,), (5,), (3, 5), (700,), (513, 3), (5_000,), (50, 70)])


@RELAXED
@given(data=st.data(), n=st.integers(1, 10), crc=st.booleans(), threads=st.integers(1, 3))
def test_rows_of_a_run_are_the_bytes_of_runs_of_one_row(
    tmp_path: Path, way: str, data: st.DataObject, n: int, crc: bool, threads: int
) -> None:
    rows = data.draw(rows_of(n))
    inputs, tensors = Inputs(tmp_path, n), []
    for i in range(data.draw(st.integers(1, 5))):
        dtype = data.draw(st.sampled_from(FLOATS + COMPLEX))
        mixed = data.draw(st.booleans()) and dtype in FLOATS
        shape = data.draw(SHAPES)
        values = [numbers(FLOATS[(k + i) % len(FLOATS)] if mixed else dtype, shape, 100 * i + k) for k in range(n)]
        turned = len(shape) == 2 and data.draw(st.booleans())
        specs = inputs.add(
            values, (1, shape[0]) if turned else c_strides(shape), data.draw(st.sampled_from([0, 0, 16]))
        )
        out = data.draw(st.sampled_from([dtype, dtype, "float32"])) if dtype in FLOATS else dtype
        own = rows if data.draw(st.integers(0, 3)) else [tuple(reversed(row)) for row in rows]  # rows differ by tensor
        tensors.append(OutTensor(DTYPES[out], shape, Terms.of_rows(specs, own), f"t{i}"))
    (last,) = inputs.add([torch.arange(9) + k for k in range(n)], (1,))[-1:]
    tensors.insert(1, OutTensor(DTYPES["int64"], (9,), Terms.copy(last), "count"))
    tensors.append(OutTensor(DTYPES["uint8"], (3,), Terms(), "data", data=b"abc"))
    inputs.save()
    begins = data.draw(st.lists(st.integers(0, 3).map(lambda k: 64 * k + 8), min_size=len(rows), max_size=len(rows)))
    files = [(tensors, row, begin) for row, begin in enumerate(begins)]
    options: dict[str, Any] = {"threads": threads, "slice_size": data.draw(st.sampled_from([None, None, 1000, 64]))}
    overflows = {"allow_nonfinite": True}  # 2.5 times the largest number of a dtype of 8 bits
    assert run(tmp_path, files, crc=crc, **options, **overflows) == alone(tmp_path, files, crc=crc, **overflows)


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX])
def test_a_row_is_the_float64_sum_of_its_terms_rounded_once(tmp_path: Path, way: str, dtype: str) -> None:
    n, rows = (
        9,
        [(0.125,) * 8 + (0.0,), (0.0, 0.5, 0.25, 0.0, 0.0, 0.0, -0.125, 0.0, 0.0), (0.0,) * 8 + (1.0,), (0.0,) * 9],
    )
    inputs = Inputs(tmp_path, n)
    values = [numbers(dtype, (40_001,), k) for k in range(n)]
    out = OutTensor(DTYPES[dtype], (40_001,), Terms.of_rows(inputs.add(values, (1,)), rows), "w")
    inputs.save()
    found = run(tmp_path, [([out], row, 8) for row in range(len(rows))], crc=True)
    wide = torch.complex128 if dtype in COMPLEX else torch.float64
    for row, data in zip(rows, found, strict=True):
        total = sum(c * each.to(wide).numpy() for c, each in zip(row, values, strict=True))
        got = torch.frombuffer(bytearray(data[8:]), dtype=values[0].dtype).to(wide).numpy()
        eps = torch.finfo(values[0].dtype).eps
        np.testing.assert_allclose(got, total, rtol=eps, atol=float(torch.finfo(values[0].dtype).tiny) + 2**-50)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(40,), (300, 200)])
def test_values_that_are_not_finite_are_refused_in_the_rows_that_use_them(
    tmp_path: Path, way: str, dtype: str, shape: tuple[int, ...]
) -> None:
    inputs = Inputs(tmp_path, 3)
    values = [numbers(dtype, shape, k) for k in range(3)]
    values[1].reshape(-1)[17] = math.nan
    specs = inputs.add(values, c_strides(shape))
    inputs.save()
    good = [(0.5, 0.0, 0.5), (1.0, 0.0, 0.0), (0.25, 0.0, 0.125)]
    for rows in (good, [*good, (0.0, 0.5, 0.5)]):
        tensor = OutTensor(DTYPES[dtype], shape, Terms.of_rows(specs, rows), "w")
        files = [([tensor], row, 0) for row in range(len(rows))]
        if len(rows) > len(good):
            with pytest.raises(NumericsError, match=r"in-1: 'w' holds NaN at \[(17|0, 17)\]"):
                run(tmp_path, files, crc=True)
        options = {"crc": True, "allow_nonfinite": len(rows) > len(good)}
        assert run(tmp_path, files, **options) == alone(tmp_path, files, **options)


def test_rows_that_copy_different_integers_are_copies(tmp_path: Path, way: str) -> None:
    rows = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    inputs, tensors = Inputs(tmp_path, 3), []
    for i, dtype in enumerate(WHOLE * 2):
        values = [(torch.arange(50 * 40).view(50, 40) * (k + 2) + i).to(getattr(torch, dtype)) for k in range(3)]
        specs = inputs.add(values, (40, 1) if i < 3 else (1, 50))
        tensors.append(OutTensor(DTYPES[dtype], (50, 40), Terms.of_rows(specs, rows), f"t{i}"))
    inputs.save()
    for crc in (False, True):
        found = run(tmp_path, [(tensors, row, 0) for row in range(len(rows))], crc=crc)
        for row, data in zip(rows, found, strict=True):
            expected = b"".join(
                (zlib.crc32(raw_bytes(v[row.index(1.0)])).to_bytes(8, "little") if crc else b"")
                + raw_bytes(v[row.index(1.0)])
                for v in inputs.values
            )
            assert data == expected


def test_more_rows_than_are_summed_at_once_are_all_written(tmp_path: Path, way: str) -> None:
    count = 2 * MOST_ROWS + 3
    rows = [(0.01 * i, 1.0 - 0.01 * i) for i in range(count)]
    inputs = Inputs(tmp_path, 2)
    specs = inputs.add([numbers("float32", (1000,), k) for k in range(2)], (1,))
    wide = inputs.add([numbers("float64", (20, 10), k) for k in range(2)], (1, 20))
    inputs.save()
    tensors = [OutTensor(each[0].dtype, each[0].shape, Terms.of_rows(each, rows), "w") for each in (specs, wide)]
    files = [(tensors, row, 0) for row in range(count)]
    assert run(tmp_path, files, crc=False) == alone(tmp_path, files, crc=False)


def test_files_need_not_have_all_tensors_nor_their_order(tmp_path: Path, way: str) -> None:
    inputs, rows = Inputs(tmp_path, 2), [(0.5, 0.5), (0.25, 0.75), (1.0, 0.0)]
    tensors = []
    for i in range(4):
        specs = inputs.add([numbers("float32", (50 + i,), 10 * i + k) for k in range(2)], (1,))
        tensors.append(OutTensor(specs[0].dtype, specs[0].shape, Terms.of_rows(specs, rows), f"t{i}"))
    inputs.save()
    files = [(tensors[:3], 0, 0), (tensors[::-1], 1, 16), (tensors[1:], 2, 8), (tensors[2:], 1, 0)]
    for crc in (False, True):
        assert run(tmp_path, files, crc=crc) == alone(tmp_path, files, crc=crc)


def test_a_term_that_no_row_uses_is_neither_read_nor_opened(tmp_path: Path, way: str) -> None:
    inputs = Inputs(tmp_path, 3)
    specs = inputs.add([numbers("float32", (70_000,), k) for k in range(3)], (1,))
    inputs.save()
    inputs.paths[1].unlink()
    tensor = OutTensor(specs[0].dtype, (70_000,), Terms.of_rows(specs, [(0.5, 0.0, 0.5), (0.0, -0.0, 1.0)]), "w")
    assert [spec.storage.path for spec in tensor.terms] == [inputs.paths[0], inputs.paths[2]]
    files = [([tensor], row, 0) for row in range(2)]
    assert run(tmp_path, files, crc=False) == alone(tmp_path, files, crc=False)


@pytest.mark.skipif(native._native is None, reason="installed without a C compiler")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts a process's calls")
@pytest.mark.parametrize(("shape", "strides"), [((400_000,), (1,)), ((600, 700), (1, 600)), ((99,), (1,))])
def test_inputs_are_read_once_for_all_rows(tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    inputs, rows = Inputs(tmp_path, 4), [tuple(0.1 * (r + k) for k in range(4)) for r in range(8)]
    many = 1 if len(strides) == 2 or shape[0] > 1000 else 300
    tensors = []
    for i in range(many):
        specs = inputs.add([numbers("float32", shape, 4 * i + k) for k in range(4)], strides)
        tensors.append(OutTensor(specs[0].dtype, shape, Terms.of_rows(specs, rows), f"t{i}"))
    inputs.save()

    def count() -> tuple[int, int]:
        fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(fields["rchar"]), int(fields["syscr"])

    with ExitStack() as stack:
        outputs = []
        for row in range(8):
            plan = planned(f"out-{row}", tensors, 8 * row, crc=False, kept=[])
            outputs.append(OutFile(plan, stack.enter_context((tmp_path / f"out-{row}").open("wb")).fileno(), row))
        before = count()
        engine.run(outputs, threads=2)
        after = count()
    nbytes = sum(map(len, inputs.content))
    assert nbytes * 0.99 < after[0] - before[0] < nbytes * 1.02 + 20_000
    assert after[1] - before[1] < 6000


def test_progress_counts_an_input_once_and_every_output(tmp_path: Path, way: str) -> None:
    inputs = Inputs(tmp_path, 2)
    specs = inputs.add([numbers("float32", (5000,), k) for k in range(2)], (1,))
    inputs.save()
    tensor = OutTensor(specs[0].dtype, (5000,), Terms.of_rows(specs, [(0.5, 0.5), (0.1, 0.9), (0.2, 0.8)]), "w")
    seen: list[int] = []
    run(tmp_path, [([tensor], row, 0) for row in range(3)], crc=True, on_progress=seen.append)
    assert seen[-1] == 4 * 5000 * (2 + 3)


@pytest.mark.parametrize("crc", [False, True])
def test_rows_on_a_device_are_the_bytes_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crc: bool) -> None:
    monkeypatch.setattr(streams, "Gpu", lambda _: Cpu())
    monkeypatch.setattr(pipeline, "LEAST", 8)
    monkeypatch.setattr(pipeline, "MOST", 64)
    rows, tensors = [(0.5, 0.25, 0.25), (0.0, 0.0, 1.0), (0.0, 0.5, 0.5), (0.5, 0.25, 0.25)], []
    inputs = Inputs(tmp_path, 3)
    for i, dtype in enumerate(["float32", "float64", "bfloat16", "complex64"]):
        specs = inputs.add([numbers(dtype, (300,), 10 * i + k) for k in range(3)], (1,))
        tensors.append(OutTensor(specs[0].dtype, (300,), Terms.of_rows(specs, rows), dtype))
    inputs.save()
    files = [(tensors, row, 8 * row) for row in range(len(rows))]
    expected = run(tmp_path, files, crc=crc)
    assert run(tmp_path, files, crc=crc, devices=("gpu",), threads=2, gpu_memory=10**6) == expected


def test_memory_needed_is_bounded_whatever_the_rows_and_terms(tmp_path: Path) -> None:
    specs = [make_spec(DTYPES["float32"], (10**9,), Storage(tmp_path / str(i), 0, 4 * 10**9)) for i in range(40)]

    def needed(n: int, rows: int, strides: tuple[int, ...] = (1,)) -> int:
        shape = (10**9,) if len(strides) == 1 else (40_000, 25_000)
        own = [TensorSpec(spec.dtype, shape, strides, 0, spec.storage) for spec in specs[:n]]
        row = [tuple(0.01 * (r + k + 1) for k in range(n)) for r in range(rows)]
        return engine.memory_needed([OutTensor(DTYPES["float32"], shape, Terms.of_rows(own, row), "w")], threads=1)

    assert needed(2, 8) == needed(40, 8)
    assert needed(2, MOST_ROWS) == needed(2, 10 * MOST_ROWS)
    if native._native is not None:
        assert needed(8, 1) < 2.5e6
        assert needed(8, 8) < 5e6
        assert needed(8, MOST_ROWS) < 9e6
        assert needed(8, MOST_ROWS, (1, 40_000)) < 25e6


def test_a_row_that_cannot_be_written_is_named(tmp_path: Path, way: str) -> None:
    inputs = Inputs(tmp_path, 2)
    specs = inputs.add([numbers("float32", (70_000,), k) for k in range(2)], (1,))
    inputs.save()
    tensor = OutTensor(specs[0].dtype, (70_000,), Terms.of_rows(specs, [(0.5, 0.5), (0.1, 0.9)]), "w")
    plans = [planned(f"out-{row}", [tensor], 0, crc=False, kept=[]) for row in range(2)]
    with (tmp_path / "out").open("w+b") as good, inputs.paths[0].open("rb") as bad:
        good.truncate(plans[0].size)
        with (
            mock.patch.object(engine, "reserve"),
            pytest.raises(WriteError, match="out-1: writing failed"),
        ):
            engine.run([OutFile(plans[0], good.fileno(), 0), OutFile(plans[1], bad.fileno(), 1)])


def test_terms_of_rows_takes_sums_apart_and_drops_what_no_row_uses(tmp_path: Path) -> None:
    a, b, c = (make_spec(DTYPES["float32"], (3,), Storage(tmp_path / name, 0, 12)) for name in "abc")
    terms = Terms.of_rows([SummedSpec.of([(a, 1.0), (b, -0.5)]), c], [(2.0, 0.0), (0.0, 0.0)])
    assert [*terms] == [a, b, c]
    assert terms.rows == ((2.0, -1.0, 0.0), (0.0, 0.0, 0.0))
    assert [used(row) for row in terms.rows] == [(0, 1), (2,)]
    assert [*terms.of_these([0])] == [a, b]
    assert terms.of_these([1]).rows == ((0.0,),)
    assert [*Terms.of([(a, 0.5), (b, 0.0)])] == [a]


def test_of_these_keeps_files_with_identical_headers_together(tmp_path: Path) -> None:
    spec = make_spec(DTYPES["float32"], (3,), Storage(tmp_path / "a", 0, 12))
    files = ((tmp_path / "a", 0), (tmp_path / "b", 8), (tmp_path / "c", 16))
    terms = Terms((spec,), ((0.5, 0.5, 0.0), (0.0, 0.5, 0.5)), files).of_these([1])
    assert terms.files == files[1:]
    assert terms.rows == ((0.5, 0.5),)
    assert [(each.storage.path, each.begin) for each in terms] == [(tmp_path / "b", 8), (tmp_path / "c", 16)]
