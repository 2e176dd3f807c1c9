"""Hidden files and folders beside a target, in which it grows.

Each is locked as long as its run lives. A run that is killed cannot clear up, but its lock goes with it: the next run
for the same target removes what has a free lock.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_START = 40  # characters that stand for the target's name, as file names have to be short
_TOKEN = 8  # hexadecimal digits
_BEGINNING = _START - _TOKEN - 1  # characters of a longer one that are kept, with a hyphen and a digest after them
_HEX = {*"0123456789abcdef"}
_DATE = re.compile(r"(19|20)\d{6}|\d{4}(19|20)\d\d")
DIGITS = 12
"""Hexadecimal digits of a job's digest in the name of its kept stage."""


def prefix(target: Path) -> str:
    """Return what the names of all that is hidden beside a target begin with."""
    return f".{_start(target.name)}."


def _start(name: str) -> str:
    """Return what stands for a target's name: itself, or of a long one the beginning and a digest.

    With the beginning alone, a job would take what belongs to a target with the same one for its own.
    """
    if len(name) < _START:
        return name
    return f"{name[:_BEGINNING]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:_TOKEN]}"


def hidden(target: Path, folder: Path) -> Path:
    """Return a path in a folder for a target; unique among concurrent and earlier runs."""
    return folder / f"{prefix(target)}{_token()}.partial"


def _token() -> str:
    """Return random digits with a letter among them: eight decimal ones are a date in the names of many backups."""
    while (token := os.urandom(_TOKEN // 2).hex()).isdecimal():
        pass
    return token


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


@contextmanager
def hidden_folder(target: Path) -> Iterator[Path]:
    """Give a folder beside a target, which is gone when the block ends; clear what killed runs have left there.

    Raises:
        OSError: the system refuses.
    """
    folder = target.absolute().parent
    clear_leftovers(target, folder)
    path, lock = locked(target, folder, new_folder)
    try:
        yield path
    finally:
        remove(path)
        os.close(lock)


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
    for path in _leftovers(target, folder):
        with held(path) as ours, suppress(OSError):
            if ours:
                remove(path)


def size_of_leftovers(target: Path) -> int:
    """Return the bytes that `clear_leftovers` will free."""
    freed = 0
    for path in _leftovers(target, target.absolute().parent):
        with held(path) as ours:
            freed += allocated(path) if ours else 0
    return freed


def _leftovers(target: Path, folder: Path) -> Iterator[Path]:
    """Yield what runs for a target have left and nobody needs."""
    found = []
    with suppress(OSError):
        found = hidden_in(folder)
    for each in found:
        if each.start == _start(target.name) and each.suffix != "parts" and not each.doubt():
            yield each.path


def kept_stages(target: Path) -> list[Path]:
    """Return the folders beside a target in which a job in parts grows, see `kept_stage`."""
    found = []
    with suppress(OSError):
        found = hidden_in(target.absolute().parent)
    return [each.path for each in found if each.suffix == "parts" and each.start == _start(target.name)]


class Hidden(NamedTuple):
    """Something whose name says that a job made it.

    Attributes:
        path: where it is.
        start: what stands for the name of the target: itself, or of a long one its beginning and a digest.
        suffix: ``partial`` (an output that grows), ``old`` (a folder that is being replaced), or ``parts`` (see
            `kept_stage`).
    """

    path: Path
    start: str
    suffix: str

    @property
    def target(self) -> Path | None:
        """The target; None if its name is longer than what is known of it."""
        return self.path.parent / self.start if len(self.start) < _START else None

    @property
    def shown(self) -> str:
        """The path of the target; of a long name the beginning, and dots."""
        return str(self.target or f"{self.path.parent / self.start[:_BEGINNING]}...")

    def doubt(self) -> str:
        """Say why it stays even if no process is at work in it; empty if nobody needs it.

        It may be a backup with a date in its name, or an old folder without a successor, so that it is all that there
        is of its target.
        """
        token = self.path.name.rsplit(".", 2)[1]
        if _DATE.fullmatch(token):
            return f"{token} in its name may be a date, and it a backup. Remove it yourself if nobody needs it"
        if self.suffix != "old":
            return ""
        if not (self.path.is_dir() or self.path.is_symlink()):
            return "it is no folder"
        if self.target is None:
            return "the name of its target is not known in full, so that it may be the only one"
        if not self.target.exists():
            return f"{self.target} is not there, so that it is the only one. Rename it to that to have it back"
        return ""


def hidden_in(folder: Path) -> list[Hidden]:
    """Return what is hidden in a folder, by its name.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".partial", ".old", ".parts")) and entry.name.count(".") > 2:
                start, token, suffix = entry.name.rsplit(".", 2)
                length = DIGITS if suffix == "parts" else _TOKEN
                if start.startswith(".") and len(token) == length and {*token} <= _HEX:
                    found.append(Hidden(folder / entry.name, start[1:], suffix))
    return sorted(found)


@contextmanager
def held(path: Path) -> Iterator[bool | None]:
    """Lock something hidden as long as the block runs.

    Yields:
        True if no process is at work in it; False if one is; None if the system does not tell. A link has no lock.
    """
    fd = None
    try:
        ours: bool | None = None
        with suppress(OSError):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                ours = True
            elif stat.S_ISDIR(mode) or stat.S_ISREG(mode):
                # Some network file systems lock only what is open for writing.
                access = os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR
                fd = os.open(path, access | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
                ours = try_lock(fd)
        yield ours
    finally:
        if fd is not None:
            with suppress(OSError):
                os.close(fd)


def allocated(path: Path) -> int:
    """Return the bytes that a file, or a folder with all that is in it, takes on the disk."""
    found = 0
    for each in [path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())]:
        with suppress(OSError, AttributeError):
            found += each.lstat().st_blocks * 512
    return found


def try_lock(fd: int, *, shared: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed; None where the file system has no locks.

    Args:
        shared: with other processes that share it, and against those that do not.
    """
    try:
        import fcntl

        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
