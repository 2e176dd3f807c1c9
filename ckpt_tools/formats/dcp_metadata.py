"""The ``.metadata`` pickle of torch.distributed.checkpoint: read without running it, written with torch's classes."""

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
from . import pickle_read as unpickle
from .header import PROVENANCE
from .pickle_objects import Inert

_LIMIT = 1 << 63
_MAX_AXES = 64  # torch's own limit
_MAX_KEYS = 100  # in a key path
# Globals of a sound file; the classes were in other modules before torch 2.3.
_KNOWN = re.compile(
    r"torch\.distributed\.(\w+\.)+(Metadata|MetadataIndex|TensorStorageMetadata|BytesStorageMetadata"
    r"|ChunkStorageMetadata|TensorProperties|_?MEM_FORMAT_ENCODING|StorageMeta|_StorageInfo"
    r"|SavePlan|WriteItem|WriteItemType|TensorWriteData)"  # the plans of all ranks, which Megatron-LM keeps
    r"|torch\.(Size|\w*\d\w*|bool|strided|serialization\._get_layout)"
    r"|pathlib\.(_local\.)?\w*Path"
)


class Location(NamedTuple):
    """The byte range of an object in a file of the folder."""

    file: str
    offset: int
    length: int


class ChunkEntry(NamedTuple):
    """A chunk of a tensor: the index of its first element, its shape, and its location."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    location: Location


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: the name of its dtype in torch, its shape, and at least one chunk."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkEntry, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """The entries of a checkpoint and their locations.

    Attributes:
        entries: name to tensor, or to the location of another object; in the order of the saved dict.
        paths: name to key path in the saved dict: text, or numbers in lists. Some names have none.
        provenance: the ckpt-tools record of how the file was made.
        foreign: unexpected globals, with counts.
    """

    entries: Mapping[str, TensorEntry | Location]
    paths: Mapping[str, tuple[Any, ...]]
    provenance: Any = None
    foreign: Counter[str] | None = None

    def locations(self) -> list[Location]:
        """Return all locations, without duplicates, sorted by file and offset."""
        found = set()
        for entry in self.entries.values():
            found.update([entry] if isinstance(entry, Location) else [chunk.location for chunk in entry.chunks])
        return sorted(found)


def load(file: IO[bytes], index: Path) -> Metadata:
    """Read a ``.metadata`` without importing the classes that it names.

    Args:
        file: open for reading.
        index: its path, for messages.

    Raises:
        CorruptError: damaged, or another pickle.
        UnsupportedError: compressed, or not written to files.
    """
    saved, foreign = unpickle.load(file, where=str(index), torch_values=False)
    read = _Reader(index)
    fields = read.fields(saved, "Metadata")
    entries, stored, paths = (fields.get(key) for key in ("state_dict_metadata", "storage_data", "planner_data"))
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise CorruptError(f"{index}: has no entries, or no locations of entries. It is damaged.")
    locations = dict(read.location(key, info) for key, info in stored.items())
    found = {read.name(name): read.entry(name, entry, locations) for name, entry in entries.items()}
    paths = paths if isinstance(paths, dict) else {}  # an old save of a flat dict has none
    known = {name: read.path(name, path) for name, path in paths.items() if isinstance(name, str) and name in found}
    # In the entries, each rank's own tensors come first; the paths have the order of the dict.
    ordered = {name: found[name] for name in (*known, *found)}
    unknown = Counter({name: n for name, n in foreign.items() if not _KNOWN.fullmatch(name)})
    return Metadata(ordered, known, fields.get(PROVENANCE), unknown)


class _Reader:
    """Parses the objects of a pickle, trusting no number or name in them."""

    def __init__(self, index: Path) -> None:
        self._index = index

    def _damaged(self, what: str) -> CorruptError:
        return CorruptError(f"{self._index}: {what}. It is damaged, or not a checkpoint; get a fresh copy.")

    def fields(self, saved: Any, *names: str) -> dict[str, Any]:
        """Return the fields of an object, which must be of one of these classes of torch.distributed."""
        full = type(saved).global_name if isinstance(saved, Inert) else type(saved).__name__
        if not full.startswith("torch.distributed.") or full.rpartition(".")[2] not in names:
            raise self._damaged(f"holds a {full} in place of a {names[0]}")
        return saved.state if isinstance(saved.state, dict) else {}  # a class without fields has no state

    def name(self, name: Any) -> str:
        if not isinstance(name, str):
            raise self._damaged("has an entry name that is not text")
        return name

    def numbers(self, name: str, size: Any) -> tuple[int, ...]:
        """Return the numbers of a torch.Size."""
        numbers = size.args[0] if isinstance(size, Inert) and size.args else size
        if not isinstance(numbers, (tuple, list)) or len(numbers) > _MAX_AXES or not all(map(_is_count, numbers)):
            raise self._damaged(f"a size of '{name}' is invalid")
        return tuple(numbers)

    def location(self, key: Any, info: Any) -> tuple[tuple[str, tuple[int, ...] | None], Location]:
        index = self.fields(key, "MetadataIndex")
        name, offset = self.name(index.get("fqn")), index.get("offset")
        if not isinstance(info, Inert) or type(info).global_name.rpartition(".")[2] != "_StorageInfo":
            raise UnsupportedError(
                f"{self._index}: '{name}' was written by a custom storage writer, not to files as torch writes them. "
                "Load it with the program that wrote it, and save it with torch.save."
            )
        fields = self.fields(info, "_StorageInfo")
        if fields.get("transform_descriptors"):
            raise UnsupportedError(
                f"{self._index}: '{name}' is compressed or otherwise transformed, which is not supported. "
                "Load it with torch.distributed.checkpoint and save it without extensions."
            )
        file, start, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not _is_count(start) or not _is_count(length):
            raise self._damaged(f"the location of '{name}' is invalid")
        return (name, None if offset is None else self.numbers(name, offset)), Location(file, start, length)

    def entry(
        self, name: str, entry: Any, locations: Mapping[tuple[str, tuple[int, ...] | None], Location]
    ) -> TensorEntry | Location:
        fields = self.fields(entry, "TensorStorageMetadata", "BytesStorageMetadata")
        if type(entry).global_name.endswith("BytesStorageMetadata"):
            if (name, None) not in locations:
                raise self._damaged(f"has no location for '{name}'")
            return locations[name, None]
        properties: Any = fields.get("properties")
        self.fields(properties, "TensorProperties")
        dtype = properties.state[0] if isinstance(properties.state, tuple) and properties.state else None
        chunks = fields.get("chunks")
        if not isinstance(chunks, list) or not chunks:
            raise self._damaged(f"lists no chunks of '{name}'")
        return TensorEntry(
            str(getattr(dtype, "global_name", "")).removeprefix("torch."),
            self.numbers(name, fields.get("size")),
            tuple(self._chunk(name, chunk, locations) for chunk in chunks),
        )

    def _chunk(
        self, name: str, chunk: Any, locations: Mapping[tuple[str, tuple[int, ...] | None], Location]
    ) -> ChunkEntry:
        fields = self.fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = (self.numbers(name, fields.get(key)) for key in ("offsets", "sizes"))
        location = locations.get((name, offsets))
        if location is None:
            raise self._damaged(f"has no location for the chunk of '{name}' at {list(offsets)}")
        return ChunkEntry(offsets, sizes, location)

    def path(self, name: str, path: Any) -> tuple[Any, ...]:
        if (
            not isinstance(path, (tuple, list))
            or not 0 < len(path) <= _MAX_KEYS
            or not all(isinstance(key, str) or _is_count(key) for key in path)
        ):
            raise self._damaged(f"the key path of '{name}' is empty, too long or invalid")
        return tuple(path)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LIMIT


def dump(metadata: Metadata) -> bytes:
    """Write a ``.metadata``; equal contents give equal bytes.

    Raises:
        WriteError: this torch was built without torch.distributed.
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
            # torch 2.15 adds a sixth field, the strides; torch 2.13 and older fail on it.
            reduced: Any = obj.__reduce_ex__(4)
            return *reduced[:2], reduced[2][:5]

    def info(location: Location) -> Any:
        return filesystem._StorageInfo(sys.intern(location.file), location.offset, location.length)

    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    paths = {}
    for given, entry in metadata.entries.items():
        # Pickle writes a string object once; interning makes equal strings one object.
        name = sys.intern(given)
        if given in metadata.paths:
            paths[name] = tuple(sys.intern(k) if isinstance(k, str) else k for k in metadata.paths[given])
        if isinstance(entry, Location):
            described[name] = classes.BytesStorageMetadata()
            stored[classes.MetadataIndex(name)] = info(entry)
            continue
        described[name] = classes.TensorStorageMetadata(
            classes.TensorProperties(dtype=getattr(torch, entry.dtype)),
            torch.Size(entry.shape),
            [classes.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in entry.chunks],
        )
        for number, chunk in enumerate(entry.chunks):
            stored[classes.MetadataIndex(name, chunk.offsets, number)] = info(chunk.location)
    saved = classes.Metadata(described, paths or None, stored)
    if metadata.provenance is not None:
        setattr(saved, PROVENANCE, metadata.provenance)
    stream = io.BytesIO()
    Pickler(stream, protocol=4).dump(saved)
    return stream.getvalue()
