"""Sources: the files that bytes are read from, and what tells that one has changed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stamp:
    """One file as it was when its header was read; another Stamp of the path that differs means other content.

    Attributes:
        path: the file.
        nbytes: its size.
        identity: device, inode and time of modification.
    """

    path: Path
    nbytes: int
    identity: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path, fd: int) -> Stamp:
        """Take the stamp of an open file, whatever stands at its path by now."""
        stat = os.fstat(fd)
        return cls(path, stat.st_size, (stat.st_dev, stat.st_ino, stat.st_mtime_ns))

    def sha256(self) -> str:
        """Read the whole file and return its SHA-256, in hexadecimal digits."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
