"""torch.distributed.checkpoint: a folder of what each process saved, and a pickle that says what stands where.

``.metadata`` maps names to tensors (dtype, shape, and the boxes that they were cut into) or to other
objects, and each box or object to a window of a ``__<rank>_<n>.distcp`` file. What stands in a window is
what ``torch.save`` writes.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError, WriteError
from ..storage.source import InputFile, read_file, store_of
from ..tensors import Part, TensorSpec, UnsupportedTensor, join
from . import dcp_metadata, torch_zip
from .dcp_metadata import Chunk, Metadata, TensorEntry, Window
from .file_plan import FilePlan, OutTensor, joined, whole_file
from .format import Format, Writing
from .header import Header, parse_provenance
from .sharded import members
from .zip import ALIGNMENT, Archive

METADATA = ".metadata"
SUFFIX = ".distcp"


def is_folder(folder: Path) -> bool:
    """Return whether a folder holds what processes saved: whether it is one checkpoint, complete or not."""
    return any(name.endswith(SUFFIX) for name in store_of(folder).names(folder))


class DCP(Format):
    """A folder that torch.distributed.checkpoint wrote."""

    name = "dcp"
    folder = True
    nests = True
    writes = True

    def sniff(self, path: Path, start: bytes) -> bool:
        if start:
            return path.name == METADATA or path.name.endswith(SUFFIX)
        return is_folder(path)

    def read(self, path: Path) -> Header:
        """Read the header; see `read`.

        Raises:
            ReadError: incomplete, damaged, or a single file of the folder.
        """
        if path.name == METADATA or path.name.endswith(SUFFIX):
            raise UnsupportedError(
                f"{path}: one file of the checkpoint that the folder holds. Give the folder: {path.parent}"
            )
        return read(path)

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        return tuple(plan(content, max_bytes=writing.max_bytes, provenance=writing.provenance))


DCP_FOLDER = DCP()


def read(folder: Path) -> Header:
    """Read the header of a folder that torch.distributed.checkpoint wrote.

    Raises:
        CorruptError: incomplete or damaged; or it points outside its folder.
        UnsupportedError: it was written with compression, or by another storage.
    """
    index = folder / METADATA
    store = store_of(folder)
    if not store.is_file(index):
        if any(name.endswith(METADATA) for name in store.names(folder)):
            raise UnsupportedError(
                f"{folder}: each rank saved its own {METADATA}, so no file says how the parts fit together. "
                "Load it with torch.distributed.checkpoint and save it with collectives."
            )
        raise CorruptError(
            f"{folder}: holds {SUFFIX} files and no {METADATA}, which is written last: the save was interrupted, "
            "or is under way. Get a complete copy."
        )
    raw, stamp = read_file(index)
    metadata = dcp_metadata.load(io.BytesIO(raw), index)
    foreign = Counter(metadata.foreign)
    objects: dict[Window, Any] = {}
    stamps = [stamp]
    windows_of = {name: list(each) for name, each in groupby(metadata.windows(), key=lambda window: window.file)}
    for name, path in members(index, windows_of).items():
        with InputFile(path) as file:
            stamps.append(file.stamp)
            for window in windows_of[name]:
                if window.offset + window.length > stamps[-1].nbytes:
                    raise CorruptError(
                        f"{path}: truncated: {METADATA} says that an entry ends at byte "
                        f"{window.offset + window.length}, the file at {stamps[-1].nbytes}. Get a complete copy."
                    )
                if file.read(window.offset, 9)[8:] == b"{":  # how safetensors begins
                    raise UnsupportedError(
                        f"{path}: its entries were written as safetensors, which torch itself reads in no such folder. "
                        "Save it again with the serialization format that FileSystemWriter has by default."
                    )
                where = f"{path}: the entry at byte {window.offset}"
                archive = Archive(file, window.offset, window.length, where=where)
                saved = torch_zip.read_archive(archive, path, where=where)
                objects[window] = saved.tree
                foreign.update(saved.foreign)
    leaves = (
        (metadata.paths.get(name, (name,)), _value(folder, index, name, entry, objects))
        for name, entry in metadata.entries.items()
    )
    provenance = parse_provenance(metadata.provenance if isinstance(metadata.provenance, str) else None)
    return Header(folder, DCP_FOLDER, _nest(index, leaves), tuple(stamps), foreign, provenance=provenance)


def _value(folder: Path, index: Path, name: str, entry: TensorEntry | Window, objects: Mapping[Window, Any]) -> Any:
    """Return what stands for one name in the tree."""
    if isinstance(entry, Window):
        return objects[entry]
    parts: list[Part] = []
    for offsets, shape, window in entry.chunks:
        chunk = objects[window]
        if isinstance(chunk, UnsupportedTensor):
            return chunk
        if not isinstance(chunk, TensorSpec) or chunk.shape != shape or chunk.dtype.name != entry.dtype:
            has = f"{chunk.dtype.name} {list(chunk.shape)}" if isinstance(chunk, TensorSpec) else "no tensor"
            raise CorruptError(
                f"{index}: says that '{name}' has a chunk of {entry.dtype} {list(shape)} at byte {window.offset} "
                f"of {window.file}; there is {has}. Get a fresh copy."
            )
        parts.append((offsets, chunk))
    return join(folder, name, parts[0][1].dtype, entry.shape, parts)


class _Level(dict[Any, Any]):
    """A container of the tree in the making; a value that is a dict is none."""


def _nest(index: Path, leaves: Iterable[tuple[tuple[Any, ...], Any]]) -> dict[Any, Any]:
    """Put values where their keys lead: dicts, and lists where all keys of a level are numbers."""
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
    # torch saves nothing of an empty dict, so that a list may have gaps; few, or it is a dict of numbers.
    if all(isinstance(key, int) for key in children) and max(children) < 2 * len(children) + 100:
        return [children.get(i) for i in range(max(children) + 1)]
    return children


def plan(
    tree: Mapping[Any, Any], *, max_bytes: int | None = None, provenance: Mapping[str, Any] | None = None
) -> list[FilePlan]:
    """Lay out a folder that torch.distributed.checkpoint loads into any number of processes.

    Args:
        tree: plain data (see `pickle_write.plain`) with OutTensors, as a training script would save it: names to
            tensors, or nested such as ``{"model": {...}, "step": 7}``. A tensor is one chunk; one OutTensor under
            several names is stored once.
        max_bytes: the largest file; a tensor larger than that has a file of its own.
        provenance: stored in ``.metadata``, where torch passes over it.

    Returns:
        The files, in the order of writing; ``.metadata``, without which it is no checkpoint, comes last.

    Raises:
        WriteError: two entries would have one name, or an entry is no plain data.
    """
    files: list[list[tuple[int, FilePlan]]] = [[]]
    end = 0
    entries: dict[str, TensorEntry | Window] = {}
    paths: dict[str, tuple[Any, ...]] = {}
    places: dict[OutTensor, Window] = {}
    for path, value in _leaves(tree):
        name = ".".join(map(str, path))
        if name in entries:
            raise WriteError(
                f"two entries would be called '{name}', which torch.distributed.checkpoint cannot tell apart. "
                "Rename one, or write a .pth file."
            )
        paths[name] = path
        window = places.get(value) if isinstance(value, OutTensor) else None
        if window is None:
            part = torch_zip.plan(value, name=name)
            start = end + -end % ALIGNMENT
            if max_bytes is not None and start and start + part.size > max_bytes:
                files.append([])
                start = 0
            window = Window(f"__0_{len(files) - 1}{SUFFIX}", start, part.size)
            files[-1].append((start, part))
            end = start + part.size
        if isinstance(value, OutTensor):
            places[value] = window
            entries[name] = TensorEntry(
                value.dtype.name, value.shape, (Chunk((0,) * len(value.shape), value.shape, window),)
            )
        else:
            entries[name] = window
    text = None if provenance is None else json.dumps(provenance, indent=1)
    index = dcp_metadata.dump(Metadata(entries, paths, text))
    return [
        *(joined(f"__0_{number}{SUFFIX}", parts) for number, parts in enumerate(files)),
        whole_file(METADATA, index),
    ]


def _leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Walk a tree as torch does on saving and loading: into dicts, and into lists that hold dicts or tensors."""
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
