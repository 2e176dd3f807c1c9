"""Hidden files and folders beside a target, in which it grows.

Each is locked as long as its run lives. A run that is killed cannot clear up, but its lock goes with it: the next run
for the same target removes what has a free lock.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

_TOKEN = 8  # hexadecimal digits
_HEX = {*"0123456789abcdef"}
DIGITS = 12
"""Hexadecimal digits of a job's digest in the name of its kept stage."""


def prefix(target: Path) -> str:
    """Return what the names of all that is hidden beside a target begin with."""
    return f".{target.name[:40]}."  # short, as file names have to be


def hidden(target: Path, folder: Path) -> Path:
    """Return a path in a folder for a target; unique among concurrent and earlier runs."""
    return folder / f"{prefix(target)}{os.urandom(_TOKEN // 2).hex()}.partial"


def locked(target: Path, folder: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Make a hidden file or folder for a target, and lock it.

    Args:
        make: makes it at a path, and returns a descriptor of it.

    Returns:
        (its path, the descriptor, which holds the lock).

    Raises:
        OSError: the system refuses.
    """
    while True:
        path = hidden(target, folder)
        try:
            fd = make(path)
            if try_lock(fd) is not False and is_open_as(path, fd):
                return path, fd
        except BaseException:
            remove(path)
            raise
        os.close(fd)  # another run took it for a leftover, before it was locked


def new_file(path: Path) -> int:
    """Create a file; return a descriptor for reading and writing."""
    # 0o666 minus the umask: the default mode of new files.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


def new_folder(path: Path) -> int:
    """Create a folder; return a descriptor."""
    path.mkdir()
    return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder of our own, if it is there.

    Raises:
        OSError: the system refuses to remove a file.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(target: Path, folder: Path) -> None:
    """Remove what killed runs for a target have left beside it, as far as the system allows."""
    for path, lock in _leftovers(target, folder):
        with suppress(OSError):
            remove(path)
        _close(lock)


def size_of_leftovers(target: Path) -> int:
    """Return the bytes that `clear_leftovers` will free."""
    freed = 0
    for path, lock in _leftovers(target, target.absolute().parent):
        for each in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]:
            with suppress(OSError, AttributeError):
                freed += each.lstat().st_blocks * 512
        _close(lock)
    return freed


def _leftovers(target: Path, folder: Path) -> Iterator[tuple[Path, int | None]]:
    """Yield what killed runs have left, with a descriptor that holds its lock; None for a link."""
    begin, found = prefix(target), []
    with suppress(OSError), os.scandir(folder) as entries:
        found = [each.name for each in entries if each.name.startswith(begin)]
    there = os.path.lexists(folder / target.name)
    for name in found:
        token, _, suffix = name[len(begin) :].partition(".")
        # The old folder has the suffix .old between two renames, and may be all that there is.
        if len(token) == _TOKEN and {*token} <= _HEX and suffix in ("partial", "old")[: 1 + there]:
            path = folder / name
            with suppress(OSError):
                mode = path.lstat().st_mode
                if stat.S_ISLNK(mode):
                    yield path, None
                elif stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                    # Some network file systems lock only what is open for writing.
                    access = os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR
                    fd = os.open(path, access | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
                    if try_lock(fd):
                        yield path, fd
                    else:
                        os.close(fd)


def kept_stages(target: Path) -> list[Path]:
    """Return the folders beside a target in which a job in parts grows, see `kept_stage`."""
    begin, found = prefix(target), []
    with suppress(OSError), os.scandir(target.absolute().parent) as entries:
        for each in entries:
            token, _, suffix = each.name[len(begin) :].partition(".")
            if each.name.startswith(begin) and len(token) == DIGITS and {*token} <= _HEX and suffix == "parts":
                found.append(Path(each.path))
    return sorted(found)


def try_lock(fd: int) -> bool | None:
    """Lock an open file or folder until it is closed; None where the file system has no locks."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def is_open_as(path: Path, fd: int) -> bool:
    """Return True if a path leads to an open file or folder.

    Raises:
        OSError: the system does not tell.
    """
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _close(fd: int | None) -> None:
    if fd is not None:
        with suppress(OSError):
            os.close(fd)
