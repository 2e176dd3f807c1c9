"""Staged writing: at any instant, a target file is the old file or the complete new one.

The output is written next to its target under a hidden name, synced to the disk, and renamed. On
failure or interruption the hidden file is removed; inputs are never opened for writing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from stat import S_IMODE

from ..errors import WriteError
from .local import raise_file_limit, write_once


@contextmanager
def staged_files(
    target: Path, names: Sequence[str] | None, sizes: Sequence[int], *, force: bool = False
) -> Iterator[tuple[Path, list[int]]]:
    """Create files next to the target, and rename them to it when the block ends without an exception.

    Args:
        target: the output file or folder.
        names: files in the folder, with folders in it before their names; None if the target is one file.
        sizes: of the files, in bytes.
        force: replace an existing target.

    Yields:
        (temporary path of the target, a writable descriptor of each file).

    Raises:
        WriteError: the system refuses.
    """
    stage = _hidden(target)
    fds: list[int] = []
    raise_file_limit(len(sizes))
    try:
        try:
            if names is not None:
                stage.mkdir()
            folders = {stage / name: None for each in names or () for name in [*PurePath(each).parents][-2::-1]}
            for folder in folders:
                folder.mkdir()
            for path, size in zip([stage] if names is None else [stage / n for n in names], sizes, strict=True):
                # 0o666 minus the umask: the default mode of new files.
                fds.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666))
                os.truncate(fds[-1], size)
        except OSError as error:
            raise WriteError(
                f"{target}: cannot be written ({error.strerror}). Choose another place with `out`."
            ) from error
        yield stage, fds
        try:
            for fd in fds:
                os.fsync(fd)
            for folder in [*folders, stage] if names is not None else ():
                _sync_folder(folder)
            _put(stage, target, force)
            _sync_folder(stage.parent)
            _clear(stage, fds)
        except OSError as error:
            if error.errno in _TAKEN:
                raise WriteError(
                    f"{target}: was created by another program in the meantime, and was kept. "
                    "Choose another name with `out`."
                ) from error
            raise WriteError(f"{target}: cannot be written ({error.strerror}). Nothing was left there.") from error
        except BaseException:
            if os.path.lexists(stage) and not same_file(stage, target):
                raise
            # Interrupted after the rename: the target is complete.
    finally:
        _clear(stage, fds)


def _hidden(target: Path) -> Path:
    """Return a path next to a target; unique among concurrent and earlier runs; short, as file names have to be."""
    return target.absolute().parent / f".{target.name[:40]}.{os.urandom(4).hex()}.partial"


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Give a hidden folder next to a target, which is gone when the block ends.

    Raises:
        WriteError: the system refuses.
    """
    folder = _hidden(target)
    try:
        try:
            folder.mkdir()
        except OSError as error:
            raise WriteError(
                f"{target}: cannot be written ({error.strerror}). Choose another place with `out`."
            ) from error
        yield folder
    finally:
        remove(folder)


def write_file(target: Path, data: bytes, *, force: bool = False) -> None:
    """Write a file of these bytes, whole or not at all; see `staged_files`.

    Raises:
        WriteError: the system refuses.
    """
    with staged_files(target, None, [len(data)], force=force) as (_, fds):
        write_at(fds[0], memoryview(data), 0, target)


def _clear(stage: Path, fds: list[int]) -> None:
    """Close the descriptors and remove the stage; safe to repeat after an interruption."""
    while fds:
        os.close(fds.pop())
    remove(stage)


def remove(path: Path) -> None:
    """Remove a file or a folder of our own, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def same_file(a: Path, b: Path) -> bool:
    """Return True if both paths lead to the same existing file."""
    try:
        return a.samefile(b)
    except OSError:
        return False


_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""Errors of link and rename for an existing target."""


def _put(stage: Path, target: Path, force: bool) -> None:
    if stage.is_dir():
        if force and (target.is_symlink() or (target.is_dir() and any(target.iterdir()))):
            _exchange(stage, target)
        else:
            stage.rename(target)  # replaces an empty folder, and no other
    elif force:
        stage.replace(target)
    else:
        try:
            os.link(stage, target)  # unlike rename, replaces nothing; `_clear` removes the other name
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) == errno.EEXIST or os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "exists") from error
            stage.rename(target)  # a file system without hard links


def _exchange(stage: Path, target: Path) -> None:
    """Replace a folder or link: rename the old one away, and back if the new one cannot be put in place.

    Between the two renames the target does not exist; a crash then leaves the old one under the name `aside`.
    """
    aside = stage.with_suffix(".old")
    try:
        target.rename(aside)
        stage.rename(target)
    finally:
        if not stage.exists():
            if aside.is_symlink():
                aside.unlink()
            else:
                shutil.rmtree(aside, ignore_errors=True)
        elif os.path.lexists(aside):
            try:
                aside.rename(target)
            except OSError as error:
                raise WriteError(
                    f"{target}: cannot be written ({error.strerror}). The old content is now {aside}; move it back."
                ) from error


def _sync_folder(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written but not read; the file is already in place
        os.sync()
        return
    try:
        with suppress(OSError):  # not supported by some network file systems
            os.fsync(fd)
    finally:
        os.close(fd)


def reserve(fd: int, offset: int, nbytes: int, name: object) -> None:
    """Allocate disk blocks for later writes, if the file system can.

    A full disk is then found before the work starts, and writes need not allocate. Not os.posix_fallocate: where the
    file system lacks the call, it writes to each block instead.

    Raises:
        WriteError: the disk is full.
    """
    import ctypes  # takes 4 ms

    with suppress(AttributeError, TypeError):  # only Linux has the call
        libc = ctypes.CDLL(None, use_errno=True)
        if nbytes and libc.fallocate(fd, 0, ctypes.c_int64(offset), ctypes.c_int64(nbytes)) != 0:
            reason = ctypes.get_errno()
            if reason in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise write_failed(name, os.strerror(reason))


def write_at(fd: int, data: memoryview, offset: int, name: object) -> None:
    """Write all bytes of a buffer at an offset.

    Raises:
        WriteError: the disk is full, or another failure of the system.
    """
    done = 0
    while done < len(data):
        try:
            done += write_once(fd, data[done:] if done else data, offset + done)
        except OSError as error:
            raise write_failed(name, error.strerror) from error


def write_failed(name: object, reason: str | None) -> WriteError:
    """Return the error for an output that the system cannot write."""
    return WriteError(
        f"{name}: writing failed: {reason}. Nothing was left at the target. "
        "Free some space or choose another place with `out`."
    )


def keep_attributes(fd: int, old: int) -> None:
    """Copy the owner, the extended attributes (with access lists) and the mode bits of the old file to a new one."""
    stat = os.fstat(old)
    with suppress(OSError, AttributeError):  # Windows has neither owners nor mode bits
        os.fchown(fd, stat.st_uid, stat.st_gid)
    with suppress(OSError, AttributeError):  # no extended attributes
        for name in os.listxattr(old):
            with suppress(OSError):  # an attribute that only the system sets
                os.setxattr(fd, name, os.getxattr(old, name))
    if hasattr(os, "fchmod"):
        os.fchmod(fd, S_IMODE(stat.st_mode))


def flush(fd: int) -> None:
    """Wait until all writes to a file are on the disk."""
    os.fsync(fd)


def is_writable(path: Path) -> bool:
    """Return True if this process may write to a file, or create files in a folder."""
    return os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK)
