"""Calls of the C extension, made of the bytes of an input: any formula, sizes, strides, offsets, dtypes and files.

Python's callers check offsets and sizes against files first. So those here are any number below 2**62; a stride is any
number below 2**20 where the axis has more than one element. What C computes is compared with NumPy and zlib.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import os
import random
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_tools.compute.summation import Kind
from properties import Fault, Watch

_LENGTHS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    17,
    33,
    63,
    64,
    65,
    100,
    511,
    512,
    513,
    1000,
    4096,
    4097,
    16_385,
    70_003,
    300_001,
)
_ODD = (-1, -8, -(1 << 40), 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, (1 << 62) - 1, -(1 << 62))
_KINDS = (Kind.PLAIN, Kind.PLAIN, Kind.PLAIN, Kind.SUM, Kind.AVERAGE, Kind.MEAN)
_COEFFICIENTS = (None, 1.0, 0.5, -0.25, 1 / 3, 0.0, -0.0, 1e-300, 1e300, math.inf, math.nan)
_NUMPY = {"float64": "<f8", "float32": "<f4", "float16": "<f2"}
_INPUT = 3 << 20  # bytes of the input that is long enough


def extension() -> Any:
    """Return the extension: the sanitized one in the folder CKPT_TOOLS_NATIVE, or the installed one."""
    if "CKPT_TOOLS_NATIVE" not in os.environ:
        from ckpt_tools.compute import _native

        return _native
    (path,) = Path(os.environ["CKPT_TOOLS_NATIVE"]).glob("**/_native*.so")
    loader = importlib.machinery.ExtensionFileLoader("_native", str(path))
    spec = importlib.util.spec_from_file_location("_native", path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Numbers:
    """Numbers made of bytes; zeros behind their end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        """Return a number from 0 to count - 1, of one byte, or of two for large counts."""
        size = 1 if count <= 256 else 2
        raw = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(raw, "little") % count

    def one_of(self, values: Sequence[Any]) -> Any:
        return values[self.below(len(values))]

    def rarely(self) -> bool:
        return self.below(16) == 15

    def offset(self) -> int:
        return self.one_of(_ODD) if self.rarely() else self.below(5000)


