"""Templates: the parsed content of one header, shared by all files with an identical header.

The checkpoints of a series mostly have the same names, dtypes, shapes and offsets. Then only the header of the first is
parsed, and the others are compared with it: their tensors have the same offsets in other files, or offsets larger by a
constant, if the metadata before the data is longer.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..storage.source import InputFile
from ..tensors import Storage, TensorSpec, UnsupportedTensor
from .pickle_read import SealedDict
from .tree import map_tree
from .zip import CENTRAL_SIZE, LOCAL_SIZE, Archive

Places = Mapping[Path, tuple[Path, int]]
"""File of the template to (corresponding file, bytes by which its payload starts later)."""

_DEEPEST = 200  # levels; a copy is recursive
_ATOMS = {type(None), bool, int, float, complex, str, bytes, UnsupportedTensor}


class Template:
    """The parsed content of a checkpoint.

    Attributes:
        content: the saved object; its tensors are in `files`.
        files: the files that were parsed.
    """

    def __init__(self, content: Any, files: tuple[Path, ...]) -> None:
        self.content, self.files = content, files

    @cached_property
    def shareable(self) -> bool:
        """True if the content can be copied for another file: it has only dicts, lists, tuples and plain values."""
        seen: set[int] = set()
        waiting = [(self.content, 0)]
        while waiting:
            node, depth = waiting.pop()
            cls = type(node)
            if cls is TensorSpec or cls in _ATOMS or id(node) in seen:
                continue
            seen.add(id(node))
            inside: Iterable[Any]
            if cls is dict or cls is SealedDict:
                if not _ATOMS.issuperset(map(type, node)):
                    return False
                inside = [*node.values(), getattr(node, "_metadata", None)]
            elif cls is list or cls is tuple:
                inside = node
            else:
                return False
            if depth > _DEEPEST:
                return False
            waiting += [(each, depth + 1) for each in inside if type(each) is not TensorSpec]
        return True


def relocated(content: Any, places: Places) -> Any:
    """Copy the content of a shareable template, with its tensors in other files; the copy shares nothing mutable.

    Args:
        places: tensors in files that are not in it keep their file.
    """
    storages: dict[int, Storage] = {}

    def place(node: TensorSpec) -> TensorSpec:
        old = node.storage
        storage = storages.get(id(old))
        if storage is None:
            path, shift = places.get(old.path, (old.path, 0))
            storage = storages[id(old)] = Storage(path, old.offset + shift, old.nbytes, old.big_endian)
        return TensorSpec(node.dtype, node.shape, node.stride, node.start, storage)

    if type(content) is dict and {TensorSpec}.issuperset(map(type, content.values())):  # the usual case, and large
        return {name: place(spec) for name, spec in content.items()} if places else dict(content)
    placed: dict[int, TensorSpec] = {}  # a tensor under two names stays one object

    def replace(_: object, node: Any) -> Any:
        if type(node) is TensorSpec:
            return placed.get(id(node)) or placed.setdefault(id(node), place(node))
        return node if type(node) in _ATOMS else NotImplemented

    return map_tree(content, replace)


# Offsets in an entry of the central directory: the timestamp, the checksum, and the sizes after it.
_TIME, _CRC, _SIZES = 12, 16, 20
_CRC_SIZE = _SIZES - _CRC
_SIGNATURE = 4  # bytes at the start of a local file header
_LENGTHS = 4  # bytes at its end: the lengths of the name and of the extra fields
_LONGEST = 1 << 16  # bytes of a coalesced range, at most
_NEAR = 1 << 10  # bytes of a gap up to which one read costs less than two


class ArchiveTemplate(Template):
    """The content of a torch zip file, and its header bytes, with which other files are compared.

    Args:
        path: the file.
        foreign: unknown globals of its pickle.
        archive: of the file; all names start with the root.
        root: the archive's root folder name, with a slash at its end.
    """

    def __init__(self, content: Any, path: Path, foreign: Counter[str], archive: Archive, root: bytes) -> None:
        super().__init__(content, (path,))
        self.foreign = Counter(foreign)
        self._archive = archive
        self._root = root

    def describes(self, file: InputFile, directory: bytes) -> bool:
        """Return True if `file` has the same header bytes, ignoring checksums, timestamps and the root folder name.

        Args:
            file: of the same length.
            directory: its central directory, at the same offset.
        """
        root = directory[CENTRAL_SIZE : CENTRAL_SIZE + len(self._root)]
        contents = self._archive.contents.values()
        return (
            root.endswith(b"/")
            and root.isascii()
            and root.count(b"/") == 1
            and not {*b"\0\\"} & {*root}
            and self._same(directory, root, *self._directory)
            and self._same(_read(file, self._header_ranges), root, *self._headers)
            and _read(file, _coalesce((at, len(content)) for at, content in contents))
            == b"".join(content for _, content in contents)
            and all(directory[at : at + _CRC_SIZE] in checksums for at, checksums in self._checksums)
        )

    def _same(self, theirs: bytes, root: bytes, pieces: Sequence[bytes], mask: int) -> bool:
        """Compare, where the mask has ones, with the bytes of the template under another root."""
        ours = root.join(pieces)
        return len(theirs) == len(ours) and not (_number(theirs) ^ _number(ours)) & mask

    def _without_root(self, data: bytes, offsets: Sequence[int]) -> list[bytes]:
        """Split bytes at the root folder names, which start at these offsets."""
        ends = [*offsets, len(data)]
        begins = [0, *(offset + len(self._root) for offset in offsets)]
        return [data[begin:end] for begin, end in zip(begins, ends, strict=True)]

    @cached_property
    def _line_starts(self) -> list[int]:
        lengths = (CENTRAL_SIZE + len(entry.name) for entry in self._archive.entries.values())
        return [*accumulate(lengths, initial=0)]

    @cached_property
    def _directory(self) -> tuple[list[bytes], int]:
        line = b"\xff" * _TIME + bytes(_SIZES - _TIME) + b"\xff" * (CENTRAL_SIZE - _SIZES)
        mask = b"".join(line + b"\xff" * len(entry.name) for entry in self._archive.entries.values())
        names = [at + CENTRAL_SIZE for at in self._line_starts[:-1]]
        return self._without_root(self._archive.directory, names), _number(mask)

    @cached_property
    def _headers(self) -> tuple[list[bytes], int]:
        headers = [header for _, header in sorted(self._archive.headers.items())]
        line = b"\xff" * _SIGNATURE + bytes(LOCAL_SIZE - _SIGNATURE - _LENGTHS) + b"\xff" * _LENGTHS
        mask = b"".join(line + b"\xff" * (len(header) - LOCAL_SIZE) for header in headers)
        begins = [*accumulate(map(len, headers), initial=0)][:-1]
        return self._without_root(b"".join(headers), [at + LOCAL_SIZE for at in begins]), _number(mask)

    @cached_property
    def _header_ranges(self) -> list[_Coalesced]:
        return _coalesce((offset, len(header)) for offset, header in sorted(self._archive.headers.items()))

    @cached_property
    def _checksums(self) -> list[tuple[int, tuple[bytes, bytes]]]:
        """Return (offset in the directory, allowed values) for the checksum of each content; 0 means no checksum."""
        at = dict(zip(self._archive.entries, self._line_starts, strict=False))
        return [
            (at[name] + _CRC, (zlib.crc32(content).to_bytes(_CRC_SIZE, "little"), bytes(_CRC_SIZE)))
            for name, (_, content) in self._archive.contents.items()
        ]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


_Coalesced = tuple[int, int, list[slice]]  # offset, length, and the original ranges as slices


def _coalesce(ranges: Iterable[tuple[int, int]]) -> list[_Coalesced]:
    """Coalesce ranges, (offset, length) in ascending order, that are close together."""
    found: list[_Coalesced] = []
    begin = end = -1
    for offset, nbytes in ranges:
        if found and end <= offset <= end + _NEAR and offset + nbytes <= begin + _LONGEST:
            slices = found.pop()[2]
        else:
            begin, slices = offset, []
        end = offset + nbytes
        slices.append(slice(offset - begin, end - begin))
        found.append((begin, end - begin, slices))
    return found


def _read(file: InputFile, ranges: Iterable[_Coalesced]) -> bytes:
    """Read coalesced ranges of a file; return the original ranges joined."""
    found = []
    for offset, length, slices in ranges:
        data = file.read(offset, length)
        found += [data] if len(slices) == 1 else [data[each] for each in slices]
    return b"".join(found)
