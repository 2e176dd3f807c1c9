"""Twins: files of a series whose headers are the same but for checksums, so that one is parsed for all."""

from __future__ import annotations

import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

from ..tensors import TensorSpec, UnsupportedTensor
from .pickle_read import SealedDict
from .tree import map_tree
from .zip_records import CENTRAL, LOCAL, Archive

_ATOMS = {type(None), bool, int, float, complex, str, bytes, UnsupportedTensor}
_CONTAINERS = {dict, SealedDict, OrderedDict, list, tuple}
_WINDOW = 1 << 16  # bytes that are read at once, at most
_DENSE = 1 << 10  # bytes between two headers that cost less to read than another call does
# Offsets in a line of the directory: of the times, of the checksum behind them, and of the sizes behind that.
_TIME, _CRC, _SIZES = 12, 16, 20
_LENGTHS = 4  # bytes at the end of a local header: of the name, and of what stands between it and the content
_CRC_SIZE = _SIZES - _CRC
_MARK = 4  # bytes at the start of either


class Unmovable(Exception):
    """A tree with objects in it that are not known to be copied by copying what they hold."""


def moved(tree: Any, path: Path) -> Any:
    """Copy a tree whose tensors stand at the same places of another file; the copy shares nothing that can change.

    Raises:
        Unmovable: it holds more than dicts, lists, tuples and plain values.
    """

    def relocated(where: list[Any], node: Any) -> Any:
        if where and type(where[-1]) not in _ATOMS:
            raise Unmovable
        kind = type(node)
        if kind is TensorSpec:
            return node.moved(path)
        if kind in _ATOMS:
            return node
        if kind not in _CONTAINERS:
            raise Unmovable
        return NotImplemented

    try:
        return map_tree(tree, relocated)
    except RecursionError as error:
        raise Unmovable from error


@dataclass(frozen=True, eq=False)
class Known:
    """A torch zip file that has been read, for those after it.

    Attributes:
        archive: its records, in a directory as torch writes it.
        root: what their names begin with, and a slash.
        tree, foreign: what its pickle holds.
    """

    archive: Archive
    root: bytes
    tree: Any
    foreign: Counter[str]

    def describes(self, file: IO[bytes], directory: bytes) -> bool:
        """Return whether all that was read of this file stands in another one, too, where the names begin otherwise.

        Args:
            file: the other, open for reading, of the same length.
            directory: of it, from the same place.
        """
        root = directory[CENTRAL.size : CENTRAL.size + len(self.root)]
        return (
            root.endswith(b"/")
            and root.isascii()
            and root.count(b"/") == 1
            and not {*b"\0\\"} & {*root}
            and self._alike(directory, root, *self._directory)
            and self._alike(_read(file, self._head_windows), root, *self._heads)
            and _read(file, self._content_windows) == b"".join(self.archive.contents.values())
            and all(directory[at : at + _CRC_SIZE] in checksums for at, checksums in self._checksums)
        )

    def _alike(self, theirs: bytes, root: bytes, pieces: Sequence[bytes], mask: int) -> bool:
        """Compare with what ours would be with another root, put only where names begin."""
        ours = root.join(pieces)
        return len(theirs) == len(ours) and not (_number(theirs) ^ _number(ours)) & mask

    @cached_property
    def _directory(self) -> tuple[list[bytes], int]:
        """Return its lines, cut where the root stands, and which bits count: not those of times and checksums."""
        line = b"\xff" * _TIME + bytes(_SIZES - _TIME) + b"\xff" * (CENTRAL.size - _SIZES)
        mask = b"".join(line + b"\xff" * len(record.name) for record in self.archive.records.values())
        lengths = [CENTRAL.size + len(record.name) for record in self.archive.records.values()]
        begins = [*accumulate(lengths, initial=0)][:-1]
        return self._without_root(self.archive.directory, [at + CENTRAL.size for at in begins]), _number(mask)

    def _without_root(self, data: bytes, places: Sequence[int]) -> list[bytes]:
        ends = [*places, len(data)]
        begins = [0, *(place + len(self.root) for place in places)]
        return [data[begin:end] for begin, end in zip(begins, ends, strict=True)]

    @cached_property
    def _heads(self) -> tuple[list[bytes], int]:
        """Return its local headers, cut likewise, and which bits count: of signature, the two lengths and the name."""
        heads = [head for _, head in sorted(self.archive.heads.items())]
        line = b"\xff" * _MARK + bytes(LOCAL.size - _MARK - _LENGTHS) + b"\xff" * _LENGTHS
        mask = b"".join(line + b"\xff" * (len(head) - LOCAL.size) for head in heads)
        begins = [*accumulate(map(len, heads), initial=0)][:-1]
        return self._without_root(b"".join(heads), [at + LOCAL.size for at in begins]), _number(mask)

    @cached_property
    def _head_windows(self) -> list[_Window]:
        return _windows((offset, len(head)) for offset, head in sorted(self.archive.heads.items()))

    @cached_property
    def _content_windows(self) -> list[_Window]:
        return _windows((offset, len(content)) for (_, offset), content in self.archive.contents.items())

    @cached_property
    def _checksums(self) -> list[tuple[int, tuple[bytes, bytes]]]:
        """Return where those of the contents stand in the directory, and what may stand there: none is 0."""
        lines = accumulate((CENTRAL.size + len(record.name) for record in self.archive.records.values()), initial=0)
        at = dict(zip(self.archive.records, lines, strict=False))
        return [
            (at[name] + _CRC, (zlib.crc32(content).to_bytes(_CRC_SIZE, "little"), bytes(_CRC_SIZE)))
            for (name, _), content in self.archive.contents.items()
        ]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


_Window = tuple[int, int, list[slice]]  # offset, length, and where the pieces are in it


def _windows(places: Iterable[tuple[int, int]]) -> list[_Window]:
    """Put pieces, (offset, length) in ascending order, together that stand so close that one read brings them all."""
    windows: list[_Window] = []
    begin = end = -1
    for offset, nbytes in places:
        if windows and end <= offset <= end + _DENSE and offset + nbytes <= begin + _WINDOW:
            pieces = windows.pop()[2]
        else:
            begin, pieces = offset, []
        end = offset + nbytes
        pieces.append(slice(offset - begin, end - begin))
        windows.append((begin, end - begin, pieces))
    return windows


def _read(file: IO[bytes], windows: Iterable[_Window]) -> bytes:
    """Read pieces of a file, and put them together."""
    fd = file.fileno()
    found = []
    for offset, length, pieces in windows:
        window = os.pread(fd, length, offset)
        if len(pieces) == 1:
            found.append(window)
        else:
            found += [window[piece] for piece in pieces]
    return b"".join(found)


KNOWN: WeakValueDictionary[tuple[int, int], Known] = WeakValueDictionary()
"""By the length of the file and where its directory begins; as long as a header of such a file is in use."""
