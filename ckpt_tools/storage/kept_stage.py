"""Kept stages: output files that several processes fill, at once or one after another, and that outlive these.

The files grow in a hidden folder beside the target, ``.NAME.DIGEST.parts``, where the digest is that of the job:

    job.json               what the job is, in words that tell how another one differs
    output/                the files, at their full size from the start
    part-2-of-8.jsonl      journal: a line for what one process has finished, locked while it is at work
    processes              lines for each part that has begun or ended, where the last one publishes

A line is appended when what it tells of is on the disk. A stage without `job.json` is void: nothing is known of it.
Processes that have a stage open share a lock of the folder; to remove it takes that lock alone.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WriteError
from .hidden import DIGITS, allocated, held, is_open_as, kept_stages, prefix, remove, try_lock
from .local import raise_file_limit
from .staged import place_files

KEPT: list[Path] = []
"""Targets of which this process has a stage that stays if it ends now."""
_JOB, _OUTPUT, _PROCESSES, _JOURNAL = "job.json", "output", "processes", r"part-(\d+)-of-(\d+)\.jsonl"
_OWN = re.compile(rf"{re.escape(_JOB)}(\.[0-9a-f]{{8}})?|{_OUTPUT}|{_PROCESSES}|{_JOURNAL}")


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage beside a target.

    Attributes:
        target: the output.
        path: the hidden folder.
    """

    target: Path
    path: Path

    @classmethod
    def of(cls, target: Path, digest: str) -> Stage:
        """Return that of a job, which need not be there."""
        return cls(target, target.absolute().parent / f"{prefix(target)}{digest[:DIGITS]}.parts")

    @property
    def output(self) -> Path:
        """The folder of the output files."""
        return self.path / _OUTPUT

    def job(self) -> Mapping[str, Any] | None:
        """Return what its job is; None if it is void, or not there."""
        try:
            found = json.loads((self.path / _JOB).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    @contextmanager
    def opened(self, names: Sequence[str], sizes: Sequence[int], job: Mapping[str, Any]) -> Iterator[list[int]]:
        """Open its files, and create them if that has not been done; processes may do so at once.

        Args:
            names: of the files, with folders in them before their names.
            sizes: in bytes.
            job: what the job is.

        Yields:
            A descriptor of each.

        Raises:
            WriteError: the system refuses, or a file is not as it was made.
        """
        raise_file_limit(len(sizes) + 3)
        fds: list[int] = []
        lock = self._shared()
        try:
            self._open(fds, names, sizes, job)
            yield fds
        finally:
            for fd in [*fds, lock]:
                os.close(fd)

    def _shared(self) -> int:
        """Make the folder if it is not there; return a descriptor that holds its lock, with other processes."""
        try:
            while True:
                self.path.mkdir(exist_ok=True)
                fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                if try_lock(fd, shared=True) is not False and is_open_as(self.path, fd):
                    return fd
                os.close(fd)  # it is being removed
                time.sleep(0.01)
        except OSError as error:
            raise self._refused(error) from error

    def _open(self, fds: list[int], names: Sequence[str], sizes: Sequence[int], job: Mapping[str, Any]) -> None:
        try:
            journals = self.journals()  # first, for another process writes its journal after the job
            begun = self.job() is not None
            if not begun and journals:  # they tell of files that are gone
                with self.alone():
                    for path in (*self.path.glob("part-*"), self.path / _PROCESSES):
                        path.unlink(missing_ok=True)
            for name, size in zip(names, sizes, strict=True):
                path = self.output / name
                if not begun:
                    path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | (0 if begun else os.O_CREAT)
                fds.append(os.open(path, flags, 0o666))
                if not begun:
                    os.truncate(fds[-1], size)
                if os.fstat(fds[-1]).st_size != size:
                    raise self._damaged(f"{name} has another size")
            if not begun:
                self.begin(job)
        except FileNotFoundError as error:
            raise self._damaged(f"{error.filename} is missing") from error
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> WriteError:
        return WriteError(f"{self.target}: cannot be written ({error.strerror}). Choose another place with `out`.")

    def begin(self, job: Mapping[str, Any]) -> None:
        """Say what the job is; the stage is not void from now on."""
        path = self.path / f"{_JOB}.{os.urandom(4).hex()}"
        path.write_text(json.dumps(job))
        path.replace(self.path / _JOB)

    def _damaged(self, what: str) -> WriteError:
        return WriteError(
            f"{self.target}: what is there of it is damaged: {what}. Remove the folder {self.path} to begin anew."
        )

    def journals(self) -> list[Journal]:
        """Return the journals, by part."""
        found = []
        with suppress(OSError):
            for path in self.path.iterdir():
                if match := re.fullmatch(_JOURNAL, path.name):
                    found.append(Journal(self.target, path, *map(int, match.groups())))
        return sorted(found, key=lambda each: (each.count, each.index))

    @contextmanager
    def alone(self) -> Iterator[list[Open]]:
        """Give all journals, and keep their processes away while the block runs.

        Raises:
            WriteError: one is at work.
        """
        with ExitStack() as locks:
            yield [locks.enter_context(journal.opened()) for journal in self.journals()]

    def doubt(self) -> str:
        """Say why it may be no stage; empty if it is a folder with nothing in it but what jobs write there.

        Raises:
            OSError: it cannot be looked into.
        """
        if self.path.is_symlink() or not self.path.is_dir():
            return "it is no folder"
        strange = sorted(each.name for each in self.path.iterdir() if not _OWN.fullmatch(each.name))
        return f"it has something that ckpt does not write there ({strange[0]})" if strange else ""

    @property
    def has_work(self) -> bool:
        """True if something was done in it."""
        return any("nbytes" in line for journal in self.journals() for line in journal.lines())

    def journal(self, index: int, count: int) -> Journal:
        """Return the journal of a part, which need not be there."""
        return Journal(self.target, self.path / f"part-{index}-of-{count}.jsonl", index, count)

    @property
    def allocated(self) -> int:
        """Bytes that it takes on the disk."""
        return allocated(self.path)

    @contextmanager
    def abandoned(self) -> Iterator[bool | None]:
        """Tell if no process has it open, and keep others away while the block runs; None if the system has no locks.

        Some network file systems lock files and no folders; the journals tell then.
        """
        with ExitStack() as locks:
            folder, *parts = [
                locks.enter_context(held(path)) for path in (self.path, *(each.path for each in self.journals()))
            ]
            if folder is False or False in parts:
                yield False
            else:
                yield (True if all(parts) and (folder or parts) else None)

    def began(self, step: str, index: int, count: int) -> None:
        """Note that a part has begun: until it ends none is the last one, also where a step has the name of an old one.

        Args:
            step: names those that were started together.
            index, count: part `index` of `count`.

        Raises:
            WriteError: the system refuses, or has no locks.
        """
        self._noted(step, index, count, "begins")

    def ended(self, step: str, index: int, count: int) -> tuple[bool, list[int]]:
        """Note that a part has ended; see `began`.

        Returns:
            (True in one process, the last of its step; the parts of it that have not begun).
        """
        found = self._noted(step, index, count, "ends")
        parts = {each: found.get(f"{each}/{count}") for each in range(1, count + 1)}
        return {*parts.values()} == {"ends"}, [each for each, said in parts.items() if said is None]

    def has(self, step: str) -> bool:
        """Return True if a part of a step has begun here."""
        with suppress(OSError):
            return any(line.startswith(f"{step} ") for line in (self.path / _PROCESSES).read_text().splitlines())
        return False

    def _noted(self, step: str, index: int, count: int, what: str) -> dict[str, str]:
        """Note something of a part; return the last note on each part of its step."""
        path = self.path / _PROCESSES
        try:
            import fcntl

            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)  # also brings what other machines have written
                os.write(fd, f"{step} {index}/{count} {what}\n".encode())
                os.fsync(fd)
                lines = [line.split(" ") for line in path.read_text().splitlines()]
            finally:
                os.close(fd)
        except (ImportError, OSError) as error:
            raise WriteError(
                f"{path}: cannot be written or locked ({getattr(error, 'strerror', None) or error}), so that the last "
                "part is not known. Give each process its part with `part`, and publish with `finish`."
            ) from error
        return {line[1]: line[2] for line in lines if line[0] == step and len(line) == 3}

    def place(self, names: Sequence[str] | None, *, force: bool, on_sync: Callable[[int], None]) -> None:
        """Put the files, which are complete, in the place of the target, and remove the stage.

        Args:
            names: as given to `opened`; None if the target is one file.
            force: replace an existing target.
            on_sync: see `staged_files`.

        Raises:
            WriteError: the system refuses; the stage is as it was.
        """
        job = self.job() or {}
        whole = self.output if names is not None else self.output / self.target.name

        def leave() -> None:
            (self.path / _JOB).unlink(missing_ok=True)  # a kill during the rename leaves nothing that would be trusted

        def stay() -> None:
            with suppress(OSError):
                self.begin(job)

        place_files(self.target, names, whole, force=force, before=leave, failed=stay, on_sync=on_sync)
        with suppress(OSError):
            remove(self.path)


