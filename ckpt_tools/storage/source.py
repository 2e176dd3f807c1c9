"""Sources: where the bytes of inputs come from, and what tells that an input has changed.

A `Source` is one file that can be read at any offset. A `Store` is a place that has files and folders: the local file
system (`local.py`), or one that is registered for a scheme such as ``s3``. A path belongs to a store by its first
part: ``s3://bucket/run`` is the `Path` ``s3:/bucket/run``, whose first part is ``s3:``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

from ..errors import CorruptError, ReadError
from .local import LocalStore, raise_file_limit


@dataclass(frozen=True, slots=True)
class Stamp:
    """The state of a file when its header was read; a stamp of the same path that differs means other content.

    Attributes:
        path: the file.
        nbytes: its size.
        identity: what changes with the content: device, inode and time of modification of a local file, or the
            entity tag of an object.
    """

    path: Path
    nbytes: int
    identity: tuple[object, ...]


class Source(Protocol):
    """One open file. Threads may read from it at the same time."""

    def stat(self) -> tuple[int, tuple[object, ...]]:
        """Return (size in bytes, identity) as they are now; see `Stamp`.

        Raises:
            OSError: the system cannot tell.
        """

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill a buffer with the bytes from an offset on.

        Returns:
            Bytes read; fewer than asked for only where the file ends.

        Raises:
            OSError: the system cannot read.
        """

    def fileno(self) -> int | None:
        """Return a descriptor for `pread`, which the C extension and the kernel read from; None if there is none."""

    def close(self) -> None:
        """Give up what the source holds."""


class Store(Protocol):
    """A place that has files and folders. All methods may raise OSError."""

    def open(self, path: Path) -> Source:
        """Open a file for reading."""

    def is_file(self, path: Path) -> bool:
        """Return True if there is a file of this name."""

    def is_folder(self, path: Path) -> bool:
        """Return True if there is a folder of this name."""

    def names(self, folder: Path) -> list[str]:
        """Return the names of the files and folders in a folder, sorted."""

    def real_path(self, path: Path) -> Path:
        """Return the path that links lead to; the path itself where there are no links."""

    def identity(self, path: Path) -> object:
        """Return what two names of one file, or of one folder, have in common: device and inode of a local one."""

    def find(self, pattern: Path) -> list[Path]:
        """Return what matches a glob pattern; hidden names do not."""


LOCAL: Store = LocalStore()
STORES: dict[str, Store] = {}
"""Stores by scheme, such as ``s3``; add one to read from it."""


def store_of(path: Path) -> Store:
    """Return the store that a path belongs to: the local file system unless its first part is a known scheme."""
    return STORES.get(path.parts[0][:-1], LOCAL) if STORES and path.parts else LOCAL


def open_source(path: Path) -> Source:
    """Open a file of any store.

    Raises:
        ReadError: it cannot be opened.
    """
    try:
        return store_of(path).open(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise ReadError(f"{path}: no such file." if missing else _cannot_open(path, error)) from error
    except ValueError as error:  # a NUL byte
        raise ReadError(f"{str(path)!r}: is not a path ({error}).") from error


def _cannot_open(path: Path, error: OSError) -> str:
    import errno

    advice = ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        advice = " Allow more open files (ulimit -n), or give fewer checkpoints at a time."
    return f"{path}: cannot be read ({error.strerror or error}).{advice}"


class RangeReader(io.RawIOBase):
    """A range of a source as a read-only file object, for libraries that want one; see `as_file`."""

    def __init__(self, source: Source, path: Path, start: int, length: int) -> None:
        self._source, self._path, self._start, self._length = source, path, start, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise OSError("seek before the start of the file")  # as a real file does; zipfile relies on it
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), max(self._length - self._at, 0))
        done = read_some(self._source, memoryview(buffer)[:count], self._start + self._at, self._path)
        self._at += done
        return done


class InputFile:
    """One open input: a source, its path and the stamp that was taken when it was opened; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = open_source(path)
        try:
            self.stamp = stamp_of(self.source, path)
        except BaseException:
            self.source.close()
            raise

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return the bytes from an offset on; fewer where the file ends."""
        data = bytearray(max(min(nbytes, self.stamp.nbytes - offset), 0))
        done = read_some(self.source, memoryview(data), offset, self.path)
        return bytes(data if done == len(data) else data[:done])

    def as_file(self, start: int = 0, length: int | None = None) -> IO[bytes]:
        """Return a range of the file, to its end by default, as a buffered file object."""
        length = self.stamp.nbytes - start if length is None else length
        return io.BufferedReader(RangeReader(self.source, self.path, start, length))

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.close()


