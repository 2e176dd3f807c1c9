"""Hashes: the SHA-256 of whole files, with the progress of the reading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..storage.source import sha256, stamp_at
from .progress import HASHING, Progress, counted

_TOLD = 1 << 26
"""Bytes from one call of `on_progress` to the next."""


def file_hashes(paths: Iterable[Path], on_progress: Progress | None) -> dict[Path, str]:
    """Return the SHA-256 of files, in hexadecimal digits.

    Args:
        on_progress: called with (what is done, bytes hashed, bytes in all).

    Raises:
        ReadError: one cannot be read.
    """
    paths = [*paths]
    total = 0 if on_progress is None else sum(stamp_at(path).nbytes for path in paths)
    tell = counted(on_progress, HASHING, total)
    done = told = 0

    def count(nbytes: int) -> None:
        nonlocal done, told
        done += nbytes
        if tell is not None and (done - told >= _TOLD or done == total):
            told = done
            tell(done)

    return {path: sha256(path, count) for path in paths}
