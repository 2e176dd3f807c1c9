"""Follower: reads inputs right behind the sums, from the page cache, to hash them or to drop them there.

SHA-256 takes a file in its order, which the threads that sum do not keep to. So threads of their own follow the
furthest byte that was read of each file. The sums wait when these fall behind by more than a page cache surely holds.
So the disk is read once where tensors are summed in about the order of their files; elsewhere the follower reads again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import CkptError, CorruptError
from ..storage.page_cache import drop, in_use
from ..storage.source import LOCAL, InputFile, Stamp, read_at, store_of
from ..tensors import TensorSpec
from .progress import HASHING, Progress, counted
from .threads import default_threads
from .work_units import Slice, WorkUnit

BLOCK = 1 << 20
"""Bytes that a thread hashes at a time."""
FETCHED = 8 << 20
"""The same, of a file that is not on this machine: as many as come with a request."""
BEHIND = 1 << 30
"""Bytes that the hashes of all files may be behind the sums."""
_IN_USE = 64 << 20  # bytes behind the furthest one that other threads may still read


@dataclass(slots=True)
class _File:
    """A file that is followed.

    Attributes:
        stamp: taken when its header was read.
        front: the end of what the sums have read.
        at: the end of what was followed.
        sha256: of the bytes up to there; None if that is not wanted.
        dropped: its pages are dropped.
        busy: a thread is at it.
    """

    stamp: Stamp
    front: int = 0
    at: int = 0
    sha256: Any = None
    dropped: bool = False
    busy: bool = False

    @property
    def fetched(self) -> bool:
        """True if it is not on this machine."""
        return store_of(self.stamp.path) is not LOCAL

    @property
    def block(self) -> int:
        """Bytes that a thread hashes at a time."""
        return FETCHED if self.fetched else BLOCK

    def is_there(self) -> bool:
        """Return True if the file that was summed still has its name."""
        with suppress(CkptError), InputFile(self.stamp.path) as file:
            return file.stamp == self.stamp
        return False


class Follower:
    """Follows a job; a context manager. Its threads end with it.

    Args:
        stamps: of all inputs, taken when their headers were read.
        hashed: files of which the SHA-256 is wanted.
        drop: let the system drop the pages of files that were not in its cache before.
        threads: for the hashes; as many as there are cores by default.

    Raises:
        CorruptError: from any method, as soon as a file is found changed.
        ReadError: from any method, if a file cannot be read.
    """

    def __init__(
        self, stamps: Iterable[Stamp], *, hashed: Iterable[Path] = (), drop: bool = False, threads: int | None = None
    ) -> None:
        wanted = set(hashed)
        self._files = {
            stamp.path: _File(
                stamp,
                sha256=hashlib.sha256() if stamp.path in wanted else None,
                dropped=drop and _is_unused(stamp.path),
            )
            for stamp in stamps
            if drop or stamp.path in wanted
        }
        self._hashed = [each for each in self._files.values() if each.sha256 is not None]
        count = (default_threads() if threads is None else threads) if wanted else 1
        self._threads = [threading.Thread(target=self._work, name="ckpt-follower", daemon=True) for _ in range(count)]
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        self._last = False  # the sums are done
        self._stopped = False

    def __enter__(self) -> Follower:
        with suppress(RuntimeError):  # no more threads: those that there are take longer
            for thread in self._threads:
                thread.start()
        if self._threads[0].ident is None:
            raise CkptError("Can't start new thread: the system has no more. Allow more (ulimit -u).")
        return self

    def __exit__(
        self, cls: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(None if error is None else 1.0)  # a request that hangs holds no job up that has failed

    def wait(self, stop: threading.Event) -> None:
        """Wait until the hashes are near enough, or until the job is stopped."""
        with self._changed:
            while not stop.is_set():
                self._raise()
                if sum([each.front - each.at for each in self._hashed]) <= BEHIND:
                    return
                self._changed.wait(0.1)

    def read(self, unit: WorkUnit) -> None:
        """Take note of a work unit that was read."""
        ends: dict[Path, int] = {}
        for slice_ in unit.slices:
            for path, end in _ends(slice_):
                ends[path] = max(end, ends.get(path, 0))
        with self._changed:
            for path, end in ends.items():
                if (file := self._files.get(path)) is not None:
                    file.front = max(file.front, min(end, file.stamp.nbytes))
            self._changed.notify_all()

    def finish(self, on_progress: Progress | None = None) -> Mapping[Path, str]:
        """Follow all files to their ends, and return the SHA-256 of those that are hashed, in hexadecimal digits.

        Args:
            on_progress: called with (what is done, bytes hashed, bytes in all), if any are hashed.
        """
        tell = counted(on_progress, HASHING, sum(each.stamp.nbytes for each in self._hashed)) if self._hashed else None
        with self._changed:
            self._last = True
            for each in self._files.values():
                if each.sha256 is not None or each.front:
                    each.front = each.stamp.nbytes
            self._changed.notify_all()
        ended = False
        while not ended:
            ended = self._ended()
            if tell is not None:  # without the lock, for the threads that hash
                tell(sum(each.at for each in self._hashed))
        return {each.stamp.path: each.sha256.hexdigest() for each in self._hashed}

    def _ended(self) -> bool:
        """Return True if all files were followed to their ends; False after a moment of waiting."""
        with self._changed:
            self._raise()
            if all([each.at == each.front and not each.busy for each in self._files.values()]):
                return True
            self._changed.wait(0.1)
            return False

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _next(self) -> tuple[_File, int] | None:
        """Return the file that is most behind, and how many bytes of it to follow; None at the end."""
        with self._changed:
            while not self._stopped:
                waiting = [(self._behind(each), each) for each in self._files.values() if not each.busy]
                behind, file = max(waiting, key=lambda item: item[0], default=(0, None))
                if file is not None and behind > 0:
                    file.busy = True
                    return file, behind if file.sha256 is None else min(behind, file.block)
                self._changed.wait()
            return None

    def _behind(self, file: _File) -> int:
        behind = file.front - file.at
        whole = file.front == file.stamp.nbytes
        least = _IN_USE if file.sha256 is None else file.block if file.fetched else 0
        return behind if whole or behind >= least else 0

    def _work(self) -> None:
        block = bytearray(max((each.block for each in self._hashed), default=0))
        while (found := self._next()) is not None:
            file, nbytes = found
            try:
                self._follow(file, memoryview(block)[:nbytes], nbytes)
            except BaseException as error:  # noqa: BLE001 - raised in the thread of the job
                with self._changed:
                    self._failed = error
                    self._stopped = True
                    self._changed.notify_all()
                return
            with self._changed:
                file.at += nbytes
                file.busy = False
                self._changed.notify_all()

    def _follow(self, file: _File, block: memoryview, nbytes: int) -> None:
        if file.sha256 is None and not file.is_there():
            return  # nothing is lost if pages stay
        # Opened each time: a job may have more files than may be open.
        with InputFile(file.stamp.path) as opened:
            if opened.stamp != file.stamp:
                raise CorruptError(
                    f"{file.stamp.path}: changed while it was read. Wait until training has finished writing, then try "
                    "again."
                )
            fd = opened.source.fileno()
            if file.sha256 is not None:
                read_at(opened.source, block, file.at, file.stamp.path)
                file.sha256.update(block)
            if file.dropped and fd is not None:
                end = file.at + nbytes
                begin = max(file.at - _IN_USE, 0)
                if end < file.stamp.nbytes:
                    end -= _IN_USE
                if end > begin:
                    drop(fd, begin, end - begin)


def _is_unused(path: Path) -> bool:
    with InputFile(path) as file:
        fd = file.source.fileno()
        return fd is not None and not in_use(fd)


def _ends(slice_: Slice) -> Iterable[tuple[Path, int]]:
    """Yield each file that a slice was read from, and the byte up to which it was read about."""
    for spec, places in slice_.tensor.terms.inputs:
        if type(spec) is TensorSpec:
            # Of a tile, the whole tensor: its rows lie anywhere in it.
            numel = slice_.stop if slice_.tile is None and spec.contiguous else spec.numel
            end = spec.begin + numel * spec.dtype.itemsize
            for path, shift in places:
                yield path, end + shift