def stamp_of(source: Source, path: Path) -> Stamp:
    """Return the stamp of an open source.

    Raises:
        ReadError: the system cannot tell its size.
    """
    try:
        return Stamp(path, *source.stat())
    except OSError as error:
        raise read_failed(path, error.strerror) from error


class OpenFiles:
    """Inputs that are opened once and shared by all threads; a context manager.

    Args:
        stamps: of files whose headers have been read; a file that differs from its stamp is refused.
    """

    def __init__(self, stamps: Iterable[Stamp] = ()) -> None:
        self._sources: dict[Path, Source] = {}
        self._stamps = {stamp.path: stamp for stamp in stamps}

    def open(self, path: Path) -> None:
        """Open a file, if it is not open yet.

        Raises:
            ReadError: it cannot be opened.
            CorruptError: it is not the file whose header was read.
        """
        if path in self._sources:
            return
        source = self._sources[path] = open_source(path)
        now = stamp_of(source, path)
        self._check(now, self._stamps.setdefault(path, now))

    def open_all(self, paths: Iterable[Path]) -> None:
        """Open all these files, and raise the limit of open files for them where the system allows it."""
        # By identity first, because hashing a path takes longer.
        unique = dict.fromkeys({id(path): path for path in paths}.values())
        raise_file_limit(len(unique))
        for path in unique:
            self.open(path)

    def __getitem__(self, path: Path) -> Source:
        return self._sources[path]

    @property
    def have_descriptors(self) -> bool:
        """True if every open file has a descriptor; see `Source.fileno`."""
        return all(source.fileno() is not None for source in self._sources.values())

    def descriptor(self, path: Path) -> int:
        """Return the descriptor of an open file that has one."""
        fd = self._sources[path].fileno()
        if fd is None:
            raise ValueError(f"{path} has no descriptor")
        return fd

    def check_unchanged(self) -> None:
        """Refuse a result made from files that were written to meanwhile.

        Raises:
            CorruptError: size or modification time of a file has changed since its header was read.
        """
        for path, source in self._sources.items():
            self._check(stamp_of(source, path), self._stamps[path])

    def _check(self, now: Stamp, then: Stamp) -> None:
        if now != then:
            raise CorruptError(
                f"{then.path}: changed while it was read. Wait until training has finished writing, then try again."
            )

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for source in self._sources.values():
            source.close()
        self._sources.clear()


def read_some(source: Source, target: memoryview, offset: int, path: Path) -> int:
    """Fill a buffer with the bytes from an offset on, as far as the file goes; return how many there were.

    Raises:
        ReadError: a failure of the system.
    """
    try:
        return source.read_into(offset, target)
    except OSError as error:
        raise read_failed(path, error.strerror) from error


def read_at(source: Source, target: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer with the bytes from an offset on.

    Raises:
        ReadError: a failure of the system.
        CorruptError: the file ends before them.
    """
    if read_some(source, target, offset, path) != len(target):
        raise ended_early(path)


def read_file(path: Path) -> tuple[bytes, Stamp]:
    """Return the content of a small file, and its stamp.

    Raises:
        ReadError: it cannot be read.
    """
    with InputFile(path) as file:
        return file.read(0, file.stamp.nbytes), file.stamp


def sha256(path: Path) -> str:
    """Read a whole file and return its SHA-256, in hexadecimal digits.

    Raises:
        ReadError: it cannot be read.
    """
    digest, block, at = hashlib.sha256(), bytearray(1 << 20), 0
    with InputFile(path) as file:
        while got := read_some(file.source, memoryview(block), at, path):
            digest.update(memoryview(block)[:got])
            at += got
    return digest.hexdigest()


def stamp_at(path: Path) -> Stamp:
    """Return the stamp of the file at a path.

    Raises:
        ReadError: it cannot be opened.
    """
    with InputFile(path) as file:
        return file.stamp


def read_failed(path: object, reason: str | None) -> ReadError:
    """Make the error for an input that the system cannot read."""
    return ReadError(f"{path}: reading failed ({reason}).")


def ended_early(path: object) -> CorruptError:
    """Make the error for an input that is shorter than its header says."""
    return CorruptError(f"{path}: ends before its tensors do. Get a fresh copy.")
