"""Staging pipeline: the bytes of the CPU, whatever the device, its memory, the ring, the threads; and nothing hangs.

A CPU stands in for the device, as it is and as one that does nothing until it is waited for (`late`); the same tests
run on a GPU where there is one: `pytest -m cuda`.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import FLOATS
from fake_gpu import Cpu, Late, LateEvent, LateStream
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from ckpt_tools.checkpoints.open import open_checkpoint
from ckpt_tools.compute import engine
from ckpt_tools.compute.gpu import pipeline, streams
from ckpt_tools.compute.work_units import OutFile, Slice, Target
from ckpt_tools.errors import CorruptError, NumericsError, UsageError, WriteError
from ckpt_tools.formats.file_plan import Computed, FilePlan, OutTensor, Payload, Segment, Terms
from ckpt_tools.formats.format import Writing
from ckpt_tools.formats.safetensors import SAFETENSORS
from ckpt_tools.tensors import DTYPES, TensorSpec

DTYPE_NAMES = [*FLOATS, "complex128", "complex64", "complex32"]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
RELAXED = settings(max_examples=12)
CUDA = pytest.param(
    "cuda:0",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")],
)


@pytest.fixture(params=["cpu", "late", CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a device, with loads so small that a few tensors make many."""
    if request.param != "cuda:0":
        monkeypatch.setattr(streams, "Gpu", lambda _: Late() if request.param == "late" else Cpu())
    monkeypatch.setattr(pipeline, "LEAST", 8)
    monkeypatch.setattr(pipeline, "MOST", 64)
    return str(request.param)


def out_tensors(path: Path, series: Sequence[dict[str, torch.Tensor]], coefficients: Sequence[float]) -> dict[str, Any]:
    """Save a series and make its weighted sums, those of integers copied."""
    rows = []
    for i, tensors in enumerate(series):
        torch.save(tensors, path / f"{i}.pth")
        rows.append(open_checkpoint(path / f"{i}.pth").specs)
    found = {}
    for name, last in rows[-1].items():
        assert isinstance(last, TensorSpec)
        specs: Any = tuple([row[name] for row in rows])
        terms = Terms(specs, (tuple(coefficients),)) if last.dtype.averaged else Terms.copy(last)
        found[name] = OutTensor(last.dtype, last.shape, terms, name)
    return found


