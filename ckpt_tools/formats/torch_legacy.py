"""The torch format before 1.6: consecutive pickles, then the storages. Read only.

The pickles are the magic number, the protocol, system information, the saved object, and the list of storage keys.
For each key follow the element count (int64) and the elements, always little endian.
"""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import IO, Any

from ..errors import CorruptError
from ..storage.source import InputFile
from ..storage.splice import Span
from ..tensors import DType, Storage
from . import pickle_edit, pickle_read
from .format import Format, Named
from .header import Header
from .pickle_edit import NamedPickle
from .torch_zip import TORCH_ZIP

_NUMBER = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
MAGIC = b"\x80\x02" + _NUMBER
_MAGICS = (MAGIC, b"\x80\x03" + _NUMBER, *(bytes([0x80, p, 0x95]) + struct.pack("<Q", 13) + _NUMBER for p in (4, 5)))
"""The magic number as each protocol writes it; torch.save has 2 unless it is told otherwise."""


class TorchLegacy(Format):
    """The torch format before 1.6; read only."""

    name = "torch-legacy"
    nests = True

    @property
    def written_as(self) -> Format:
        return TORCH_ZIP

    def sniff(self, path: Path, start: bytes) -> bool:
        if start.startswith(_MAGICS):
            return True
        if any(magic.startswith(start) or start.startswith(magic[:-1]) for magic in _MAGICS):
            raise CorruptError(f"{path}: truncated after {len(start)} bytes. Get a fresh copy.")
        return False

    def read(self, path: Path) -> Header:
        """Read the header of a legacy torch file.

        Raises:
            CorruptError: truncated or damaged.
        """
        with InputFile(path) as source, source.as_file() as file:
            tree, foreign = _read(path, file, source.stamp.nbytes)
            return Header(path, self, tree, (source.stamp,), foreign)

    def rename(self, header: Header) -> Named:
        path = header.files[0].path
        with InputFile(path) as source, source.as_file() as file:
            start = _to_object(file, str(path))
            pickle_read.load(file, pickle_edit.nowhere, where=str(path))
            end, size = file.tell(), source.stamp.nbytes
            traced = pickle_edit.trace(source.read(start, end - start), where=str(path))
        return NamedPickle(path, traced, lambda pickled: (Span(0, start), pickled, Span(end, size)))


TORCH_LEGACY = TorchLegacy()


def _to_object(file: IO[bytes], where: str) -> int:
    """Go to the pickle of the saved object; return its offset."""
    file.seek(0)
    for _ in range(3):  # magic number, protocol, system information
        pickle_read.load(file, where=where)
    return file.tell()


def _read(path: Path, file: IO[bytes], size: int) -> tuple[Any, Counter[str]]:
    declared = _declared_storages(path, file, size)
    offsets = _storage_offsets(path, file, size, declared)

    # The storages follow the pickle that refers to them, so it is read again once their offsets are known.
    def locate(key: str, dtype: DType | None, numel: int, view: Any) -> Storage:
        item = dtype.itemsize if dtype else 1
        whole = Storage(path, offsets[key], declared[key])
        if view is None:
            return whole
        _, first, count = view
        if type(first) is not int or type(count) is not int or not 0 <= first <= first + count <= numel:
            raise CorruptError(f"{path}: a storage view reaches beyond its storage. The file is damaged.")
        return Storage(path, whole.offset + first * item, count * item)

    _to_object(file, str(path))
    return pickle_read.load(file, locate, where=str(path))


def _declared_storages(path: Path, file: IO[bytes], size: int) -> dict[str, int]:
    """Read up to the saved object; return the size in bytes that it declares for each storage."""
    declared: dict[str, int] = {}

    def locate(key: str, dtype: DType | None, numel: int, view: Any) -> Storage:
        nbytes = numel * (dtype.itemsize if dtype else 1)
        if not 0 <= nbytes <= size:
            raise CorruptError(f"{path}: truncated: storage {key} is larger than the file. Get a fresh copy.")
        if declared.setdefault(key, nbytes) != nbytes:
            raise CorruptError(f"{path}: storage {key} has two sizes. The file is damaged; get a fresh copy.")
        return Storage(path, 0, nbytes)

    _to_object(file, str(path))
    pickle_read.load(file, locate, where=str(path))
    return declared


def _storage_offsets(path: Path, file: IO[bytes], size: int, declared: dict[str, int]) -> dict[str, int]:
    keys, _ = pickle_read.load(file, where=str(path))
    if not isinstance(keys, list) or any(type(k) is not str for k in keys) or sorted(keys) != sorted(declared):
        raise CorruptError(f"{path}: its list of storages does not match its tensors. The file is damaged.")
    offsets = {}
    position = file.tell()
    for key in keys:
        file.seek(position)
        count = file.read(8)
        end = position + 8 + declared[key]
        if len(count) < 8 or end > size:
            raise CorruptError(
                f"{path}: truncated: storage {key} ends at byte {end}, the file at {size}. Get a fresh copy."
            )
        counts = {declared[key] // item for item in (1, 2, 4, 8, 16) if declared[key] % item == 0}
        if struct.unpack("<q", count)[0] not in counts:
            raise CorruptError(f"{path}: storage {key} has a different size than in its pickle. The file is damaged.")
        offsets[key] = position + 8
        position = end
    return offsets
