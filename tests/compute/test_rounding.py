"""Rounding, against fractions: the value of an element depends on its inputs alone, and is rounded as it is promised.

The oracle is `value_of` and `rounded`: rational arithmetic, and the parameters of each format.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FLOATS
from fake_gpu import Cpu

from ckpt_tools.checkpoints.open import open_checkpoint
from ckpt_tools.compute import engine, native
from ckpt_tools.compute import torch_sums as summing
from ckpt_tools.compute.gpu import pipeline, streams
from ckpt_tools.compute.work_units import OutFile
from ckpt_tools.errors import NumericsError
from ckpt_tools.formats.file_plan import FilePlan, OutTensor, Payload, Terms
from ckpt_tools.tensors import DTYPES

# Bits of a significand, and the exponent of the smallest normal number.
FORMATS = {
    "float64": (53, -1022),
    "float32": (24, -126),
    "bfloat16": (8, -126),
    "float16": (11, -14),
    "float8_e4m3fn": (4, -6),
    "float8_e5m2": (3, -14),
    "float8_e4m3fnuz": (4, -7),
    "float8_e5m2fnuz": (3, -15),
}
PLAIN = ("float32", "bfloat16", "float16")
WAYS = ("native", "torch", "gpu")
ROWS = {
    "a mean of three": [1 / 3] * 3,
    "a mean of two and one": [0.5, 0.25, 0.25],
    "an EMA": [0.81, 0.09, 0.1],
    "a small first": [1e-8 / (1 + 1e-8), 0.75 / (1 + 1e-8), 0.25 / (1 + 1e-8)],
    "a difference": [-2.0, 3.0, 0.1],
    "near cancellation": [1.0, -0.9999, -0.0001],
}


# ---- the oracle ----


def value_of(xs: Sequence[float], row: Sequence[float]) -> Fraction:
    """Return the sum c x; the mean if all c are 1/N; the value of equal values if the c sum up to 1."""
    numbers = [Fraction(x) for x in xs]
    if len(set(row)) == 1 and row[0] == 1 / len(row):
        return sum(numbers, Fraction()) / len(row)
    if abs(sum(map(Fraction, row)) - 1) <= Fraction(1, 10**12) and len(set(numbers)) == 1:
        return numbers[0]
    return sum((Fraction(c) * x for c, x in zip(row, numbers, strict=True)), Fraction())


def step_at(value: Fraction, dtype: str) -> Fraction:
    """Return the unit in the last place."""
    bits, lowest = FORMATS[dtype]
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length() if size else lowest
    exponent -= Fraction(2) ** exponent > size
    return Fraction(2) ** (max(exponent, lowest) - bits + 1)


def rounded(value: Fraction, dtype: str) -> Fraction:
    """Round to nearest, ties to even."""
    step = step_at(value, dtype)
    return round(value / step) * step


# ---- all ways ----


def values(dtype: str, kind: str, generator: torch.Generator, n: int = 40) -> list[torch.Tensor]:
    """Three tensors whose sums are of a certain kind."""
    info = torch.finfo(getattr(torch, dtype))
    found = [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3)]
    if kind == "subnormal":
        found = [x * info.smallest_normal * 4 for x in found]
    elif kind == "ties":  # few bits beyond those of the result
        found = [1 + torch.randint(0, 16, (n,), generator=generator) * info.eps * 2.0**-i for i, x in enumerate(found)]
    elif kind == "large first":
        found[0] *= math.sqrt(info.max) if info.bits == 8 else 1e4
    elif kind == "cancelling":
        found = [found[0], found[0], found[0] * (1 + 8 * info.eps)]
    elif kind == "equal":
        found = [found[0]] * 3
    return [x.to(torch.float32 if info.bits == 8 else x.dtype).to(getattr(torch, dtype)) for x in found]


KINDS = ("random", "subnormal", "ties", "large first", "cancelling", "equal")


@contextmanager
def by(way: str) -> Iterator[dict[str, Any]]:
    """Let the engine compute in one way; yields its options."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "native" and native._native is None:
            pytest.skip("installed without a C compiler")
        if way == "torch":
            patch.setattr(native, "_native", None)
        if way == "gpu":
            patch.setattr(streams, "Gpu", lambda _: Cpu())
            patch.setattr(pipeline, "LEAST", 8)
        yield {"devices": ["cuda:0"], "gpu_memory": 10**6} if way == "gpu" else {}


