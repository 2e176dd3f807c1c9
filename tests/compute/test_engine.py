"""The engine: exact sums, one rounding, the same bytes for any slice size and thread count."""

from __future__ import annotations

import bisect
import math
import os
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as safetensors_library
import torch
from conftest import FLOATS
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.checkpoints.open import open_checkpoint
from ckpt_tools.compute import engine, native
from ckpt_tools.compute import torch_sums as summing
from ckpt_tools.compute.work_units import OutFile
from ckpt_tools.errors import CkptError, CorruptError, NumericsError, ReadError, WriteError
from ckpt_tools.formats.file_plan import OutTensor, Terms
from ckpt_tools.formats.format import Writing
from ckpt_tools.formats.safetensors import SAFETENSORS
from ckpt_tools.tensors import DTYPES, TensorSpec

Save = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("way")
RELAXED = settings(max_examples=25)


def average(
    tmp_path: Path,
    tensors: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    dtype: str | None = None,
    slice_size: int | None = None,
    threads: int = 2,
    allow_nonfinite: bool = False,
) -> torch.Tensor:
    """Sum tensors with the engine alone and read the result back with the safetensors library."""
    specs = []
    for i, tensor in enumerate(tensors):
        torch.save({"w": tensor}, tmp_path / f"{i}.pth")
        spec = open_checkpoint(tmp_path / f"{i}.pth").specs["w"]
        assert isinstance(spec, TensorSpec)
        specs.append(spec)
    out_dtype = DTYPES[dtype] if dtype else specs[0].dtype
    out = OutTensor(out_dtype, specs[0].shape, Terms(tuple(specs), (tuple(coefficients),)), "w")
    plan = SAFETENSORS.plan({"w": out}, Writing(name="out"))[0]
    path = tmp_path / "out.safetensors"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.truncate(fd, plan.size)
        engine.run([OutFile(plan, fd)], threads=threads, slice_size=slice_size, allow_nonfinite=allow_nonfinite)
    finally:
        os.close(fd)
    return safetensors_library.load(path.read_bytes())["w"]


def exact(tensors: Sequence[torch.Tensor], coefficients: Sequence[float]) -> list[Fraction]:
    columns = zip(*(t.double().reshape(-1).tolist() for t in tensors), strict=True)
    return [
        sum((Fraction(c) * Fraction(x) for c, x in zip(coefficients, xs, strict=True)), Fraction()) for xs in columns
    ]


@cache
def finite_values(dtype: torch.dtype) -> tuple[list[float], list[int]]:
    """All finite values of a narrow dtype in order, and the bit pattern of each."""
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    values = torch.arange(2 ** (8 * dtype.itemsize)).to(bits).view(dtype).double()
    codes = [code for code in torch.argsort(values).tolist() if math.isfinite(values[code])]
    return values[codes].tolist(), codes


def nearest_even(value: Fraction, dtype: torch.dtype) -> set[float]:
    """Return the value of a dtype nearest to an exact number, the even one at a tie, found among its neighbours."""
    values, codes = finite_values(dtype)
    at = bisect.bisect_left(values, value)
    around = range(max(0, at - 3), min(len(values), at + 3))
    best = min(abs(Fraction(values[i]) - value) for i in around)
    ties = [i for i in around if abs(Fraction(values[i]) - value) == best]
    distinct = {values[i] for i in ties}
    return distinct if len(distinct) == 1 else {values[i] for i in ties if codes[i] % 2 == 0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_run_rounds_ties_and_subnormals_once(tmp_path: Path, dtype: str) -> None:
    """Midway between neighbours, and a hair to either side, in normal and subnormal range: where rounding
    by way of float32 goes wrong."""
    torch_dtype = getattr(torch, dtype)
    info = torch.finfo(torch_dtype)
    base = [
        1.0,
        1.0 + info.eps,
        3.0,
        info.tiny,
        info.tiny * (1 + info.eps),
        info.smallest_normal * info.eps,
        info.max / 2,
    ]
    values = []
    for b in base:
        low = torch.tensor(b, dtype=torch_dtype)
        bits = {1: torch.uint8, 2: torch.int16}[low.element_size()]
        high = (low.view(bits) + 1).view(torch_dtype).double().item()
        middle = (low.double().item() + high) / 2
        values += [middle, middle * (1 + 2**-40), middle * (1 - 2**-40), -middle, low.double().item()]
    found = average(tmp_path, [torch.tensor(values, dtype=torch.float64)], [1.0], dtype=dtype)
    for got, want in zip(found.double().tolist(), values, strict=True):
        assert got in nearest_even(Fraction(want), torch_dtype), want


@RELAXED
@given(
    data=st.data(),
    dtype=st.sampled_from([*FLOATS[:4], "complex64", "complex128"]),
    n=st.integers(1, 6),
    numel=st.integers(1, 300),
)
def test_run_writes_the_same_bytes_for_any_slice_size_and_threads(
    tmp_path: Path, data: st.DataObject, dtype: str, n: int, numel: int
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    kind = getattr(torch, dtype)
    real = torch.float64 if not kind.is_complex else torch.complex128
    tensors = [torch.randn(numel, generator=generator, dtype=real).to(kind) for _ in range(n)]
    coefficients = [c / 10 for c in data.draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n))]
    whole = average(tmp_path, tensors, coefficients, threads=1, dtype=None if dtype != "complex128" else "complex64")
    pieces = average(
        tmp_path,
        tensors,
        coefficients,
        slice_size=data.draw(st.integers(1, 350)),
        threads=data.draw(st.integers(1, 4)),
        dtype=None if dtype != "complex128" else "complex64",
    )
    assert whole.view(torch.uint8).equal(pieces.view(torch.uint8))


