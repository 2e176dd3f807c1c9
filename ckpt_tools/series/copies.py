"""Copies: checkpoints with the same weights under several names, of which one counts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from ..checkpoints.layouts import select
from ..checkpoints.optimizers import looks_like_training_state
from ..checkpoints.prefixes import renamed, unwrap
from ..checkpoints.steps import stored_counters
from ..compute.progress import Activity, Progress, counted
from ..compute.threads import HandedOut, in_threads
from ..errors import AlignmentError, LayoutError, ReadError
from ..formats.header import Header
from ..formats.tree import tensors_in
from ..storage.source import OpenFiles, ended_early, read_at
from ..tensors import Tensor, TensorSpec, in_c_order
from .numbered import lined_up_first, without_numbers
from .paths import keep_one


def without_copies(
    headers: Sequence[Header], notes: list[str], *, compare: bool = True, on_progress: Progress | None = None
) -> list[Header]:
    """Drop copies: checkpoints with the same weights at the same step, whatever their layout and other entries.

    Names that differ only in numbers belong to different checkpoints, whatever the weights.

    Args:
        notes: receives decisions to report.
        compare: all bytes of suspected copies. Otherwise a few bytes of each tensor decide, and a note says so.
        on_progress: called with (what is done, bytes read, bytes to read at most) while all bytes are compared.
    """
    groups = [list(headers)]
    # Each comparison costs more than the one before, and is limited to headers that were equal so far.
    for look in (_outlines, _middles):
        groups = [subgroup for group in groups for subgroup in _split(group, look)]
    if compare:
        groups = [subgroup for group in groups for subgroup in _split_by_values(group, on_progress)]
    key = lined_up_first(header.path for header in headers)
    copies: set[Header] = set()
    for group in groups:
        if not _may_hold_copies(group):
            continue
        same = sorted(group, key=lambda header: key(header.path))
        while same:
            first, *rest = same
            others = [each for each in rest if _is_copy(each, first)]
            what = "again (the same weights)" if compare else f"again, as {_LOOKED_AT} bytes of each tensor say"
            keep_one([header.path for header in (first, *others)], what, notes)
            copies.update(others)
            same = [each for each in rest if each not in others]
    return [header for header in headers if header not in copies]


_LOOKED_AT = 64
_BLOCK = 1 << 20
_COMPARING = Activity("comparing copies")


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
        with _reading(header):
            groups.setdefault(look(header), []).append(header)
    return list(groups.values())


def _split_by_values(headers: list[Header], on_progress: Progress | None) -> list[list[Header]]:
    """Group headers by all bytes of their weights; each is compared with the first of a group until they differ."""
    if not _may_hold_copies(headers):
        return [headers]
    groups: list[list[Header]] = []
    for header in headers:
        with _reading(header):
            group = next((each for each in groups if _have_same_values(each[0], header, on_progress)), None)
        if group is None:
            groups.append(group := [])
        group.append(header)
    return groups


@contextmanager
def _reading(header: Header) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReadError(f"{header.path}: cannot be read ({error.strerror}).") from error


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
    """Compare a few bytes of each tensor: at least one tensor changes between checkpoints."""
    weights = _weights(header)
    ranges = [_ranges(each.chunks, each.extent // 2, min(_LOOKED_AT, each.extent)) for each in weights]
    of_file: dict[Path, list[tuple[int, int]]] = {}
    for path, offset, nbytes in chain.from_iterable(ranges):
        of_file.setdefault(path, []).append((offset, nbytes))
    read: dict[tuple[Path, int, int], bytes] = {}
    with OpenFiles() as files:
        files.open_all(of_file)
        for path, own in of_file.items():  # all of a file at once: each may be a request
            for (offset, nbytes), data in zip(own, files[path].read_ranges(own), strict=True):
                if len(data) != nbytes:
                    raise ended_early(path)
                read[path, offset, nbytes] = data
    return frozenset(
        (each.name, b"".join([read[part] for part in own])) for each, own in zip(weights, ranges, strict=True)
    )


def _have_same_values(header: Header, other: Header, on_progress: Progress | None) -> bool:
    """Compare all bytes of weights with equal outlines, block by block in several threads, up to a difference."""
    ours = {each.name: each.chunks for each in _weights(header)}
    # Tied tensors once.
    pairs = dict.fromkeys((ours[each.name], each.chunks) for each in _weights(other))
    stop = threading.Event()
    waiting = HandedOut(pairs, stop)
    differing: list[bool] = []
    blocks: list[int] = []  # sizes of those that were read; threads add to it
    tell = counted(on_progress, _COMPARING, 2 * sum(chunk.extent for a, _ in pairs for chunk in a))

    def work() -> None:
        for a, b in waiting:
            extent = sum(chunk.extent for chunk in a)
            for start in range(0, extent, _BLOCK):
                nbytes = min(_BLOCK, extent - start)
                if stop.is_set():
                    return
                blocks.append(2 * nbytes)
                if _read(files, a, start, nbytes) != _read(files, b, start, nbytes):
                    differing.append(True)
                    stop.set()
                    return

    with OpenFiles() as files:
        files.open_all(chunk.storage.path for pair in pairs for chunks in pair for chunk in chunks)
        in_threads(work, None, stop, on_tick=None if tell is None else lambda: tell(sum(blocks)))
    if on_progress is not None and differing:
        on_progress(_COMPARING, sum(blocks), sum(blocks))  # nothing else has to be read
    return not differing


def _read(files: OpenFiles, chunks: Sequence[TensorSpec], start: int, nbytes: int) -> bytearray:
    """Return bytes of a tensor from `start`, relative to its first element."""
    found = bytearray(nbytes)
    done = 0
    for path, offset, size in _ranges(chunks, start, nbytes):
        read_at(files[path], memoryview(found)[done : done + size], offset, path)
        done += size
    return found


def _ranges(chunks: Sequence[TensorSpec], start: int, nbytes: int) -> list[tuple[Path, int, int]]:
    """Return where bytes of a tensor are, up to its end: (file, offset, length) of each part."""
    found = []
    for chunk in chunks:
        size = min(nbytes, chunk.extent - start)
        if size > 0:
            found.append((chunk.storage.path, chunk.begin + start, size))
            nbytes -= size
        start = max(start - chunk.extent, 0)
    return found