def written(path: Path, tensors: dict[str, OutTensor], *, checksums: bool = False, **options: Any) -> bytes:
    """Run the engine and return the bytes of all tensors, and their checksums if they are asked for."""
    kept: list[bytes] = []

    def keep(crcs: Sequence[int]) -> bytes:
        kept.append(repr(list(crcs)).encode())
        return b""

    ends = list(itertools.accumulate((tensor.nbytes for tensor in tensors.values()), initial=0))
    segments: list[Segment] = [Payload(*slot) for slot in zip(tensors.values(), ends[:-1], strict=True)]
    if checksums:
        segments.append(Computed(ends[-1], 0, tuple(tensors.values()), keep))
    plan = FilePlan("out", ends[-1], tuple(segments))
    fd = os.open(path / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.truncate(fd, plan.size)
        engine.run([OutFile(plan, fd)], **options)
    finally:
        os.close(fd)
    return (path / "out").read_bytes() + b"".join(kept)


def random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(list(shape), generator=generator, dtype=wide).to(dtype)


def series_of(n: int, seed: int, dtypes: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {f"w{i}": random(shapes[i], getattr(torch, dtype), generator) for i, dtype in enumerate(dtypes)}
        for _ in range(n)
    ]


@RELAXED
@given(data=st.data(), n=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_run_on_a_device_writes_the_bytes_of_the_cpu(
    tmp_path: Path, device: str, data: st.DataObject, n: int, seed: int
) -> None:
    dtypes = data.draw(st.lists(st.sampled_from(DTYPE_NAMES), min_size=1, max_size=6))
    shapes = [data.draw(st.sampled_from([(), (1,), (3, 5), (0,), (7, 40), (200,)])) for _ in dtypes]
    series = series_of(n, seed, dtypes, shapes)
    for i, tensors in enumerate(series):
        tensors["count"] = torch.arange(100) + i
        tensors["turned"] = torch.arange(60.0).add(i).view(6, 10).t()
    weights = data.draw(st.lists(st.integers(-9, 9).filter(bool), min_size=n, max_size=n))
    same = data.draw(st.booleans())
    coefficients = [1 / n] * n if same else [w / sum(map(abs, weights)) for w in weights]
    tensors = out_tensors(tmp_path, series, coefficients)
    tensors["data"] = OutTensor(DTYPES["uint8"], (9,), Terms(), "data", data=b"123456789")
    checksums = data.draw(st.booleans())
    expected = written(tmp_path, tensors, checksums=checksums)
    with mock.patch.object(pipeline, "RING", data.draw(st.integers(1, 4))):
        found = written(
            tmp_path,
            tensors,
            checksums=checksums,
            threads=data.draw(st.integers(1, 3)),
            slice_size=data.draw(st.one_of(st.none(), st.integers(1, 100))),
            devices=(device,) * data.draw(st.integers(1, 2)),
            gpu_memory=data.draw(st.sampled_from([20_000, 50_000, 10**6])),
        )
    assert found == expected


@pytest.mark.parametrize("out", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS[:4])
def test_run_on_a_device_rounds_to_another_dtype_as_the_cpu_does(
    tmp_path: Path, device: str, dtype: str, out: str
) -> None:
    """Midway between neighbours too, and among subnormals: the mean of neighbours in the narrower of both dtypes."""
    narrow = min(getattr(torch, dtype), getattr(torch, out), key=lambda d: d.itemsize)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[narrow.itemsize]
    low = torch.cat([torch.arange(0, 70).to(bits), torch.full((30,), 0.7, dtype=narrow).view(bits)])
    pair = [(low + i).view(narrow).double().to(getattr(torch, dtype)) for i in range(2)]
    tensors = out_tensors(tmp_path, [{"w": each} for each in pair], [0.5, 0.5])
    tensors["w"] = OutTensor(DTYPES[out], (100,), tensors["w"].terms, "w")
    assert written(tmp_path, tensors, devices=(device,)) == written(tmp_path, tensors)


def test_run_on_a_device_writes_large_tensors_as_the_cpu_does(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With loads as large as in earnest, so that a device has time to be behind."""
    monkeypatch.setattr(pipeline, "MOST", 1 << 20)
    series = series_of(
        3, 0, ["float32", "bfloat16", "float64", "float32"], [(3_000_000,), (1500, 1000), (1_000_000,), (9,)]
    )
    tensors = out_tensors(tmp_path, series, [0.2, 0.3, 0.5])
    found = written(tmp_path, tensors, checksums=True, devices=(device,), threads=2, gpu_memory=10**8)
    assert found == written(tmp_path, tensors, checksums=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64", "float64"])
def test_run_on_a_device_treats_values_that_are_not_finite_as_the_cpu_does(
    tmp_path: Path, device: str, dtype: str, value: float
) -> None:
    series = series_of(3, 0, [dtype, dtype], [(20,), (3, 50)])
    series[1]["w1"][2, 7] = value
    tensors = out_tensors(tmp_path, series, [0.25, 0.25, 0.5])
    with pytest.raises(NumericsError, match=r"1\.pth: 'w1' holds (NaN|-?infinity) at \[2, 7\]"):
        written(tmp_path, tensors, devices=(device,))
    expected = written(tmp_path, tensors, allow_nonfinite=True)
    assert written(tmp_path, tensors, allow_nonfinite=True, devices=(device,)) == expected


def test_run_on_a_device_rejects_a_result_beyond_its_dtype_as_the_cpu_does(tmp_path: Path, device: str) -> None:
    largest = torch.finfo(torch.float16).max
    tensors = out_tensors(tmp_path, [{"w": torch.full((3,), largest, dtype=torch.float16)}], [1.5])
    with pytest.raises(NumericsError, match="average of 'w' overflows float16"):
        written(tmp_path, tensors, devices=(device,))


def test_run_on_a_device_hides_differences_that_overflow_on_the_way(tmp_path: Path, device: str) -> None:
    series = [{"w": torch.tensor([sign * 1.7e308, 2.0 - sign], dtype=torch.float64)} for sign in (1, -1)]
    tensors = out_tensors(tmp_path, series, [0.5, 0.5])
    found = written(tmp_path, tensors, devices=(device,))
    assert torch.frombuffer(bytearray(found), dtype=torch.float64).tolist() == [0.0, 2.0]


def test_run_on_a_device_rejects_a_truncated_file_and_ends(tmp_path: Path, device: str) -> None:
    tensors = out_tensors(tmp_path, series_of(3, 0, ["float32"], [(10_000,)]), [0.5, 0.25, 0.25])
    os.truncate(tmp_path / "1.pth", 9000)
    with pytest.raises(CorruptError, match=r"1\.pth: ends before its tensors do"):
        written(tmp_path, tensors, devices=(device, device), threads=4)


def test_run_on_a_device_rejects_an_output_that_cannot_be_written_and_ends(tmp_path: Path, device: str) -> None:
    tensors = out_tensors(tmp_path, series_of(2, 0, ["float32"], [(10_000,)]), [0.5, 0.25])
    plan = SAFETENSORS.plan(tensors, Writing(name="out"))[0]
    fd = os.open(tmp_path / "0.pth", os.O_RDONLY)
    try:
        with pytest.raises(WriteError, match="out: writing failed"):
            engine.run([OutFile(plan, fd)], devices=(device,), threads=3)
    finally:
        os.close(fd)


def test_run_on_a_device_counts_every_byte_once(tmp_path: Path, device: str) -> None:
    tensors = out_tensors(tmp_path, series_of(3, 0, ["float32", "float64"], [(10_000,), (3,)]), [0.2, 0.3, 0.5])
    seen: list[int] = []
    written(tmp_path, tensors, devices=(device,), on_progress=seen.append)
    assert seen[-1] == 4 * (10_000 * 4 + 3 * 8)


def test_run_on_a_device_stops_all_pipelines_on_an_interrupt(tmp_path: Path, device: str) -> None:
    tensors = out_tensors(tmp_path, series_of(3, 0, ["float32"], [(300_000,)]), [0.2, 0.3, 0.5])

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt("by the user")

    with pytest.raises(KeyboardInterrupt, match="by the user"):
        written(tmp_path, tensors, devices=(device,), threads=3, on_progress=interrupt)
    assert not any(thread.name.startswith("ckpt") for thread in threading.enumerate())


def use(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Cpu]) -> list[Cpu]:
    """Let pipelines use such devices, and return those that they open."""
    opened: list[Cpu] = []

    def open_one(_: str) -> Cpu:
        opened.append(make())
        return opened[-1]

    monkeypatch.setattr(streams, "Gpu", open_one)
    return opened


class Scarce(Late):
    """A device with so much memory, and which lacks some at certain moments."""

    def __init__(self, nbytes: int, moments: Sequence[int] = ()) -> None:
        super().__init__()
        self.nbytes, self.moments = nbytes, moments
        self.taken: list[int] = []
        self.calls = 0

    def empty(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.nbytes:
            raise torch.cuda.OutOfMemoryError(f"{nbytes} bytes")
        self.taken.append(nbytes)
        return super().empty(nbytes)

    def using(self, stream: Any) -> AbstractContextManager[object]:
        self.calls += 1
        if self.calls in self.moments:
            raise torch.cuda.OutOfMemoryError("at this moment")
        return super().using(stream)


@pytest.mark.parametrize("nbytes", [10**9, 10_000, 5000, 4000, 0])
def test_run_on_a_device_shrinks_pieces_and_ends_on_the_cpu_for_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    monkeypatch.setattr(pipeline, "LEAST", 16)
    monkeypatch.setattr(pipeline, "MOST", 1024)
    opened: Any = use(monkeypatch, lambda: Scarce(nbytes))
    tensors = out_tensors(tmp_path, series_of(3, 0, ["float32", "float16"], [(5000,), (30,)]), [0.2, 0.3, 0.5])
    assert written(tmp_path, tensors, devices=("gpu",), threads=2) == written(tmp_path, tensors)
    assert [bool(each.taken) for each in opened] == [nbytes > 0] * 2
    assert all(taken <= nbytes for each in opened for taken in each.taken)


@RELAXED
@given(moments=st.sets(st.integers(1, 60), max_size=4))
def test_run_on_a_device_loses_no_byte_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moments: set[int]
) -> None:
    """Of several kinds, so that what is under way when it happens is of another kind than what comes next."""
    monkeypatch.setattr(pipeline, "LEAST", 8)
    monkeypatch.setattr(pipeline, "MOST", 64)
    use(monkeypatch, lambda: Scarce(10**9, sorted(moments)))
    tensors = out_tensors(tmp_path, series_of(2, 0, ["float32", "float16", "float64"], [(200,)] * 3), [0.2, 0.3])
    seen: list[int] = []
    found = written(tmp_path, tensors, checksums=True, devices=("gpu",), threads=1, on_progress=seen.append)
    assert found == written(tmp_path, tensors, checksums=True)
    assert seen[-1] == 3 * 200 * (4 + 2 + 8)


def test_run_on_a_device_frees_memory_before_it_takes_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a pipeline that has to shrink shrinks once."""

    class Exact(Scarce):
        def empty(self, nbytes: int) -> torch.Tensor:
            if any(not reference.expired() for reference in held):
                raise torch.cuda.OutOfMemoryError("held already")
            memory = super().empty(nbytes)
            held.append(StorageWeakRef(memory.untyped_storage()))
            return memory

    held: list[StorageWeakRef] = []
    opened: Any = use(monkeypatch, lambda: Exact(10**9, [20]))
    tensors = out_tensors(tmp_path, series_of(5, 0, ["float32"], [(50_000,)]), [0.2] * 5)
    found = written(tmp_path, tensors, devices=("gpu",), threads=1, slice_size=10_000, gpu_memory=10**6)
    assert found == written(tmp_path, tensors)
    before, after = opened[0].taken
    assert before == 2 * after - 11 * 256  # half the reals


def test_run_shares_the_work_among_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(streams, "Gpu", lambda name: names.append(name) or Cpu())
    tensors = out_tensors(tmp_path, series_of(2, 0, ["float32"], [(1000,)]), [0.5, 0.5])
    written(tmp_path, tensors, devices=("a", "b", "c"), threads=1)
    assert sorted(names) == ["a", "b", "c"]
    names.clear()
    written(tmp_path, tensors, devices=("a", "b"), threads=4)
    assert sorted(names) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "complex64"])
@pytest.mark.parametrize("memory", [20 * 10**6, 300 * 10**6])
def test_run_takes_no_more_of_a_device_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, memory: int
) -> None:
    opened: Any = use(monkeypatch, lambda: Scarce(memory))
    tensors = out_tensors(tmp_path, series_of(2, 0, [dtype], [(100_000,)]), [0.5, 0.5])
    written(tmp_path, tensors, devices=("gpu",), threads=3, gpu_memory=memory)
    taken = sum(sum(each.taken) for each in opened)
    assert len(opened) == 3
    assert taken <= memory
    assert taken > memory / 2.1 or taken > 3 * pipeline.MOST * 40  # as many reals as a power of two allows


