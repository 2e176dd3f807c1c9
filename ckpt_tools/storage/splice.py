"""Splicing: copies with edits. A new file consists of new bytes and spans of an old file.

The kernel copies the spans if it can. File systems that share blocks between files (btrfs, XFS) then copy no data,
provided that the offsets within a block stay the same.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptError, WriteError
from .source import Source, read_some
from .staged import reserve, write_at

BLOCK = 4096
"""Bytes; spans move by a multiple of it."""
_AT_ONCE = 64 << 20  # bytes per call; signals are handled and progress is shown between calls
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of the old file."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Splice:
    """A new file made from an old one.

    Attributes:
        source: the old file.
        pieces: the content of the new file, in order: new bytes, and spans of the old file.
    """

    source: Path
    pieces: tuple[bytes | Span, ...]

    def cut(self, size: int) -> Splice:
        """Return the same with spans of so many bytes at most."""

        def cut() -> Iterator[bytes | Span]:
            for piece in self.pieces:
                if isinstance(piece, Span):
                    for start in range(piece.start, piece.stop, size):
                        yield Span(start, min(start + size, piece.stop))
                else:
                    yield piece

        return Splice(self.source, tuple(cut()))

    @property
    def size(self) -> int:
        """Size of the new file, in bytes."""
        return sum(map(len, self.pieces))

    @property
    def copied(self) -> int:
        """Bytes of it that are of the old file."""
        return sum(len(piece) for piece in self.pieces if isinstance(piece, Span))


def whole_blocks(grown: int) -> int:
    """Return the distance, in bytes of whole blocks, by which to move what is behind a growth of `grown` bytes."""
    return -(-grown // BLOCK) * BLOCK


def write(
    splice: Splice,
    source: Source,
    target: int,
    on_bytes: Callable[[int], None] = lambda _: None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Write the new file.

    Args:
        source: the old file.
        target: descriptor of the new file, which has its final size and no data.
        on_bytes: called with the number of bytes just copied.
        around: entered for each span while it is copied.

    Raises:
        CorruptError: the old file ends too early.
        ReadError, WriteError: the system refuses.
    """
    name = _called(splice.source)
    position = 0
    for piece in splice.pieces:
        if isinstance(piece, Span):
            with around():
                for span in _without_holes(source, piece):
                    at = position + span.start - piece.start
                    reserve(target, at, len(span), name)
                    copy(splice.source, source, span, target, at, on_bytes)
        else:
            write_at(target, memoryview(piece), position, name)
        position += len(piece)


def _without_holes(source: Source, span: Span) -> Iterator[Span]:
    """Yield the parts of a span with data, so that holes of a sparse file stay holes."""
    fd = source.fileno()
    if fd is None or not hasattr(os, "SEEK_DATA"):
        yield span
        return
    stat = os.fstat(fd)
    if stat.st_blocks * 512 >= stat.st_size:  # not sparse: some file systems report holes in new files wrongly
        yield span
        return
    position = span.start
    while position < span.stop:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            position = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # no data up to the end
                yield Span(position, span.stop)
            return
        if start < span.stop:
            yield Span(start, min(position, span.stop))


def _write_out(fd: int, position: int, count: int) -> None:
    """Start writing the last bytes to the disk while the next are copied."""
    with suppress(AttributeError, OSError):
        os.posix_fadvise(fd, position, count, os.POSIX_FADV_DONTNEED)


_NOT_BY_KERNEL = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


def copy(path: Path, source: Source, span: Span, target: int, position: int, on_bytes: Callable[[int], None]) -> None:
    """Copy bytes of an open file, by the kernel if it can.

    Args:
        path, source: the old file.
        target, position: descriptor of the new file, and offset of the bytes in it.
        on_bytes: called with the number of bytes just copied.

    Raises:
        CorruptError: the old file ends too early.
        ReadError, WriteError: the system refuses.
    """
    start = span.start
    fd = source.fileno() if hasattr(os, "copy_file_range") else None
    while start < span.stop:
        # The first call ends at a block boundary, so that later calls can share blocks.
        count = min(span.stop - start, _AT_ONCE - start % BLOCK)
        done = 0
        if fd is not None:
            try:
                done = os.copy_file_range(fd, target, count, start, position)
            except OSError as error:
                if error.errno not in _NOT_BY_KERNEL:
                    raise WriteError(
                        f"copying {path} failed ({error.strerror}). Nothing was left at the target."
                    ) from error
        if not done:  # some file systems return 0 instead of an error
            fd = None
            done = _copy_through(path, source, start, min(count, _BUFFER), target, position)
        _write_out(target, position, done)
        start += done
        position += done
        on_bytes(done)


def _copy_through(path: Path, source: Source, start: int, count: int, target: int, position: int) -> int:
    block = memoryview(bytearray(count))
    done = read_some(source, block, start, path)
    if not done:
        raise CorruptError(f"{path}: is shorter than its header declares. Get a fresh copy.")
    write_at(target, block[:done], position, _called(path))
    return done


def _called(source: Path) -> str:
    """Name the new file in messages; it has no final name yet."""
    return f"the copy of {source}"