def written(
    path: Path, series: Sequence[dict[str, torch.Tensor]], out: str | None, *rows: Sequence[float], **options: Any
) -> list[dict[str, torch.Tensor]]:
    """Sum each tensor of a series, for each row, by the engine."""
    specs: list[Any] = []
    for i, tensors in enumerate(series):
        torch.save(tensors, path / f"{i}.pth")
        specs.append(open_checkpoint(path / f"{i}.pth").specs)
    tensors, at = [], 0
    for name, spec in specs[0].items():
        terms = Terms(tuple([each[name] for each in specs]), tuple(map(tuple, rows)))
        tensors.append((OutTensor(DTYPES[out] if out else spec.dtype, spec.shape, terms, name), at))
        at += tensors[-1][0].nbytes
    plan = FilePlan("out", at, tuple([Payload(*each) for each in tensors]))
    with ExitStack() as stack:
        files = [stack.enter_context((path / f"out-{row}").open("w+b")) for row in range(len(rows))]
        for file in files:
            file.truncate(at)
        engine.run([OutFile(plan, file.fileno(), row) for row, file in enumerate(files)], **{"threads": 1} | options)
        data = [bytearray(file.read()) for file in files]
    return [
        {
            tensor.name: torch.frombuffer(
                each, dtype=getattr(torch, tensor.dtype.name), count=tensor.numel, offset=begin
            ).view(tensor.shape)
            for tensor, begin in tensors
        }
        for each in data
    ]


def codes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("row", ROWS)
def test_sums_are_rounded_as_promised_in_every_way(tmp_path: Path, row: str) -> None:
    generator, coefficients = torch.Generator().manual_seed(1), ROWS[row]
    cases = list(itertools.product(FLOATS, KINDS))
    drawn = {f"{dtype}, {kind}": values(dtype, kind, generator) for dtype, kind in cases}
    series = [{name: tensors[i] for name, tensors in drawn.items()} for i in range(3)]
    results = {}
    for way in WAYS:
        with by(way) as options:
            (results[way],) = written(tmp_path, series, None, coefficients, allow_nonfinite=True, **options)
    for name, tensors in drawn.items():
        dtype = name.split(",")[0]
        found = results["native"][name]
        for way in WAYS[1:]:
            assert codes(results[way][name]) == codes(found), (name, way)
        columns = zip(*[tensor.double().tolist() for tensor in tensors], strict=True)
        for got, xs in zip(found.double().tolist(), columns, strict=True):
            exact = value_of(xs, coefficients)
            if dtype in PLAIN and row != "a mean of three":
                size = sum(abs(Fraction(c) * Fraction(x)) for c, x in zip(coefficients, xs, strict=True))
                assert abs(Fraction(got) - exact) <= step_at(exact, dtype) / 2 + 4 * size / 2**53, (name, xs)
            elif math.isfinite(got):
                assert Fraction(got) == rounded(exact, dtype), (name, xs)
            else:
                assert abs(rounded(exact, dtype)) > torch.finfo(getattr(torch, dtype)).max, (name, xs)


@pytest.mark.parametrize("out", ["float32", "bfloat16", "float8_e4m3fn"])
def test_float64_is_rounded_once_to_fewer_bits_in_every_way(tmp_path: Path, out: str) -> None:
    """Ties of the narrow dtype that are none by 2^-60 of the value."""
    info = torch.finfo(getattr(torch, out))
    middle = 1 + info.eps * (torch.arange(16, dtype=torch.float64) + 0.5)
    series = [{"w": middle}, {"w": middle[:1].expand(16).contiguous() * 2.0**-59}, {"w": middle * -(2.0**-60)}]
    for row in ([1.0, 1.0, 1.0], [1.0, -1.0, 0.25], [1.0, 0.5, 0.5]):
        for way in WAYS:
            with by(way) as options:
                ((found,),) = (each.values() for each in written(tmp_path, series, out, row, **options))
            columns = zip(*[tensors["w"].tolist() for tensors in series], strict=True)
            expected = [rounded(value_of(xs, row), out) for xs in columns]
            assert [Fraction(x) for x in found.double().tolist()] == expected, (row, way)


@pytest.mark.parametrize("way", WAYS)
def test_what_two_numbers_for_a_sum_do_not_decide_is_rounded_once_to_fewer_bits(tmp_path: Path, way: str) -> None:
    """A tie of float32 but for a term that is lost between two others."""
    columns = [(1 + 2.0**-24, 2.0**-80, sign * 2.0**-140, -(2.0**-80)) for sign in (1, -1)]
    columns += [tuple(-x for x in xs) for xs in columns]
    series = [{"w": torch.tensor(xs, dtype=torch.float64)} for xs in zip(*columns, strict=True)]
    with by(way) as options:
        ((found,),) = (each.values() for each in written(tmp_path, series, "float32", [1.0] * 4, **options))
    assert found.tolist() == [float(rounded(sum(map(Fraction, xs)), "float32")) for xs in columns]