def test_memory_needed_reports_the_memory_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Cpu):
        pins = 0

        def pinned(self, nbytes: int) -> torch.Tensor:
            Counting.pins += nbytes
            return super().pinned(nbytes)

    use(monkeypatch, Counting)
    tensors = out_tensors(tmp_path, series_of(2, 0, ["float32"], [(1000,)]), [0.5, 0.5])
    written(tmp_path, tensors, devices=("gpu",), threads=2, gpu_memory=10**7)
    needed = engine.memory_needed(tensors.values(), 2, ("gpu",), 10**7)
    without = engine.memory_needed(tensors.values(), 2)
    assert 0 <= Counting.pins - (needed - without) < 1000  # a few numbers beside the buffers


def test_memory_needed_rejects_too_little_memory_of_a_gpu_and_says_the_least(tmp_path: Path) -> None:
    tensors = out_tensors(tmp_path, series_of(2, 0, ["float32"], [(10,)]), [0.5, 0.5])
    with pytest.raises(UsageError, match=r"`gpu_memory=1000`: 8 threads need at least 2MB on a GPU"):
        engine.memory_needed(tensors.values(), 8, ("cuda:0",), 1000)
    assert engine.memory_needed(tensors.values(), 8, ("cuda:0",), 2 * 10**6) > 0