@RELAXED
@given(
    data=st.data(),
    dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16", "complex64"]),
    n=st.integers(1, 12),
    decay=st.floats(0, 1),
)
def test_run_returns_identical_checkpoints_bit_for_bit(
    tmp_path: Path, data: st.DataObject, dtype: str, n: int, decay: float
) -> None:
    from ckpt_tools.series.rules.ema import ema

    kind = getattr(torch, dtype)
    item = {
        "float64": torch.int64,
        "float32": torch.int32,
        "float16": torch.int16,
        "bfloat16": torch.int16,
        "complex64": torch.int64,
    }[dtype]
    info = torch.iinfo(item)
    bits = torch.tensor(data.draw(st.lists(st.integers(info.min, info.max), min_size=1, max_size=20)), dtype=item)
    tensor = bits.view(kind)
    tensor = torch.where(torch.isfinite(tensor), tensor, torch.zeros((), dtype=kind))
    found = average(tmp_path, [tensor] * n, ema(n, decay=decay))
    assert found.view(item).equal(tensor.view(item))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64", "float64"])
def test_run_names_file_tensor_and_place_of_a_value_that_is_not_finite(
    tmp_path: Path, value: float, dtype: str
) -> None:
    tensors = [torch.zeros(3, 50, dtype=getattr(torch, dtype)) for _ in range(3)]
    tensors[1][2, 7] = value
    with pytest.raises(NumericsError, match=r"1\.pth: 'w' holds (NaN|-?infinity) at \[2, 7\]"):
        average(tmp_path, tensors, [0.5, 0.25, 0.25], slice_size=16)
    found = average(tmp_path, tensors, [1 / 3] * 3, allow_nonfinite=True)
    assert not torch.isfinite(found[2, 7])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "complex64"])
def test_run_keeps_infinity_where_it_is_allowed(tmp_path: Path, dtype: str) -> None:
    values = torch.tensor([[1.0, -math.inf, math.inf], [2.0, -math.inf, math.inf]], dtype=getattr(torch, dtype))
    found = average(tmp_path, list(values), [0.5, 0.5], allow_nonfinite=True)
    real = torch.view_as_real(found)[:, 0] if found.is_complex() else found
    assert real.tolist() == [1.5, -math.inf, math.inf]


def test_run_does_not_overflow_on_float64_of_opposite_signs(tmp_path: Path) -> None:
    tensors = [torch.tensor([1.7e308, 1.0], dtype=torch.float64), torch.tensor([-1.7e308, 3.0], dtype=torch.float64)]
    assert average(tmp_path, tensors, [0.5, 0.5]).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32"])
def test_run_rejects_a_result_beyond_the_output_dtype(tmp_path: Path, dtype: str) -> None:
    largest = torch.finfo(getattr(torch, dtype)).max
    tensors = [torch.tensor([largest, 0.0], dtype=torch.float64)]
    with pytest.raises(NumericsError, match=f"average of 'w' overflows {dtype}"):
        average(tmp_path, tensors, [1.5], dtype=dtype)
    assert average(tmp_path, tensors, [1.0], dtype=dtype).double().tolist() == [largest, 0.0]


def test_run_rejects_a_file_cut_after_its_header_was_read(tmp_path: Path, save: Save) -> None:
    path = save("a.pth", {"w": torch.zeros(100_000)})
    spec = open_checkpoint(path).specs["w"]
    assert isinstance(spec, TensorSpec)
    os.truncate(path, 1000)
    out = OutTensor(spec.dtype, spec.shape, Terms((spec,), ((0.5,),)), "w")
    plan = SAFETENSORS.plan({"w": out}, Writing(name="out"))[0]
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(CorruptError, match="ends before its tensors do"):
            engine.run([OutFile(plan, fd)])
        path.unlink()
        with pytest.raises(ReadError, match=r"a\.pth: no such file"):
            engine.run([OutFile(plan, fd)])
    finally:
        os.close(fd)


