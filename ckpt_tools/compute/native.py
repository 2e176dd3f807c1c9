"""Sums by `_native`, a C extension: from file to file, several threads at once, and without torch.

Where no compiler was at hand when this package was installed, there is none, and torch does it all.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from array import array
from collections.abc import Sequence
from functools import lru_cache

from ..formats.file_plan import SumKind
from ..storage.source import OpenFiles, ended_early, read_failed
from ..storage.staged import write_failed
from .batches import Part

try:
    from . import _native
except ImportError:
    _native = None  # type: ignore[assignment]

SCRATCH = 3 << 19
"""Bytes that a thread keeps for blocks, their sums, and what is written at once; `_native` refuses too little."""
MEMORY = SCRATCH + (3 << 18)
"""Private bytes that a thread needs, at most: its scratch, and what is packed of small tensors, twice."""
PIECE = 1 << 20
"""Elements of a batch: enough to make the price of a call vanish, few enough to share a model out evenly."""

_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
_RAW = 3
# The smallest magnitude that rounds beyond the largest value: half a step above it.
_LIMITS = {"float32": (2 - 2**-24) * 2.0**127, "bfloat16": (2 - 2**-8) * 2.0**127, "float16": (2 - 2**-11) * 2.0**15}
_NOT_READ, _ENDS_EARLY = 1, 2


def knows(kind: SumKind | None) -> bool:
    """True if a batch of this kind can be summed here."""
    return _native is not None and sys.byteorder == "little" and kind is not None and _fits(kind)


@lru_cache(maxsize=256)
def _fits(kind: SumKind) -> bool:
    if kind.copied and not kind.checked:
        return True
    return kind.out.name in _CODES and all(dtype.name in _CODES for dtype in kind.dtypes)


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
    terms, out, item, common, limit = _terms(kind)
    row = array("q", [(part.stop - part.start) * item, part.out.fd, part.position, *_inputs(part, files, {})])
    crcs, bad = array("I", [0]), bytearray(1)
    told = _native.sum_large(
        terms, out, common, limit, kind.copied, kind.checked, part.out.plan.needs_checksums, row, crcs, bad, scratch
    )
    _raise_failure(told, (part,))
    return crcs[0], bool(bad[0])


def pack(
    kind: SumKind, parts: Sequence[Part], files: OpenFiles, scratch: bytearray
) -> tuple[memoryview, Sequence[int], bytes]:
    """Sum small parts of a kind that is known here into memory, one behind the other.

    Args:
        scratch: `SCRATCH` bytes that no other thread uses.

    Returns:
        (bytes, CRC-32 of each part, 1 for each part in which NaN or infinity was found).

    Raises:
        ReadError: an input cannot be read, or ends early.
    """
    terms, out, item, common, limit = _terms(kind)
    rows = array("q")
    fds: dict[int, int] = {}
    for part in parts:
        rows.append((part.stop - part.start) * item)
        rows.extend(_inputs(part, files, fds))
    crcs, bad = array("I", bytes(4 * len(parts))), bytearray(len(parts))
    packed = bytearray(sum(part.nbytes for part in parts))
    told = _native.sum_small(
        terms,
        out,
        common,
        limit,
        kind.copied,
        kind.checked,
        parts[0].out.plan.needs_checksums,
        rows,
        crcs,
        bad,
        scratch,
        packed,
    )
    _raise_failure(told, parts)
    return memoryview(packed), crcs, bytes(bad)


def _inputs(part: Part, files: OpenFiles, fds: dict[int, int]) -> list[int]:
    """List descriptor and position of each term.

    Args:
        fds: descriptors known so far by the identity of their path, for comparing paths costs more than all the rest.
    """
    found: list[int] = []
    for spec, places in part.tensor.places:
        offset = spec.begin + part.start * spec.dtype.itemsize
        for path, shift in places:
            fd = fds.get(id(path))
            if fd is None:
                fd = fds[id(path)] = files.descriptor(path)
            found += (fd, offset + shift)
    return found


@lru_cache(maxsize=256)
def _terms(kind: SumKind) -> tuple[bytes, int, int, float, float]:
    """Return (the terms as C has them, code of the output, its elements to one of ours, common coefficient, limit)."""
    if kind.copied and not kind.checked:
        return struct.pack("qd", _RAW, 1.0), _RAW, kind.out.itemsize, 1.0, 0.0
    coefficients = kind.coefficients
    common = coefficients[0] if len(set(coefficients)) == 1 else None
    packed = b"".join(
        struct.pack("qd", _CODES[dtype.name], c if common is None else 1.0)
        for dtype, c in zip(kind.dtypes, coefficients, strict=True)
    )
    return packed, _CODES[kind.out.name], 1, 1.0 if common is None else common, _LIMITS[kind.out.name]


def _raise_failure(told: tuple[int, int, int, int], parts: Sequence[Part]) -> None:
    status, at, term, reason = told
    if not status:
        return
    part = parts[at]
    source = part.tensor.terms[term][0].storage.path
    if status == _ENDS_EARLY:
        raise ended_early(source)
    if status == _NOT_READ:
        raise read_failed(source, os.strerror(reason))
    raise write_failed(part.out.plan.name, os.strerror(reason))
