"""Sums by `_native`, a C extension: from file to file, several threads at once, and without torch.

Where no compiler was at hand when this package was installed, there is none, and torch does it all.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache

from .errors import CkptError
from .formats.opened import OpenFiles, ended_early, read_failed
from .formats.staged import write_failed
from .pieces import Kind, Part

try:
    from . import _native
except ImportError:
    _native = None  # type: ignore[assignment]

MEMORY = 16384 * 16
"""Private bytes that a thread needs for its blocks."""
PIECE = 1 << 20
"""Elements of a batch: enough to make the price of a call vanish, few enough to share a model out evenly."""

_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
_RAW = 3
# The smallest magnitude that rounds beyond the largest value: half a step above it.
_LIMITS = {"float32": (2 - 2**-24) * 2.0**127, "bfloat16": (2 - 2**-8) * 2.0**127, "float16": (2 - 2**-11) * 2.0**15}
_NOT_READ, _ENDS_EARLY, _NOT_WRITTEN = 1, 2, 3


def knows(kind: Kind | None) -> bool:
    """True if a batch of this kind can be summed here."""
    return _native is not None and kind is not None and _fits(kind)


@lru_cache(maxsize=256)
def _fits(kind: Kind) -> bool:
    if kind.copied and not kind.checked:
        return True
    return kind.out.name in _CODES and all(dtype.name in _CODES for dtype in kind.dtypes)


def fill(kind: Kind, parts: Sequence[Part], files: OpenFiles, *, checksums: bool) -> tuple[list[int], list[bool]]:
    """Sum parts of a kind that is known here, and write them.

    Returns:
        (checksums, in which parts NaN or infinity was found; these are not written).

    Raises:
        ReadError: an input cannot be read, or ends early.
        WriteError: the output cannot be written.
    """
    terms, out, item, common = _terms(kind)
    rows = array("q")
    for part in parts:
        tensor, start = part.tensor, part.start
        rows.extend(((part.stop - start) * item, part.out.fd, part.offset + start * tensor.dtype.itemsize))
        for spec, _ in tensor.terms:
            storage = spec.storage
            rows.extend((files[storage.path], storage.offset + (spec.start + start) * spec.dtype.itemsize))
    crcs = array("I", bytes(4 * len(parts)))
    bad = bytearray(len(parts))
    status, at, term, reason = _native.sum_parts(
        terms, out, common, _LIMITS.get(kind.out.name, 0.0), kind.copied, kind.checked, checksums, rows, crcs, bad
    )
    if status:
        part = parts[at]
        raise _failure(status, part.tensor.terms[term][0].storage.path, part.out.plan.name, reason)
    return crcs.tolist(), [bool(flag) for flag in bad]


@lru_cache(maxsize=256)
def _terms(kind: Kind) -> tuple[bytes, int, int, float]:
    """Return (the terms as C has them, code of the output, its elements to one of ours, the common coefficient)."""
    if kind.copied and not kind.checked:
        return struct.pack("qd", _RAW, 1.0), _RAW, kind.out.itemsize, 1.0
    coefficients = kind.coefficients
    common = coefficients[0] if len(set(coefficients)) == 1 else None
    packed = b"".join(
        struct.pack("qd", _CODES[dtype.name], c if common is None else 1.0)
        for dtype, c in zip(kind.dtypes, coefficients, strict=True)
    )
    return packed, _CODES[kind.out.name], 1, 1.0 if common is None else common


def _failure(status: int, source: object, target: str, reason: int) -> CkptError:
    if status == _ENDS_EARLY:
        return ended_early(source)
    if status == _NOT_READ:
        return read_failed(source, os.strerror(reason))
    return write_failed(target, os.strerror(reason or errno.EIO))
