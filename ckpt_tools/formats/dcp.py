"""torch.distributed.checkpoint (DCP): a folder with the files of each process and an index.

The index, ``.metadata``, maps names to tensors (dtype, shape, chunks) or to other objects, and each chunk or object to
a byte range of a ``__<rank>_<n>.distcp`` file. Each range is a file as ``torch.save`` writes it. Where tensors were
serialized as safetensors, one such file with all of them is at the end, and the range of each begins there.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError, WriteError
from ..storage.source import InputFile, Stamp, store_of
from ..tensors import DTYPES, Chunk, Storage, TensorSpec, UnsupportedTensor, join, make_spec
from . import dcp_metadata
from .dcp_metadata import ChunkEntry, Location, Metadata, TensorEntry
from .file_plan import FilePlan, OutTensor, Payload, joined, whole_file
from .format import Format, Named, Writing
from .header import Header, damage, parse_provenance
from .json_file import read_small
from .safetensors import SAFETENSORS
from .sharded import members
from .template import ArchiveTemplate
from .torch_zip import TORCH_ZIP, read_archive
from .zip import ALIGNMENT, Archive, find_directory

_LARGEST_METADATA = 2 << 30  # bytes

METADATA = ".metadata"
SUFFIX = ".distcp"


class DCP(Format):
    """The format of torch.distributed.checkpoint."""

    name = "dcp"
    folder = True
    nests = True
    writes = True

    def sniff(self, path: Path, start: bytes) -> bool:
        if start:
            return path.name == METADATA or path.name.endswith(SUFFIX)
        return any(name.endswith(SUFFIX) for name in store_of(path).names(path))

    def read(self, path: Path) -> Header:
        """Read the header of a folder.

        Raises:
            CorruptError: incomplete or damaged, or a path leads outside the folder.
            UnsupportedError: compressed, written by another storage, or a single file of a folder.
        """
        if path.name == METADATA or path.name.endswith(SUFFIX):
            raise UnsupportedError(
                f"{path}: one file of the checkpoint that the folder holds. Give the folder: {path.parent}"
            )
        folder = read_folder(path)
        leaves = ((folder.paths.get(name, (name,)), value) for name, value in folder.entries.items())
        tree = _nest(path / METADATA, leaves)
        return Header(
            path,
            self,
            tree,
            folder.stamps,
            folder.foreign,
            provenance=folder.provenance,
            record_fault=folder.record_fault,
        )

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        """Lay out a folder that any number of processes can load: a tensor is one chunk.

        The provenance is in ``.metadata``, where torch ignores it. It is last: it makes a folder a checkpoint.

        Raises:
            WriteError: two entries have the same name, or an entry is not plain data.
        """
        leaves = ((".".join(map(str, path)), path, value) for path, value in _leaves(content))
        return lay_out(leaves, writing)

    def rename(self, header: Header) -> Named:
        raise UnsupportedError(
            f"{header.path}: a DCP checkpoint, with names in many places. Convert it to one file first: `convert(...)`."
        )

    def replaced(self, folder: Path, names: Collection[str]) -> Collection[str]:
        return [name for name in store_of(folder).names(folder) if name.endswith(SUFFIX)] if METADATA in names else ()


DCP_FOLDER = DCP()


@dataclass(frozen=True, slots=True)
class Folder:
    """What a folder holds.

    Attributes:
        entries: name to tensor or other object, in the order of the saved dict.
        objects: names of the entries that are not tensors.
        paths: name to key path in the saved dict, where it is known.
        stamps: of all files.
        foreign: unknown globals, with counts.
        provenance, record_fault: as in Header.
    """

    entries: Mapping[str, Any]
    objects: Collection[str]
    paths: Mapping[str, tuple[Any, ...]]
    stamps: tuple[Stamp, ...]
    foreign: Counter[str]
    provenance: dict[str, Any] | None
    record_fault: str


@dataclass(frozen=True, slots=True)
class Saved:
    """An object other than a tensor, as the bytes that `torch.save` made of it."""

    pickled: OutTensor


def read_folder(path: Path, *, whole_objects: bool = True) -> Folder:
    """Read the index of a folder and the headers of its entries.

    Args:
        whole_objects: read objects other than tensors. Otherwise each is a tensor of the bytes that `torch.save` made
            of it.

    Raises:
        CorruptError, UnsupportedError: see `DCP.read`.
    """
    index, store = path / METADATA, store_of(path)
    if not store.is_file(index):
        if any(name.endswith(METADATA) for name in store.names(path)):
            raise UnsupportedError(
                f"{path}: each rank saved its own {METADATA}, so no file lists the chunks of each tensor. "
                "Load it with torch.distributed.checkpoint and save it with collectives."
            )
        raise CorruptError(
            f"{path}: holds {SUFFIX} files and no {METADATA}, which is written last: the save was interrupted, "
            "or is under way. Get a complete copy."
        )
    raw, stamp = read_small(index, _LARGEST_METADATA)
    metadata = dcp_metadata.load(io.BytesIO(raw), index)
    foreign = Counter(metadata.foreign)
    unread = () if whole_objects else {each for each in metadata.entries.values() if isinstance(each, Location)}
    objects: dict[Location, Any] = {}
    known: _Known = {}
    stamps = [stamp]
    locations_of = {
        name: list(each) for name, each in groupby(metadata.locations(), key=lambda location: location.file)
    }
    for name, member in members(index, locations_of).items():
        with InputFile(member) as file:
            stamps.append(file.stamp)
            for location in locations_of[name]:
                _check_inside(file, location)
                if location in unread:
                    storage = Storage(member, location.offset, location.length)
                    objects[location] = make_spec(DTYPES["uint8"], (location.length,), storage)
                    continue
                last = next(reversed(objects.values()), None)
                if isinstance(last, _Tensors) and (last.path, last.start) == (member, location.offset):
                    objects[location] = last
                    continue
                objects[location], unknown = _read_object(file, location, known)
                foreign.update(unknown)
    entries = {name: _value(path, index, name, entry, objects) for name, entry in metadata.entries.items()}
    provenance = parse_provenance(metadata.provenance if isinstance(metadata.provenance, str) else None)
    names = {name for name, entry in metadata.entries.items() if isinstance(entry, Location)}
    fault = damage(metadata.provenance, provenance)
    return Folder(entries, names, metadata.paths, tuple(stamps), foreign, provenance, fault)


def lay_out(leaves: Iterable[tuple[str, tuple[Any, ...] | None, Any]], writing: Writing) -> tuple[FilePlan, ...]:
    """Lay out a folder; see `DCP.plan`.

    Args:
        leaves: (name, key path or None, value) of each entry; a value is an OutTensor, `Saved` or plain data.

    Raises:
        WriteError: as `DCP.plan`.
    """
    files: list[list[tuple[int, FilePlan]]] = [[]]
    end = 0
    entries: dict[str, TensorEntry | Location] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    stored: dict[OutTensor, Location] = {}
    for name, path, value in leaves:
        if name in entries:
            raise WriteError(
                f"two entries would have the name '{name}', which torch.distributed.checkpoint cannot tell apart. "
                "Rename one, or write a .pth file."
            )
        if path is not None:
            paths[name] = path
        location = stored.get(value) if isinstance(value, OutTensor) else None
        if location is None:
            (inner,) = _as_saved(value) if isinstance(value, Saved) else TORCH_ZIP.plan(value, Writing(name=name))
            start = end + -end % ALIGNMENT
            if writing.max_bytes is not None and start and start + inner.size > writing.max_bytes:
                files.append([])
                start = 0
            location = Location(f"__0_{len(files) - 1}{SUFFIX}", start, inner.size)
            files[-1].append((start, inner))
            end = start + inner.size
        if isinstance(value, OutTensor):
            stored[value] = location
            entries[name] = TensorEntry(
                value.dtype.name, value.shape, (ChunkEntry((0,) * len(value.shape), value.shape, location),)
            )
        else:
            entries[name] = location
    text = None if writing.provenance is None else json.dumps(writing.provenance, indent=1)
    index = dcp_metadata.dump(Metadata(entries, paths, text))
    return (
        *(joined(f"__0_{number}{SUFFIX}", plans) for number, plans in enumerate(files)),
        whole_file(METADATA, index),
    )


def _as_saved(value: Saved) -> tuple[FilePlan]:
    return (FilePlan(value.pickled.name, value.pickled.nbytes, (Payload(value.pickled, 0),)),)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The tensors of a file that a process serialized as safetensors, which all have the same location.

    Attributes:
        path, start: of their file, and where they begin in it.
        chunks: by name.
        offsets: of each chunk in its tensor.
    """

    path: Path
    start: int
    chunks: Mapping[str, Any]
    offsets: Mapping[str, tuple[int, ...]]

    def chunk(self, name: str, offsets: tuple[int, ...]) -> Any:
        """Return a chunk; None if there is none at these offsets of its tensor."""
        return self.chunks[name] if self.offsets.get(name) == offsets else None


