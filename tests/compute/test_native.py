"""Sums in C: every value of the narrow dtypes, checksums of any length, files laid out in any way."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ckpt_tools
from ckpt_tools.compute import native
from ckpt_tools.compute.work_units import SMALL

Save = Callable[..., Path]
RELAXED = settings(max_examples=15)

pytestmark = pytest.mark.skipif(native._native is None, reason="installed without a C compiler")


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not done by the other way."""
    from ckpt_tools.compute import torch_sums as summing

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(summing, "Worker", refuse)


def finite(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, [0.25, 0.5, 0.25]])
def test_run_averages_every_value_of_16_bits_to_itself(
    save: Save, tmp_path: Path, dtype: torch.dtype, weights: list[float] | None
) -> None:
    paths = [save(f"{i}.pth", {"w": finite(dtype)}) for i in range(3)]
    mode = {} if weights is None else {"mode": "weights", "weights": weights}
    ckpt_tools.average(paths, out=tmp_path / "out.safetensors", **mode)
    found = load_file(tmp_path / "out.safetensors")["w"]
    assert torch.equal(found.view(torch.int16), finite(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_widen_is_exact_for_every_value_of_16_bits(save: Save, tmp_path: Path, dtype: torch.dtype) -> None:
    values = finite(dtype)
    ckpt_tools.average(save("0.pth", {"w": values}), dtype="float32", out=tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")["w"]
    assert torch.equal(found.view(torch.int32), values.float().view(torch.int32))


@RELAXED
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    gap=st.sampled_from([0, 1, 3, 64, 5000]),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]), min_size=1),
    suffix=st.sampled_from(["pth", "safetensors"]),
)
def test_run_averages_and_copies_small_tensors_in_any_neighbourhood(
    tmp_path: Path, lengths: list[int], gap: int, dtypes: list[torch.dtype], suffix: str
) -> None:
    """Names in another order than the bytes, bytes of others between them, odd offsets."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for i in range(3):
        tensors = {}
        for k, length in enumerate(lengths):
            dtype = dtypes[k % len(dtypes)]
            tensors[f"t{(k * 7) % len(lengths)}.{k}"] = (torch.randn(length, generator=generator) * 9).to(dtype)
            tensors[f"gap{k}"] = torch.full((max(gap, 1),), 7, dtype=torch.uint8)
        inputs.append(tensors)
        if suffix == "pth":
            torch.save(tensors, tmp_path / f"{i}.pth")
        else:
            save_file(tensors, tmp_path / f"{i}.safetensors")
    out = tmp_path / f"out.{suffix}"
    ckpt_tools.average([tmp_path / f"{i}.{suffix}" for i in range(3)], out=out, force=True)
    found = torch.load(out, weights_only=True) if suffix == "pth" else load_file(out)
    assert found.keys() == inputs[0].keys()
    for name, last in inputs[-1].items():
        if last.is_floating_point():
            total = sum(tensors[name].double() for tensors in inputs)
            assert isinstance(total, torch.Tensor)
            assert torch.equal(found[name], (total * (1 / 3)).to(last.dtype))
        else:
            assert torch.equal(found[name], last)
    if suffix == "pth":
        assert zipfile.ZipFile(out).testzip() is None  # every checksum


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64, 65, 79, 80, 127, 128, 1000, 4096, 65_537, 300_001])
def test_crc32_of_any_length_is_that_of_zlib(save: Save, tmp_path: Path, length: int) -> None:
    values = torch.from_numpy(np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8))
    paths = [save(f"{i}.pth", {"bytes": values, "w": torch.ones(3)}) for i in range(2)]
    ckpt_tools.average(paths, out=tmp_path / "out.pth")
    assert zipfile.ZipFile(tmp_path / "out.pth").testzip() is None
    assert torch.equal(torch.load(tmp_path / "out.pth", weights_only=True)["bytes"], values)


@RELAXED
@given(data=st.binary(max_size=3000), start=st.integers(0, 70))
def test_crc32_is_that_of_zlib_wherever_bytes_begin(data: bytes, start: int) -> None:
    assert native.crc32(memoryview(data)[start:]) == zlib.crc32(data[start:])


def test_fill_reads_a_large_tensor_block_by_block_to_its_end(save: Save, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(2**21 + 12_345).astype(np.float32) for _ in range(3)]
    paths = [save(f"{i}.pth", {"w": torch.from_numpy(values)}) for i, values in enumerate(arrays)]
    ckpt_tools.average(paths, mode="ema", decay=0.9, out=tmp_path / "out.pth")
    oracle = sum(c * values.astype(np.float64) for c, values in zip((0.81, 0.09, 0.1), arrays, strict=True))
    found = torch.load(tmp_path / "out.pth", weights_only=True)["w"].numpy()
    np.testing.assert_allclose(found, oracle, rtol=2**-24, atol=1e-14)  # half a step, and the order of the float64 sum
    assert zipfile.ZipFile(tmp_path / "out.pth").testzip() is None


def test_average_of_plain_files_does_not_import_torch(save: Save, tmp_path: Path) -> None:
    paths = [save(f"{i}.pth", {"w": torch.full((5,), float(i)), "n": torch.tensor(i)}) for i in (1, 3)]
    script = (
        "import sys, ckpt_tools\n"
        f"ckpt_tools.average({list(map(str, paths))!r}, out={str(tmp_path / 'out.pth')!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert found["w"].tolist() == [2.0] * 5
    assert found["n"].item() == 3


ONE = (0, (1.0,), 1.0, 0.0)  # a row


def formula(**changes: Any) -> Any:
    """The formula of the mean of two float32 tensors, with changes."""
    usual: dict[str, Any] = {"dtypes": ("float32", "float32"), "rows": ((0, (1.0, 1.0), 0.5, 0.0),), "out": "float32"}
    usual |= {"itemsize": 4, "copied": False, "checked": True}
    return native._native.Formula(**usual | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtypes": (), "rows": ((0, (), 0.5, 0.0),)},
        {"rows": ()},
        {"rows": ((0, (1.0,), 0.5, 0.0),)},
        {"rows": ((0, (None, None), 0.5, 0.0),)},
        {"rows": ((4, (1.0, 1.0), 0.5, 0.0),)},
        {"rows": ((-1, (1.0, 1.0), 0.5, 0.0),)},
        {"rows": ((0, (1.0, 1.0), 0.5, 0.0), (0, (1.0,), 0.5, 0.0))},
        {"rows": ((0, (1.0, 1.0), 0.5, 0.0),) * 33},
        {"rows": (0.5,)},
        {"itemsize": 2},
        {"itemsize": 0},
        {"out": None},
        {"copied": True},
        {"dtypes": ("float32", "complex64")},
        {"dtypes": ("float32",), "rows": (ONE,), "copied": True, "out": "bfloat16", "itemsize": 2},
        {"dtypes": ("int64",), "rows": (ONE,), "out": None, "itemsize": 1000, "copied": True, "checked": False},
    ],
)
def test_formula_rejects_parts_that_do_not_fit_each_other(changes: dict[str, Any]) -> None:
    formula()
    with pytest.raises(ValueError, match="do not fit"):
        formula(**changes)


def test_formula_rejects_a_dtype_that_is_not_summed() -> None:
    with pytest.raises(ValueError, match="no dtype int64"):
        formula(dtypes=("float32", "int64"))


def test_formula_rejects_too_little_scratch_and_rows_of_another_length() -> None:
    mean, row = formula(), [1, 0, 0, 0, 0, 0, 0, 0]
    for method in (mean.fill, mean.pack):
        with pytest.raises(ValueError, match="too little scratch"):
            method(array("q", row), bytearray(1000), True)
    for wrong in ([], row[:-1], row[:-3], [*row, 0], [-1, *row[1:]], [*row[:-3], 1, 0, 0], [*row[:-3], -1, 0, 0]):
        with pytest.raises(ValueError, match="do not fit"):
            mean.fill(array("q", wrong), bytearray(native.scratch(1)), True)
    with pytest.raises(ValueError, match="not small"):
        mean.pack(array("q", [1 << 20, 0, 0, 0, 0]), bytearray(native.scratch(1)), True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_run_writes_the_same_bytes_with_vectors_without_and_by_torch(tmp_path: Path) -> None:
    """The same source, compiled without what only x86-64 has; every kind of sum, and lengths that leave a rest."""
    sources = Path(native.__file__).with_name("csrc").glob("*.c")
    for folder in ("portable", "vectors", "torch"):
        (tmp_path / folder).mkdir()
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-ffp-contract=off", "-DPORTABLE", f"-I{sysconfig.get_path('include')}"]
        + [*map(str, sources), "-o", str(tmp_path / "portable" / "_native.so"), "-lm"],
        check=True,
    )
    generator = torch.Generator().manual_seed(1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    paths = []
    for i in range(6):
        tensors = {
            f"{dtype}.{n}".replace("torch.", ""): torch.randn(n, generator=generator)
            .mul(0.1 * 8.0 ** (i % 3))
            .to(dtype)
            for dtype in dtypes
            for n in (1, 3, 4, 7, 33, 70_003)
        }
        paths.append(tmp_path / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    script = f"""
