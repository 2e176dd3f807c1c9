"""Records of a zip: where their bytes stand, when nothing that the zip says of itself is trusted."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

from ..errors import CorruptError, UnsupportedError

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
UTF8 = 0x800
MAX32, MAX16 = 0xFFFFFFFF, 0xFFFF
# Of a line of the directory: signature, version, flags, method, checksum, sizes, lengths, offset.
_LINE = struct.Struct("<4s2x3H4x3L3H8xL")
_LENGTHS = struct.Struct("<2H")
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_DESCRIPTOR = 0x8  # sizes and checksum stand behind the record, too, where torch's writer has them
_NEWEST = 63  # version of the format that zipfile knows


class Record(NamedTuple):
    """A line of the directory.

    Attributes:
        name: as it stands in the local header.
        offset: of the local header.
        size: of the content.
        crc: of the content; 0 where torch was told to leave checksums out.
        stored: True if the content stands there as it is, in so many bytes.
        whole: True if it is said to take up as many bytes as it has.
    """

    name: bytes
    offset: int
    size: int
    crc: int
    stored: bool = True
    whole: bool = True


class Archive:
    """The zip in a part of a file.

    Attributes:
        records: by name.
        directory: its lines, if they are as torch writes them; else empty.
        heads: the local headers that were read, by their place.
        contents: the records that were read, by name and place.

    Args:
        file: open for reading.
        start, length: the part, in bytes; it lies within the file.
        where: for messages.

    Raises:
        CorruptError: its directory cannot be read, or two records have one name.
    """

    records: Mapping[str, Record]
    directory: bytes
    heads: dict[int, bytes]
    contents: dict[tuple[str, int], bytes]

    def __init__(self, file: IO[bytes], start: int, length: int, *, where: str) -> None:
        self._file, self._start, self._where = file, start, where
        window = _Window(file, start, length)
        self._limit, self.directory = usual_directory(window, length)
        self.heads, self.contents = {}, {}
        usual = _usual_records(self.directory)
        if usual is not None:
            self.records = usual
        else:
            self.directory = b""
            self.records, self._limit = _directory(window, where)

    def offset_of(self, name: str) -> int:
        """Find in the file where the bytes of a record start.

        Raises:
            UnsupportedError: it is compressed or encrypted.
            CorruptError: no such record stands there, or it reaches beyond the zip.
        """
        own, offset, size, _, stored, whole = self.records[name]
        if not stored:
            raise UnsupportedError(
                f"{self._where}: its records are compressed or encrypted, so it was repacked by another program. "
                "Load and save it with torch once."
            )
        head = b""
        if 0 <= offset < self._limit:
            self._file.seek(self._start + offset)
            head = self._file.read(LOCAL.size + len(own))
        if head[:4] != b"PK\3\4" or head[LOCAL.size :] != own:
            raise CorruptError(f"{self._where}: its directory points at no record for {name}. The file is damaged.")
        name_length, extra_length = _LENGTHS.unpack_from(head, LOCAL.size - _LENGTHS.size)
        self.heads[offset] = head
        offset += int(LOCAL.size + name_length + extra_length)
        if not whole or offset + size > self._limit:
            raise CorruptError(f"{self._where}: the record {name} reaches beyond the file. Get a fresh copy.")
        return self._start + offset

    def read(self, name: str) -> bytes:
        """Read a record.

        Raises:
            UnsupportedError, CorruptError: see `offset_of`; or its checksum does not fit.
        """
        at = self.offset_of(name)
        self._file.seek(at)
        raw = self._file.read(self.records[name].size)
        if self.records[name].crc and zlib.crc32(raw) != self.records[name].crc:
            short = name.partition("/")[2]
            raise CorruptError(f"{self._where}: the checksum of its {short} does not fit. The file is damaged.")
        self.contents[name, at] = raw
        return raw


def usual_directory(window: Any, length: int) -> tuple[int, bytes]:
    """Return where the directory begins, and its lines, in a zip that ends as torch ends it; (0, nothing) if not.

    Args:
        window: a file that holds the zip and nothing else, of so many bytes.
    """
    nothing = 0, b""
    tails = _END64.size + _LOCATOR.size + _END.size
    if length < tails:
        return nothing
    window.seek(length - tails)
    tail = window.read(tails)
    if len(tail) < tails:
        return nothing
    mark, *_, size, start, comment = _END.unpack_from(tail, tails - _END.size)
    end = length - _END.size
    if mark != b"PK\5\6" or comment:
        return nothing
    mark, disk, _, disks = _LOCATOR.unpack_from(tail, _END64.size)
    if mark == b"PK\6\7":
        mark, *_, size, start = _END64.unpack_from(tail)
        end = length - tails
        if mark != b"PK\6\6" or disk or disks != 1:
            return nothing
    if start + size != end:
        return nothing
    window.seek(start)
    return start, window.read(size)


def _usual_records(directory: bytes) -> dict[str, Record] | None:
    """Read the lines of a directory as torch writes them; None if one is otherwise, or anything is wrong.

    For ten thousand records, zipfile takes ten times as long.
    """
    records: dict[bytes, Record] = {}
    at = count = 0
    while at + _LINE.size <= len(directory):
        mark, version, flags, method, crc, stored, nbytes, length, extra, comment, offset = _LINE.unpack_from(
            directory, at
        )
        if (
            mark != b"PK\1\2"
            or version > _NEWEST
            or flags & ~(UTF8 | _DESCRIPTOR)
            or method
            or stored != nbytes
            or not length
            or extra
            or comment
            or nbytes == MAX32
            or offset == MAX32
        ):
            return None
        at += _LINE.size + length
        name = directory[at - length : at]
        records[name] = Record(name, offset, nbytes, crc)
        count += 1
    names = b"/".join(records)
    sound = at == len(directory) > 0 and len(records) == count
    if not sound or not names.isascii() or b"\0" in names or b"\\" in names:
        return None
    return {name.decode(): record for name, record in records.items()}


def _directory(window: Any, where: str) -> tuple[Mapping[str, Record], int]:
    """Read any directory.

    Raises:
        CorruptError: it cannot be read, or two records have one name.
    """
    import zipfile  # with compressors that no file as torch writes it has need of

    try:
        archive = zipfile.ZipFile(window)
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
        raise CorruptError(
            f"{where}: truncated or damaged: its zip directory cannot be read ({error}). Get a fresh copy."
        ) from error
    infos = archive.infolist()
    records = {
        info.filename: Record(
            info.orig_filename.encode("utf-8" if info.flag_bits & UTF8 else "cp437"),
            info.header_offset,
            info.file_size,
            info.CRC,
            stored=info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1,
            whole=info.compress_size == info.file_size,
        )
        for info in infos
    }
    if len(records) != len(infos):
        raise CorruptError(f"{where}: two records have one name. The file is damaged.")
    return records, archive.start_dir


class _Window:
    """A part of a file, as a file of its own; only what reading a zip asks for."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise OSError("seeks before the start")  # as a real file does, which zipfile expects
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data