def _check_inside(file: InputFile, location: Location) -> None:
    end = location.offset + location.length
    if end > file.stamp.nbytes:
        raise CorruptError(
            f"{file.path}: truncated: {METADATA} says that an entry ends at byte {end}, the file at "
            f"{file.stamp.nbytes}. Get a complete copy."
        )


_Known = dict[tuple[int, int], list[tuple[ArchiveTemplate, int]]]
"""Chunks read before, by their length and the offset of their directory; each with its offset in its file."""
_MOST_KNOWN = 8  # of one key


def _read_object(file: InputFile, location: Location, known: _Known) -> tuple[Any, Counter[str]]:
    """Return a chunk or another object, and its unknown globals. A chunk like one that is known is not unpickled."""
    limit, directory = find_directory(file, location.offset, location.length)
    alike = known.setdefault((location.length, limit), []) if directory else []
    for template, start in alike:
        if template.describes(file, directory, location.offset):
            return template.content.relocated(file.path, location.offset - start), Counter()
    if file.read(location.offset, 9)[8:] == b"{":  # the start of a safetensors file
        header, offsets = SAFETENSORS.parse(file.path, location.offset)
        return _Tensors(file.path, location.offset, header.tree, offsets or {}), Counter()
    where = f"{file.path}: the entry at byte {location.offset}"
    archive = Archive(file, location.offset, location.length, where=where)
    root, value, foreign = read_archive(archive, file.path, where=where)
    usual = archive.usual and all(name.startswith(f"{root}/") for name in archive.entries)
    if type(value) is TensorSpec and usual and not foreign and len(alike) < _MOST_KNOWN:
        template = ArchiveTemplate(value, (file.path,), foreign, archive, f"{root}/".encode())
        alike.append((template, location.offset))
    return value, foreign


