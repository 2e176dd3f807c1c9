"""torch.distributed.checkpoint: a folder of what each process saved, and a pickle that says what stands where.

``.metadata`` maps names to tensors (dtype, shape, and the boxes that they were cut into) or to other
objects, and each box or object to a window of a ``__<rank>_<n>.distcp`` file. What stands in a window is
what ``torch.save`` writes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CorruptError, UnsupportedError
from ..tensors import DType, Part, Storage, TensorSpec, UnsupportedTensor, join
from . import torch_zip, unpickle
from .header import PROVENANCE, Header, Stamp, parse_provenance
from .sharded import member
from .unpickle import Inert

METADATA = ".metadata"
SUFFIX = ".distcp"
_MAX_DEPTH = 100  # keys on the way to a value; the recursion over the tree ends there
# What an honest .metadata names; the classes were in other modules before torch 2.3.
_KNOWN = re.compile(
    r"torch\.distributed\.(\w+\.)+(Metadata|MetadataIndex|TensorStorageMetadata|BytesStorageMetadata"
    r"|ChunkStorageMetadata|TensorProperties|_MEM_FORMAT_ENCODING|MEM_FORMAT_ENCODING|StorageMeta|_StorageInfo)"
    r"|torch\.(Size|\w*\d\w*|bool|strided|serialization\._get_layout)"
    r"|pathlib\.(_local\.)?\w*Path"
)


def is_folder(path: Path) -> bool:
    """Return whether a folder holds what a process saved: whether it is one checkpoint, complete or not."""
    return any(child.name.endswith(SUFFIX) for child in path.iterdir())


def read(folder: Path) -> Header:
    """Read the header of a folder that torch.distributed.checkpoint wrote.

    Raises:
        CorruptError: incomplete or damaged; or it points outside its folder.
        UnsupportedError: it was written with compression, or by another storage.
    """
    index = folder / METADATA
    if not index.is_file():
        raise CorruptError(
            f"{folder}: holds {SUFFIX} files and no {METADATA}, which is written last. "
            "The save was interrupted, or each rank saved on its own; get a complete copy."
        )
    with index.open("rb") as file:
        stamp = Stamp.of(index, file.fileno())
        saved, foreign = unpickle.load(file, _no_storage, where=str(index), torch_values=False)
    facts = _Facts.parse(index, saved)
    contents = _Contents.read(folder, index, facts.windows())
    leaves = [
        (facts.paths.get(name, (name,)), _value(folder, index, name, entry, contents.objects))
        for name, entry in facts.entries.items()
    ]
    unknown = Counter({name: n for name, n in foreign.items() if not _KNOWN.fullmatch(name)})
    return Header(
        folder,
        "dcp",
        nest(index, leaves),
        (stamp, *contents.stamps),
        unknown + contents.foreign,
        provenance=parse_provenance(facts.provenance),
    )


def _no_storage(key: str, dtype: DType | None, numel: int, view: Any) -> Storage:
    raise CorruptError("a storage where none belongs")


class Window(NamedTuple):
    """Where one object stands: a part of a file of the folder."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """What `.metadata` says about one name.

    Attributes:
        shape: None for what is no tensor.
        dtype: its name in torch.
        chunks: (offsets, sizes, window); of an object, one without offsets and sizes.
    """

    shape: tuple[int, ...] | None
    dtype: str
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...], Window], ...]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a `.metadata` says, checked as far as it can be by itself."""

    entries: Mapping[str, _Entry]
    paths: Mapping[str, tuple[Any, ...]]
    provenance: Any

    @classmethod
    def parse(cls, index: Path, saved: Any) -> _Facts:
        fields = _state(index, saved, "Metadata")
        entries, places = fields.get("state_dict_metadata"), fields.get("storage_data")
        paths = fields.get("planner_data")
        if not isinstance(entries, dict) or not isinstance(places, dict):
            raise CorruptError(f"{index}: says nothing about what was saved, or where. It is damaged.")
        windows = dict(_window(index, key, place) for key, place in places.items())
        found = {}
        for name, entry in entries.items():
            if not isinstance(name, str):
                raise CorruptError(f"{index}: names an entry by something that is no text. It is damaged.")
            found[name] = _entry(index, name, entry, windows)
        paths = paths if isinstance(paths, dict) else {}  # the save of a flat dict has none
        known = {name: _path(index, name, paths[name]) for name in found if name in paths}
        return cls(found, known, fields.get(PROVENANCE))

    def windows(self) -> list[Window]:
        return [window for entry in self.entries.values() for _, _, window in entry.chunks]


