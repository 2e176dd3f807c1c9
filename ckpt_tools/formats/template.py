"""Templates: the parsed content of one header, shared by all files with an identical header.

The checkpoints of a series mostly have the same names, dtypes, shapes and offsets. Then only the header of the first is
parsed, and the others are compared with it: their tensors have the same offsets in other files, or offsets larger by a
constant, if the metadata before the data is longer.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..storage.source import InputFile
from ..tensors import RankPart, Storage, TensorSpec, UnsupportedTensor
from .pickle_objects import SealedDict
from .tree import PLAIN, map_tree
from .zip import CENTRAL_SIZE, LOCAL_SIZE, Archive

Places = Mapping[Path, tuple[Path, int]]
"""File of the template to (corresponding file, bytes by which its payload starts later)."""

_DEEPEST = 200  # levels; a copy is recursive
_ATOMS = {type(None), bool, int, float, complex, str, bytes, UnsupportedTensor}


@dataclass(frozen=True, eq=False)
class Template:
    """The parsed content of a checkpoint, and the files in which its tensors are."""

    content: Any
    files: tuple[Path, ...]


def in_own_files(content: Any, places: Places) -> Any:
    """Copy the content of a template, with its tensors in other files; the copy shares nothing mutable.

    Args:
        content: dicts, lists, tuples and plain values; see `ArchiveTemplate.shareable`.
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
        return {name: place(spec) for name, spec in content.items()}
    placed: dict[int, TensorSpec] = {}  # a tensor under two names stays one object

    def replace(_: object, node: Any) -> Any:
        if type(node) is TensorSpec:
            return placed.get(id(node)) or placed.setdefault(id(node), place(node))
        if type(node) is RankPart:
            chunks = tuple([(offsets, place(chunk)) for offsets, chunk in node.chunks])
            return RankPart(node.reason, node.dtype, node.shape, chunks, node.ranks)
        return node if type(node) in _ATOMS else NotImplemented

    return map_tree(content, replace, PLAIN)


# Offsets in an entry of the central directory: the timestamp, the checksum, and the sizes after it.
_TIME, _CRC, _SIZES = 12, 16, 20
_CRC_SIZE = _SIZES - _CRC
_SAME = b"\xff"
# What is equal in the same file at another time, with other contents: in the directory, and in a local file header,
# the signature and the two lengths at the end.
_LINE_MASK = _SAME * _TIME + bytes(_SIZES - _TIME) + _SAME * (CENTRAL_SIZE - _SIZES)
_HEADER_MASK = _SAME * 4 + bytes(LOCAL_SIZE - 8) + _SAME * 4
_LONGEST = 1 << 16  # bytes of a coalesced range, at most
_NEAR = 1 << 10  # bytes of a gap up to which one read costs less than two


@dataclass(frozen=True, eq=False)
class ArchiveTemplate(Template):
    """The content of a torch zip file, and its header bytes, with which other files are compared.

    Attributes:
        foreign: unknown globals of its pickle.
        archive: of the file; all names start with the root.
        root: the archive's root folder name, with a slash at its end.
    """

    foreign: Counter[str]
    archive: Archive
    root: bytes

    @cached_property
    def shareable(self) -> bool:
        """True if the content can be copied for another file: it has only dicts, lists, tuples and plain values."""
        seen: set[int] = set()
        waiting = [(self.content, 0)]
        while waiting:
            node, depth = waiting.pop()
            cls = type(node)
            if cls is TensorSpec or cls is RankPart or cls in _ATOMS or id(node) in seen:
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

    def describes(self, file: InputFile, directory: bytes, start: int = 0) -> bool:
        """Return True if `file` has the same header bytes, ignoring checksums, timestamps and the root folder name.

        Args:
            file: of the same length; or a range in it is, from `start`.
            directory: its central directory, at the same offset.
            start: in bytes.
        """
        root = directory[CENTRAL_SIZE : CENTRAL_SIZE + len(self.root)]
        content_ranges, contents = self._contents
        return (
            root.endswith(b"/")
            and root.isascii()
            and root.count(b"/") == 1
            and not {*b"\0\\"} & {*root}
            and _same(directory, root, *self._directory)
            and _same(_read_ranges(file, self._header_ranges, start), root, *self._headers)
            and _read_ranges(file, content_ranges, start) == contents
            and all(directory[at : at + _CRC_SIZE] in checksums for at, checksums in self._checksums)
        )

    @cached_property
    def _bounds(self) -> list[int]:
        """Where the lines of the directory start and end."""
        sizes = (CENTRAL_SIZE + len(entry.name) for entry in self.archive.entries.values())
        return [*accumulate(sizes, initial=0)]

    @cached_property
    def _directory(self) -> tuple[list[bytes], int]:
        return _masked(self.archive.directory, self._bounds, _LINE_MASK, len(self.root))

    @cached_property
    def _headers(self) -> tuple[list[bytes], int]:
        headers = [header for _, header in sorted(self.archive.headers.items())]
        bounds = [*accumulate(map(len, headers), initial=0)]
        return _masked(b"".join(headers), bounds, _HEADER_MASK, len(self.root))

    @cached_property
    def _header_ranges(self) -> list[_Coalesced]:
        return _coalesce((offset, len(header)) for offset, header in sorted(self.archive.headers.items()))

    @cached_property
    def _contents(self) -> tuple[list[_Coalesced], bytes]:
        contents = self.archive.contents.values()
        return _coalesce((at, len(content)) for at, content in contents), b"".join(content for _, content in contents)

    @cached_property
    def _checksums(self) -> list[tuple[int, tuple[bytes, bytes]]]:
        """(Offset in the directory, allowed values) of the checksum of each content; 0 means no checksum."""
        at = dict(zip(self.archive.entries, self._bounds, strict=False))
        return [
            (at[name] + _CRC, (zlib.crc32(content).to_bytes(_CRC_SIZE, "little"), bytes(_CRC_SIZE)))
            for name, (_, content) in self.archive.contents.items()
        ]


def _masked(data: bytes, bounds: Sequence[int], fields: bytes, root: int) -> tuple[list[bytes], int]:
    """Return the bytes between the root folder names, and a mask with ones for all bytes to compare.

    Args:
        data: entries: fields, and a name that starts with a root folder name.
        bounds: where the entries start and end.
        fields: the mask of the fields.
        root: length of the root folder name.
    """
    names = [start + len(fields) for start in bounds[:-1]]
    begins, ends = [0, *(name + root for name in names)], [*names, len(data)]
    masks = (fields + _SAME * (end - name) for name, end in zip(names, bounds[1:], strict=True))
    return [data[begin:end] for begin, end in zip(begins, ends, strict=True)], _number(b"".join(masks))


def _same(theirs: bytes, root: bytes, pieces: Sequence[bytes], mask: int) -> bool:
    """Compare, where the mask has ones, with the bytes of the template under another root."""
    ours = root.join(pieces)
    return len(theirs) == len(ours) and not (_number(theirs) ^ _number(ours)) & mask


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


def _read_ranges(file: InputFile, ranges: Sequence[_Coalesced], start: int) -> bytes:
    """Read coalesced ranges, counted from `start`; return the original ranges joined, up to the end of the file."""
    found: list[bytes] = []
    for (_, _, slices), data in zip(
        ranges, file.read_ranges([(start + at, nbytes) for at, nbytes, _ in ranges]), strict=True
    ):
        found += [data] if len(slices) == 1 else [data[each] for each in slices]
    return b"".join(found)
