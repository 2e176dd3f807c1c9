"""One record of a zip replaced: all others keep their bytes, and most of them their places.

What the new record is shorter or longer by goes into padding in its header, up to whole blocks; by
these the records behind it move, so that storages stay aligned as torch wants them.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from ..errors import CorruptError, UnsupportedError
from ..storage.splice import Span, moved
from .torch_zip import _PADDING_ID, _end
from .zip_records import CENTRAL, LOCAL, MAX16, MAX32

_ZIP64 = 1
_DESCRIPTOR = 1 << 3  # the flag for checksum and sizes behind the record, where torch's writer has them
# Behind a record, in descending order of likelihood: with and without a signature, with short and long sizes.
_FOOTERS = ("<4s3L", "<4sL2Q", "<3L", "<L2Q")


def replace(file: IO[bytes], name: str, body: bytes, *, where: str) -> tuple[bytes | Span, ...]:
    """Say of which pieces a zip consists once a record of it has another content.

    Args:
        file: the zip, which `torch_zip.read` has accepted.
        name: the record, stored without compression.
        body: its new content.
        where: the file's name, for messages.

    Raises:
        CorruptError: records overlap, or the directory is not one.
        UnsupportedError: the zip is of a form that no torch writes.
    """
    with zipfile.ZipFile(file) as archive:
        infos, start, comment = archive.infolist(), archive.start_dir, archive.comment
    entries = list(_directory(file, start, len(infos), where=where))
    if [entry.offset for entry in entries] != [info.header_offset for info in infos]:
        raise UnsupportedError(
            f"{where}: something stands before its zip, which torch cannot read either. Load and save it with torch."
        )
    at = [info.filename for info in infos].index(name)
    old = entries[at]
    head, extra = _local(file, old, where=where)
    data = old.offset + LOCAL.size + len(head.name) + len(extra)
    end = data + old.size
    footer = _footer(file, end, old) if old.flags & _DESCRIPTOR else ""
    end += struct.calcsize(footer) if footer else 0
    for entry in entries:
        if entry is not old and not (end <= entry.offset < start or _end_of(file, entry, where=where) <= old.offset):
            raise CorruptError(f"{where}: its records overlap. The file is damaged; get a fresh copy.")
    if end > start or len(body) >= MAX32:
        raise CorruptError(f"{where}: its records overlap its directory. The file is damaged; get a fresh copy.")

    crc, size = zlib.crc32(body), len(body)
    rest = _resized(_without(extra, _PADDING_ID), old.size, size)
    slack = len(extra) - len(rest) - 4  # for a field has 4 bytes of its own
    shift = moved(size - old.size - slack)
    slack += shift - (size - old.size)
    extra = rest + struct.pack("<2H", _PADDING_ID, slack) + b"Z" * slack
    if len(extra) > MAX16:
        raise UnsupportedError(f"{where}: the header of its {name} has no room left. Load and save it with torch once.")
    lines = [
        _line(entry, crc, size, entry.offset)
        if entry is old
        else _line(entry, entry.crc, None, entry.offset + (shift if entry.offset > old.offset else 0))
        for entry in entries
    ]
    pieces = (
        Span(0, old.offset),
        head.repacked(crc, size, len(extra)) + head.name + extra,
        body,
        struct.pack(footer, *(b"PK\7\10",) * ("s" in footer), crc, size, size) if footer else b"",
        Span(end, start),
        b"".join(lines) + _end(start + shift, lines)[:-2] + struct.pack("<H", len(comment)) + comment,
    )
    return tuple(piece for piece in pieces if piece and piece != Span(0, 0))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the directory.

    Attributes:
        fields: as they stand in it; sizes and offset may be in the extra fields instead.
        rest: extra fields but for that one.
        values: the uncompressed size, the compressed one and the offset.
    """

    fields: tuple[int, ...]
    name: bytes
    rest: bytes
    comment: bytes
    values: tuple[int, int, int]

    @property
    def flags(self) -> int:
        return self.fields[2]

    @property
    def crc(self) -> int:
        return self.fields[6]

    @property
    def size(self) -> int:
        return self.values[1]

    @property
    def offset(self) -> int:
        return self.values[2]


