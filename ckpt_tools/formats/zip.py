"""Zip: an archive of uncompressed entries, read without trust, written as torch writes it, and copied with edits.

An entry is a local file header, the content, and sometimes a data descriptor; the central directory at the end has a
header for each, called a line here. The format is PKWARE's APPNOTE.TXT, sections 4.3.7 and 4.3.12.
"""

from __future__ import annotations

import encodings.cp437  # noqa: F401 - so that no name in a file decides whether it is imported
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import CorruptError, UnsupportedError, shortened
from ..storage.source import InputFile
from ..storage.splice import Span, whole_blocks

ALIGNMENT = 64
"""Bytes; torch aligns the contents of entries to it, for memory mapping."""
LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCAL_SIZE, CENTRAL_SIZE = LOCAL.size, _CENTRAL.size
_LENGTHS = struct.Struct("<2H")  # the last fields of a local file header: lengths of the name and the extra fields
MAX32, MAX16 = 0xFFFFFFFF, 0xFFFF
_UTF8, _ENCRYPTED, DESCRIPTOR = 1 << 11, 1 << 0, 1 << 3  # general purpose flags
_NEWEST = 63  # the newest version of the format that zipfile reads
ZIP64_FIELD, PADDING_FIELD = 1, 0x4246  # extra fields: 64-bit sizes; torch's padding
_DATE_1980 = 0x21  # the first date of the format: a constant, so that equal contents give equal bytes
_DEFLATED = 8  # compression method
_ONE, _SEVERAL = 1 << 10, 1 << 13  # bytes per read: for one local file header, or for several close together
# Fields of a directory line, after the signature.
_VERSION, _FLAGS, _METHOD, _CRC, _PACKED, _SIZE = 1, 2, 3, 6, 7, 8
_NAME_LENGTH, _EXTRA_LENGTH, _COMMENT_LENGTH, _ATTRIBUTES, _OFFSET = 9, 10, 11, 14, 15
_IS_FOLDER = 1 << 4  # attribute of DOS


class Entry(NamedTuple):
    """A line of the central directory.

    Attributes:
        name: equal to that in the local file header.
        offset: of the local file header, in bytes from the start of the archive.
        size: of the content, in bytes.
        crc: CRC-32 of the content; 0 if torch saved without checksums.
        packed: size of the content in the archive, in bytes.
        fields: the fixed fields; 64-bit sizes and offsets are in the extra fields instead.
        extra: the extra fields without the 64-bit sizes.
        comment: of the entry.
    """

    name: bytes
    offset: int
    size: int
    crc: int
    packed: int
    fields: tuple[int, ...]
    extra: bytes
    comment: bytes

    @property
    def stored(self) -> bool:
        """True if the content is neither compressed nor encrypted."""
        return not self.fields[_METHOD] and not self.fields[_FLAGS] & _ENCRYPTED


