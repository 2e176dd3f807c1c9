"""Sums by `_native`, the C extension: from files to files, in several threads at once, without torch.

The extension is optional. Without it torch computes the same bytes; `moments` of channels alone agree only but for
float64 rounding.
"""

from __future__ import annotations

import os
import sys
import zlib
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from ..formats.file_plan import GroupKey, used
from ..storage.ahead import Buffer
from ..storage.source import OpenFiles, ended_early, read_failed
from ..storage.staged import write_failed
from ..tensors import TensorSpec, c_strides
from .summation import Steps, real_dtype
from .tiles import Tile
from .work_units import Slice

try:
    from . import _native
except ImportError:
    _native = None  # type: ignore[assignment]

SLICE = 1 << 20
"""Elements of a unit: enough to make the price of a call vanish, few enough to share a model out evenly."""
_PACKED = 3 << 18  # bytes of packed small tensors of all rows, twice


def present() -> bool:
    """Return True if the C extension is installed, and can be imported."""
    return _native is not None


def scratch(rows: int, *, tiles: bool = False) -> int:
    """Return the bytes that a thread provides for so many rows: for blocks, their sums, and the bytes of one write."""
    return 0 if _native is None else _native.scratch(rows, tiles)


def memory(rows: int, *, tiles: bool = False) -> int:
    """Return the private bytes that a thread needs, at most: its scratch, and packed small tensors."""
    return scratch(rows) + _PACKED + (scratch(rows, tiles=True) if tiles else 0)


def knows(key: GroupKey | None, axes: int = 0) -> bool:
    """Return True if C can fill a work unit with this key; if it is a tile, one with so many axes."""
    if _native is None or sys.byteorder != "little" or key is None:
        return False
    return axes <= _native.AXES and _fits(key)


@lru_cache(maxsize=256)
def _fits(key: GroupKey) -> bool:
    if key.copied and not key.checked:
        return True
    return all(dtype.name in _native.LIMITS and dtype.category is key.out.category for dtype in (key.out, *key.dtypes))


def crc32(data: bytes | memoryview) -> int:
    """Return the CRC-32 of bytes, as zip has it; ten times as fast as zlib if the processor allows."""
    return zlib.crc32(data) if _native is None else _native.crc32(data)


def reads_memory() -> Callable[[Buffer | array[int]], int] | None:
    """Return what finds the address of bytes, if C can read them there; see `InMemory` in `csrc/native.h`."""
    return None if _native is None or sys.byteorder != "little" else _native.address


def start_disk(fd: int, offset: int, nbytes: int) -> None:
    """Start to write a range of a file to the disk, so that the final sync takes less time; 0 bytes: up to its end."""
    if _native is not None:
        _native.start_disk(fd, offset, nbytes)


def gram_knows(specs: Sequence[TensorSpec]) -> bool:
    """Return True if C can read these tensors, and widen them."""
    if _native is None or sys.byteorder != "little":
        return False
    return all(
        type(spec) is TensorSpec and spec.contiguous and not spec.swapped and spec.dtype.name in _native.LIMITS
        for spec in specs
    )


def gram_scratch(count: int) -> int:
    """Return the bytes of scratch that a thread provides for inner products of so many tensors."""
    return 0 if _native is None else _native.gram_scratch(count)


def gram(
    specs: Sequence[TensorSpec], start: int, stop: int, files: OpenFiles, sums: bytearray, scratch: bytearray
) -> None:
    """Add the inner products of elements [start, stop) to sums, see `_native.pyi`; C knows the tensors.

    Raises:
        ReadError: an input cannot be read, or ends early.
    """
    dtypes = tuple([real_dtype(spec.dtype).name for spec in specs])
    places = array("q")
    for spec in specs:
        places.extend((files.handle(spec.paths[0]), spec.begin + start * spec.dtype.itemsize))
    reals = specs[0].dtype.itemsize // real_dtype(specs[0].dtype).itemsize
    failure = _native.gram(dtypes, places, (stop - start) * reals, sums, scratch)
    if failure is not None:
        status, _, row, reason = failure
        _raise_unread(status, specs[row].storage.path, reason)


def moments(address: int, dtype: str, shape: tuple[int, int, int], threads: int) -> bytearray | None:
    """Return mean and M2 of channels in memory, see `_native.pyi`; None if C does not know the dtype."""
    if _native is None or dtype not in ("float64", "float32", "bfloat16", "float16"):
        return None
    return _native.moments(address, dtype, shape, threads)


def fill(key: GroupKey, slice_: Slice, files: OpenFiles, scratch: bytearray) -> tuple[Sequence[int], bool]:
    """Sum a slice and write it; C knows its key.

    Args:
        scratch: memory that no other thread uses, see `scratch`.

    Returns:
        (CRC-32 of each row if a file needs it, True if C leaves it to torch, because of NaN, infinity, or a sum that it
        cannot decide; the slice is not written to its end then).

    Raises:
        ReadError: an input cannot be read, or ends early.
        WriteError: the output cannot be written.
    """
    ends = array("q", [slice_.stop - slice_.start, *_inputs(slice_, files, {}), *_ends(slice_)])
    failure, crcs, bad = _formula(key).fill(ends, scratch, slice_.needs_checksums)
    _raise_failure(failure, (slice_,))
    return memoryview(crcs).cast("I"), bad


