"""Copies: checkpoints with the same weights under several names, of which one counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints.layouts import select
from ..checkpoints.optimizers import looks_like_training_state
from ..checkpoints.prefixes import renamed, unwrap
from ..checkpoints.steps import stored_counters
from ..errors import AlignmentError, LayoutError, ReadError
from ..formats.header import Header
from ..formats.tree import tensors_in
from ..storage.source import OpenFiles, read_at
from ..tensors import Tensor, TensorSpec, in_c_order
from .numbered import lined_up_first, without_numbers
from .paths import keep_one


def without_copies(headers: Sequence[Header], notes: list[str]) -> list[Header]:
    """Drop copies: checkpoints with the same weights at the same step, whatever their layout and other entries.

    Names that differ only in numbers belong to different checkpoints, whatever the weights.
    """
    groups = [list(headers)]
    # Each comparison costs more than the one before, and is limited to headers that were equal so far.
    for look in (_outlines, _middles, _values):
        groups = [subgroup for group in groups for subgroup in _split(group, look)]
    key = lined_up_first(header.path for header in headers)
    copies: set[Header] = set()
    for group in groups:
        if not _may_hold_copies(group):
            continue
        same = sorted(group, key=lambda header: key(header.path))
        while same:
            first, *rest = same
            others = [each for each in rest if _is_copy(each, first)]
            keep_one([header.path for header in (first, *others)], "again (the same weights)", notes)
            copies.update(others)
            same = [each for each in rest if each not in others]
    return [header for header in headers if header not in copies]


def _is_copy(header: Header, other: Header) -> bool:
    """Tell a copy from another checkpoint with the same weights; weights alone are of any step."""
    if without_numbers(header.path) == without_numbers(other.path):
        return False
    a, b = stored_counters(header), stored_counters(other)
    return all(a[key] == b[key] for key in a.keys() & b)


def _may_hold_copies(headers: list[Header]) -> bool:
    return len({without_numbers(header.path) for header in headers}) > 1


def _split(headers: list[Header], look: Callable[[Header], object]) -> list[list[Header]]:
    if not _may_hold_copies(headers):
        return [headers]
    groups: dict[object, list[Header]] = {}
    for header in headers:
        try:
            groups.setdefault(look(header), []).append(header)
        except OSError as error:
            raise ReadError(f"{header.path}: cannot be read ({error.strerror}).") from error
    return list(groups.values())


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor, or a chunk of one: its name, what of it has to be equal in a copy, and where its bytes are.

    Attributes:
        chunks: its bytes one behind another, whoever cut them.
    """

    name: tuple[Any, ...]
    outline: tuple[object, ...]
    chunks: tuple[TensorSpec, ...]

    @property
    def extent(self) -> int:
        return sum(chunk.extent for chunk in self.chunks)


def _weights(header: Header) -> list[_Stored]:
    """List the weights; if no layout tells them, all but the training state."""
    if header.ranks:
        own = ((name, each) for name, rank in header.ranks.items() for each in _weights(rank))
        return [replace(each, name=(name, *each.name)) for name, each in own]
    tree = header.tree if isinstance(header.tree, dict) else {}
    found: Iterable[tuple[tuple[Any, ...], Tensor]]
    try:
        tensors = select(header).tensors
        found = (((name,), spec) for name, spec in renamed(tensors, unwrap(tensors)).items())
    except (AlignmentError, LayoutError):
        found = (
            (path, spec)
            for path, spec in tensors_in(header.tree)
            if not (len(path) > 1 and path[0] in tree and looks_like_training_state(path[0], tree[path[0]]))
        )
    return [stored for path, spec in found if isinstance(spec, TensorSpec) for stored in _stored(path, spec)]


def _stored(path: tuple[Any, ...], spec: TensorSpec) -> Iterator[_Stored]:
    """Yield a tensor whole if its chunks are in C order one behind another, and else chunk by chunk."""
    order = spec.storage.big_endian
    if in_c_order(spec):
        chunks = tuple(chunk for _, chunk in spec.as_chunks)
        yield _Stored(path, (spec.dtype.name, spec.shape, spec.stride, order), chunks)
        return
    for index, chunk in spec.as_chunks:
        yield _Stored((*path, *index), (chunk.dtype.name, chunk.shape, chunk.stride, order), (chunk,))


def _outlines(header: Header) -> object:
    """Compare names, dtypes and shapes; no payload is read."""
    return frozenset((each.name, each.outline) for each in _weights(header))


def _middles(header: Header) -> object:
    """Compare 64 bytes of each tensor: at least one tensor changes between checkpoints."""
    with OpenFiles() as files:
        middles = ((each.name, _blocks(files, each, each.extent // 2, 64)) for each in _weights(header))
        return frozenset((name, b"".join(blocks)) for name, blocks in middles)


def _values(header: Header) -> object:
    """Compare all bytes."""
    digests: dict[tuple[TensorSpec, ...], bytes] = {}
    found = set()
    with OpenFiles() as files:
        for each in _weights(header):
            if each.chunks not in digests:
                digest = hashlib.sha256()
                for block in _blocks(files, each, 0, each.extent):
                    digest.update(block)
                digests[each.chunks] = digest.digest()
            found.add((each.name, digests[each.chunks]))
    return frozenset(found)


def _blocks(files: OpenFiles, stored: _Stored, start: int, nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a tensor from `start` (relative to its first element) in blocks of a megabyte."""
    stop = start + nbytes
    for chunk in stored.chunks:
        path, end = chunk.storage.path, min(stop, chunk.extent)
        files.open(path)
        at = max(start, 0)
        while at < end:
            block = memoryview(bytearray(min(end - at, 1 << 20)))
            read_at(files[path], block, chunk.begin + at, path)
            yield block
            at += len(block)
        start, stop = start - chunk.extent, stop - chunk.extent
