"""The torch format since 1.6: an uncompressed zip of one pickle and one record a storage.

``<root>/data.pkl`` is the saved object, ``<root>/data/<key>`` a storage, ``<root>/byteorder`` its
byte order. Records that torch does not know are passed over by `torch.load`; ours is
``<root>/ckpt_tools.json``, which says where the weights came from.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import CorruptError, NotACheckpointError, UnsupportedError
from ..storage.source import Stamp
from ..tensors import DType, Storage
from . import pickle_read as unpickle
from .file_plan import FilePlan, OutTensor
from .header import PROVENANCE, Header, parse_provenance
from .pickle_write import dump, plain
from .twins import KNOWN, Known, Unmovable, moved
from .zip_records import CENTRAL, LOCAL, MAX16, MAX32, UTF8, Archive, Record, usual_directory

ALIGNMENT = 64  # torch's own, so that payloads can be mapped
_PROVENANCE_RECORD = f"{PROVENANCE}.json"
_STORED = 0
_DATE_1980 = 0x21  # the first day of the format's calendar: the same bytes whenever it is written
_PADDING_ID = 0x4246  # the extra field that torch pads with


def read(path: Path) -> Header:
    """Read the header of a torch zip file.

    Raises:
        NotACheckpointError: a zip without a torch pickle, or a TorchScript archive.
        CorruptError: truncated or damaged.
    """
    with path.open("rb") as file:
        stamp = Stamp.of(path, file.fileno())
        start, directory = usual_directory(file, stamp.nbytes)
        known = KNOWN.get((stamp.nbytes, start))
        if known is not None and known.describes(file, directory):
            foreign = Counter(known.foreign)
            return Header(path, "torch-zip", known.tree, (stamp,), foreign, pattern=known, lent=True)
        archive = Archive(file, 0, stamp.nbytes, where=str(path))
        root, tree, foreign, provenance = _read(archive, path, where=str(path))
    known = None
    prefix = f"{root}/"
    if archive.directory and provenance is None and all(name.startswith(prefix) for name in archive.records):
        with suppress(Unmovable):
            known = Known(archive, prefix.encode(), moved(tree, path), foreign.copy())
            KNOWN[stamp.nbytes, start] = known
    made = parse_provenance(provenance)
    return Header(path, "torch-zip", tree, (stamp,), foreign, provenance=made, pattern=known)


def read_window(
    file: IO[bytes], path: Path, start: int, length: int, *, where: str
) -> tuple[Any, Counter[str], bytes | None]:
    """Read what torch.save wrote into a part of a file.

    Args:
        file: open for reading.
        path: of the file, for the specs.
        start, length: the part, in bytes; it lies within the file.
        where: for messages.

    Returns:
        (object tree, foreign globals with counts, the record of provenance).

    Raises:
        NotACheckpointError: a zip without a torch pickle, or a TorchScript archive.
        CorruptError: truncated or damaged.
    """
    return _read(Archive(file, start, length, where=where), path, where=where)[1:]


def _read(archive: Archive, path: Path, *, where: str) -> tuple[str, Any, Counter[str], bytes | None]:
    """Return the root of the names of an archive, and see `read_window`."""
    records = archive.records
    root = _root(where, records)

    def record(name: str) -> bytes:
        return archive.read(f"{root}/{name}") if f"{root}/{name}" in records else b""

    big_endian = record("byteorder").strip() == b"big"

    def locate(key: str, dtype: DType | None, numel: int, _view: Any) -> Storage:
        name = f"{root}/data/{key}"
        info = records.get(name)
        nbytes = numel * (dtype.itemsize if dtype else 1)
        if info is None or info.size != nbytes:
            has = "no such record" if info is None else f"{info.size} bytes"
            raise CorruptError(
                f"{where}: storage {key} should have {nbytes} bytes; there is {has}. The file is damaged."
            )
        return Storage(path, archive.offset_of(name), nbytes, big_endian)

    tree, foreign = unpickle.load(io.BytesIO(record("data.pkl")), locate, where=where)
    return root, tree, foreign, record(_PROVENANCE_RECORD) or None


def pickled(path: Path) -> tuple[str, bytes]:
    """Return the name of the record with the saved object in a file that `read` has accepted, and its bytes."""
    with path.open("rb") as file:
        try:
            archive = Archive(file, 0, Stamp.of(path, file.fileno()).nbytes, where=str(path))
        except CorruptError as error:
            raise CorruptError(f"{path}: changed while it was read. Try again when it is whole.") from error
        name = f"{_root(str(path), archive.records)}/data.pkl"
        return name, archive.read(name)


def _root(where: str, records: Mapping[str, Record]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise NotACheckpointError(f"{where}: a zip file, but not one that torch.save wrote (no data.pkl inside).")
    if f"{roots[0]}/constants.pkl" in records:
        raise UnsupportedError(
            f"{where}: a TorchScript archive, which holds a program. "
            "Save its weights first: torch.save(torch.jit.load(FILE).state_dict(), NEW)."
        )
    return roots[0]


def plan(tree: Any, *, name: str, provenance: Mapping[str, Any] | None = None) -> FilePlan:
    """Lay out a torch zip file.

    Args:
        tree: plain data (see `plain`) with OutTensors; one OutTensor in several places stays tied.
        name: file name, for messages and sharded outputs.
        provenance: stored as a record of its own, beside the object.
    """
    pickled, storages = dump(tree, name=name)
    records: list[tuple[str, bytes | OutTensor]] = [("data.pkl", pickled), ("byteorder", b"little")]
    records += [(f"data/{key}", tensor) for key, tensor in enumerate(storages)]
    records.append(("version", b"3\n"))
    if provenance is not None:
        records.append((_PROVENANCE_RECORD, json.dumps(provenance, indent=1).encode()))
    layout, directory = _lay_out(records)

    def patches(crcs: Mapping[OutTensor, int]) -> list[tuple[int, bytes]]:
        pieces = []
        entries = []
        for record in layout:
            body = record.body
            if isinstance(body, OutTensor):
                crc = crcs.get(body, 0)
            else:
                crc = zlib.crc32(body)
                pieces.append((record.offset, record.local_header(crc) + body))
            entries.append(record.central_header(crc))
        return [*pieces, (directory, b"".join(entries) + _end(directory, entries))]

    at = {record.data: record for record in layout if isinstance(record.body, OutTensor)}
    end = directory + sum(record.central_size for record in layout)
    return FilePlan(
        name=name,
        size=end + len(_end(directory, [b""] * len(layout))),
        slots=tuple((record.body, record.data) for record in layout if isinstance(record.body, OutTensor)),
        patches=patches,
        needs_crc=True,
        head=lambda offset, crc: at[offset].local_header(crc),
    )


class _Record:
    """One stored record: its place and its two headers."""

    __slots__ = ("_extra", "_padding", "_sizes", "body", "data", "name", "offset", "size")

    def __init__(self, name: str, body: bytes | OutTensor, offset: int) -> None:
        self.name = f"archive/{name}".encode()
        self.body = body
        self.offset = offset
        self.size = body.nbytes if isinstance(body, OutTensor) else len(body)
        big, far = self.size >= MAX32, offset >= MAX32
        self._sizes = struct.pack("<2H2Q", 1, 16, self.size, self.size) if big else b""
        self._extra = b""
        if big or far:
            values = ([self.size, self.size] if big else []) + ([offset] if far else [])
            self._extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)
        head = offset + LOCAL.size + len(self.name) + len(self._sizes) + 4
        self._padding = -head % ALIGNMENT
        self.data = head + self._padding

    @property
    def central_size(self) -> int:
        return CENTRAL.size + len(self.name) + len(self._extra)

    def _common(self, crc: int) -> tuple[int, ...]:
        size = MAX32 if self._sizes else self.size
        return (UTF8, _STORED, 0, _DATE_1980, crc, size, size, len(self.name))

    def local_header(self, crc: int) -> bytes:
        extra = self._sizes + struct.pack("<2H", _PADDING_ID, self._padding) + b"Z" * self._padding
        return LOCAL.pack(b"PK\3\4", 45 if self._sizes else 20, *self._common(crc), len(extra)) + self.name + extra

    def central_header(self, crc: int) -> bytes:
        version = 45 if self._extra else 20
        offset = min(self.offset, MAX32)
        line = CENTRAL.pack(
            b"PK\1\2", version, version, *self._common(crc), len(self._extra), 0, 0, 0, 0, offset
        )  # fmt: skip
        return line + self.name + self._extra


def _lay_out(records: Iterable[tuple[str, bytes | OutTensor]]) -> tuple[list[_Record], int]:
    layout = []
    position = 0
    for name, body in records:
        record = _Record(name, body, position)
        layout.append(record)
        position = record.data + record.size
    return layout, position


def _end(directory: int, entries: list[bytes]) -> bytes:
    """Make the records that close a zip: always with the zip64 ones, which lift the limits on count and size."""
    count, size = len(entries), sum(map(len, entries))
    zip64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, directory)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, directory + size, 1)
    few, near = min(count, MAX16), min(directory, MAX32)
    return zip64 + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, min(size, MAX32), near, 0)


__all__ = ["ALIGNMENT", "pickled", "plain", "plan", "read", "read_window"]
