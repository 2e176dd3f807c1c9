"""Staged writing: a target file is the old one or the whole new one, at any instant.

The output is made beside its target under a hidden name, synced to the disk, and renamed. On
failure or interruption the hidden file goes; inputs are never opened for writing.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE

from ..errors import WriteError
from .local import raise_file_limit, write_once


@contextmanager
def staged_files(
    target: Path, names: Sequence[str] | None, sizes: Sequence[int], *, force: bool = False
) -> Iterator[tuple[Path, list[int]]]:
    """Make files beside the target and put them in its place when the block ends well.

    Args:
        target: the file, or the folder, to appear.
        names: files in the folder; None if the target is one file.
        sizes: bytes of each file.
        force: replace what stands there when the block ends.

    Yields:
        (where the files are being made, a writable descriptor of each).

    Raises:
        WriteError: the system refuses.
    """
    # A name of its own, whatever other runs there are or were; short, for names have a limit.
    stage = target.absolute().parent / f".{target.name[:40]}.{secrets.token_hex(4)}.partial"
    fds: list[int] = []
    raise_file_limit(len(sizes))
    try:
        try:
            if names is not None:
                stage.mkdir()
            for path, size in zip([stage] if names is None else [stage / n for n in names], sizes, strict=True):
                # 0o666 less the umask: the mode that any program of the user gives its files.
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
            if names is not None:
                _sync_folder(stage)
            _put(stage, target, force)
            _sync_folder(stage.parent)
            _clear(stage, fds)
        except OSError as error:
            if error.errno in _TAKEN:
                raise WriteError(
                    f"{target}: was created by another program in the meantime, and was kept. Choose another name with `out`."
                ) from error
            raise WriteError(f"{target}: cannot be written ({error.strerror}). Nothing was left there.") from error
        except BaseException:
            if os.path.lexists(stage) and not same_file(stage, target):
                raise
            # An interruption that came too late: the target is in its place.
    finally:
        _clear(stage, fds)


def _clear(stage: Path, fds: list[int]) -> None:
    """Remove what is left of the stage, wherever an interruption broke this off before."""
    while fds:
        os.close(fds.pop())
    if stage.is_dir():
        shutil.rmtree(stage, ignore_errors=True)
    else:
        stage.unlink(missing_ok=True)


def same_file(a: Path, b: Path) -> bool:
    """True if both paths lead to one file that is there."""
    try:
        return a.samefile(b)
    except OSError:
        return False


_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""What link and rename say of a target that is there."""


def _put(stage: Path, target: Path, force: bool) -> None:
    if stage.is_dir():
        if force and (target.is_symlink() or (target.is_dir() and any(target.iterdir()))):
            _exchange(stage, target)
        else:
            stage.rename(target)  # in place of nothing, or of an empty folder
    elif force:
        stage.replace(target)
    else:
        try:
            os.link(stage, target)  # which, unlike rename, replaces nothing; the other name goes with the stage
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) == errno.EEXIST or os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, "exists") from error
            stage.rename(target)  # a file system without hard links


def _exchange(stage: Path, target: Path) -> None:
    """Replace what cannot be renamed over: the old one steps aside, and comes back if the new one fails.

    Between the two renames nothing stands at the target; a crash there leaves the old one under the name `aside`.
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
    except OSError:  # it may be written but not read; the file is in its place by now, whatever the folder allows
        os.sync()
        return
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(fd)
    finally:
        os.close(fd)


def reserve(fd: int, offset: int, nbytes: int, name: object) -> None:
    """Set blocks aside for bytes that will be written, where the file system can.

    So a full disk is found before the work, and no write has to look for its blocks. Python's own call is not for this:
    it falls back to writing into each block where the file system cannot.

    Raises:
        WriteError: the disk is full.
    """
    import ctypes  # 4 ms that a look at a file has no need of

    with suppress(AttributeError, TypeError):  # only Linux has the call
        libc = ctypes.CDLL(None, use_errno=True)
        if nbytes and libc.fallocate(fd, 0, ctypes.c_int64(offset), ctypes.c_int64(nbytes)) != 0:
            reason = ctypes.get_errno()
            if reason in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise write_failed(name, os.strerror(reason))


def write_at(fd: int, data: memoryview, offset: int, name: object) -> None:
    """Write all of some bytes at an offset.

    Raises:
        WriteError: disk full, or another failure of the system.
    """
    done = 0
    while done < len(data):
        try:
            done += write_once(fd, data[done:] if done else data, offset + done)
        except OSError as error:
            raise write_failed(name, error.strerror) from error


def write_failed(name: object, reason: str | None) -> WriteError:
    """Make the error for an output that the system does not let us write."""
    return WriteError(
        f"{name}: writing failed: {reason}. Nothing was left at the target. "
        "Free some space or choose another place with `out`."
    )


def keep_attributes(fd: int, old: int) -> None:
    """Give a new file the owner, the attributes (access lists among them) and the mode bits of the old one."""
    stat = os.fstat(old)
    with suppress(OSError, AttributeError):  # Windows has neither owners nor mode bits
        os.fchown(fd, stat.st_uid, stat.st_gid)
    with suppress(OSError, AttributeError):  # a system or a file system without attributes
        for name in os.listxattr(old):
            with suppress(OSError):  # one that only the system sets
                os.setxattr(fd, name, os.getxattr(old, name))
    if hasattr(os, "fchmod"):
        os.fchmod(fd, S_IMODE(stat.st_mode))


def flush(fd: int) -> None:
    """Wait until the disk has what was written to a file."""
    os.fsync(fd)


def is_writable(path: Path) -> bool:
    """True if this process may write to a file, or make files in a folder."""
    return os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK)