def _directory(file: IO[bytes], position: int, count: int, *, where: str) -> Iterator[_Entry]:
    file.seek(position)
    for _ in range(count):
        line = file.read(CENTRAL.size)
        if len(line) < CENTRAL.size or not line.startswith(b"PK\1\2"):
            raise CorruptError(f"{where}: its zip directory is damaged. Get a fresh copy.")
        fields = CENTRAL.unpack(line)[1:]
        name, extra, comment = (file.read(fields[i]) for i in (9, 10, 11))
        wide = _field(extra, _ZIP64) or b""
        values = []
        for short in (fields[8], fields[7], fields[15]):
            if short == MAX32 and len(wide) >= 8:
                short, wide = int.from_bytes(wide[:8], "little"), wide[8:]
            values.append(short)
        yield _Entry(fields, name, _without(extra, _ZIP64), comment, (values[0], values[1], values[2]))


def _line(entry: _Entry, crc: int, size: int | None, offset: int) -> bytes:
    """Write a line of the directory; a number is a long one where it was, or has to be."""
    fields = list(entry.fields)
    wide = b""
    for i, value in (
        (8, entry.values[0] if size is None else size),
        (7, entry.size if size is None else size),
        (15, offset),
    ):
        long = fields[i] == MAX32 or value >= MAX32
        fields[i] = MAX32 if long else value
        wide += struct.pack("<Q", value) if long else b""
    extra = (struct.pack("<2H", _ZIP64, len(wide)) + wide if wide else b"") + entry.rest
    fields[6], fields[10] = crc, len(extra)
    return CENTRAL.pack(b"PK\1\2", *fields) + entry.name + extra + entry.comment


@dataclass(frozen=True, slots=True)
class _Head:
    """The fixed part of the header before a record, and the record's name."""

    fields: tuple[int, ...]
    name: bytes

    def repacked(self, crc: int, size: int, extra: int) -> bytes:
        fields = list(self.fields)
        for i, value in ((5, crc), (6, size), (7, size)):
            behind = fields[1] & _DESCRIPTOR and fields[i] == 0
            long = i > 5 and fields[i] == MAX32
            fields[i] = fields[i] if behind or long else value
        fields[9] = extra
        return LOCAL.pack(b"PK\3\4", *fields)


def _local(file: IO[bytes], entry: _Entry, *, where: str) -> tuple[_Head, bytes]:
    file.seek(entry.offset)
    raw = file.read(LOCAL.size)
    if len(raw) < LOCAL.size or not raw.startswith(b"PK\3\4"):
        raise CorruptError(f"{where}: its zip directory points at no record. The file is damaged.")
    fields = LOCAL.unpack(raw)[1:]
    return _Head(fields, file.read(fields[8])), file.read(fields[9])


def _end_of(file: IO[bytes], entry: _Entry, *, where: str) -> int:
    head, extra = _local(file, entry, where=where)
    return entry.offset + LOCAL.size + len(head.name) + len(extra) + entry.size


def _footer(file: IO[bytes], position: int, entry: _Entry) -> str:
    """Find out in which form checksum and sizes stand behind a record; "" if they do not."""
    file.seek(position)
    raw = file.read(24)
    for form in _FOOTERS:
        length = struct.calcsize(form)
        if len(raw) < length:
            continue
        *signature, _crc, packed, size = struct.unpack(form, raw[:length])
        if (packed, size) == (entry.size, entry.size) and signature in ([], [b"PK\7\10"]):
            return form
    return ""


def _fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        yield kind, extra[position + 4 : position + 4 + length]
        position += 4 + length


def _field(extra: bytes, wanted: int) -> bytes | None:
    return next((data for kind, data in _fields(extra) if kind == wanted), None)


def _without(extra: bytes, unwanted: int) -> bytes:
    return b"".join(struct.pack("<2H", kind, len(data)) + data for kind, data in _fields(extra) if kind != unwanted)


def _resized(extra: bytes, old: int, new: int) -> bytes:
    """Put the new size where the long form of a header has the old one."""
    wide = _field(extra, _ZIP64)
    if wide is None:
        return extra
    sizes = struct.pack("<Q", old)
    changed = b"".join(
        struct.pack("<Q", new) if wide[i : i + 8] == sizes else wide[i : i + 8] for i in range(0, len(wide), 8)
    )
    return struct.pack("<2H", _ZIP64, len(wide)) + changed + _without(extra, _ZIP64)
