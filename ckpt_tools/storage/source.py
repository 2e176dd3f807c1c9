"""Sources: reading inputs, and detecting that an input has changed.

A `Source` is one open file. A `Store` has files and folders: the local file system (`local.py`), or a store registered
for a scheme such as ``s3``. The first component of a path selects its store: ``s3://bucket/run`` is the `Path`
``s3:/bucket/run``, with the first component ``s3:``.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, runtime_checkable

from ..errors import CorruptError, ReadError
from .local import LocalStore, raise_file_limit


@dataclass(frozen=True, slots=True)
class Stamp:
    """The state of a file when its header was read; a different stamp means changed content.

    Attributes:
        path: the file.
        nbytes: its size.
        identity: values that change with the content: device, inode and modification time of a local file, or the
            entity tag of an object.
    """

    path: Path
    nbytes: int
    identity: tuple[object, ...]


class Source(Protocol):
    """One open file. Threads may read from it at the same time."""

    def stat(self) -> tuple[int, tuple[object, ...]]:
        """Return the current (size in bytes, identity); see `Stamp`. May raise OSError."""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill a buffer from an offset.

        Returns:
            The number of bytes read; less than the buffer only at the end of the file.

        Raises:
            OSError: the system cannot read.
        """

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of many small ranges, given as (offset, nbytes); fewer of those beyond the end of the file.

        Raises:
            OSError: the system cannot read.
        """

    def fileno(self) -> int | None:
        """Return a file descriptor, for the C extension and the kernel; None if there is none."""

    def close(self) -> None:
        """Release all resources."""


@runtime_checkable
class InMemory(Source, Protocol):
    """A source that the C extension reads from memory, without a descriptor.

    Attributes:
        address: of an `InMemory` of `csrc/native.h`.
    """

    address: int | None


class Store(Protocol):
    """A file system. All methods may raise OSError."""

    def refresh(self) -> None:
        """Forget what is known of files and folders: a new job begins."""

    def open(self, path: Path) -> Source:
        """Open a file for reading."""

    def is_file(self, path: Path) -> bool:
        """Return True if there is a file of this name."""

    def is_folder(self, path: Path) -> bool:
        """Return True if there is a folder of this name."""

    def names(self, folder: Path) -> list[str]:
        """Return the names of the files and folders in a folder, sorted."""

    def real_path(self, path: Path) -> Path:
        """Return the path with all links resolved."""

    def identity(self, path: Path) -> object:
        """Return a value that is equal for all names of a file or folder: device and inode of a local one."""

    def find(self, pattern: Path) -> list[Path]:
        """Return the paths that match a glob pattern; hidden names do not match."""


LOCAL: Store = LocalStore()
STORES: dict[str, Store] = {}
"""Stores by scheme, such as ``s3``; add an item to register a store."""


def store_of(path: Path) -> Store:
    """Return the store of a path: the local file system, unless its first component is a known scheme and a colon."""
    first = path.parts[0] if STORES and path.parts else ""
    return STORES.get(first[:-1], LOCAL) if first.endswith(":") else LOCAL


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
    """A range of a source as a read-only file object; see `InputFile.as_file`."""

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
            raise OSError("seek before the start of the file")  # like a real file; zipfile relies on it
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
    """An open input: a source, its path and its stamp at opening; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = open_source(path)
        try:
            self.stamp = stamp_of(self.source, path)
        except BaseException:
            self.source.close()
            raise

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes from an offset; fewer than `nbytes` at the end of the file."""
        data = bytearray(max(min(nbytes, self.stamp.nbytes - offset), 0))
        done = read_some(self.source, memoryview(data), offset, self.path)
        return bytes(data if done == len(data) else data[:done])

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of many ranges, given as (offset, nbytes); fewer of those beyond the end of the file."""
        try:
            return self.source.read_ranges(ranges)
        except OSError as error:
            raise read_failed(self.path, error.strerror) from error

    def as_file(self, start: int = 0, length: int | None = None) -> IO[bytes]:
        """Return a range of the file (by default to its end) as a buffered file object."""
        length = self.stamp.nbytes - start if length is None else length
        return io.BufferedReader(RangeReader(self.source, self.path, start, length))

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.close()


def stamp_of(source: Source, path: Path) -> Stamp:
    """Return the stamp of an open source.

    Raises:
        ReadError: its size cannot be read.
    """
    try:
        return Stamp(path, *source.stat())
    except OSError as error:
        raise read_failed(path, error.strerror) from error


