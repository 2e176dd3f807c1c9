"""Templates: the content of one header, shared by all files whose headers are identical.

The checkpoints of a series mostly have the same names, dtypes, shapes and offsets. Then the header of the first is
parsed, and those of the others are only compared with it: their tensors are at the same places of other files, or all
the same number of bytes further on, where the header is longer by some metadata.
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
"""From a file of the template to (the file in its place, by how many bytes its payload begins later)."""

_DEEPEST = 200  # levels; a copy follows them by recursion
_ATOMS = {type(None), bool, int, float, complex, str, bytes, UnsupportedTensor}


class Template:
    """What was parsed of one checkpoint.

    Attributes:
        content: what was saved; its tensors are in the files that were parsed.
        files: these files.
    """

    def __init__(self, content: Any, files: tuple[Path, ...]) -> None:
        self.content, self.files = content, files

    @cached_property
    def shareable(self) -> bool:
        """True if the content can be copied for another file: it holds dicts, lists, tuples and plain values alone."""
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
    """Copy a content with its tensors at their places in other files; the copy shares nothing that can change.

    Args:
        content: of a template that is shareable.
        places: where the files of the template have gone; tensors in other files keep their place.
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


# Offsets in a line of the central directory: of the times, of the checksum, and of the sizes behind it.
_TIME, _CRC, _SIZES = 12, 16, 20
_CRC_SIZE = _SIZES - _CRC
_SIGNATURE = 4  # bytes at the start of a local header
_LENGTHS = 4  # bytes at its end: the length of the name, and of the extra fields
_LONGEST = 1 << 16  # bytes that are read at once, at most
_NEAR = 1 << 10  # bytes between two ranges up to which one read of both costs less than two reads


class ArchiveTemplate(Template):
    """The content of a torch zip file, and all bytes of it that were read, to compare other files with.

    Checksums and times may differ, and the root: what the names of all entries begin with.

    Args:
        path: the file.
        foreign: globals of its pickle that were not understood.
        archive: the file's, of which all names begin with the root.
        root: with the slash at its end.
    """

    def __init__(self, content: Any, path: Path, foreign: Counter[str], archive: Archive, root: bytes) -> None:
        super().__init__(content, (path,))
        self.foreign = Counter(foreign)
        self._archive = archive
        self._root = root

    def describes(self, file: InputFile, directory: bytes) -> bool:
        """Return True if a file has the same header bytes, ignoring checksums, times and the root.

        Args:
            file: open, of the same length.
            directory: its central directory, from the same offset.
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
            and _read(file, _coalesced((at, len(content)) for at, content in contents))
            == b"".join(content for _, content in contents)
            and all(directory[at : at + _CRC_SIZE] in checksums for at, checksums in self._checksums)
        )

    def _same(self, theirs: bytes, root: bytes, pieces: Sequence[bytes], mask: int) -> bool:
        """Compare, where the mask has ones, with our bytes under another root."""
        ours = root.join(pieces)
        return len(theirs) == len(ours) and not (_number(theirs) ^ _number(ours)) & mask

    def _without_root(self, data: bytes, places: Sequence[int]) -> list[bytes]:
        """Cut our bytes where the root is."""
        ends = [*places, len(data)]
        begins = [0, *(place + len(self._root) for place in places)]
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
        return _coalesced((offset, len(header)) for offset, header in sorted(self._archive.headers.items()))

    @cached_property
    def _checksums(self) -> list[tuple[int, tuple[bytes, bytes]]]:
        """Return where the checksums of the contents are in the directory, and what may be there: 0 stands for none."""
        at = dict(zip(self._archive.entries, self._line_starts, strict=False))
        return [
            (at[name] + _CRC, (zlib.crc32(content).to_bytes(_CRC_SIZE, "little"), bytes(_CRC_SIZE)))
            for name, (_, content) in self._archive.contents.items()
        ]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


_Coalesced = tuple[int, int, list[slice]]  # offset, length, and where the ranges are in it


def _coalesced(ranges: Iterable[tuple[int, int]]) -> list[_Coalesced]:
    """Put ranges, (offset, length) in ascending order, into found of those that are close together."""
    found: list[_Coalesced] = []
    begin = end = -1
    for offset, nbytes in ranges:
        if found and end <= offset <= end + _NEAR and offset + nbytes <= begin + _LONGEST:
            pieces = found.pop()[2]
        else:
            begin, pieces = offset, []
        end = offset + nbytes
        pieces.append(slice(offset - begin, end - begin))
        found.append((begin, end - begin, pieces))
    return found


def _read(file: InputFile, found: Iterable[_Coalesced]) -> bytes:
    """Read ranges of a file, and put them together."""
    found = []
    for offset, length, pieces in found:
        window = file.read(offset, length)
        found += [window] if len(pieces) == 1 else [window[piece] for piece in pieces]
    return b"".join(found)