def test_run_names_the_output_on_a_full_disk(tmp_path: Path, save: Save) -> None:
    spec = open_checkpoint(save("a.pth", {"w": torch.ones(100_000)})).specs["w"]
    assert isinstance(spec, TensorSpec)
    out = OutTensor(spec.dtype, spec.shape, Terms((spec, spec), ((0.5, 0.5),)), "w")
    plan = SAFETENSORS.plan({"w": out}, Writing(name="out.safetensors"))[0]
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(WriteError, match=r"out.safetensors: writing failed: No space left on device"):
            engine.run([OutFile(plan, fd)])
    finally:
        os.close(fd)


def test_run_rejects_a_file_that_changes_meanwhile(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("a.pth", {"w": torch.zeros(3000)})
    spec = open_checkpoint(path).specs["w"]
    assert isinstance(spec, TensorSpec)
    out = OutTensor(spec.dtype, spec.shape, Terms((spec,), ((0.5,),)), "w")
    plan = SAFETENSORS.plan({"w": out}, Writing(name="out"))[0]
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    used = engine.OpenFiles.used
    monkeypatch.setattr(engine.OpenFiles, "used", lambda *given: (os.utime(path, (1, 1)), used(*given)))
    try:
        with pytest.raises(CorruptError, match="changed while it was read"):
            engine.run([OutFile(plan, fd)])
    finally:
        os.close(fd)


@pytest.mark.parametrize("slice_size", [1, 7, 1000])
def test_run_writes_bytes_that_no_input_holds(tmp_path: Path, slice_size: int) -> None:
    values = torch.arange(100, dtype=torch.float32)
    out = OutTensor(DTYPES["float32"], (10, 10), Terms(), "w", data=bytes(values.view(torch.uint8).tolist()))
    plan = SAFETENSORS.plan({"w": out}, Writing(name="out"))[0]
    path = tmp_path / "out.safetensors"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.truncate(fd, plan.size)
        engine.run([OutFile(plan, fd)], slice_size=slice_size, threads=2)
    finally:
        os.close(fd)
    assert safetensors_library.load_file(path)["w"].equal(values.view(10, 10))


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_run_computes_with_one_torch_thread_and_restores_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, value: float
) -> None:
    """What C finds infinite comes to torch when the job is under way."""
    compute, seen = summing.Worker.compute, set()

    def watched(*args: Any) -> memoryview:
        seen.add(torch.get_num_threads())
        return compute(*args)

    monkeypatch.setattr(summing.Worker, "compute", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        average(tmp_path, [torch.tensor([value, 1.0])], [0.5], allow_nonfinite=True)
        assert seen == ({1} if value or way == "torch" else set())
        assert torch.get_num_threads() == 3
        with pytest.raises(NumericsError, match="NaN"):
            average(tmp_path, [torch.tensor([float("nan")])], [0.5])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("allowed", [0, 2])
def test_run_goes_on_with_the_threads_that_the_system_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    start, started = threading.Thread.start, []

    def scarce(thread: threading.Thread) -> None:
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    tensors = [torch.randn(3000), torch.randn(3000)]
    if allowed:
        found = average(tmp_path, tensors, [0.5, 0.5], threads=8, slice_size=100)
        assert torch.equal(found, ((tensors[0].double() + tensors[1].double()) * 0.5).float())
        assert len(started) == allowed
    else:
        with pytest.raises(CkptError, match="Can't start new thread: the system has no more, or no memory"):
            average(tmp_path, tensors, [0.5, 0.5], threads=8)


def test_run_waits_for_no_disk_when_it_fails(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is not worth writing out, however much of it there is."""
    begun: list[int] = []

    def slow(fd: int, offset: int, nbytes: int) -> None:
        begun.append(offset)
        for thread in threading.enumerate():  # until the workers have failed
            if thread.name.startswith("ckpt_"):
                thread.join(60)

    monkeypatch.setattr(native, "start_disk", slow)
    large = torch.ones(600_000)
    spec = open_checkpoint(save("a.pth", {"w0": large})).specs["w0"]
    bad = open_checkpoint(save("b.pth", {"w": torch.full((600_000,), math.nan)})).specs["w"]
    assert isinstance(spec, TensorSpec)
    assert isinstance(bad, TensorSpec)
    outs = {f"w{i}": OutTensor(spec.dtype, spec.shape, Terms((spec, spec), ((0.5, 0.5),)), f"w{i}") for i in range(4)}
    outs["bad"] = OutTensor(bad.dtype, bad.shape, Terms((bad, bad), ((0.5, 0.5),)), "bad")
    plan = SAFETENSORS.plan(outs, Writing(name="out"))[0]
    fd = os.open(tmp_path / "out.safetensors", os.O_RDWR | os.O_CREAT)
    try:
        os.truncate(fd, plan.size)
        with pytest.raises(NumericsError, match="'bad' holds NaN"):
            engine.run([OutFile(plan, fd)], threads=1, slice_size=600_000)
    finally:
        os.close(fd)
    assert len(begun) == 1  # the one that was under way
