"""The ``.metadata`` of torch.distributed.checkpoint: read without running it, written with torch's classes."""

from __future__ import annotations

import io
import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeGuard

from ..errors import CorruptError, UnsupportedError, WriteError
from ..tensors import DType, Storage
from . import pickle_read as unpickle
from .header import PROVENANCE
from .pickle_read import Inert

_LIMIT = 1 << 63
_MAX_AXES = 64  # as many as torch has
_MAX_KEYS = 100  # on the way to a value
# What an honest file names; the classes were in other modules before torch 2.3.
_KNOWN = re.compile(
    r"torch\.distributed\.(\w+\.)+(Metadata|MetadataIndex|TensorStorageMetadata|BytesStorageMetadata"
    r"|ChunkStorageMetadata|TensorProperties|_?MEM_FORMAT_ENCODING|StorageMeta|_StorageInfo)"
    r"|torch\.(Size|\w*\d\w*|bool|strided|serialization\._get_layout)"
    r"|pathlib\.(_local\.)?\w*Path"
)


class Window(NamedTuple):
    """Where one object stands: a part of a file of the folder."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A box of a tensor: the index of its first element, its shape, and where it stands."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    window: Window


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: its dtype by the name that it has in torch, its shape, and at least one chunk."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What was saved, and where.

    Attributes:
        entries: name to tensor, or to where an object stands that is none; in the order of the saved dict.
        paths: name to the keys that led to it in the saved dict: text, or numbers in lists. Not all names have one.
        provenance: what ckpt-tools wrote about its own output.
        foreign: globals that belong in no such file, with counts.
    """

    entries: Mapping[str, TensorEntry | Window]
    paths: Mapping[str, tuple[Any, ...]]
    provenance: Any = None
    foreign: Counter[str] | None = None

    def windows(self) -> list[Window]:
        """Return where to read, each place once, in the order of files and bytes."""
        found = set()
        for entry in self.entries.values():
            found.update([entry] if isinstance(entry, Window) else [chunk.window for chunk in entry.chunks])
        return sorted(found)


def load(file: IO[bytes], index: Path) -> Metadata:
    """Read a ``.metadata``; no class that it names is imported.

    Args:
        file: open for reading.
        index: its path, for messages.

    Raises:
        CorruptError: it is damaged, or something else.
        UnsupportedError: written with compression, or by another storage than files.
    """
    saved, foreign = unpickle.load(file, _no_storage, where=str(index), torch_values=False)
    read = _Reader(index)
    fields = read.fields(saved, "Metadata")
    entries, places, paths = (fields.get(key) for key in ("state_dict_metadata", "storage_data", "planner_data"))
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise CorruptError(f"{index}: says nothing about what was saved, or where. It is damaged.")
    windows = dict(read.place(key, place) for key, place in places.items())
    found = {read.name(name): read.entry(name, entry, windows) for name, entry in entries.items()}
    paths = paths if isinstance(paths, dict) else {}  # an old save of a flat dict has none
    known = {name: read.path(name, path) for name, path in paths.items() if isinstance(name, str) and name in found}
    # Each rank lists its own tensors first in the entries; the paths are as the dict had them.
    ordered = {name: found[name] for name in (*known, *found)}
    unknown = Counter({name: n for name, n in foreign.items() if not _KNOWN.fullmatch(name)})
    return Metadata(ordered, known, fields.get(PROVENANCE), unknown)


def _no_storage(key: str, dtype: DType | None, numel: int, view: Any) -> Storage:
    raise pickle.UnpicklingError("a storage where none belongs")