class OpenFiles:
    """Inputs shared by all threads; a context manager.

    Either they are all open from the beginning to the end (`open_all`), or each until the last of its expected uses
    (`expect`). Then no more are open than the system allows, unless more are in use at once.

    Args:
        stamps: of files with known headers; a file that differs from its stamp is refused.
    """

    def __init__(self, stamps: Iterable[Stamp] = ()) -> None:
        self._sources: dict[Path, Source] = {}
        self._stamps = {stamp.path: stamp for stamp in stamps}
        self._coming: Counter[Path] = Counter()  # uses that are expected
        self._users: Counter[Path] = Counter()  # at the moment
        self._most: int | None = None  # files that may be open
        self._lock = threading.Lock()

    def open(self, path: Path) -> None:
        """Open a file, if it is not open yet.

        Raises:
            ReadError: it cannot be opened.
            CorruptError: it has changed since its header was read.
        """
        if path in self._sources:
            return
        if self._most is not None and len(self._sources) >= self._most:
            idle = next((each for each in self._sources if not self._users[each]), None)
            if idle is not None:
                self._close(idle)
        source = self._sources[path] = open_source(path)
        now = stamp_of(source, path)
        self._check(now, self._stamps.setdefault(path, now))

    def open_all(self, paths: Iterable[Path]) -> None:
        """Open files, and raise the limit of open files for them if the system allows it."""
        # By identity first: hashing a path takes longer.
        unique = dict.fromkeys({id(path): path for path in paths}.values())
        raise_file_limit(len(unique))
        for path in unique:
            self.open(path)

    def expect(self, paths: Iterable[Path]) -> None:
        """Expect a use of these files, see `used`; in the order of the uses."""
        self._coming.update(paths)

    def open_expected(self) -> None:
        """Open the files that are expected, or the first ones if there are more than the system allows.

        An open file can be read to its end though its name goes meanwhile.

        Raises:
            ReadError, CorruptError: see `open`.
        """
        self._most = raise_file_limit(len(self._coming))
        for path in islice(self._coming, self._most):
            self.open(path)

    @contextmanager
    def using(self, paths: Iterable[Path]) -> Iterator[None]:
        """Keep files open.

        Raises:
            ReadError, CorruptError: see `open`.
        """
        held = []
        try:
            with self._lock:
                for path in paths:
                    self.open(path)
                    self._users[path] += 1
                    held.append(path)
            yield
        finally:
            with self._lock:
                for path in held:
                    self._users[path] -= 1
                    self._settle(path)

    def used(self, paths: Iterable[Path]) -> None:
        """Take note of an expected use; a file is closed after its last one.

        Raises:
            CorruptError: a file that is closed has changed since its header was read.
        """
        with self._lock:
            for path in paths:
                self._coming[path] -= 1
                self._settle(path)

    def _settle(self, path: Path) -> None:
        if not self._coming[path] and not self._users[path] and path in self._sources:
            self._close(path)

    def _close(self, path: Path) -> None:
        source = self._sources.pop(path)
        try:
            self._check(stamp_of(source, path), self._stamps[path])
        finally:
            source.close()

    def __getitem__(self, path: Path) -> Source:
        return self._sources[path]

    def items(self) -> list[tuple[Path, Source]]:
        """Return the open files."""
        return [*self._sources.items()]

    def substitute(self, path: Path, source: Source) -> None:
        """Read an open file from another source, which closes the first one."""
        self._sources[path] = source

    def known_to_c(self, paths: Iterable[Path]) -> bool:
        """Return True if the C extension can read each of these open files."""
        return all([self._handle(path) is not None for path in paths])

    def handle(self, path: Path) -> int:
        """Return what the C extension knows an open file by: its descriptor, or minus an address in memory."""
        found = self._handle(path)
        if found is None:
            raise ValueError(f"{path} has neither descriptor nor address")
        return found

    def _handle(self, path: Path) -> int | None:
        source = self._sources[path]
        fd = source.fileno()
        if fd is None and isinstance(source, InMemory) and source.address is not None:
            return -source.address
        return fd

    def check_unchanged(self) -> None:
        """Check that no file has changed since its header was read.

        Raises:
            CorruptError: a file has another size or identity.
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
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for source in self._sources.values():
            source.close()
        self._sources.clear()


def read_some(source: Source, target: memoryview, offset: int, path: Path) -> int:
    """Fill a buffer from an offset, up to the end of the file; return the number of bytes read.

    Raises:
        ReadError: the system cannot read.
    """
    try:
        return source.read_into(offset, target)
    except OSError as error:
        raise read_failed(path, error.strerror) from error


def read_at(source: Source, target: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from an offset.

    Raises:
        ReadError: the system cannot read.
        CorruptError: the file ends too early.
    """
    if read_some(source, target, offset, path) != len(target):
        raise ended_early(path)


def read_file(path: Path) -> tuple[bytes, Stamp]:
    """Return the content and the stamp of a small file.

    Raises:
        ReadError: it cannot be read.
    """
    with InputFile(path) as file:
        return file.read(0, file.stamp.nbytes), file.stamp


def sha256(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits.

    Args:
        on_read: called with the bytes of each block.

    Raises:
        ReadError: it cannot be read.
    """
    digest, block, at = hashlib.sha256(), bytearray(1 << 20), 0
    with InputFile(path) as file:
        while got := read_some(file.source, memoryview(block), at, path):
            digest.update(memoryview(block)[:got])
            at += got
            if on_read is not None:
                on_read(got)
    return digest.hexdigest()


def stamp_at(path: Path) -> Stamp:
    """Return the stamp of the file at a path.

    Raises:
        ReadError: it cannot be opened.
    """
    with InputFile(path) as file:
        return file.stamp


def read_failed(path: object, reason: str | None) -> ReadError:
    """Return the error for an input that the system cannot read."""
    return ReadError(f"{path}: reading failed ({reason}).")


def ended_early(path: object) -> CorruptError:
    """Return the error for an input that is shorter than its header declares."""
    return CorruptError(f"{path}: ends before its tensors do. Get a fresh copy.")