class _Files:
    """Descriptors of inputs and of an output."""

    def __init__(self, folder: Path) -> None:
        self.content = random.Random(0).randbytes(_INPUT // 2) + np.arange(_INPUT // 8, dtype="<f4").tobytes()
        (folder / "long").write_bytes(self.content)
        (folder / "short").write_bytes(self.content[:100])
        self.long = os.open(folder / "long", os.O_RDONLY)
        self.short = os.open(folder / "short", os.O_RDONLY)
        self.out = os.open(folder / "out", os.O_RDWR | os.O_CREAT)

    def readable(self, numbers: Numbers) -> int:
        return numbers.one_of((self.short, -1, 1 << 20, self.out)) if numbers.rarely() else self.long

    def writable(self, numbers: Numbers) -> int:
        return numbers.one_of((self.long, -1, 1 << 20)) if numbers.rarely() else self.out


def seeds() -> Mapping[str, bytes]:
    """Return inputs of random bytes, of which each method takes some."""
    return {str(number): bytes([number]) + random.Random(number).randbytes(60) for number in range(20)}


def start(folder: Path, watch: Watch) -> Callable[[bytes], None]:
    """Return the function that makes a call of an input, with files in a folder."""
    native, files = extension(), _Files(folder)
    names = [*native.LIMITS]
    calls = (_fill, _pack, _tile, _gram, _moments, _crc32, _start_disk, _fill)

    def fuzz(data: bytes) -> None:
        numbers = Numbers(data)
        os.truncate(files.out, 0)
        with suppress(ValueError, MemoryError, OverflowError):
            numbers.one_of(calls)(native, names, files, numbers)

    return fuzz


class _Formula:
    """A formula, with what it is made of."""

    def __init__(self, native: Any, names: list[str], numbers: Numbers) -> None:
        out = numbers.one_of(names)
        self.copied = numbers.below(4) == 0
        count = 1 if self.copied and not numbers.rarely() else 1 + numbers.below(9)
        self.dtypes = tuple(numbers.one_of(names) if not self.copied else out for _ in range(count))
        if not self.copied and numbers.below(2):
            self.dtypes = self.dtypes[:1] * count
        rows = 1 if self.copied else 1 + numbers.below(34 if numbers.rarely() else 4)
        self.rows = tuple(
            (
                numbers.one_of(_KINDS),
                tuple(numbers.one_of(_COEFFICIENTS) for _ in range(count)),
                numbers.one_of((1.0, 0.5, 1e300)),
                numbers.one_of((0.0, 0.0, 2.0**-1000)),
            )
            for _ in range(rows)
        )
        self.checked = numbers.below(2) == 0
        self.out = None if self.copied and not self.checked else out
        self.item = numbers.below(20) if numbers.rarely() else _itemsize(out)
        self.of = native.Formula(
            dtypes=self.dtypes,
            rows=self.rows,
            out=self.out,
            itemsize=self.item,
            copied=self.copied,
            checked=self.checked,
        )


def _itemsize(dtype: str) -> int:
    bits = int("".join(c for c in dtype.partition("_")[0] if c.isdigit()))
    return bits // 8


def _scratch(native: Any, numbers: Numbers, nbytes: int) -> memoryview:
    """Return scratch anywhere in memory; rarely too little."""
    shift = numbers.below(64)
    return memoryview(bytearray(shift + nbytes))[shift : -1 if numbers.rarely() else None]


def _fill(native: Any, names: list[str], files: _Files, numbers: Numbers) -> None:
    formula = _Formula(native, names, numbers)
    n = numbers.one_of(_ODD) if numbers.rarely() else numbers.one_of(_LENGTHS)
    places = [(files.readable(numbers), numbers.offset()) for _ in formula.dtypes]
    targets = [
        (numbers.below(len(formula.rows) + numbers.rarely()), files.writable(numbers), numbers.offset())
        for _ in range(1 + numbers.below(3))
    ]
    ends = array(
        "q", [n, *(each for place in places for each in place), *(each for target in targets for each in target)]
    )
    if numbers.rarely():
        ends = ends[: numbers.below(len(ends))]
    scratch = _scratch(native, numbers, native.scratch(len(formula.rows), False))
    failure, crcs, bad = formula.of.fill(ends, scratch, True)
    if failure is None and not bad and len(targets) == 1 and n:  # nothing is written nowhere, too
        row, _, offset = targets[0]
        written = os.pread(files.out, n * formula.item, offset)
        if zlib.crc32(written) != memoryview(crcs).cast("I")[row]:
            raise Fault("fill: the checksum is not that of what was written")
        _compare(formula, row, n, files, places, written)


def _compare(formula: _Formula, row: int, n: int, files: _Files, places: list[tuple[int, int]], written: bytes) -> None:
    """Hold results against NumPy, where it has the dtypes."""
    if any(fd != files.long for fd, _ in places):
        return
    if formula.copied:
        begin = places[0][1]
        if written != files.content[begin : begin + n * formula.item]:
            raise Fault("fill: a copy differs")
        return
    kind, coefficients, common, _ = formula.rows[row]
    if kind != Kind.PLAIN or not {*formula.dtypes, formula.out} <= _NUMPY.keys():
        return
    with np.errstate(all="ignore"):
        total: Any = None
        for dtype, (_, begin), coefficient in zip(formula.dtypes, places, coefficients, strict=True):
            if coefficient is not None:
                values = np.frombuffer(files.content, np.uint8)[begin : begin + n * _itemsize(dtype)]
                term = values.copy().view(_NUMPY[dtype]).astype(np.float64) * coefficient
                total = term if total is None else total + term
        expected = (total * common).astype(_NUMPY[str(formula.out)])
    if expected.tobytes() != written:
        raise Fault(f"fill: not the sum that NumPy computes, of {formula.dtypes} to {formula.out}, {formula.rows[row]}")


def _pack(native: Any, names: list[str], files: _Files, numbers: Numbers) -> None:
    formula = _Formula(native, names, numbers)
    rows = array("q")
    for _ in range(numbers.below(9)):
        rows.append(numbers.one_of(_ODD) if numbers.rarely() else numbers.one_of(_LENGTHS[:20]))
        for _ in formula.dtypes:
            rows.extend((files.readable(numbers), numbers.offset()))
    scratch = _scratch(native, numbers, native.scratch(len(formula.rows), False))
    failure, packed, crcs, bad = formula.of.pack(rows, scratch, True)
    if failure is None and len(bad) and not any(bad):
        n = rows[0] * formula.item
        if zlib.crc32(packed[:n]) != memoryview(crcs).cast("I")[0]:
            raise Fault("pack: the checksum is not that of the result")


def _tile(native: Any, names: list[str], files: _Files, numbers: Numbers) -> None:
    formula = _Formula(native, names, numbers)
    axes = numbers.below(native.AXES + 2) if numbers.rarely() else 1 + numbers.below(4)
    sizes = [numbers.one_of((1, 2, 3, 5, 8, 17, 40)) for _ in range(axes)]
    if numbers.rarely():
        sizes[:1] = [numbers.one_of(_ODD)]

    def strides() -> list[int]:
        """Of any order of the axes, with gaps; rarely odd ones."""
        order = sorted(range(axes), key=lambda axis: numbers.below(256))
        found, step = [0] * axes, 1 + numbers.below(2)
        for axis in order:
            found[axis] = step
            step *= abs(sizes[axis]) % 1000
        if numbers.rarely():
            found = [numbers.one_of(_ODD) if size == 1 else numbers.below(1 << 16) - 8 for size in sizes]
        return found

    ends = array("q")
    flat = array("q", strides())
    for _ in formula.dtypes:
        flat.extend(strides())
        ends.extend((files.readable(numbers), numbers.offset()))
    for _ in range(1 + numbers.below(2)):
        ends.extend((numbers.below(len(formula.rows)), files.writable(numbers), numbers.offset()))
    scratch = _scratch(native, numbers, native.scratch(len(formula.rows), True))
    formula.of.largest_tile(bool(numbers.below(2)))
    formula.of.fill_tile(array("q", sizes), flat, ends, scratch, True)


def _gram(native: Any, names: list[str], files: _Files, numbers: Numbers) -> None:
    count = numbers.below(11)
    dtypes = tuple(numbers.one_of(names) for _ in range(count))
    places = array("q")
    for _ in range(count - numbers.rarely()):
        places.extend((files.readable(numbers), numbers.offset()))
    padded = (count + 3) // 4 * 4
    sums = bytearray(8 * padded * padded - numbers.rarely())
    n = numbers.one_of(_ODD) if numbers.rarely() else numbers.one_of(_LENGTHS)
    native.gram(dtypes, places, n, sums, _scratch(native, numbers, native.gram_scratch(count)))


def _moments(native: Any, names: list[str], files: _Files, numbers: Numbers) -> None:
    dtype = numbers.one_of(names)
    shape = (numbers.below(6), numbers.below(40), numbers.one_of(_LENGTHS[:21]))
    begin = 16 * numbers.below(64)
    size = _itemsize(dtype)
    values = array("B", files.content[begin : begin + math.prod(shape) * size])
    if len(values) < math.prod(shape) * size:
        return
    found = native.moments(values.buffer_info()[0], dtype, shape, 1 + numbers.below(4))
    if dtype in _NUMPY:
        _compare_moments(np.frombuffer(values, _NUMPY[dtype]).reshape(shape), np.frombuffer(found).reshape(2, -1))


def _compare_moments(values: np.ndarray, found: np.ndarray) -> None:
    """Hold mean and M2 of channels of finite numbers against NumPy."""
    with np.errstate(all="ignore"):
        whole = values.astype(np.float64)
        mean = whole.mean((0, 2))
        squares = np.square(whole - mean[:, None]).sum((0, 2))
        largest = np.abs(whole).max((0, 2))
        near = np.abs(found[0] - mean) <= 1e-12 * largest
        near &= np.abs(found[1] - squares) <= 1e-9 * (squares + largest**2) + np.finfo(np.float64).tiny
    if not near[largest < 1e100].all():
        raise Fault(f"moments: not those that NumPy computes, of {values.dtype} {values.shape}")


def _crc32(native: Any, names: list[str], files: _Files, numbers: Numbers) -> None:
    begin = numbers.below(5000)
    data = files.content[begin : begin + numbers.one_of(_LENGTHS)]
    if native.crc32(data) != zlib.crc32(data):
        raise Fault("crc32: not the checksum that zlib computes")


def _start_disk(native: Any, names: list[str], files: _Files, numbers: Numbers) -> None:
    native.start_disk(files.writable(numbers), numbers.offset(), numbers.offset())
