"""The torch format since 1.6: an uncompressed zip of one pickle and one record a storage.

``<root>/data.pkl`` is the saved object, ``<root>/data/<key>`` a storage, ``<root>/byteorder`` its
byte order. Records that torch does not know are passed over by `torch.load`; ours is
``<root>/ckpt_tools.json``, which says where the weights came from.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from ..errors import CorruptError, NotACheckpointError, UnsupportedError, WriteError
from ..tensors import DType, Storage, TensorSpec, c_strides
from . import unpickle
from .header import PROVENANCE, Header, Stamp, parse_provenance
from .output import FilePlan, OutTensor

ALIGNMENT = 64  # torch's own, so that payloads can be mapped
_PROVENANCE_RECORD = f"{PROVENANCE}.json"
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_UTF8 = 0x800
_DATE_1980 = 0x21  # the first day of the format's calendar: the same bytes whenever it is written
_PADDING_ID = 0x4246  # the extra field that torch pads with
_MAX32, _MAX16 = 0xFFFFFFFF, 0xFFFF


def read(path: Path) -> Header:
    """Read the header of a torch zip file.

    Raises:
        NotACheckpointError: a zip without a torch pickle, or a TorchScript archive.
        CorruptError: truncated or damaged.
    """
    with path.open("rb") as file:
        stamp = Stamp.of(path, file.fileno())
        tree, foreign, provenance = read_window(file, path, 0, stamp.nbytes, where=str(path))
    return Header(path, "torch-zip", tree, (stamp,), foreign, provenance=parse_provenance(provenance))


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
    window: Any = _Window(file, start, length)
    try:
        archive = zipfile.ZipFile(window)
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
        raise CorruptError(
            f"{where}: truncated or damaged: its zip directory cannot be read ({error}). Get a fresh copy."
        ) from error
    records = {info.filename: info for info in archive.infolist()}
    if len(records) != len(archive.infolist()):
        raise CorruptError(f"{where}: two records have one name. The file is damaged.")
    root = _root(where, records)
    offset_of = _offsets(where, window, limit=archive.start_dir)

    def record(name: str) -> bytes | None:
        info = records.get(f"{root}/{name}")
        if info is None:
            return None
        window.seek(offset_of(info))
        raw: bytes = window.read(info.file_size)
        if info.CRC and zlib.crc32(raw) != info.CRC:  # 0: torch was told to leave checksums out
            raise CorruptError(f"{where}: the checksum of its {name} does not fit. The file is damaged.")
        return raw

    big_endian = (record("byteorder") or b"").strip() == b"big"

    def locate(key: str, dtype: DType | None, numel: int, _view: Any) -> Storage:
        info = records.get(f"{root}/data/{key}")
        nbytes = numel * (dtype.itemsize if dtype else 1)
        if info is None or info.file_size != nbytes:
            has = "no such record" if info is None else f"{info.file_size} bytes"
            raise CorruptError(
                f"{where}: storage {key} should have {nbytes} bytes; there is {has}. The file is damaged."
            )
        return Storage(path, start + offset_of(info), nbytes, big_endian)

    tree, foreign = unpickle.load(io.BytesIO(record("data.pkl") or b""), locate, where=where)
    return tree, foreign, record(_PROVENANCE_RECORD)


def pickled(path: Path) -> tuple[str, bytes]:
    """Return the name of the record with the saved object in a file that `read` has accepted, and its bytes."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        info = records[f"{_root(str(path), records)}/data.pkl"]
        file.seek(_offsets(str(path), file, limit=archive.start_dir)(info))
        return info.filename, file.read(info.file_size)