def _value(folder: Path, index: Path, name: str, entry: TensorEntry | Location, objects: Mapping[Location, Any]) -> Any:
    """Return the tensor or object of one name."""
    if isinstance(entry, Location):
        if isinstance(objects[entry], _Tensors):
            raise CorruptError(f"{index}: '{name}' is no tensor, and there are tensors in its place. It is damaged.")
        return objects[entry]
    chunks: list[Chunk] = []
    for offsets, shape, location in entry.chunks:
        chunk = objects[location]
        if isinstance(chunk, _Tensors):
            chunk = chunk.chunk(name, offsets)
        if isinstance(chunk, UnsupportedTensor):
            return chunk
        if not isinstance(chunk, TensorSpec) or chunk.shape != shape or chunk.dtype.name != entry.dtype:
            has = f"{chunk.dtype.name} {list(chunk.shape)}" if isinstance(chunk, TensorSpec) else "no tensor"
            raise CorruptError(
                f"{index}: says that '{name}' has a chunk of {entry.dtype} {list(shape)} at byte {location.offset} "
                f"of {location.file}; there is {has}. Get a fresh copy."
            )
        chunks.append((offsets, chunk))
    return join(folder, name, chunks[0][1].dtype, entry.shape, chunks)


class _Level(dict[Any, Any]):
    """A container under construction; its own class tells it from a dict that is a value."""


def _nest(index: Path, leaves: Iterable[tuple[tuple[Any, ...], Any]]) -> dict[Any, Any]:
    """Build the tree from (key path, value): dicts, or lists where all keys of a level are numbers."""
    root = _Level()
    for path, value in leaves:
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, _Level())
            if not isinstance(node, _Level):
                break
        if not isinstance(node, _Level) or path[-1] in node:
            raise CorruptError(f"{index}: puts two entries at '{'.'.join(map(str, path))}'. It is damaged.")
        node[path[-1]] = value
    return {key: _settled(child) for key, child in root.items()}


def _settled(node: Any) -> Any:
    if not isinstance(node, _Level):
        return node
    children = {key: _settled(child) for key, child in node.items()}
    # torch saves nothing for an empty dict, so a list may have gaps. Many gaps mean a dict with numbers as keys.
    if all(isinstance(key, int) for key in children) and max(children) < 2 * len(children) + 100:
        return [children.get(i) for i in range(max(children) + 1)]
    return children


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Flatten a tree as torch does: dicts, and lists that contain dicts or tensors."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(node, list) and _is_container(node):
        for number, value in enumerate(node):
            yield from _leaves(value, (*path, number))
    else:
        yield path, node


def _is_container(node: Any) -> bool:
    return isinstance(node, (Mapping, OutTensor)) or (isinstance(node, list) and any(map(_is_container, node)))