import importlib.machinery, importlib.util, sys
import ckpt_tools
from ckpt_tools.compute import native
path = {str(tmp_path / "portable" / "_native.so")!r}
loader = importlib.machinery.ExtensionFileLoader("_native", path)
portable = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_native", path, loader=loader))
loader.exec_module(portable)
paths = {[str(path) for path in paths]!r}
for way, native._native in (("vectors", native._native), ("portable", portable), ("torch", None)):
    for number, options in enumerate({_MODES!r}):
        ckpt_tools.average(paths, out=f"{tmp_path}/{{way}}/{{number}}.safetensors", **options)
    assert ("torch" in sys.modules) == (way == "torch")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    for number, _ in enumerate(_MODES):
        found = [(tmp_path / way / f"{number}.safetensors").read_bytes() for way in ("vectors", "portable", "torch")]
        assert found[0] == found[1] == found[2]


_MODES: list[dict[str, Any]] = [
    *({"dtype": dtype} for dtype in (None, "float32", "bfloat16", "float16")),
    {"mode": "ema", "decay": 0.9},
    {"mode": "weights", "weights": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "dtype": "float16"},
]


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16", "F8_E4M3", "C64", "I64", "U8"])
def test_cut_gathers_no_more_small_tensors_than_scratch_holds(tmp_path: Path, dtype: str) -> None:
    """As many bytes as are gathered at most: tensors that are just small enough, behind others that are not enough."""
    item = {"F64": 8, "C64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}[dtype]
    small = SMALL // max(item, 2)
    lengths = [1, *[small - 1] * 3, small, small, small] * 3
    header, payload, at = {}, bytearray(), 0
    for i, length in enumerate(lengths):
        data = (np.arange(length * item) % 64).astype(np.uint8).tobytes()  # a finite number in every dtype
        # A gap between them keeps them apart, which safetensors itself would not write but for tensors in between.
        for name, content in ((f"t{i}", data), (f"gap{i}", b"\x00" * item * 2)):
            kind = dtype if name[0] == "t" else "U8"
            shape = [len(content) // (item if kind == dtype else 1)]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(content)]}
            payload += content
            at += len(content)
    text = json.dumps(header).encode()
    for name in ("0", "1"):
        (tmp_path / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + payload)
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    ckpt_tools.average(paths, out=tmp_path / "out.safetensors")
    expected, found = load_file(paths[0]), load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