def _state(index: Path, record: Any, *names: str) -> dict[str, Any]:
    """Return the fields of a record of one of these classes of torch.distributed."""
    full = type(record).global_name if isinstance(record, Inert) else type(record).__name__
    if not full.startswith("torch.distributed.") or full.rpartition(".")[2] not in names:
        raise CorruptError(f"{index}: holds a {full} where a {names[0]} belongs. It is damaged, or no checkpoint.")
    # A class without fields has no state.
    return record.state if isinstance(record.state, dict) else {}


def _numbers(index: Path, name: str, size: Any) -> tuple[int, ...]:
    """Return the numbers of a torch.Size."""
    numbers = size.args[0] if isinstance(size, Inert) and size.args else size
    if not isinstance(numbers, (tuple, list)) or any(type(n) is not int or n < 0 for n in numbers):
        raise CorruptError(f"{index}: the sizes of '{name}' are no numbers. It is damaged.")
    return tuple(numbers)


def _window(index: Path, key: Any, place: Any) -> tuple[tuple[str, tuple[int, ...] | None], Window]:
    what = _state(index, key, "MetadataIndex")
    name, offset = what.get("fqn"), what.get("offset")
    if not isinstance(name, str):
        raise CorruptError(f"{index}: names an entry by something that is no text. It is damaged.")
    if not isinstance(place, Inert) or type(place).global_name.rpartition(".")[2] != "_StorageInfo":
        raise UnsupportedError(
            f"{index}: '{name}' was written by a storage of its own, not to the files of torch's FileSystemWriter."
        )
    fields = _state(index, place, "_StorageInfo")
    if fields.get("transform_descriptors"):
        raise UnsupportedError(
            f"{index}: '{name}' is stored compressed or otherwise transformed, which is not read here. "
            "Load it with torch.distributed.checkpoint and save it without extensions once."
        )
    file, start, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or type(start) is not int or type(length) is not int or min(start, length) < 0:
        raise CorruptError(f"{index}: the place of '{name}' is none. It is damaged.")
    return (name, None if offset is None else _numbers(index, name, offset)), Window(file, start, length)


def _entry(index: Path, name: str, entry: Any, windows: Mapping[tuple[str, tuple[int, ...] | None], Window]) -> _Entry:
    fields = _state(index, entry, "TensorStorageMetadata", "BytesStorageMetadata")
    if type(entry).global_name.endswith("BytesStorageMetadata"):
        if (name, None) not in windows:
            raise CorruptError(f"{index}: does not say where '{name}' stands. It is damaged.")
        return _Entry(None, "", (((), (), windows[name, None]),))
    shape = _numbers(index, name, fields.get("size"))
    properties: Any = fields.get("properties")
    _state(index, properties, "TensorProperties")
    dtype = properties.state[0] if isinstance(properties.state, tuple) and properties.state else None
    full = str(getattr(dtype, "global_name", ""))
    chunks = []
    listed = fields.get("chunks")
    for chunk in listed if isinstance(listed, list) else []:
        where = _state(index, chunk, "ChunkStorageMetadata")
        offsets, sizes = (_numbers(index, name, where.get(key)) for key in ("offsets", "sizes"))
        window = windows.get((name, offsets))
        if window is None:
            raise CorruptError(f"{index}: does not say where the chunk of '{name}' at {list(offsets)} stands.")
        chunks.append((offsets, sizes, window))
    if not chunks:
        raise CorruptError(f"{index}: lists no chunk of '{name}'. It is damaged.")
    return _Entry(shape, full.removeprefix("torch."), tuple(chunks))