class Archive:
    """An archive in a range of a file.

    Attributes:
        entries: by name.
        directory: the lines of the central directory, in bytes.
        limit: offset of the directory from the start of the archive, in bytes.
        comment: of the archive.
        shift: bytes before the archive that its offsets do not count.
        usual: True if it ends like torch's archives and its directory has no extra fields or comments.
        headers: the local file headers read so far, by offset.
        contents: (offset from the start of the archive, content) of the entries read so far, by name.

    Args:
        file: open for reading.
        start, length: the range, in bytes; to the end of the file by default.
        where: for messages.

    Raises:
        CorruptError: its directory cannot be read, or two entries have the same name.
    """

    def __init__(self, file: InputFile, start: int = 0, length: int | None = None, *, where: str) -> None:
        self.file, self._start, self._where = file, start, where
        length = file.stamp.nbytes - start if length is None else length
        self.limit, self.directory = find_directory(file, start, length)
        self.comment, self.shift = b"", 0
        self.usual = bool(self.directory)
        self._window = 0, b""
        self._fetched: dict[int, bytes] | None = None  # local file headers by offset, where each read is a request
        self.headers: dict[int, bytes] = {}
        self.contents: dict[str, tuple[int, bytes]] = {}
        entries = _parse_directory(self.directory, where)[0] if self.usual else self._found_by_zipfile(length)
        self.entries = self._by_name(entries)
        plain = len(self.directory) == sum(CENTRAL_SIZE + len(entry.name) for entry in self.entries.values())
        self.usual = self.usual and plain

    def _found_by_zipfile(self, length: int) -> list[Entry]:
        import zipfile  # loads compression modules, which torch's archives do not need

        with self.file.as_file(self._start, length) as window:
            try:
                archive = zipfile.ZipFile(window)
            except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
                raise CorruptError(
                    f"{self._where}: truncated or damaged: its zip directory cannot be read ({error}). "
                    "Get a fresh copy."
                ) from error
            infos = archive.infolist()
            self.limit, self.comment = archive.start_dir, archive.comment
            self.directory = self.file.read(self._start + self.limit, length - self.limit)
            entries, end = _parse_directory(self.directory, self._where, count=len(infos))
            self.directory = self.directory[:end]
            self.shift = infos[0].header_offset - entries[0].offset if infos else 0
            return [entry._replace(offset=entry.offset + self.shift) for entry in entries]

    def _by_name(self, entries: Sequence[Entry]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for entry in entries:
            try:
                name = entry.name.decode("utf-8" if entry.fields[_FLAGS] & _UTF8 or entry.name.isascii() else "cp437")
            except UnicodeDecodeError as error:
                raise CorruptError(f"{self._where}: the name of an entry is not text. The file is damaged.") from error
            found[name] = entry
        if len(found) != len(entries):
            raise CorruptError(f"{self._where}: two entries have the same name. The file is damaged.")
        return found

    def local_header(self, entry: Entry) -> tuple[bytes, int]:
        """Return the local file header of an entry up to its name, and the offset of its content.

        Raises:
            CorruptError: there is no header of this entry at its offset.
        """
        header = b""
        wanted = LOCAL_SIZE + len(entry.name)
        if 0 <= entry.offset < self.limit:
            header = self._read_header(entry.offset, wanted)
        if header[:4] != b"PK\3\4" or header[LOCAL_SIZE:] != entry.name:
            name = entry.name.decode("utf-8", "replace")
            raise CorruptError(f"{self._where}: its directory points at no entry for {name}. The file is damaged.")
        self.headers[entry.offset] = header
        name_length, extra_length = _LENGTHS.unpack_from(header, LOCAL_SIZE - _LENGTHS.size)
        return header, entry.offset + LOCAL_SIZE + name_length + extra_length

    def _read_header(self, offset: int, nbytes: int) -> bytes:
        if self.file.source.fileno() is None:
            if self._fetched is None:  # all at once, and nothing else
                sizes = {each.offset: LOCAL_SIZE + len(each.name) for each in self.entries.values() if each.offset >= 0}
                found = self.file.read_ranges([(self._start + at, size) for at, size in sizes.items()])
                self._fetched = dict(zip(sizes, found, strict=True))
            return self._fetched.get(offset, b"")
        begin, window = self._window
        at = offset - begin
        if not 0 <= at <= len(window) - nbytes:
            ahead = _SEVERAL if 0 <= at < _SEVERAL else _ONE
            begin, window = self._window = offset, self.file.read(self._start + offset, ahead)
            at = 0
        return window[at : at + nbytes]

    def offset_of(self, name: str) -> int:
        """Return the offset of the content of an entry, in bytes from the start of the file.

        Raises:
            UnsupportedError: it is compressed or encrypted.
            CorruptError: its local file header is missing, or it reaches beyond the archive.
        """
        entry = self.entries[name]
        if not entry.stored:
            raise UnsupportedError(
                f"{self._where}: its entries are compressed or encrypted, so another program has repacked it. "
                "Load and save it with torch once."
            )
        _, offset = self.local_header(entry)
        if entry.packed != entry.size or offset + entry.size > self.limit:
            raise CorruptError(f"{self._where}: the entry {name} reaches beyond the file. Get a fresh copy.")
        return self._start + offset

    def read(self, name: str, most: int | None = None) -> bytes:
        """Return the content of an entry.

        Args:
            most: bytes that it may have, if that is limited.

        Raises:
            UnsupportedError, CorruptError: see `offset_of`; or its checksum does not match, or it is too large.
        """
        entry = self.entries[name]
        offset = self.offset_of(name)
        short = shortened(name.partition("/")[2])
        try:
            if most is not None and entry.size > most:
                raise MemoryError
            content = self.file.read(offset, entry.size)
        except MemoryError as error:
            raise CorruptError(
                f"{self._where}: its {short} of {entry.size} bytes is too large to be read. Is the file damaged?"
            ) from error
        if entry.crc and zlib.crc32(content) != entry.crc:
            raise CorruptError(f"{self._where}: the checksum of its {short} does not match. The file is damaged.")
        self.contents[name] = offset - self._start, content
        return content

    def inflated(self, name: str, most: int) -> bytes:
        """Return the content of an entry that may be compressed.

        Args:
            most: bytes that it may have.

        Raises:
            UnsupportedError: it is encrypted, or compressed by another method than deflate.
            CorruptError: it is larger, truncated or damaged.
        """
        entry = self.entries[name]
        if entry.size > most:
            raise CorruptError(f"{self._where}: {name} claims {entry.size} bytes, more than such an entry has.")
        if entry.fields[_METHOD] != _DEFLATED or entry.fields[_FLAGS] & _ENCRYPTED:
            return self.read(name)
        _, offset = self.local_header(entry)
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(
                self.file.read(self._start + offset, entry.packed), entry.size + 1
            )
        except zlib.error as error:
            raise CorruptError(f"{self._where}: {name} cannot be decompressed ({error}). Get a fresh copy.") from error
        if len(content) != entry.size or (entry.crc and zlib.crc32(content) != entry.crc):
            raise CorruptError(f"{self._where}: {name} is not what its directory says. The file is damaged.")
        return content


def find_directory(file: InputFile, start: int, length: int) -> tuple[int, bytes]:
    """Find the central directory of an archive that ends like torch's archives.

    Args:
        start, length: of the archive in the file, in bytes.

    Returns:
        (offset of the directory from the start of the archive, its lines); (0, b"") for any other end.
    """
    nothing = 0, b""
    tails = END64.size + LOCATOR.size + END.size
    if length < tails:
        return nothing
    tail = file.read(start + length - tails, tails)
    if len(tail) < tails:
        return nothing
    signature, *_, size, at, comment = END.unpack_from(tail, tails - END.size)
    end = length - END.size
    if signature != b"PK\5\6" or comment:
        return nothing
    signature, disk, _, disks = LOCATOR.unpack_from(tail, END64.size)
    if signature == b"PK\6\7":
        signature, *_, size, at = END64.unpack_from(tail)
        end = length - tails
        if signature != b"PK\6\6" or disk or disks != 1:
            return nothing
    if at + size != end:
        return nothing
    return at, file.read(start + at, size)


def _parse_directory(data: bytes, where: str, count: int | None = None) -> tuple[list[Entry], int]:
    """Parse `count` lines of a central directory, or all; return them, and the offset after them."""
    entries: list[Entry] = []
    at, end = 0, len(data)
    unpack, size = _CENTRAL.unpack_from, _CENTRAL.size
    while at < end if count is None else len(entries) < count:
        fields: tuple[Any, ...] = unpack(data, at) if at + size <= end else (b"",)
        if fields[0] != b"PK\1\2" or fields[_VERSION + 1] > _NEWEST:
            raise CorruptError(f"{where}: truncated or damaged: its zip directory cannot be read. Get a fresh copy.")
        fields = fields[1:]
        name_end = at + size + fields[_NAME_LENGTH]
        name = data[at + size : name_end]
        if not name or b"\0" in name or b"\\" in name:
            raise CorruptError(f"{where}: an entry of the zip has an impossible name. The file is damaged.")
        length, packed, offset = fields[_SIZE], fields[_PACKED], fields[_OFFSET]
        extra = comment = b""
        at = name_end + fields[_EXTRA_LENGTH] + fields[_COMMENT_LENGTH]
        if at != name_end:
            extra, comment = data[name_end : at - fields[_COMMENT_LENGTH]], data[at - fields[_COMMENT_LENGTH] : at]
            zip64, extra = _taken(extra, ZIP64_FIELD)
            values = []
            for value in (length, packed, offset):
                if value == MAX32 and len(zip64) >= 8:
                    value, zip64 = int.from_bytes(zip64[:8], "little"), zip64[8:]
                values.append(value)
            length, packed, offset = values
        if fields[_ATTRIBUTES] & _IS_FOLDER and length:  # torch reads nothing of it, and returns unset memory
            raise CorruptError(
                f"{where}: the zip says of an entry with {length} bytes that it is a folder. The file is damaged."
            )
        entries.append(Entry(name, offset, length, fields[_CRC], packed, fields, extra, comment))
    if at > end:
        raise CorruptError(f"{where}: truncated or damaged: its zip directory cannot be read. Get a fresh copy.")
    return entries, at


class NewEntry:
    """A new entry: its offsets, its local file header and its directory line.

    Args:
        size: of the content, in bytes.

    Attributes:
        offset: of the local file header.
        data: offset of the content, a multiple of `ALIGNMENT`.
        end: offset after the content.
    """

    __slots__ = ("_central_extra", "_local_extra", "_padding", "_size", "data", "end", "name", "offset")

    def __init__(self, name: bytes, size: int, offset: int) -> None:
        self.name, self._size, self.offset = name, size, offset
        big, far = size >= MAX32, offset >= MAX32
        sizes = struct.pack("<2Q", size, size) if big else b""
        numbers = sizes + (struct.pack("<Q", offset) if far else b"")
        self._local_extra = _field(ZIP64_FIELD, sizes) if big else b""
        self._central_extra = _field(ZIP64_FIELD, numbers) if numbers else b""
        header = offset + LOCAL_SIZE + len(name) + len(self._local_extra) + 4
        self._padding = -header % ALIGNMENT
        self.data = header + self._padding
        self.end = self.data + size

    @property
    def line_size(self) -> int:
        """Size of its directory line, in bytes."""
        return CENTRAL_SIZE + len(self.name) + len(self._central_extra)

    def _common(self, crc: int) -> tuple[int, ...]:
        size = MAX32 if self._local_extra else self._size
        return (_UTF8, 0, 0, _DATE_1980, crc, size, size, len(self.name))

    def local_header(self, crc: int) -> bytes:
        """Return the bytes from `offset` to `data`."""
        extra = self._local_extra + _field(PADDING_FIELD, b"Z" * self._padding)
        version = 45 if self._local_extra else 20
        return LOCAL.pack(b"PK\3\4", version, *self._common(crc), len(extra)) + self.name + extra

    def local_header_of(self, crcs: Sequence[int]) -> bytes:
        """Return `local_header` as the segment of a file plan makes it: from one checksum in a sequence."""
        return self.local_header(crcs[0])

    def line(self, crc: int) -> bytes:
        """Return its directory line."""
        version = 45 if self._central_extra else 20
        offset = min(self.offset, MAX32)
        line = _CENTRAL.pack(
            b"PK\1\2", version, version, *self._common(crc), len(self._central_extra), 0, 0, 0, 0, offset
        )  # fmt: skip
        return line + self.name + self._central_extra


END_SIZE = END64.size + LOCATOR.size + END.size
"""Size of the end records of an archive without a comment, in bytes."""


def end_of(start: int, size: int, count: int, comment: bytes = b"") -> bytes:
    """Return the end records of an archive, always with those of zip64, which lift the limits on count and size.

    Args:
        start, size: of the central directory, in bytes.
        count: of entries.
    """
    end64 = END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = LOCATOR.pack(b"PK\6\7", 0, start + size, 1)
    few, near = min(count, MAX16), min(start, MAX32)
    return end64 + locator + END.pack(b"PK\5\6", 0, 0, few, few, min(size, MAX32), near, len(comment)) + comment


# Data descriptors by likelihood: with and without a signature, with 32-bit and 64-bit sizes.
_DESCRIPTORS = ("<4s3L", "<4sL2Q", "<3L", "<L2Q")


def replaced(archive: Archive, name: str, body: bytes, *, where: str) -> tuple[bytes | Span, ...]:
    """Describe a copy of an archive with new content in one entry; all other entries keep their bytes.

    The padding of the entry absorbs the difference in length up to whole blocks; later entries move by whole blocks,
    so that their contents stay aligned.

    Args:
        archive: a whole file.
        name: of the entry, which is not compressed.
        body: its new content.
        where: for messages.

    Returns:
        The pieces of the new file: new bytes, and spans of the old one.

    Raises:
        CorruptError: entries overlap.
        UnsupportedError: not an archive of torch.
    """
    if archive.shift:
        raise UnsupportedError(
            f"{where}: other bytes precede its zip archive, and torch cannot read such a file. Get a fresh copy."
        )
    old = archive.entries[name]
    header, begin = archive.local_header(old)
    extra = archive.file.read(old.offset + len(header), begin - old.offset - len(header))
    end = begin + old.packed
    found = data_descriptor(archive.file.read(end, 24), old) if old.fields[_FLAGS] & DESCRIPTOR else None
    descriptor = "" if found is None else found[0]
    end += struct.calcsize(descriptor) if descriptor else 0
    for entry in archive.entries.values():
        before = archive.local_header(entry)[1] + entry.packed <= old.offset
        if entry is not old and not (end <= entry.offset < archive.limit or before):
            raise CorruptError(f"{where}: its entries overlap. The file is damaged; get a fresh copy.")
    if end > archive.limit or len(body) >= MAX32:
        raise CorruptError(f"{where}: its entries overlap its directory. The file is damaged; get a fresh copy.")

    crc, size = zlib.crc32(body), len(body)
    zip64, kept = _taken(_taken(extra, PADDING_FIELD)[1], ZIP64_FIELD)
    if zip64:
        words = (zip64[i : i + 8] for i in range(0, len(zip64), 8))
        was, now = struct.pack("<Q", old.packed), struct.pack("<Q", size)
        kept = _field(ZIP64_FIELD, b"".join(now if word == was else word for word in words)) + kept
    slack = len(extra) - len(kept) - 4  # the identifier and length of a field take 4 bytes
    shift = whole_blocks(size - old.packed - slack)
    extra = kept + _field(PADDING_FIELD, b"Z" * (slack + shift - (size - old.packed)))
    if len(extra) > MAX16:
        raise UnsupportedError(f"{where}: the header of its {name} has no room left. Load and save it with torch once.")
    fields = list(LOCAL.unpack_from(header))
    for i, value in ((6, crc), (7, size), (8, size)):
        in_descriptor = fields[2] & DESCRIPTOR and fields[i] == 0
        in_extra = i > 6 and fields[i] == MAX32
        fields[i] = fields[i] if in_descriptor or in_extra else value
    fields[-1] = len(extra)
    lines = [
        _line(
            entry._replace(crc=crc, size=size, packed=size)
            if entry is old
            else entry._replace(offset=entry.offset + (shift if entry.offset > old.offset else 0))
        )
        for entry in archive.entries.values()
    ]
    directory = b"".join(lines)
    pieces = (
        Span(0, old.offset),
        LOCAL.pack(*fields) + old.name + extra,
        body,
        struct.pack(descriptor, *(b"PK\7\10",) * ("s" in descriptor), crc, size, size) if descriptor else b"",
        Span(end, archive.limit),
        directory + end_of(archive.limit + shift, len(directory), len(lines), archive.comment),
    )
    return tuple(piece for piece in pieces if piece and piece != Span(0, 0))


def _line(entry: Entry) -> bytes:
    """Return a directory line; a number has 64 bits if it had before, or has to."""
    fields = list(entry.fields)
    zip64 = b""
    for i, value in ((_SIZE, entry.size), (_PACKED, entry.packed), (_OFFSET, entry.offset)):
        wide = fields[i] == MAX32 or value >= MAX32
        fields[i] = MAX32 if wide else value
        zip64 += struct.pack("<Q", value) if wide else b""
    extra = (_field(ZIP64_FIELD, zip64) if zip64 else b"") + entry.extra
    fields[_CRC], fields[_EXTRA_LENGTH] = entry.crc, len(extra)
    return _CENTRAL.pack(b"PK\1\2", *fields) + entry.name + extra + entry.comment


def data_descriptor(raw: bytes, entry: Entry) -> tuple[str, int] | None:
    """Return (struct layout, CRC-32) of the data descriptor that these bytes begin with; None if there is none."""
    for layout in _DESCRIPTORS:
        length = struct.calcsize(layout)
        if len(raw) < length:
            continue
        *signature, crc, packed, size = struct.unpack(layout, raw[:length])
        if (packed, size) == (entry.packed, entry.packed) and signature in ([], [b"PK\7\10"]):
            return layout, crc
    return None


def extra_fields(extra: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return the (identifier, data) of each extra field, and the bytes that are none."""
    found, at = [], 0
    while at + 4 <= len(extra):
        identifier, length = struct.unpack_from("<2H", extra, at)
        if at + 4 + length > len(extra):
            break
        found.append((identifier, extra[at + 4 : at + 4 + length]))
        at += 4 + length
    return found, extra[at:]


def _field(identifier: int, data: bytes) -> bytes:
    """Return an extra field."""
    return struct.pack("<2H", identifier, len(data)) + data


def _taken(extra: bytes, wanted: int) -> tuple[bytes, bytes]:
    """Return (data of the first extra field with this identifier, fields with other identifiers)."""
    found = others = b""
    at = 0
    while at + 4 <= len(extra):
        identifier, length = struct.unpack_from("<2H", extra, at)
        data = extra[at + 4 : at + 4 + length]
        if identifier == wanted:
            found = found or data
        else:
            others += _field(identifier, data)
        at += 4 + length
    return found, others