@dataclass(frozen=True, slots=True)
class Journal:
    """What one process has finished.

    Attributes:
        target: the output.
        path: its file.
        index, count: part `index` of `count`, from 1 on.
    """

    target: Path
    path: Path
    index: int
    count: int

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield its lines; one that a kill has cut off is passed over."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be read ({error.strerror}).") from error
        for line in data.splitlines():
            with suppress(ValueError, RecursionError):
                said = json.loads(line)
                if isinstance(said, dict):
                    yield said

    @contextmanager
    def opened(self) -> Iterator[Open]:
        """Lock it as long as the block runs, and create it if it is not there.

        Raises:
            WriteError: another process has it, or the system refuses.
        """
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written ({error.strerror}).") from error
        try:
            if try_lock(fd) is False:
                raise self._at_work()
            yield Open(self, fd)
        finally:
            os.close(fd)

    def _at_work(self) -> WriteError:
        return WriteError(
            f"{self.target}: part {self.index} of {self.count} is at work in another process. Wait until it has ended."
        )


@dataclass(frozen=True, slots=True)
class Open:
    """A journal that this process has to itself."""

    journal: Journal
    fd: int

    def append(self, said: Mapping[str, Any]) -> None:
        """Append a line, and wait until it is on the disk.

        Raises:
            WriteError: the system refuses, or the journal was removed meanwhile.
        """
        line = json.dumps(said, separators=(",", ":")).encode() + b"\n"
        try:
            there = is_open_as(self.journal.path, self.fd)
            if there:
                size = os.fstat(self.fd).st_size
                torn = size and os.pread(self.fd, 1, size - 1) != b"\n"
                os.write(self.fd, b"\n" * bool(torn) + line)
                os.fsync(self.fd)
        except OSError as error:
            raise WriteError(f"{self.journal.path}: cannot be written ({error.strerror}).") from error
        if not there:
            raise WriteError(f"{self.journal.target}: {self.journal.path} was removed by another program. Try again.")

    def forget(self) -> None:
        """Remove all lines."""
        os.truncate(self.fd, 0)


def stages(target: Path) -> list[Stage]:
    """Return the stages beside a target."""
    return [Stage(target, path) for path in kept_stages(target)]


def clear(target: Path, *, but: Stage | None = None, void: bool = False) -> list[Stage]:
    """Remove the stages beside a target in which no process is at work, and nothing of others; return them.

    Args:
        but: this one stays.
        void: only those in which nothing was done.
    """
    gone = []
    for stage in stages(target):
        if stage != but and not (void and stage.has_work):
            with suppress(OSError), stage.abandoned() as free:
                if free and not stage.doubt():
                    remove(stage.path)
                    gone.append(stage)
    return gone
