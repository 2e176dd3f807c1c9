"""Sums by `_native`, the C extension: from files to files, in several threads at once, without torch.

The extension is optional; results are identical without it, computed by torch.
"""

from __future__ import annotations

import os
import sys
import zlib
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ..formats.file_plan import GroupKey
from ..storage.source import OpenFiles, ended_early, read_failed
from ..storage.staged import write_failed
from ..tensors import TensorSpec, c_strides
from .formula import Steps, real_dtype
from .tiles import Tile
from .work_units import Slice

try:
    from . import _native
except ImportError:
    _native = None  # type: ignore[assignment]

SCRATCH = 0 if _native is None else _native.SCRATCH
"""Bytes that a thread provides for blocks, their sums, and the bytes of one write."""
TILE_SCRATCH = 0 if _native is None else _native.TILE_SCRATCH
"""The same for tiles."""
MEMORY = SCRATCH + (3 << 18)
"""Private bytes that a thread needs, at most: its scratch, and packed small tensors, twice."""
SLICE = 1 << 20
"""Elements of a unit: enough to make the price of a call vanish, few enough to share a model out evenly."""


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
        places.extend((files.descriptor(spec.paths[0]), spec.begin + start * spec.dtype.itemsize))
    reals = specs[0].dtype.itemsize // real_dtype(specs[0].dtype).itemsize
    failure = _native.gram(dtypes, places, (stop - start) * reals, sums, scratch)
    if failure is not None:
        status, _, row, reason = failure
        _raise_unread(status, specs[row].storage.path, reason)


def fill(key: GroupKey, slice_: Slice, files: OpenFiles, scratch: bytearray) -> tuple[int, bool]:
    """Sum a slice and write it; C knows its key.

    Args:
        scratch: `SCRATCH` bytes that no other thread uses.

    Returns:
        (CRC-32 if its file needs it, True if NaN or infinity was found; the slice is not written to its end then).

    Raises:
        ReadError: an input cannot be read, or ends early.
        WriteError: the output cannot be written.
    """
    row = array("q", [slice_.stop - slice_.start, slice_.out.fd, slice_.position, *_inputs(slice_, files, {})])
    failure, crc, bad = _formula(key).fill(row, scratch, slice_.out.plan.needs_checksums)
    _raise_failure(failure, (slice_,))
    return crc, bad


def largest_tile(key: GroupKey, one_order: bool) -> int:
    """Return the number of elements that a tile may have; C knows its key.

    Args:
        one_order: all terms have the same axis order.
    """
    return _formula(key).largest_tile(one_order)


def fill_tile(key: GroupKey, slice_: Slice, tile: Tile, files: OpenFiles, scratch: bytearray) -> tuple[int, bool]:
    """Sum a tile and write it; C knows its key.

    Args:
        tile: the one of the slice.
        scratch: `TILE_SCRATCH` bytes that no other thread uses.

    Returns:
        (what it adds to the CRC-32 of all bytes up to its end, True if NaN or infinity was found; the tile is not
        written then).

    Raises:
        ReadError, WriteError: see `fill`.
    """
    strides = array("q", c_strides(slice_.tensor.shape))
    ends = array("q", [slice_.out.fd, slice_.position])
    for spec, places in slice_.tensor.terms.inputs:
        offset = spec.begin + tile.begin(spec.stride) * spec.dtype.itemsize
        for path, shift in places:
            strides.extend(spec.stride)
            ends.extend((files.descriptor(path), offset + shift))
    failure, crc, bad = _formula(key).fill_tile(
        array("q", tile.sizes), strides, ends, scratch, slice_.out.plan.needs_checksums
    )
    _raise_failure(failure, (slice_,))
    return crc, bad


def pack(
    key: GroupKey, slices: Sequence[Slice], files: OpenFiles, scratch: bytearray
) -> tuple[memoryview, Sequence[int], Sequence[int]]:
    """Sum small slices into memory, one behind the other; C knows their key.

    Args:
        scratch: `SCRATCH` bytes that no other thread uses.

    Returns:
        (bytes, CRC-32 of each slice, 1 for each slice with NaN or infinity).

    Raises:
        ReadError: an input cannot be read, or ends early.
    """
    rows = array("q")
    fds: dict[int, int] = {}
    for slice_ in slices:
        rows.append(slice_.stop - slice_.start)
        rows.extend(_inputs(slice_, files, fds))
    failure, packed, crcs, bad = _formula(key).pack(rows, scratch, slices[0].out.plan.needs_checksums)
    _raise_failure(failure, slices)
    return memoryview(packed), memoryview(crcs).cast("I"), bad


def _inputs(slice_: Slice, files: OpenFiles, fds: dict[int, int]) -> list[int]:
    """List descriptor and offset of each term.

    Args:
        fds: descriptors found so far, by the identity of their path: comparing paths would cost more than all the rest.
    """
    found: list[int] = []
    for spec, places in slice_.tensor.terms.inputs:
        offset = spec.begin + slice_.start * spec.dtype.itemsize
        for path, shift in places:
            fd = fds.get(id(path))
            if fd is None:
                fd = fds[id(path)] = files.descriptor(path)
            found += (fd, offset + shift)
    return found


@lru_cache(maxsize=256)
def _formula(key: GroupKey) -> _native.Formula:
    looked_at = key.checked or not key.copied
    common, anchored = Steps.of(key.dtypes, key.coefficients)
    return _native.Formula(
        dtypes=tuple(dtype.name for dtype in key.dtypes),
        coefficients=key.coefficients if common is None else (1.0,) * len(key.coefficients),
        out=key.out.name if looked_at else None,
        itemsize=key.out.itemsize,
        common=1.0 if common is None else common,
        anchored=anchored,
        copied=key.copied,
        checked=key.checked,
    )


def _raise_failure(failure: tuple[int, int, int, int] | None, slices: Sequence[Slice]) -> None:
    if failure is None:
        return
    status, at, term, reason = failure
    slice_ = slices[at]
    source = slice_.tensor.terms[term][0].storage.path
    _raise_unread(status, source, reason)
    raise write_failed(slice_.out.plan.name, os.strerror(reason))


def _raise_unread(status: int, source: Path, reason: int) -> None:
    if status == _native.ENDS_EARLY:
        raise ended_early(source)
    if status == _native.NOT_READ:
        raise read_failed(source, os.strerror(reason))
