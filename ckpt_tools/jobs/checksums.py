"""Checksums: the SHA-256 of each tensor of an output, in its record.

The record stands in front of the tensors, or its checksum does; so a place is kept for digests, which all have one
length, and filled when the tensors are written. They are read once more for that.
"""

from __future__ import annotations

import hashlib
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..compute.progress import HASHING_OUTPUT, Progress, counted
from ..compute.threads import HandedOut, in_threads
from ..compute.work_units import OutFile
from ..errors import WriteError
from ..formats.file_plan import OutTensor
from ..storage.local import read_once
from ..storage.staged import write_at
from .assembly import Assembly

CHECKSUMS = "checksums"
"""Name of the checksums in a record."""
BLOCK = 1 << 20
"""Bytes read at a time."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """What is recorded of a tensor.

    Attributes:
        dtype: its name in torch.
        shape: sizes.
        sha256: of its elements in C order, little endian, in hexadecimal digits.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def with_place(assembly: Assembly, wanted: bool) -> Assembly:
    """Return an output with a place for checksums in its record, if they are wanted.

    Raises:
        UnsupportedError: two tensors have the same path.
    """
    if not wanted:
        return assembly
    empty = dict.fromkeys(assembly.tensors.values(), "0" * 64)
    return replace(_recording(assembly, empty), checksums=True)


def fill(
    assembly: Assembly,
    outputs: Sequence[OutFile],
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Compute the checksums of what was written, and write them into their place.

    Args:
        on_progress: called with (what is done, bytes hashed, bytes in all).

    Raises:
        WriteError: the files cannot be read or written.
    """
    sums = _sums(outputs, threads, on_progress)
    final = _recording(assembly, {tensor: sha256 for tensor, (sha256, _) in sums.items()})
    for out, plan in zip(outputs, final.files, strict=True):
        for segment in plan.computed:
            data = segment.make([sums[tensor][1] for tensor in segment.needs])
            write_at(out.fd, memoryview(data), segment.offset, plan.name)


def read_checksums(made: Mapping[str, Any]) -> dict[str, Checksum] | None:
    """Read the checksums in a record, which may say anything; None if it has none.

    Raises:
        ValueError: they are damaged.
    """
    said = made.get(CHECKSUMS)
    if said is None:
        return None
    found = {}
    for name, each in said.items() if isinstance(said, dict) else [("", None)]:
        if not isinstance(each, dict):
            raise ValueError("its checksums are no objects by name")
        dtype, shape, sha256 = each.get("dtype"), each.get("shape"), each.get("sha256")
        if not (isinstance(dtype, str) and isinstance(shape, list) and all(type(n) is int for n in shape)):
            raise ValueError(f"its checksum of '{name}' has no dtype and shape")
        if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise ValueError(f"its checksum of '{name}' is no SHA-256")
        found[name] = Checksum(dtype, tuple(shape), sha256)
    return found


def _recording(assembly: Assembly, sha256: Mapping[OutTensor, str]) -> Assembly:
    said = {
        name: {"dtype": tensor.dtype.name, "shape": [*tensor.shape], "sha256": sha256[tensor]}
        for name, tensor in assembly.tensors.items()
    }
    return assembly.recording(**{CHECKSUMS: said})


def _sums(
    outputs: Sequence[OutFile], threads: int | None, on_progress: Progress | None
) -> dict[OutTensor, tuple[str, int]]:
    """Read what was written; return the SHA-256 and the CRC-32 of each tensor."""
    places = {tensor: (out, offset) for out in outputs for tensor, offset in out.plan.payloads}
    found: dict[OutTensor, tuple[str, int]] = {}
    stop = threading.Event()
    blocks: list[int] = []  # sizes of those that were read; threads add to it
    tell = counted(on_progress, HASHING_OUTPUT, sum(tensor.nbytes for tensor in places))
    # The largest first: a tensor is hashed in one thread.
    waiting = HandedOut(sorted(places, key=lambda tensor: -tensor.nbytes), stop)

    def work() -> None:
        block = memoryview(bytearray(BLOCK))
        for tensor in waiting:
            found[tensor] = _sum(*places[tensor], tensor.nbytes, block, blocks)

    in_threads(work, threads, stop, on_tick=None if tell is None else lambda: tell(sum(blocks)))
    return found


def _sum(out: OutFile, offset: int, nbytes: int, block: memoryview, blocks: list[int]) -> tuple[str, int]:
    hasher, crc = hashlib.sha256(), 0
    for part in read_back(out, offset, nbytes, block):
        hasher.update(part)
        crc = zlib.crc32(part, crc)
        blocks.append(len(part))
    return hasher.hexdigest(), crc


def read_back(out: OutFile, offset: int, nbytes: int, block: memoryview) -> Iterator[memoryview]:
    """Yield what was written to a range of an output, in parts; each overwrites the one before in `block`.

    Raises:
        WriteError: it cannot be read, or the file has become shorter.
    """
    at = 0
    while at < nbytes:
        try:
            got = read_once(out.fd, block[: min(len(block), nbytes - at)], offset + at)
        except OSError as error:
            raise WriteError(f"{out.plan.name}: cannot be read again for its checksums ({error.strerror}).") from error
        if not got:
            raise WriteError(f"{out.plan.name}: cannot be read again for its checksums: it became shorter.")
        yield block[:got]
        at += got
