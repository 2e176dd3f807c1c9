"""Open inputs: the very files whose headers were read, and refused if they are others by now."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ..errors import CorruptError, ReadError
from .source import Stamp


class OpenFiles:
    """Input files, opened read-only once and shared by all threads; a context manager.

    Args:
        stamps: of files whose headers have been read, to be refused if they are other files by now.
    """

    def __init__(self, stamps: Iterable[Stamp] = ()) -> None:
        self._fds: dict[Path, int] = {}
        self._stamps = {stamp.path: stamp for stamp in stamps}

    def open(self, path: Path) -> None:
        """Open a file, if it is not open yet.

        Raises:
            ReadError: it cannot be opened.
            CorruptError: it is not the file whose header was read.
        """
        if path in self._fds:
            return
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            advice = (
                " Allow more (ulimit -n), or give fewer files at a time."
                if error.errno in (errno.EMFILE, errno.ENFILE)
                else ""
            )
            raise ReadError(f"{path}: cannot be read ({error.strerror}).{advice}") from error
        self._fds[path] = fd
        self._check(self._stamps.setdefault(path, Stamp.of(path, fd)))

    def open_all(self, paths: Iterable[Path]) -> None:
        """Open all these files, and let the process hold so many, as far as it may."""
        # By identity first, for to hash a path takes longer.
        unique = dict.fromkeys({id(path): path for path in paths}.values())
        raise_file_limit(len(unique))
        for path in unique:
            self.open(path)

    def __getitem__(self, path: Path) -> int:
        return self._fds[path]

    def check_unchanged(self) -> None:
        """Refuse a result made from files that somebody wrote to meanwhile.

        Raises:
            CorruptError: size or modification time of a file has changed since its header was read.
        """
        for path in self._fds:
            self._check(self._stamps[path])

    def _check(self, stamp: Stamp) -> None:
        if Stamp.of(stamp.path, self._fds[stamp.path]) != stamp:
            raise CorruptError(
                f"{stamp.path}: changed while it was read. Wait until training has finished writing, then try again."
            )

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def raise_file_limit(count: int) -> None:
    """Let this process open `count` more files, as far as it may."""
    already = 0
    with suppress(OSError):
        already = sum(1 for _ in Path("/dev/fd").iterdir())
    with suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = already + count + 64
        if soft != resource.RLIM_INFINITY and soft < wanted:
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def read_at(fd: int, target: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer with the bytes at an offset.

    Raises:
        ReadError: a failure of the system.
        CorruptError: the file ends before them.
    """
    done = 0
    while done < len(target):
        try:
            got = os.preadv(fd, [target[done:] if done else target], offset + done)
        except OSError as error:
            raise read_failed(path, error.strerror) from error
        if got == 0:
            raise ended_early(path)
        done += got


def read_failed(path: object, reason: str | None) -> ReadError:
    """Make the error for an input that the system does not let us read."""
    return ReadError(f"{path}: reading failed ({reason}).")


def ended_early(path: object) -> CorruptError:
    """Make the error for an input that is shorter than its header says."""
    return CorruptError(f"{path}: ends before its tensors do. Get a fresh copy.")
