"""The local file system as a store, with fallbacks for systems other than Linux.

Older calls replace those that a system lacks (preadv, pread, pwrite: Windows; copy_file_range, fallocate: macOS and
Windows); the bytes are the same.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

_SEEKING = threading.Lock()
"""Held between a seek and its read or write, because all threads share the file position."""

_SPARE = 64  # open files for other things than inputs

# A pipe would wait for a writer without O_NONBLOCK.
_READING = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_BINARY", "O_NONBLOCK"))


class LocalFile:
    """A file of the local file system, open for reading."""

    __slots__ = ("_fd",)

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, _READING)
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            self.close()
            raise OSError(errno.EINVAL, "it is no regular file", str(path))

    def stat(self) -> tuple[int, tuple[object, ...]]:
        now = os.fstat(self._fd)
        return now.st_size, (now.st_dev, now.st_ino, now.st_mtime_ns)

    def read_into(self, offset: int, view: memoryview) -> int:
        done = got = read_once(self._fd, view, offset)
        while got and done < len(view):
            got = read_once(self._fd, view[done:], offset + done)
            done += got
        return done

    def fileno(self) -> int | None:
        return self._fd

    def close(self) -> None:
        with suppress(OSError):  # it has been read, and nothing can be lost
            os.close(self._fd)


class LocalStore:
    """The local file system."""

    def open(self, path: Path) -> LocalFile:
        return LocalFile(path)

    def is_file(self, path: Path) -> bool:
        return path.is_file()

    def is_folder(self, path: Path) -> bool:
        return path.is_dir()

    def names(self, folder: Path) -> list[str]:
        return sorted(entry.name for entry in os.scandir(folder))

    def real_path(self, path: Path) -> Path:
        return Path(os.path.realpath(path))

    def identity(self, path: Path) -> object:
        now = path.stat()
        return now.st_dev, now.st_ino

    def find(self, pattern: Path) -> list[Path]:
        # Existing parent folders are taken literally, so that brackets in their names are not a pattern.
        folder = next((parent for parent in pattern.parents if parent.is_dir()), Path())
        return sorted(_glob(folder, str(pattern.relative_to(folder))))


def scanned(folder: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    """Return the entries of a folder, which know without a further call what they are."""
    return os.scandir(folder)


def _glob(folder: Path, pattern: str) -> set[Path]:
    """Expand a pattern without hidden names; ** follows no links, as they may form cycles."""
    import glob  # takes 3 ms

    parts = Path(pattern).parts
    if "**" not in parts:
        return {folder / name for name in glob.glob(pattern, root_dir=folder)}  # noqa: PTH207 - hides hidden names
    at = parts.index("**")
    rest = str(Path(*parts[at + 1 :])) if parts[at + 1 :] else "*"
    found: set[Path] = set()
    for start in _glob(folder, str(Path(*parts[:at]))) if at else {folder}:
        for inner, folders, _ in os.walk(start):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found |= _glob(Path(inner), rest)
    return found


def read_once(fd: int, view: memoryview, offset: int) -> int:
    """Read at an offset with one call; return the number of bytes read."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    if hasattr(os, "pread"):
        data = os.pread(fd, len(view), offset)
    else:
        with _SEEKING:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def read_small(fd: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read ranges, (offset, nbytes), so small that one call reads each."""
    if hasattr(os, "pread"):
        return [os.pread(fd, nbytes, offset) for offset, nbytes in ranges]
    found = []
    for offset, nbytes in ranges:
        data = bytearray(nbytes)
        found.append(bytes(data[: read_once(fd, memoryview(data), offset)]))
    return found


def write_once(fd: int, view: memoryview, offset: int) -> int:
    """Write at an offset with one call; return the number of bytes written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


def raise_file_limit(count: int) -> int | None:
    """Raise the limit of open files of this process by `count`, as far as the system allows.

    Returns:
        How many more may be opened, with some left over for other things; None if the system does not tell.
    """
    already = 0
    with suppress(OSError):
        already = sum(1 for _ in os.scandir("/dev/fd"))
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = already + count + _SPARE
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return None if soft == resource.RLIM_INFINITY else max(soft - already - _SPARE, 1)
    return None


def peak_memory() -> int:
    """Return the most bytes of memory that this process has taken so far; 0 if the system does not tell."""
    with suppress(OSError, ValueError), Path("/proc/self/status").open() as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with suppress(ImportError):
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