def _root(where: str, records: Mapping[str, zipfile.ZipInfo]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise NotACheckpointError(f"{where}: a zip file, but not one that torch.save wrote (no data.pkl inside).")
    if f"{roots[0]}/constants.pkl" in records:
        raise UnsupportedError(
            f"{where}: a TorchScript archive, which holds a program. "
            "Save its weights first: torch.save(torch.jit.load(FILE).state_dict(), NEW)."
        )
    return roots[0]


def _offsets(where: str, file: IO[bytes], *, limit: int) -> Callable[[zipfile.ZipInfo], int]:
    """Make a function that finds where the bytes of a record start."""

    def offset_of(info: zipfile.ZipInfo) -> int:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UnsupportedError(
                f"{where}: its records are compressed or encrypted, so it was repacked by another program. "
                "Load and save it with torch once."
            )
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        head = b""
        if 0 <= info.header_offset < limit:
            file.seek(info.header_offset)
            head = file.read(_LOCAL.size + len(name))
        if not head.startswith(b"PK\3\4") or head[_LOCAL.size :] != name:
            raise CorruptError(f"{where}: its directory points at no record for {info.filename}. The file is damaged.")
        fields = _LOCAL.unpack_from(head)
        offset = info.header_offset + _LOCAL.size + int(fields[9]) + int(fields[10])
        if info.compress_size != info.file_size or offset + info.file_size > limit:
            raise CorruptError(f"{where}: the record {info.filename} reaches beyond the file. Get a fresh copy.")
        return offset

    return offset_of


class _StorageOut:
    """A storage to come; the pickler turns it into a persistent id."""

    def __init__(self, tensor: OutTensor, key: str) -> None:
        self.tensor = tensor
        self.key = key


class _Pickler(pickle.Pickler):
    """Writes a tree of plain data with OutTensors in it, as torch.save would."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)  # the one that torch's restricted loader knows
        self.storages: list[_StorageOut] = []

    def persistent_id(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, _StorageOut):
            return None
        dtype = obj.tensor.dtype
        if dtype.storage is None:
            return ("storage", torch.storage.UntypedStorage, obj.key, "cpu", obj.tensor.nbytes)
        return ("storage", getattr(torch, dtype.storage), obj.key, "cpu", obj.tensor.numel)

    def reducer_override(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, OutTensor):
            return NotImplemented
        storage = _StorageOut(obj, str(len(self.storages)))
        self.storages.append(storage)
        rebuild: Any = torch._utils._rebuild_tensor_v2
        hooks: OrderedDict[Any, Any] = OrderedDict()
        args = (storage, 0, obj.shape, c_strides(obj.shape), False, hooks)
        if obj.dtype.storage is None:
            rebuild = torch._utils._rebuild_tensor_v3
            return rebuild, (*args, getattr(torch, obj.dtype.name))
        return rebuild, args


def plain(tree: Any, dropped: list[str], convert: Callable[[TensorSpec], OutTensor]) -> Any:
    """Copy a tree so that torch.load(weights_only=True) accepts it.

    Namespaces become dicts, frozensets sets; what is no plain data is left out. What stands in the tree
    twice, or contains itself, does so in the copy.

    Args:
        tree: of a header; OutTensors in it stay.
        dropped: receives the dotted path of everything that was left out.
        convert: gives what is to be written for a tensor of an input.

    Raises:
        WriteError: nested deeper than Python can follow.
    """
    import torch

    atoms = (bool, int, float, complex, str, bytes, bytearray, OutTensor, torch.Size, torch.dtype, torch.device)
    keys = (str, int, float, bool, tuple, type(None))
    copies: dict[int, Any] = {}

    def copy(node: Any, where: str) -> Any:
        if node is None or isinstance(node, atoms):
            return node
        if isinstance(node, TensorSpec):
            return convert(node)
        if id(node) in copies:
            return copies[id(node)]
        if isinstance(node, (dict, argparse.Namespace)):
            mapping: Any = OrderedDict() if isinstance(node, OrderedDict) else {}
            copies[id(node)] = mapping
            for key, value in (node if isinstance(node, dict) else vars(node)).items():
                place = f"{where}.{key if isinstance(key, keys) else type(key).__name__}".lstrip(".")
                if not isinstance(key, keys):
                    dropped.append(place)
                    continue
                found = copy(value, place)
                if found is not _LEFT_OUT:
                    mapping[key] = found
            metadata = getattr(node, "_metadata", None)
            if isinstance(node, OrderedDict) and metadata is not None:
                mapping._metadata = copy(metadata, where)
            return mapping
        if isinstance(node, list):
            copies[id(node)] = items = []
            items += [value for value in (copy(v, f"{where}[]") for v in node) if value is not _LEFT_OUT]
            return items
        if isinstance(node, (tuple, set, frozenset)):
            values = [value for value in (copy(v, f"{where}[]") for v in node) if value is not _LEFT_OUT]
            copies[id(node)] = tuple(values) if isinstance(node, tuple) else set(values)
            return copies[id(node)]
        dropped.append(where or "the object itself")
        return _LEFT_OUT

    try:
        return copy(tree, "")
    except RecursionError as error:
        raise WriteError(
            "what stands beside the weights is nested too deeply to be copied. Write a .safetensors file instead."
        ) from error


_LEFT_OUT = object()


def plan(tree: Any, *, name: str, provenance: Mapping[str, Any] | None = None) -> FilePlan:
    """Lay out a torch zip file.

    Args:
        tree: plain data (see `plain`) with OutTensors; one OutTensor in several places stays tied.
        name: file name, for messages and sharded outputs.
        provenance: stored as a record of its own, beside the object.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    try:
        pickler.dump(tree)
    except (pickle.PicklingError, RecursionError, TypeError) as error:
        raise WriteError(
            f"{name}: what stands beside the weights cannot be written ({error}). Write a .safetensors file instead."
        ) from error
    records: list[tuple[str, bytes | OutTensor]] = [("data.pkl", stream.getvalue()), ("byteorder", b"little")]
    records += [(f"data/{storage.key}", storage.tensor) for storage in pickler.storages]
    records.append(("version", b"3\n"))
    if provenance is not None:
        records.append((_PROVENANCE_RECORD, json.dumps(provenance, indent=1).encode()))
    layout, directory = _lay_out(records)

    def patches(crcs: Mapping[OutTensor, int]) -> list[tuple[int, bytes]]:
        pieces = []
        entries = []
        for record in layout:
            crc = crcs.get(record.body, 0) if isinstance(record.body, OutTensor) else zlib.crc32(record.body)
            pieces.append((record.offset, record.local_header(crc)))
            if isinstance(record.body, bytes):
                pieces.append((record.data, record.body))
            entries.append(record.central_header(crc))
        return [*pieces, (directory, b"".join(entries) + _end(directory, entries))]

    at = {record.body: record for record in layout if isinstance(record.body, OutTensor)}
    end = directory + sum(len(record.central_header(0)) for record in layout)
    return FilePlan(
        name=name,
        size=end + len(_end(directory, [b""] * len(layout))),
        slots=tuple((record.body, record.data) for record in layout if isinstance(record.body, OutTensor)),
        patches=patches,
        needs_crc=True,
        head=lambda tensor, crc: at[tensor].local_header(crc),
    )


class _Record:
    """One stored record: its place and its two headers."""

    def __init__(self, name: str, body: bytes | OutTensor, offset: int) -> None:
        self.name = f"archive/{name}".encode()
        self.body = body
        self.offset = offset
        self.size = body.nbytes if isinstance(body, OutTensor) else len(body)
        big = self.size >= _MAX32
        self._sizes = struct.pack("<2H2Q", 1, 16, self.size, self.size) if big else b""
        head = offset + _LOCAL.size + len(self.name) + len(self._sizes) + 4
        self._padding = -head % ALIGNMENT
        self.data = head + self._padding

    def _common(self, crc: int) -> tuple[int, ...]:
        size = _MAX32 if self._sizes else self.size
        return (_UTF8, zipfile.ZIP_STORED, 0, _DATE_1980, crc, size, size, len(self.name))

    def local_header(self, crc: int) -> bytes:
        extra = self._sizes + struct.pack("<2H", _PADDING_ID, self._padding) + b"Z" * self._padding
        return _LOCAL.pack(b"PK\3\4", 45 if self._sizes else 20, *self._common(crc), len(extra)) + self.name + extra

    def central_header(self, crc: int) -> bytes:
        far = self.offset >= _MAX32
        extra = b""
        if self._sizes or far:
            values = ([self.size, self.size] if self._sizes else []) + ([self.offset] if far else [])
            extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)
        version = 45 if extra else 20
        offset = _MAX32 if far else self.offset
        return (
            _CENTRAL.pack(b"PK\1\2", version, version, *self._common(crc), len(extra), 0, 0, 0, 0, offset)
            + self.name
            + extra
        )


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
    few, near = min(count, _MAX16), min(directory, _MAX32)
    return zip64 + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, min(size, _MAX32), near, 0)
