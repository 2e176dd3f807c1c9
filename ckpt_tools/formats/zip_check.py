"""Zip check: every byte of an archive against its directory.

Readers of zip files take what they need from the directory and pass over the rest. Here the checksum of every content
is computed, and what an archive says twice has to agree: the local file header, the data descriptor and the directory
line of an entry; the end records and the directory. What follows from nothing else (padding, attributes) has to be as
torch and ckpt-tools write it. APPNOTE.TXT, sections 4.3.7 to 4.3.16, has the fields.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ..errors import CorruptError, ReadError
from ..storage.source import InputFile, read_at
from . import dcp_metadata
from .dcp import DCP, METADATA
from .dcp_metadata import Location
from .header import Header
from .zip import (
    ALIGNMENT,
    DESCRIPTOR,
    END,
    END64,
    LOCAL,
    LOCATOR,
    MAX16,
    MAX32,
    PADDING_FIELD,
    ZIP64_FIELD,
    Archive,
    Entry,
    data_descriptor,
    extra_fields,
)

_OTHERS = frozenset({0x000A, 0x5455, 0x5855, 0x7855, 0x7875})
"""Extra fields of other programs: times and owners."""
_VERSIONS = ((20, 45), (45, 20))
"""Versions in a local file header and in the directory that differ because of an offset beyond 4 GB."""
_MAKERS = frozenset({20, 30, 45, 46, 63})
_SYSTEMS = frozenset({0, 3, 10, 11, 19})
_ZIP = b"PK\3\4"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """An archive in a file: the whole file, or a range of it. `where` names it in messages; it has `nbytes`.

    In its place there may be a safetensors file, which has no checksums.
    """

    path: Path
    start: int
    length: int | None
    where: str
    nbytes: int
    safetensors: bool = False


@dataclass(frozen=True, slots=True)
class Records:
    """What came of checking an archive.

    Attributes:
        checked: number of contents whose checksum is right.
        without: number of contents that have no checksum.
        fault: the first thing that does not agree, in words; None if all does.
    """

    checked: int
    without: int
    fault: str | None = None


def archives(header: Header) -> Iterator[Place]:
    """Yield the zip archives that a checkpoint consists of, and what takes the place of one in a DCP folder.

    Raises:
        CorruptError: the entries of a file of a DCP folder do not fill it.
    """
    locations: dict[Path, list[Location]] = {}
    if isinstance(header.format, DCP):
        with InputFile(header.path / METADATA) as index:
            metadata = dcp_metadata.load(index.as_file(), index.path)
        found = groupby(metadata.locations(), key=lambda at: at.file)
        locations = {header.path / name: [*each] for name, each in found}
    for stamp in header.files:
        with InputFile(stamp.path) as file:
            if stamp.path in locations:
                yield from _entries(file, locations[stamp.path])
            elif file.read(0, 4) == _ZIP:
                yield Place(stamp.path, 0, None, str(stamp.path), stamp.nbytes)


def _entries(file: InputFile, locations: Iterable[Location]) -> Iterator[Place]:
    """Yield what is in a file of a DCP folder: torch leaves nothing between entries, ckpt-tools zeros to align them."""
    start, end = -1, 0
    for at in locations:
        begin = file.read(at.offset, 9)
        safetensors = begin[:4] != _ZIP and begin[8:] == b"{"
        if safetensors and at.offset == start:  # all tensors of a file are in one place, which goes to its end
            continue
        gap = at.offset - end
        if not 0 <= gap < ALIGNMENT or any(file.read(end, gap)):
            raise CorruptError(f"{file.path}: what is before its entry at byte {at.offset} belongs to no entry")
        length = file.stamp.nbytes - at.offset if safetensors else at.length
        where = f"{file.path}, the entry at byte {at.offset}"
        yield Place(file.path, at.offset, length, where, length, safetensors)
        start, end = at.offset, at.offset + length
    if end != file.stamp.nbytes:
        raise CorruptError(f"{file.path}: what is after byte {end} belongs to no entry")


def check(place: Place, on_progress: Callable[[int], None] = lambda _: None) -> Records:
    """Check every byte of an archive.

    Args:
        on_progress: called after each entry, and at the end, with the bytes checked so far.

    Raises:
        ReadError: it cannot be read.
    """
    if place.safetensors:
        on_progress(place.nbytes)
        return Records(0, 1)
    with InputFile(place.path) as file:
        archive = Archive(file, place.start, place.length, where=place.where)
        length = file.stamp.nbytes - place.start if place.length is None else place.length
        checked = without = at = 0
        if archive.shift:
            return Records(0, 0, f"{place.where}: other bytes precede its archive")
        for entry in sorted(archive.entries.values(), key=lambda each: each.offset):
            name = entry.name.decode("utf-8", "replace")
            if entry.offset != at:
                return Records(checked, without, f"{place.where}: bytes before '{name}' belong to no entry")
            fault, at, crc = _entry(archive, file, place.start, entry)
            if fault is not None:
                return Records(checked, without, f"{place.where}: {fault} of '{name}' is not as its directory says")
            checked, without = (checked + 1, without) if crc else (checked, without + 1)
            on_progress(at)
        fault = _directory(archive, [*archive.entries.values()], at)
        end = archive.limit + len(archive.directory)
        fault = fault or _end(archive, file.read(place.start + end, length - end))
    on_progress(place.nbytes)
    return Records(checked, without, None if fault is None else f"{place.where}: {fault}")


def _entry(archive: Archive, file: InputFile, start: int, entry: Entry) -> tuple[str | None, int, bool]:
    """Check an entry.

    Returns:
        (what is wrong; the offset after it; True if its content has a checksum)
    """
    header, begin = archive.local_header(entry)
    _, version, flags, method, time, date, crc, packed, size, _, _ = LOCAL.unpack_from(header)
    line = entry.fields
    end = begin + entry.packed
    if end > archive.limit or (entry.stored and entry.size != entry.packed):
        return "the length", end, False
    if (version != line[1] and (version, line[1]) not in _VERSIONS) or (flags, method, time, date) != line[2:6]:
        return "the local header", end, False
    described = bool(flags & DESCRIPTOR) and not (crc or packed or size)
    extra = file.read(start + entry.offset + len(header), begin - entry.offset - len(header))
    fields, rest = extra_fields(extra)
    if rest or not all(_is_usual(number, data, entry, described) for number, data in fields):
        return "the padding", end, False
    if described:
        found = data_descriptor(file.read(start + end, 24), entry)
        if found is None or found[1] != entry.crc:
            return "the data descriptor", end, False
        end += struct.calcsize(found[0])
    else:
        sizes = all(n in (m, MAX32) for n, m in ((packed, entry.packed), (size, entry.size)))
        wide = MAX32 in (packed, size) and not any(number == ZIP64_FIELD for number, _ in fields)
        if crc != entry.crc or not sizes or wide:
            return "the local header", end, False
    if not entry.crc and entry.size:
        return None, end, False
    name = next(name for name, each in archive.entries.items() if each is entry) if not entry.stored else ""
    try:
        same = (
            _crc32(file, start + begin, entry.packed) == entry.crc
            if entry.stored
            else bool(archive.inflated(name, entry.size))
        )
    except ReadError:
        same = False
    return None if same else "the checksum", end, True


def _is_usual(number: int, data: bytes, entry: Entry, described: bool) -> bool:
    if number == PADDING_FIELD:
        return data == b"Z" * len(data)
    if number == ZIP64_FIELD:
        words = [data[i : i + 8] for i in range(0, len(data), 8)]
        known = (entry.size, entry.packed, entry.offset, *[0] * described)  # torch leaves one out
        return all(int.from_bytes(word, "little") in known for word in words)
    return number in _OTHERS


def _crc32(file: InputFile, offset: int, nbytes: int) -> int:
    crc, block = 0, memoryview(bytearray(min(_BLOCK, nbytes)))
    for at in range(0, nbytes, _BLOCK):
        part = block[: nbytes - at]
        read_at(file.source, part, offset + at, file.path)
        crc = zlib.crc32(part, crc)
    return crc


def _directory(archive: Archive, entries: list[Entry], at: int) -> str | None:
    """Check what only the directory says; `at` is where the entries end."""
    if at != archive.limit:
        return "bytes before its directory belong to no entry"
    systems = {entry.fields[0] >> 8 for entry in entries}
    attributes = {entry.fields[13:15] for entry in entries}
    odd = any(entry.fields[12] or entry.fields[13] > 1 for entry in entries)
    if systems == {0}:  # torch and ckpt-tools; a program of Unix keeps permissions there
        odd = odd or len(attributes) > 1 or any(entry.fields[0] != entry.fields[1] for entry in entries)
    return "its directory has lines that differ from the others" if odd or len(systems) > 1 else None


def _end(archive: Archive, tail: bytes) -> str | None:
    """Check the end records, which repeat count, size and offset of the directory."""
    odd = "its end records are not those of its directory"
    count, size, at = len(archive.entries), len(archive.directory), archive.limit
    if tail[:4] == b"PK\6\6":
        if len(tail) < END64.size + LOCATOR.size:
            return odd
        _, length, made, needed, *rest = END64.unpack_from(tail)
        if length != 44 or needed not in _MAKERS or rest != [0, 0, count, count, size, at]:
            return odd
        if made & 0xFF not in _MAKERS or made >> 8 not in _SYSTEMS:
            return odd
        if LOCATOR.unpack_from(tail, END64.size) != (b"PK\6\7", 0, at + size, 1):
            return odd
        tail = tail[END64.size + LOCATOR.size :]
    if len(tail) < END.size:
        return odd
    signature, *found, comment = END.unpack_from(tail)
    wanted = [0, 0, count, count, size, at]
    most = [0, 0, MAX16, MAX16, MAX32, MAX32]
    right = all(n == m or n == largest != 0 for n, m, largest in zip(found, wanted, most, strict=True))
    return None if signature == b"PK\5\6" and right and len(tail) == END.size + comment else odd