def _path(index: Path, name: str, path: Any) -> tuple[Any, ...]:
    if (
        not isinstance(path, (tuple, list))
        or not 0 < len(path) <= _MAX_DEPTH
        or any(type(key) not in (str, int) or (type(key) is int and key < 0) for key in path)
    ):
        raise CorruptError(f"{index}: the keys that lead to '{name}' are none, or too many. It is damaged.")
    return tuple(path)


@dataclass(frozen=True, slots=True)
class _Contents:
    """What stands in the windows of a checkpoint's files."""

    objects: Mapping[Window, Any]
    stamps: tuple[Stamp, ...]
    foreign: Counter[str]

    @classmethod
    def read(cls, folder: Path, index: Path, windows: Iterable[Window]) -> _Contents:
        objects: dict[Window, Any] = {}
        stamps = []
        foreign: Counter[str] = Counter()
        by_file: dict[str, list[Window]] = {}
        for window in sorted(set(windows)):
            by_file.setdefault(window.file, []).append(window)
        for name, parts in by_file.items():
            path = member(folder, name, index)
            with path.open("rb") as file:
                stamp = Stamp.of(path, file.fileno())
                stamps.append(stamp)
                for window in parts:
                    end = window.offset + window.length
                    if end > stamp.nbytes:
                        raise CorruptError(
                            f"{path}: truncated: {index.name} says that an entry ends at byte {end}, "
                            f"the file at {stamp.nbytes}. Get a complete copy."
                        )
                    where = f"{path}: the entry at byte {window.offset}"
                    objects[window], unknown, _ = torch_zip.read_window(
                        file, path, window.offset, window.length, where=where
                    )
                    foreign.update(unknown)
        return cls(objects, tuple(stamps), foreign)


def _value(folder: Path, index: Path, name: str, entry: _Entry, objects: Mapping[Window, Any]) -> Any:
    """Return what stands for one name in the tree."""
    if entry.shape is None:
        return objects[entry.chunks[0][2]]
    parts: list[Part] = []
    for offsets, sizes, window in entry.chunks:
        chunk = objects[window]
        if isinstance(chunk, UnsupportedTensor):
            return chunk
        if not isinstance(chunk, TensorSpec) or chunk.shape != sizes or chunk.dtype.name != entry.dtype:
            has = f"{chunk.dtype.name} {list(chunk.shape)}" if isinstance(chunk, TensorSpec) else "no tensor"
            raise CorruptError(
                f"{index}: says that '{name}' has a chunk of {entry.dtype} {list(sizes)} at byte {window.offset} "
                f"of {window.file}; there is {has}. Get a fresh copy."
            )
        parts.append((offsets, chunk))
    return join(folder, name, parts[0][1].dtype, entry.shape, parts)


class _Level(dict[Any, Any]):
    """A container of the tree in the making; a value that is a dict is none."""


def nest(index: Path, leaves: Iterable[tuple[tuple[Any, ...], Any]]) -> dict[Any, Any]:
    """Put values where their keys lead: dicts, and lists where all keys of a level are numbers.

    Raises:
        CorruptError: two values in one place, or one inside another.
    """
    root = _Level()
    for path, value in leaves:
        node = root
        for key in path[:-1]:
            child = node.setdefault(key, _Level())
            if not isinstance(child, _Level):
                raise _clash(index, path)
            node = child
        if path[-1] in node:
            raise _clash(index, path)
        node[path[-1]] = value
    return {key: _settled(child) for key, child in root.items()}


def _clash(index: Path, path: tuple[Any, ...]) -> CorruptError:
    return CorruptError(f"{index}: puts two entries at '{'.'.join(map(str, path))}'. It is damaged.")


def _settled(node: Any) -> Any:
    if not isinstance(node, _Level):
        return node
    children = {key: _settled(child) for key, child in node.items()}
    # torch leaves out what is empty, so that a list may have gaps; few, or it is a dict of numbers.
    if all(type(key) is int for key in children) and max(children) < 2 * len(children) + 100:
        return [children.get(i) for i in range(max(children) + 1)]
    return children


__all__ = ["METADATA", "SUFFIX", "is_folder", "read"]
