"""Staged writing: at any instant, a target is the old one or the complete new one.

Files grow without names where the file system can do that (Linux: O_TMPFILE), so that a killed run leaves nothing.
Elsewhere they have a hidden name next to the target, or are in a hidden folder there (see `hidden`). The output is
synced to the disk, and then gets its name in one step; files without names are put into their folder just before. On
failure or interruption all is removed; inputs are never opened for writing.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from stat import S_IMODE

from ..errors import WriteError, WriteWarning
from . import page_cache
from .hidden import clear_leftovers, hidden, is_open_as, locked, new_file, new_folder, remove
from .local import raise_file_limit, write_once

PLACED: list[Path] = []
"""Outputs that this process has put in place."""


@contextmanager
def staged_files(
    target: Path,
    names: Sequence[str] | None,
    sizes: Sequence[int],
    *,
    force: bool = False,
    internal: bool = False,
    drop_cache: bool = False,
    on_sync: Callable[[int], None] = lambda _: None,
) -> Iterator[list[int]]:
    """Create files, and put them in the place of the target when the block ends without an exception.

    What fails when the target is in its place is a `WriteWarning`.

    Args:
        target: the output file or folder.
        names: files in the folder, with folders in it before their names; None if the target is one file.
        sizes: of the files, in bytes.
        force: replace an existing target.
        internal: it is for the job alone, and no output.
        drop_cache: let the system drop the pages of the files when they are on the disk.
        on_sync: called with the number of files that are on the disk, of those to wait for: first with 0.

    Yields:
        A descriptor of each file, for reading and writing.

    Raises:
        WriteError: the system refuses.
    """
    raise_file_limit(len(sizes) + 2)
    stage = _Stage(target)
    try:
        try:
            stage.create(names, sizes)
        except OSError as error:
            raise WriteError(
                f"{target}: cannot be written ({error.strerror}). Choose another place with `out`."
            ) from error
        yield stage.fds
        before = stage.drop if drop_cache else lambda: None
        _place(stage, force=force, internal=internal, before=before, on_sync=on_sync)
    finally:
        stage.clear()


def place_files(
    target: Path,
    names: Sequence[str] | None,
    path: Path,
    *,
    force: bool,
    before: Callable[[], None],
    failed: Callable[[], None],
    on_sync: Callable[[int], None] = lambda _: None,
) -> None:
    """Put files that are complete in the place of a target, as `staged_files` does.

    Args:
        names: files in the folder, with folders in it before their names; None if the target is one file.
        path: of the file or folder, on the same disk.
        before: called when the files are on the disk, before anything is renamed.
        failed: called if they stay where they were.
        on_sync: see `staged_files`.

    Raises:
        WriteError: the system refuses.
    """
    raise_file_limit(len(names or ()) + 3)
    stage = _Stage(target)
    try:
        stage.adopt(names, path)
        _place(stage, force=force, before=before, on_sync=on_sync)
    except OSError as error:
        raise _not_placed(target, error) from error
    finally:
        if stage.is_placed:
            stage.clear()
        else:
            stage.close()
            failed()


def _place(
    stage: _Stage,
    *,
    force: bool,
    before: Callable[[], None],
    on_sync: Callable[[int], None],
    internal: bool = False,
) -> None:
    try:
        stage.sync(on_sync)
        before()
        stage.place(force)
        stage.settle()
        stage.clear()
    except OSError as error:
        if not stage.is_placed:
            raise _not_placed(stage.target, error) from error
    except BaseException:
        if not stage.is_placed:
            raise
        # Interrupted after the rename: the target is complete.
    if not internal:
        PLACED.append(stage.target)


def _not_placed(target: Path, error: OSError) -> WriteError:
    if error.errno in _TAKEN:
        return WriteError(
            f"{target}: was created by another program in the meantime, and was kept. Choose another name with `out`."
        )
    return WriteError(f"{target}: cannot be written ({error.strerror}). Nothing was left there.")


class _Stage:
    """An output on its way to its place.

    Attributes:
        target: the place.
        fds: descriptors of its files.
    """

    def __init__(self, target: Path) -> None:
        self.fds: list[int] = []
        self.target = target
        self._parent = target.absolute().parent
        self._held: int | None = None
        self._base = self._parent
        self._names: Sequence[str] | None = None
        self._stage: Path | None = None  # None while it has no name
        self._aside: Path | None = None  # for what is replaced; beside the stage if None
        self._whole: int | None = None  # descriptor of what gets the name of the target
        self._placed = False

    def create(self, names: Sequence[str] | None, sizes: Sequence[int]) -> None:
        """Create the files; see `staged_files`."""
        self._names, self._base = names, self._hold()
        clear_leftovers(self.target, self._base)
        if self._create_unnamed(len(sizes)):
            self._whole = self.fds[0] if names is None else None
        elif names is None:
            self._stage, self._whole = locked(self.target, self._base, new_file)
            self.fds.append(self._whole)
        else:
            self._make_folder()
            for path in self._paths():
                self.fds.append(new_file(path))
        for fd, size in zip(self.fds, sizes, strict=True):
            os.truncate(fd, size)

    def adopt(self, names: Sequence[str] | None, path: Path) -> None:
        """Open files that are there; see `place_files`."""
        self._names, self._base, self._stage = names, self._hold(), path
        self._aside = hidden(self.target, self._base).with_suffix(".old")
        if names is not None:
            self._whole = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        for each in [path] if names is None else self._paths():
            self.fds.append(os.open(each, os.O_RDWR | getattr(os, "O_CLOEXEC", 0)))
        if names is None:
            self._whole = self.fds[0]

    def _hold(self) -> Path:
        """Return a path to the folder of the target that stays right when the folder is renamed, if there is one."""
        if hasattr(os, "O_PATH"):
            self._held = os.open(self._parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            path = Path(f"/proc/self/fd/{self._held}")
            with suppress(OSError):  # no /proc
                if is_open_as(path, self._held):
                    return path
        return self._parent

    def _create_unnamed(self, count: int) -> bool:
        """Create files without names; return False where that is not possible."""
        by_proc = self._base != self._parent  # through which a name is given
        if not (by_proc and hasattr(os, "O_TMPFILE") and hasattr(os, "link")):
            return False
        for _ in range(count):
            try:
                self.fds.append(os.open(self._base, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666))
            except OSError:
                if self.fds:  # no matter of the file system
                    raise
                return False
        return bool(count)

    def _make_folder(self) -> None:
        """Make the hidden folder of an output, with the folders in it."""
        self._stage, self._whole = locked(self.target, self._base, new_folder)
        for folder in self._folders()[:-1]:
            folder.mkdir()

    def _paths(self) -> list[Path]:
        """Return the paths of the files in the hidden folder."""
        return [] if self._names is None or self._stage is None else [self._stage / name for name in self._names]

    def _folders(self) -> list[Path]:
        """Return the folders of the output under their hidden names, the outermost last; none if it is one file."""
        if self._names is None or self._stage is None:
            return []
        inner = {self._stage / name: None for each in self._names for name in [*PurePath(each).parents][-2::-1]}
        return [*inner, self._stage]

    def sync(self, on_sync: Callable[[int], None]) -> None:
        """Wait until the content of all files is on the disk; see `staged_files`."""
        on_sync(0)
        for done, fd in enumerate(self.fds, 1):
            os.fsync(fd)
            on_sync(done)

    def drop(self) -> None:
        """Let the system drop the pages of all files from memory."""
        for fd in self.fds:
            page_cache.drop(fd)

    @property
    def is_placed(self) -> bool:
        """True if the target is what was written."""
        with suppress(OSError):
            return self._placed or self._is(self._base / self.target.name)
        return False

    def _is(self, path: Path) -> bool:
        return self._whole is not None and is_open_as(path, self._whole)

    def place(self, force: bool) -> None:
        """Give the output its name."""
        moved = self._held is not None and not is_open_as(self._parent, self._held)
        if moved or (self._stage is not None and not self._is(self._stage)):
            raise WriteError(
                f"{self.target}: its folder, or what was written there, was moved in the meantime. Try again, or "
                "choose another place with `out`."
            )
        place = self._base / self.target.name
        if self._names is not None:
            self._place_folder(place, force)
        elif self._stage is None:
            try:
                _link(self.fds[0], place)
            except FileExistsError:
                if not force:
                    raise
                self._stage = hidden(self.target, self._base)  # a link replaces nothing, and a rename needs a name
                _link(self.fds[0], self._stage)
                self._stage.replace(place)
        elif force:
            self._stage.replace(place)
        else:
            try:
                os.link(self._stage, place)  # unlike rename, replaces nothing; `clear` removes the other name
            except (OSError, AttributeError) as error:
                if getattr(error, "errno", None) == errno.EEXIST or os.path.lexists(place):
                    raise FileExistsError(errno.EEXIST, "exists") from error
                self._stage.rename(place)  # a file system without hard links

    def _place_folder(self, place: Path, force: bool) -> None:
        if self._stage is None:
            self._make_folder()
            for fd, path in zip(self.fds, self._paths(), strict=True):
                _link(fd, path)
        *_, stage = folders = self._folders()
        for folder in folders:
            _sync_folder(folder)
        if not force or not (place.is_symlink() or (place.is_dir() and any(place.iterdir()))):
            stage.rename(place)  # replaces an empty folder, and no other
        elif not _exchanged(stage, place):
            _rename_twice(stage, place, self._aside or stage.with_suffix(".old"), self.target)

    def settle(self) -> None:
        """Wait until the name is on the disk, too; what fails is a warning."""
        self._placed = True
        try:
            _sync_folder(self._parent)
        except OSError as error:
            _warn(
                f"{self.target}: is complete and in its place, but the system does not confirm that its name is on "
                f"the disk ({error.strerror}). After a power cut, look whether it is still there."
            )

    def clear(self) -> None:
        """Close the descriptors and remove what is hidden; safe to repeat after an interruption."""
        if self._stage is not None:
            aside = self._aside or self._stage.with_suffix(".old")
            for path in [self._stage, *([aside] if self.is_placed else ())]:
                with suppress(OSError):
                    remove(path)
                if os.path.lexists(path):
                    _warn(f"{self._parent / path.name}: is of no use any more, and cannot be removed.")
        self.close()

    def close(self) -> None:
        """Close the descriptors; safe to repeat."""
        fds = {*self.fds, self._whole, self._held} - {None}
        self.fds, self._whole, self._held = [], None, None
        for fd in fds:
            with suppress(OSError):  # all that counts has been synced
                os.close(fd)  # type: ignore[arg-type]


def _link(fd: int, path: Path) -> None:
    """Name a file that has no name."""
    # Only with a descriptor does Python follow the link in /proc, where others link the link.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def _warn(text: str) -> None:
    warnings.warn(text, WriteWarning, stacklevel=2)


@dataclass(frozen=True, slots=True)
class ScratchFile:
    """A file for the job alone.

    Attributes:
        fd: a descriptor open for writing.
        path: by which this process may open it.
    """

    fd: int
    path: Path


@contextmanager
def scratch_file(target: Path, option: str = "out") -> Iterator[ScratchFile]:
    """Give an empty file on the disk of a target, which is gone when the block ends.

    Where /proc leads to open files, its name goes at once, and the system frees it however the process ends.

    Args:
        target: after which the file is called as long as it has a name.
        option: that chooses the place, for messages.

    Raises:
        WriteError: the system refuses.
    """
    folder = target.absolute().parent
    try:
        clear_leftovers(target, folder)
        path, fd = locked(target, folder, new_file)
    except OSError as error:
        raise WriteError(
            f"{target}: cannot be written ({error.strerror}). Choose another place with `{option}`."
        ) from error
    opened = Path(f"/proc/self/fd/{fd}")
    try:
        with suppress(OSError):
            if is_open_as(opened, fd):
                path.unlink()
        yield ScratchFile(fd, path if os.path.lexists(path) else opened)
    finally:
        with suppress(OSError):
            remove(path)
        if os.path.lexists(path):
            _warn(f"{path}: is of no use any more, and cannot be removed.")
        with suppress(OSError):
            os.close(fd)


def write_file(target: Path, data: bytes, *, force: bool = False, internal: bool = False) -> None:
    """Write a file of these bytes, whole or not at all; see `staged_files`.

    Raises:
        WriteError: the system refuses.
    """
    with staged_files(target, None, [len(data)], force=force, internal=internal) as fds:
        write_at(fds[0], memoryview(data), 0, target)


def same_file(a: Path, b: Path) -> bool:
    """Return True if both paths lead to the same existing file."""
    try:
        return a.samefile(b)
    except OSError:
        return False


_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""Errors of link and rename for an existing target."""
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchanged(stage: Path, place: Path) -> bool:
    """Let a folder and its target change places in one step; False where the system cannot."""
    import ctypes  # takes 4 ms

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError, OSError):  # only Linux has the call
        return False
    if renameat2(_AT_FDCWD, os.fsencode(stage), _AT_FDCWD, os.fsencode(place), _RENAME_EXCHANGE) == 0:
        return True
    reason = ctypes.get_errno()
    if reason in _NO_EXCHANGE:
        return False
    raise OSError(reason, os.strerror(reason), str(place))