@pytest.mark.parametrize("way", WAYS)
def test_float64_is_decided_where_two_numbers_for_a_sum_are_not_enough(tmp_path: Path, way: str) -> None:
    """A tie but for the last term, far below; subnormal results; sums that overflow on the way."""
    most, least = torch.finfo(torch.float64).max, 5e-324
    columns = [
        (1.0, 2.0**-53, 2.0**-120),
        (1.0, 2.0**-53, -(2.0**-120)),
        (1.0, -(2.0**-54), -(2.0**-150)),
        (1.0, 2.0**-53, least),
        (least, 3 * least, -7 * least),
        (2.5e-308, 2.4e-308, -1.1e-308),
        (most, most, -most),
        (most, -most, 1e-300),
        (most, most / 2, most / 4),
        (-0.0, -0.0, -0.0),
    ]
    series = [{"w": torch.tensor(xs, dtype=torch.float64)} for xs in zip(*columns, strict=True)]
    for row in ([1 / 3] * 3, [0.5, 0.25, 0.25], [0.3, 0.3, 0.4], [0.5, -0.4, 0.01], [2.0**-400, 0.5, 0.5], [0.5] * 3):
        with by(way) as options:
            ((found,),) = (each.values() for each in written(tmp_path, series, None, row, **options))
        for got, xs in zip(found.tolist(), columns, strict=True):
            assert Fraction(got) == rounded(value_of(xs, row), "float64"), (row, xs)
        if sum(row) == 1:
            assert math.copysign(1.0, found[-1]) == -1


def test_float64_of_many_files_is_exact_in_any_order_of_storage_and_for_several_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    series = []
    for _ in range(11):
        w = torch.randn(70, 80, generator=generator, dtype=torch.float64)
        w *= torch.exp2(torch.randint(-30, 30, w.shape, generator=generator))
        series.append({"w": w, "turned": w.t().contiguous().t(), "short": w[:20].contiguous()})
    rows = [
        [1 / 11] * 11,
        [0.9**10, *[0.1 * 0.9 ** (10 - i) for i in range(1, 11)]],
        [0.3 * (i - 5) for i in range(11)],
    ]
    with monkeypatch.context() as patch:
        if native._native is not None:
            patch.setattr(summing, "Worker", None)  # C decides all of them
        results = written(tmp_path, series, None, *rows)
    for row, found in zip(rows, results, strict=True):
        assert torch.equal(found["w"], found["turned"])
        assert torch.equal(found["w"][:20], found["short"])
        for at in range(0, 5600, 7):
            xs = [tensors["w"].view(-1)[at].item() for tensors in series]
            terms = [(x, c) for x, c in zip(xs, row, strict=True) if c]
            exact = value_of([x for x, _ in terms], [c for _, c in terms])
            assert Fraction(found["w"].view(-1)[at].item()) == rounded(exact, "float64")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [3, 6, 49])
def test_equal_float64_values_come_back_whatever_the_coefficients_sum_up_to(tmp_path: Path, way: str, n: int) -> None:
    w = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    w[:6] = torch.tensor([1.0, 0.0, -0.0, 5e-324, 1.7e308, -1.0], dtype=torch.float64)
    for row in ([1 / n] * n, [0.9 ** (n - 1), *[(1 - 0.9) * 0.9 ** (n - 1 - i) for i in range(1, n)]]):
        with by(way) as options:
            ((found,),) = (each.values() for each in written(tmp_path, [{"w": w}] * n, None, row, **options))
        assert codes(found) == codes(w)


# ---- what is refused ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [1, 3])
def test_run_names_the_first_tensor_that_overflows_whatever_the_threads(tmp_path: Path, way: str, threads: int) -> None:
    """Small tensors are summed after large ones."""
    sizes = [10, 70_000, 10, 300_000, 10]
    for first in range(4):
        tensors = {f"w{i}": torch.ones(size) for i, size in enumerate(sizes)}
        for i in range(first, 5):
            tensors[f"w{i}"][-1] = 3e38
        with by(way) as options, pytest.raises(NumericsError, match=rf"average of 'w{first}' overflows"):
            written(tmp_path, [tensors, tensors], None, [1.0, 1.0], threads=threads, **options)
