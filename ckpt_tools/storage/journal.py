"""Journals: files that grow line by line while a job goes on, in a folder that one job has at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import WriteError


def append(path: Path, line: bytes) -> None:
    """Append a line to a file, and wait until it is on the disk; a line that a kill has cut off before it ends there.

    Raises:
        WriteError: the system refuses.
    """
    try:
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror}).") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if they are not there.

    Raises:
        WriteError: the system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{path}: cannot be made ({error.strerror}).") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other jobs out of it.

    Raises:
        WriteError: another one is at work in it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise WriteError(
            f"{folder}: cannot be used ({error.strerror}). Choose another place with `scratch`."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WriteError(f"{folder}: another sweep is at work here. Choose another place with `scratch`.") from None
        except OSError as error:
            raise WriteError(
                f"{folder}: cannot be locked ({error.strerror}). Choose another place with `scratch`."
            ) from error
        yield
    finally:
        os.close(lock)