class _Reader:
    """Takes the records of a pickle apart; every number and name in them is untrusted."""

    def __init__(self, index: Path) -> None:
        self._index = index

    def _damaged(self, what: str) -> CorruptError:
        return CorruptError(f"{self._index}: {what}. It is damaged, or no checkpoint; get a fresh copy.")

    def fields(self, record: Any, *names: str) -> dict[str, Any]:
        """Return the fields of a record of one of these classes of torch.distributed."""
        full = type(record).global_name if isinstance(record, Inert) else type(record).__name__
        if not full.startswith("torch.distributed.") or full.rpartition(".")[2] not in names:
            raise self._damaged(f"holds a {full} where a {names[0]} belongs")
        return record.state if isinstance(record.state, dict) else {}  # a class without fields has no state

    def name(self, name: Any) -> str:
        if not isinstance(name, str):
            raise self._damaged("names an entry by something that is no text")
        return name

    def numbers(self, name: str, size: Any) -> tuple[int, ...]:
        """Return the numbers of a torch.Size."""
        numbers = size.args[0] if isinstance(size, Inert) and size.args else size
        if not isinstance(numbers, (tuple, list)) or len(numbers) > _MAX_AXES or not all(map(_is_count, numbers)):
            raise self._damaged(f"a size of '{name}' is none")
        return tuple(numbers)

    def place(self, key: Any, place: Any) -> tuple[tuple[str, tuple[int, ...] | None], Window]:
        what = self.fields(key, "MetadataIndex")
        name, offset = self.name(what.get("fqn")), what.get("offset")
        if not isinstance(place, Inert) or type(place).global_name.rpartition(".")[2] != "_StorageInfo":
            raise UnsupportedError(
                f"{self._index}: '{name}' was written by a storage of its own, not to files as torch writes them. "
                "Load it with the program that wrote it, and save it with torch.save."
            )
        fields = self.fields(place, "_StorageInfo")
        if fields.get("transform_descriptors"):
            raise UnsupportedError(
                f"{self._index}: '{name}' is compressed or otherwise transformed, which is not read here. "
                "Load it with torch.distributed.checkpoint and save it without extensions once."
            )
        file, start, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not _is_count(start) or not _is_count(length):
            raise self._damaged(f"the place of '{name}' is none")
        return (name, None if offset is None else self.numbers(name, offset)), Window(file, start, length)

    def entry(
        self, name: str, entry: Any, windows: Mapping[tuple[str, tuple[int, ...] | None], Window]
    ) -> TensorEntry | Window:
        fields = self.fields(entry, "TensorStorageMetadata", "BytesStorageMetadata")
        if type(entry).global_name.endswith("BytesStorageMetadata"):
            if (name, None) not in windows:
                raise self._damaged(f"does not say where '{name}' stands")
            return windows[name, None]
        properties: Any = fields.get("properties")
        self.fields(properties, "TensorProperties")
        dtype = properties.state[0] if isinstance(properties.state, tuple) and properties.state else None
        chunks = fields.get("chunks")
        if not isinstance(chunks, list) or not chunks:
            raise self._damaged(f"lists no chunk of '{name}'")
        return TensorEntry(
            str(getattr(dtype, "global_name", "")).removeprefix("torch."),
            self.numbers(name, fields.get("size")),
            tuple(self._chunk(name, chunk, windows) for chunk in chunks),
        )

    def _chunk(self, name: str, chunk: Any, windows: Mapping[tuple[str, tuple[int, ...] | None], Window]) -> Chunk:
        fields = self.fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = (self.numbers(name, fields.get(key)) for key in ("offsets", "sizes"))
        window = windows.get((name, offsets))
        if window is None:
            raise self._damaged(f"does not say where the chunk of '{name}' at {list(offsets)} stands")
        return Chunk(offsets, sizes, window)

    def path(self, name: str, path: Any) -> tuple[Any, ...]:
        if (
            not isinstance(path, (tuple, list))
            or not 0 < len(path) <= _MAX_KEYS
            or not all(isinstance(key, str) or _is_count(key) for key in path)
        ):
            raise self._damaged(f"the keys that lead to '{name}' are none, or too many")
        return tuple(path)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LIMIT


def dump(metadata: Metadata) -> bytes:
    """Write a ``.metadata`` that torch reads, the same bytes for the same contents.

    Raises:
        WriteError: this torch is built without torch.distributed.
    """
    import torch

    try:
        from torch.distributed.checkpoint import filesystem
        from torch.distributed.checkpoint import metadata as classes
    except ImportError as error:
        raise WriteError(f"this torch is built without torch.distributed ({error}). Write a .pth file.") from error

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, classes.TensorProperties):
                return NotImplemented
            # torch 2.15 adds the strides, a sixth field on which 2.13 and older fail.
            reduced: Any = obj.__reduce_ex__(4)
            return *reduced[:2], reduced[2][:5]

    def info(window: Window) -> Any:
        return filesystem._StorageInfo(sys.intern(window.file), window.offset, window.length)

    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    paths = {}
    for given, entry in metadata.entries.items():
        # Pickle writes a text once: interned, it is the same object wherever it came from.
        name = sys.intern(given)
        paths[name] = tuple(sys.intern(k) if isinstance(k, str) else k for k in metadata.paths[given])
        if isinstance(entry, Window):
            described[name] = classes.BytesStorageMetadata()
            places[classes.MetadataIndex(name)] = info(entry)
            continue
        described[name] = classes.TensorStorageMetadata(
            classes.TensorProperties(dtype=getattr(torch, entry.dtype)),
            torch.Size(entry.shape),
            [classes.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in entry.chunks],
        )
        for number, chunk in enumerate(entry.chunks):
            places[classes.MetadataIndex(name, chunk.offsets, number)] = info(chunk.window)
    saved = classes.Metadata(described, paths, places)
    if metadata.provenance is not None:
        setattr(saved, PROVENANCE, metadata.provenance)
    stream = io.BytesIO()
    Pickler(stream, protocol=4).dump(saved)
    return stream.getvalue()
