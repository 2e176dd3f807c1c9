"""Sums by `_native`, a C extension: from file to file, several threads at once, and without torch.

Where no compiler was at hand when this package was installed, there is none, and torch does it all.
"""

from __future__ import annotations

import os
import sys
import zlib
from array import array
from collections.abc import Sequence
from functools import lru_cache

from ..formats.file_plan import SumKind
from ..storage.opened import OpenFiles, ended_early, read_failed
from ..storage.staged import write_failed
from ..tensors import c_strides
from .batches import Part
from .formula import Steps
from .tiles import Tile

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
PIECE = 1 << 20
"""Elements of a batch: enough to make the price of a call vanish, few enough to share a model out evenly."""


def knows(kind: SumKind | None, axes: int = 0) -> bool:
    """True if a batch of this kind can be summed here; if it is a tile, with so many axes."""
    if _native is None or sys.byteorder != "little" or kind is None:
        return False
    return axes <= _native.AXES and _fits(kind)


@lru_cache(maxsize=256)
def _fits(kind: SumKind) -> bool:
    if kind.copied and not kind.checked:
        return True
    return all(dtype.name in _native.LIMITS and dtype.kind is kind.out.kind for dtype in (kind.out, *kind.dtypes))


def crc32(data: bytes | memoryview) -> int:
    """Return the checksum that zip keeps, ten times as fast as zlib's where the processor can."""
    return zlib.crc32(data) if _native is None else _native.crc32(data)


def start_disk(fd: int, offset: int, nbytes: int) -> None:
    """Let the disk begin with a part of a file, so that the sync has less to wait for; 0 bytes: to its end."""
    if _native is not None:
        _native.start_disk(fd, offset, nbytes)


def fill(kind: SumKind, part: Part, files: OpenFiles, scratch: bytearray) -> tuple[int, bool]:
    """Sum a part of a kind that is known here, and write it.

    Args:
        scratch: `SCRATCH` bytes that no other thread uses.

    Returns:
        (CRC-32 if its file has need of it, True if NaN or infinity was found; the part is not written to its end then).

    Raises:
        ReadError: an input cannot be read, or ends early.
        WriteError: the output cannot be written.
    """
    row = array("q", [part.stop - part.start, part.out.fd, part.position, *_inputs(part, files, {})])
    failure, crc, bad = _formula(kind).fill(row, scratch, part.out.plan.needs_crc)
    _raise_failure(failure, (part,))
    return crc, bad


def largest_tile(kind: SumKind, one_order: bool) -> int:
    """Return the number of elements that a tile of a kind that is known here may have.

    Args:
        one_order: the elements of all terms stand in one order.
    """
    return _formula(kind).largest_tile(one_order)


def fill_tile(kind: SumKind, part: Part, tile: Tile, files: OpenFiles, scratch: bytearray) -> tuple[int, bool]:
    """Sum a tile of a kind that is known here, and write it.

    Args:
        tile: of the part.
        scratch: `TILE_SCRATCH` bytes that no other thread uses.

    Returns:
        (what it adds to the CRC-32 of all bytes up to its end, True if NaN or infinity was found; the tile is not
        written then).

    Raises:
        ReadError, WriteError: see `fill`.
    """
    strides = array("q", c_strides(part.tensor.shape))
    places = array("q", [part.out.fd, part.position])
    for spec, paths in part.tensor.places:
        offset = spec.begin + tile.begin(spec.stride) * spec.dtype.itemsize
        for path in paths:
            strides.extend(spec.stride)
            places.extend((files[path], offset))
    failure, crc, bad = _formula(kind).fill_tile(
        array("q", tile.sizes), strides, places, scratch, part.out.plan.needs_crc
    )
    _raise_failure(failure, (part,))
    return crc, bad


def pack(
    kind: SumKind, parts: Sequence[Part], files: OpenFiles, scratch: bytearray
) -> tuple[memoryview, Sequence[int], Sequence[int]]:
    """Sum small parts of a kind that is known here into memory, one behind the other.

    Args:
        scratch: `SCRATCH` bytes that no other thread uses.

    Returns:
        (bytes, CRC-32 of each part, 1 for each part in which NaN or infinity was found).

    Raises:
        ReadError: an input cannot be read, or ends early.
    """
    rows = array("q")
    fds: dict[int, int] = {}
    for part in parts:
        rows.append(part.stop - part.start)
        rows.extend(_inputs(part, files, fds))
    failure, packed, crcs, bad = _formula(kind).pack(rows, scratch, parts[0].out.plan.needs_crc)
    _raise_failure(failure, parts)
    return memoryview(packed), memoryview(crcs).cast("I"), bad


def _inputs(part: Part, files: OpenFiles, fds: dict[int, int]) -> list[int]:
    """List descriptor and position of each term.

    Args:
        fds: descriptors known so far by the identity of their path, for comparing paths costs more than all the rest.
    """
    found: list[int] = []
    for spec, paths in part.tensor.places:
        offset = spec.begin + part.start * spec.dtype.itemsize
        for path in paths:
            fd = fds.get(id(path))
            if fd is None:
                fd = fds[id(path)] = files[path]
            found += (fd, offset)
    return found


@lru_cache(maxsize=256)
def _formula(kind: SumKind) -> _native.Formula:
    looked_at = kind.checked or not kind.copied
    common, anchored = Steps.of(kind.dtypes, kind.coefficients)
    return _native.Formula(
        dtypes=tuple(dtype.name for dtype in kind.dtypes),
        coefficients=kind.coefficients if common is None else (1.0,) * len(kind.coefficients),
        out=kind.out.name if looked_at else None,
        itemsize=kind.out.itemsize,
        common=1.0 if common is None else common,
        anchored=anchored,
        copied=kind.copied,
        checked=kind.checked,
    )


def _raise_failure(failure: tuple[int, int, int, int] | None, parts: Sequence[Part]) -> None:
    if failure is None:
        return
    status, at, term, reason = failure
    part = parts[at]
    source = part.tensor.terms[term][0].storage.path
    if status == _native.ENDS_EARLY:
        raise ended_early(source)
    if status == _native.NOT_READ:
        raise read_failed(source, os.strerror(reason))
    raise write_failed(part.out.plan.name, os.strerror(reason))