def _rename_twice(stage: Path, place: Path, aside: Path, target: Path) -> None:
    """Replace a folder or link: rename the old one away, and back if the new one cannot be put in place.

    Between the two renames the target does not exist; a crash then leaves the old one under the name `aside`.
    """
    try:
        place.rename(aside)
        stage.rename(place)
    finally:
        if stage.exists() and os.path.lexists(aside):
            try:
                aside.rename(place)
            except OSError as error:
                raise WriteError(
                    f"{target}: cannot be written ({error.strerror}). The old content is now "
                    f"{target.absolute().with_name(aside.name)}; move it back."
                ) from error


_UNCONFIRMED = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""Errors of fsync that tell of a loss; others only mean that the file system has no such call for folders."""


def _sync_folder(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that may be written but not read
        os.sync()
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in _UNCONFIRMED:
            raise
    finally:
        with suppress(OSError):
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


def keep_attributes(fd: int, old: int, name: object) -> None:
    """Copy the owner, the extended attributes (with access lists) and the mode bits of the old file to a new one.

    Raises:
        WriteError: the file system does not take the mode.
    """
    stat = os.fstat(old)
    with suppress(OSError, AttributeError):  # Windows has neither owners nor mode bits
        os.fchown(fd, stat.st_uid, stat.st_gid)
    with suppress(OSError, AttributeError):  # no extended attributes
        for name in os.listxattr(old):
            with suppress(OSError):  # an attribute that only the system sets
                os.setxattr(fd, name, os.getxattr(old, name))
    mode = S_IMODE(stat.st_mode)
    if hasattr(os, "fchmod") and S_IMODE(os.fstat(fd).st_mode) != mode:
        try:
            os.fchmod(fd, mode)
        except OSError as error:
            raise WriteError(
                f"{name}: a new file there cannot have its mode {mode:o} ({error.strerror}), so it was not replaced. "
                "Name a new file with `out`."
            ) from error


def flush(fd: int, name: object) -> None:
    """Wait until all writes to a file are on the disk.

    Raises:
        WriteError: the system refuses.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        raise write_failed(name, error.strerror) from error


def is_writable(path: Path) -> bool:
    """Return True if this process may write to a file, or create files in a folder."""
    return os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK)
