"""Sums in C: every dtype has the bytes of torch, and each rounding is the one of IEEE 754."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import math
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_tools.checkpoints.open import open_checkpoint
from ckpt_tools.compute import engine, native
from ckpt_tools.compute import torch_sums as summing
from ckpt_tools.compute.torch_arithmetic import Formula
from ckpt_tools.compute.work_units import OutFile
from ckpt_tools.errors import NumericsError
from ckpt_tools.formats.file_plan import FilePlan, OutTensor, Payload, Terms
from ckpt_tools.tensors import DTYPES, TensorSpec

pytestmark = [
    pytest.mark.skipif(native._native is None, reason="installed without a C compiler"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]
CSRC = Path(native.__file__).with_name("csrc")
NARROW8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
REAL = ["float64", "float32", "bfloat16", "float16", *NARROW8]
PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
COMPLEX = list(PARTS)
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def compiled(path: Path, sources: Sequence[str], *flags: str) -> Path:
    include = f"-I{sysconfig.get_path('include')}"
    shared = ["cc", "-shared", "-fPIC", "-O3", "-ffp-contract=off", include, *flags]
    subprocess.run([*shared, *[str(CSRC / f"{name}.c") for name in sources], "-o", str(path), "-lm"], check=True)
    return path


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The extension without what only x86-64 has."""
    return built(tmp_path_factory.mktemp("portable"), "-DPORTABLE")