def test_run_opens_no_device_where_nothing_is_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = use(monkeypatch, Cpu)
    tensors = out_tensors(tmp_path, [{"n": torch.arange(10)}], [1.0])
    assert written(tmp_path, tensors, devices=("gpu",), gpu_memory=1) == torch.arange(10).numpy().tobytes()
    assert opened == []


def test_pipeline_hands_nothing_over_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are freed only after the device has done with them: all streams are empty at the end."""
    monkeypatch.setattr(pipeline, "MOST", 64)
    monkeypatch.setattr(pipeline, "LEAST", 8)
    tensors = out_tensors(tmp_path, series_of(4, 0, ["float32"], [(1000,)]), [0.25] * 4)
    late, stop = Late(), threading.Event()
    size = pipeline.choose_chunk(tensors.values(), 1, 10**6)
    assert size is not None
    with engine.OpenFiles() as files:
        files.open_all(path for tensor in tensors.values() for spec in tensor.terms for path in spec.paths)
        out = OutFile(SAFETENSORS.plan(tensors, Writing(name="out"))[0], -1)
        part = Slice(tensors["w0"], (Target(out, 0),), 0, 100)
        with pipeline.StagingPipeline(late, size, files, lambda *_: None, stop) as staging:
            stream = late.streams[0]
            monkeypatch.setattr(stream, "wait_event", lambda event: (stop.set(), LateStream.wait_event(stream, event)))
            assert staging.fill(pipeline.WorkUnit(part.tensor.group_key, (part,))) == []
            assert staging.finish() == []
            assert any(each.waiting for each in late.streams)
    assert not any(each.waiting for each in late.streams)


@pytest.mark.parametrize(("where", "what"), [(LateStream, "wait_event"), (LateEvent, "synchronize")])
def test_run_on_a_late_device_shows_a_missing_wait_in_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: type, what: str
) -> None:
    """That the late device is as late as a GPU may be."""
    monkeypatch.setattr(pipeline, "MOST", 64)
    monkeypatch.setattr(pipeline, "LEAST", 8)
    use(monkeypatch, Late)
    tensors = out_tensors(tmp_path, series_of(5, 0, ["float32"], [(1000,)]), [0.3, 0.1, 0.2, 0.3, 0.1])
    expected = written(tmp_path, tensors)
    assert written(tmp_path, tensors, devices=("late",), threads=1) == expected
    monkeypatch.setattr(where, what, lambda *_: None)
    assert written(tmp_path, tensors, devices=("late",), threads=1, allow_nonfinite=True) != expected


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=10), room=st.integers(1, 40))
def test_take_divides_parts_in_order_and_loses_none(lengths: list[int], room: int) -> None:
    tensors = [OutTensor(DTYPES["float32"], (n,), Terms(), str(i)) for i, n in enumerate(lengths)]
    rest = tuple(Slice(tensor, (), 0, n) for tensor, n in zip(tensors, lengths, strict=True))
    seen = []
    while rest:
        load, rest = pipeline.take(rest, room)
        assert 0 < sum(part.stop - part.start for part in load) <= room
        seen += [(part.tensor.name, i) for part in load for i in range(part.start, part.stop)]
    assert seen == [(str(i), j) for i, n in enumerate(lengths) for j in range(n)]