def largest_tile(key: GroupKey, one_order: bool) -> int:
    """Return the number of elements that a tile may have; C knows its key.

    Args:
        one_order: all terms have the same axis order.
    """
    return _formula(key).largest_tile(one_order)


def fill_tile(
    key: GroupKey, slice_: Slice, tile: Tile, files: OpenFiles, scratch: bytearray
) -> tuple[Sequence[int], bool]:
    """Sum a tile and write it; C knows its key.

    Args:
        tile: the one of the slice.
        scratch: memory that no other thread uses, see `scratch`.

    Returns:
        (what each row adds to the CRC-32 of all bytes up to its end, True if NaN or infinity was found; the tile is not
        written then).

    Raises:
        ReadError, WriteError: see `fill`.
    """
    strides = array("q", c_strides(slice_.tensor.shape))
    ends = array("q")
    for spec, places in slice_.tensor.terms.inputs:
        offset = spec.begin + tile.begin(spec.stride) * spec.dtype.itemsize
        for path, shift in places:
            strides.extend(spec.stride)
            ends.extend((files.handle(path), offset + shift))
    ends.extend(_ends(slice_))
    failure, crcs, bad = _formula(key).fill_tile(array("q", tile.sizes), strides, ends, scratch, slice_.needs_checksums)
    _raise_failure(failure, (slice_,))
    return memoryview(crcs).cast("I"), bad


def pack(
    key: GroupKey, slices: Sequence[Slice], files: OpenFiles, scratch: bytearray
) -> tuple[memoryview, Sequence[int], Sequence[int]]:
    """Sum small slices into memory, one behind the other; C knows their key.

    Args:
        scratch: memory that no other thread uses, see `scratch`.

    Returns:
        (bytes of all slices, row after row; the CRC-32 of each, row after row; 1 for each with NaN or infinity).

    Raises:
        ReadError: an input cannot be read, or ends early.
    """
    rows = array("q")
    fds: dict[int, int] = {}
    for slice_ in slices:
        rows.append(slice_.stop - slice_.start)
        rows.extend(_inputs(slice_, files, fds))
    failure, packed, crcs, bad = _formula(key).pack(rows, scratch, slices[0].needs_checksums)
    _raise_failure(failure, slices)
    return memoryview(packed), memoryview(crcs).cast("I"), bad


def _inputs(slice_: Slice, files: OpenFiles, fds: dict[int, int]) -> list[int]:
    """List descriptor, or what stands for it, and offset of each term.

    Args:
        fds: those found so far, by the identity of their path: comparing paths would cost more than all the rest.
    """
    found: list[int] = []
    for spec, places in slice_.tensor.terms.inputs:
        offset = spec.begin + slice_.start * spec.dtype.itemsize
        for path, shift in places:
            fd = fds.get(id(path))
            if fd is None:
                fd = fds[id(path)] = files.handle(path)
            found += (fd, offset + shift)
    return found


def _ends(slice_: Slice) -> list[int]:
    """List row, descriptor and offset of each target."""
    begin = slice_.begin
    return [number for out, offset, row, _ in slice_.targets for number in (row, out.fd, offset + begin)]


@lru_cache(maxsize=256)
def _formula(key: GroupKey) -> _native.Formula:
    looked_at = key.checked or not key.copied
    return _native.Formula(
        dtypes=tuple(dtype.name for dtype in key.dtypes),
        rows=tuple(_row(key, row) for row in key.rows),
        out=key.out.name if looked_at else None,
        itemsize=key.out.itemsize,
        copied=key.copied,
        checked=key.checked,
    )


def _row(key: GroupKey, row: Sequence[float]) -> tuple[int, tuple[float | None, ...], float, float]:
    """Return (kind; factor of each term, None if it is left out; last; lost), see `Steps`."""
    terms = used(row)
    steps = Steps.of([key.dtypes[term] for term in terms], [row[term] for term in terms], key.out)
    found: list[float | None] = [None] * len(row)
    for term, factor in zip(terms, steps.factors, strict=True):
        found[term] = factor
    return steps.kind, tuple(found), steps.last, steps.lost


def _raise_failure(failure: tuple[int, int, int, int] | None, slices: Sequence[Slice]) -> None:
    if failure is None:
        return
    status, at, term, reason = failure
    slice_ = slices[at]
    if status == _native.NOT_WRITTEN:
        raise write_failed(slice_.targets[term].out.plan.name, os.strerror(reason))
    _raise_unread(status, slice_.tensor.terms[term].storage.path, reason)


def _raise_unread(status: int, source: Path, reason: int) -> None:
    if status == _native.ENDS_EARLY:
        raise ended_early(source)
    if status == _native.NOT_READ:
        raise read_failed(source, os.strerror(reason))