@pytest.fixture(scope="module")
def narrower(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The extension without AVX-512."""
    return built(tmp_path_factory.mktemp("narrower"), "-DWITHOUT_AVX512", "-O1")


def built(folder: Path, *flags: str) -> ModuleType:
    sources = sorted(path.stem for path in CSRC.glob("*.c"))
    path = str(compiled(folder / "_native.so", sources, *flags))
    loader = importlib.machinery.ExtensionFileLoader("_native", path)
    spec = importlib.util.spec_from_file_location("_native", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# ---- the bytes of torch ----


def values(dtype: str, n: int, seed: int, out: str = "") -> torch.Tensor:
    """Finite values that `out` holds, too: normal, subnormal in one of both dtypes, zero of either sign.

    In float64, none that torch has to decide: subnormal, or near overflow.
    """
    kind = getattr(torch, dtype)
    if kind.is_complex:
        return torch.view_as_complex(values(PARTS[dtype], 2 * n, seed, PARTS.get(out, "")).view(n, 2))
    generator = torch.Generator().manual_seed(seed)
    infos = [torch.finfo(getattr(torch, name)) for name in (dtype, out or dtype)]
    most = min(1e200, *(info.max / 4 for info in infos))
    found = torch.randn(n, generator=generator, dtype=torch.float64)
    found[::3] *= max(infos[0].smallest_normal, 1e-200)
    found[1::3] *= max(infos[1].smallest_normal, 1e-200)
    found[1::7] = 0.0
    found[2::7] = -0.0
    found[3::11] = most * found[3::11].sign()
    return found.clamp(-most, most).to(torch.float32 if kind.itemsize == 1 else kind).to(kind)


def written(
    path: Path, series: Sequence[dict[str, torch.Tensor]], outs: dict[str, str], *rows: Sequence[float]
) -> bytes:
    """Sum each tensor of a series to a dtype, for each row, by the engine; return the bytes of all."""
    specs = []
    for i, tensors in enumerate(series):
        torch.save(tensors, path / f"{i}.pth")
        specs.append(open_checkpoint(path / f"{i}.pth").specs)
    slots, at = [], 0
    for name, out in outs.items():
        tensors: Any = tuple([each[name] for each in specs])
        assert all(isinstance(spec, TensorSpec) for spec in tensors)
        slots.append((OutTensor(DTYPES[out], tensors[0].shape, Terms(tensors, tuple(map(tuple, rows))), name), at))
        at += slots[-1][0].nbytes
    plan = FilePlan("out", at, tuple(Payload(*slot) for slot in slots))
    with ExitStack() as stack:
        files = [stack.enter_context((path / f"out-{row}").open("w+b")) for row in range(len(rows))]
        for file in files:
            file.truncate(at)
        engine.run([OutFile(plan, file.fileno(), row) for row, file in enumerate(files)], threads=1)
        return b"".join([file.read() for file in files])


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(summing, "Worker", refuse)


ROWS = [
    [1 / 6] * 6,  # one common coefficient
    [0.05, 0.1, 0.3, 0.25, 0.2, 0.1],  # which sum up to 1
    [0.5, -0.25, 0.125, 0.3, 0.1, -0.2],  # which do not
]


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "row"),
    [(dtype, row) for k, dtype in enumerate(REAL + COMPLEX) for row in (ROWS if k < 3 else [ROWS[k % len(ROWS)]])],
)
def test_run_sums_every_dtype_in_c_to_the_bytes_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: ModuleType, dtype: str, row: list[float]
) -> None:
    lengths = (1, 3, 4, 7, 33, 2_003)
    into = COMPLEX if dtype in COMPLEX else REAL
    names = {f"{out}.{n}": (out, n) for out in into for n in lengths} | {"long": (dtype, 70_003)}
    series = [
        {name: values(dtype, n, 100 * i + k, out) for k, (name, (out, n)) in enumerate(names.items())} for i in range(6)
    ]
    outs = {name: out for name, (out, _) in names.items()}
    with monkeypatch.context() as patch:
        patch.setattr(native, "_native", None)
        expected = written(tmp_path, series, outs, row)
    without_torch(monkeypatch)
    assert written(tmp_path, series, outs, row) == expected
    monkeypatch.setattr(native, "_native", portable)
    native._formula.cache_clear()
    try:
        assert written(tmp_path, series, outs, row) == expected
    finally:
        native._formula.cache_clear()


@needs_compiler
@pytest.mark.parametrize("dtype", [*REAL[:5], "complex64"])
def test_run_sums_rows_to_the_same_bytes_with_wide_vectors_narrower_ones_and_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: ModuleType, narrower: ModuleType, dtype: str
) -> None:
    lengths = (1, 7, 33, 1021, 70_003)
    series = [{f"{n}": values(dtype, n, 100 * i + n) for n in lengths} for i in range(10)]
    rows = [
        [0.1] * 10,
        [*[0.0] * 3, *[1 / 7] * 7],
        [0.1 * (i - 3) for i in range(10)],
        [0.5, *[0.05] * 9],
        [1 / 1024] * 10,
    ]
    rows.append([*[0.01 * i for i in range(1, 9)], 0.0, 0.64])
    outs = {f"{n}": dtype for n in lengths}
    without_torch(monkeypatch)
    expected = b"".join([written(tmp_path, series, outs, row) for row in rows])
    for module in (native._native, portable, narrower):
        monkeypatch.setattr(native, "_native", module)
        native._formula.cache_clear()
        try:
            assert written(tmp_path, series, outs, *rows) == expected
        finally:
            native._formula.cache_clear()


def test_run_sums_terms_of_several_dtypes_to_the_bytes_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["float32", "float64", "float8_e4m3fn", "bfloat16", "float16", "float64"]
    for row in ROWS:
        series = [{"w": values(dtype, 40_001, i, "float32"), "s": values(dtype, 9, i)} for i, dtype in enumerate(kinds)]
        outs = {"w": "float32", "s": "float64"}
        with monkeypatch.context() as patch:
            patch.setattr(native, "_native", None)
            expected = written(tmp_path, series, outs, row)
        with monkeypatch.context() as patch:
            without_torch(patch)
            assert written(tmp_path, series, outs, row) == expected


@pytest.mark.parametrize("n", [9, 40_000])
@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_run_leaves_nan_in_any_dtype_to_torch_which_names_it(tmp_path: Path, dtype: str, n: int) -> None:
    for row in ([1.0], [0.5, 0.5]):
        series = [{"w": values(dtype, n, i)} for i in range(len(row))]
        series[-1]["w"][5] = math.nan
        with pytest.raises(NumericsError, match=rf"{len(row) - 1}\.pth: 'w' holds NaN at \[5\]"):
            written(tmp_path, series, {"w": dtype}, row)


@pytest.mark.parametrize("n", [9, 40_000])
@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_run_rejects_a_sum_of_tiles_beyond_its_dtype(tmp_path: Path, dtype: str, n: int) -> None:
    kind = getattr(torch, dtype)
    series = [{"w": torch.zeros(n).to(kind)} for _ in range(2)]
    for tensors in series:
        tensors["w"][3] = torch.finfo(kind).max
    with pytest.raises(NumericsError, match=f"average of 'w' overflows {dtype}"):
        written(tmp_path, series, {"w": dtype}, [1.0, 1.0])
    found = written(tmp_path, series, {"w": dtype}, [0.5, 0.5])
    assert torch.frombuffer(bytearray(found), dtype=kind)[3].real.item() == torch.finfo(kind).max


@pytest.mark.parametrize("dtype", REAL + COMPLEX)
def test_run_overflows_in_c_where_it_does_in_torch(dtype: str) -> None:
    assert native._native.LIMITS[dtype] == Formula.of((DTYPES[dtype],), (0.5,), DTYPES[dtype]).limit


# ---- rounding, by the numbers ----


class Dtype(ctypes.Structure):
    """As in native.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("code", ctypes.c_int),
        ("size", ctypes.c_size_t),
        ("reals", ctypes.c_size_t),
        ("limit", ctypes.c_double),
    )


Round = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module", params=["vectors", "narrower", "portable"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Round:
    """Rounding alone: from float64 to the codes of a dtype."""
    flags = {"vectors": (), "narrower": ("-DWITHOUT_AVX512",), "portable": ("-DPORTABLE",)}[request.param]
    library = ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("sum") / "sum.so", ("sum",), *flags)))
    library.sum_init()
    library.narrow.argtypes = (
        *(ctypes.POINTER(Dtype), ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_size_t, ctypes.c_double),
    )
    dtypes = {each.name.decode(): each for each in (Dtype * 11).in_dll(library, "DTYPES")}

    def go(dtype: str, values: np.ndarray) -> np.ndarray:
        values = np.ascontiguousarray(values, dtype=np.float64)
        out = np.empty(len(values), dtype=f"u{dtypes[dtype].size}")
        library.narrow(dtypes[dtype], out.ctypes.data, values.ctypes.data, len(values), 1.0)
        return out

    return go


def around(codes: np.ndarray, exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return doubles at, between and next to the values of adjacent codes, and the code nearest to each, ties to even.

    Args:
        codes: of the values from zero upwards.
        exact: these values, whose midpoints are doubles, too.
    """
    middle = exact[:-1] + (exact[1:] - exact[:-1]) / 2
    even = np.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    doubles = np.concatenate([exact, middle, np.nextafter(middle, -1), np.nextafter(middle, np.inf)])
    return doubles, np.concatenate([codes, even, codes[:-1], codes[1:]])


@needs_compiler
def test_narrow_to_float16_is_exact_at_all_values_midpoints_and_next_to_them(rounded: Round) -> None:
    codes = np.arange(0x7C00, dtype=np.uint16)
    exact = codes.view(np.float16).astype(np.float64)
    doubles, expected = around(codes, exact)
    for low, middle, high in zip(exact[:-1:97], doubles[0x7C00::97], exact[1::97], strict=False):
        assert Fraction(middle) - Fraction(low) == Fraction(high) - Fraction(middle)
    assert np.array_equal(rounded("float16", doubles), expected)
    assert np.array_equal(rounded("float16", -doubles), expected | 0x8000)
    assert np.array_equal(rounded("float16", doubles), doubles.astype(np.float16).view(np.uint16))  # and NumPy agrees


@needs_compiler
def test_narrow_to_float16_overflows_to_infinity_and_keeps_nan(rounded: Round) -> None:
    most, half = 65504.0, 65520.0  # half a step above the largest number
    values = np.array([most, np.nextafter(half, 0), half, 1e300, np.inf, 5e-324, 2.0**-25, 2.0**-1060, -0.0, -np.inf])
    expected = [0x7BFF, 0x7BFF, 0x7C00, 0x7C00, 0x7C00, 0, 0, 0, 0x8000, 0xFC00]
    assert rounded("float16", values).tolist() == expected
    nan = rounded("float16", np.array([np.nan, -np.nan] * 4))
    assert np.isnan(nan.view(np.float16)).all()


@needs_compiler
@pytest.mark.parametrize("dtype", NARROW8)
def test_narrow_to_8_bits_is_exact_at_all_values_midpoints_and_next_to_them(rounded: Round, dtype: str) -> None:
    kind = getattr(torch, dtype)
    codes = np.arange(128, dtype=np.uint8)
    exact = torch.from_numpy(codes.copy()).view(kind).double().numpy()
    codes, exact = codes[np.isfinite(exact)], exact[np.isfinite(exact)]
    assert exact[-1] == torch.finfo(kind).max
    doubles, expected = around(codes, exact)
    assert np.array_equal(rounded(dtype, doubles), expected)
    negative = rounded(dtype, -doubles)
    zero = 0 if dtype.endswith("fnuz") else 0x80  # these have no -0
    assert np.array_equal(negative, np.where(expected == 0, zero, expected | 0x80))


@needs_compiler
def test_narrow_to_bfloat16_is_exact_at_all_values_midpoints_and_next_to_them(rounded: Round) -> None:
    codes = np.arange(0x7F80, dtype=np.uint16)
    exact = (codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    doubles, expected = around(codes, exact)
    assert np.array_equal(rounded("bfloat16", doubles), expected)
    assert np.array_equal(rounded("bfloat16", -doubles), expected | 0x8000)


# ---- moments of channels ----


@needs_compiler
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_moments_are_the_same_for_any_number_of_threads_and_with_any_vectors(
    dtype: str, narrower: ModuleType, portable: ModuleType
) -> None:
    for shape in ((3, 5, 1), (700, 37, 1), (5000, 67, 1), (4, 37, 300), (3, 2, 100_003), (1, 1, 1)):
        tensor = values(dtype, math.prod(shape), seed=1, out="float16")
        results = {
            bytes(module.moments(tensor.data_ptr(), dtype, shape, threads))
            for module in (native._native, narrower, portable)
            for threads in (1, 2, 7)
        }
        assert len(results) == 1
        mean, m2 = np.frombuffer(results.pop()).reshape(2, -1)
        exact = np.moveaxis(tensor.double().numpy().reshape(shape), 1, 0).reshape(shape[1], -1)
        np.testing.assert_allclose(mean, exact.mean(1), rtol=1e-12, atol=1e-13 * float(np.abs(exact).max()))
        np.testing.assert_allclose(m2, exact.var(1) * exact.shape[1], rtol=1e-12)


def test_moments_refuse_what_they_do_not_know() -> None:
    tensor = torch.zeros(8)
    for dtype, shape, threads in (
        *(("float32", shape, 1) for shape in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1))),
        *((dtype, (1, 1, 1), 1) for dtype in ("float8_e5m2", "complex64")),
        ("float32", (1, 1, 1), 0),
    ):
        with pytest.raises(ValueError, match="no channels of 16 bits"):
            native._native.moments(tensor.data_ptr(), dtype, shape, threads)
    with pytest.raises(ValueError, match="no dtype int64"):
        native._native.moments(tensor.data_ptr(), "int64", (1, 1, 1), 1)
