"""What the header of a checkpoint says, whatever its file format."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .twins import moved

PROVENANCE = "ckpt_tools"
"""Name under which an output says where it came from: a zip record, or a key of ``__metadata__``."""


def parse_provenance(text: str | bytes | None) -> dict[str, Any] | None:
    """Return what an output says about itself; None if it says nothing, or nothing that can be read."""
    try:
        provenance = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    return provenance if isinstance(provenance, dict) else None


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


@dataclass(frozen=True, eq=False)
class Header:
    """A checkpoint without its payload.

    Attributes:
        path: the file or folder.
        format: ``torch-zip``, ``torch-legacy``, ``safetensors``, ``sharded`` or ``dcp``.
        content: what was saved, to look at and not to change; tensors stand in it as TensorSpec or UnsupportedTensor,
            objects of unknown classes as Inert. Safetensors and sharded: a flat dict.
        files: every file that the checkpoint consists of.
        foreign: globals of the pickle that were not understood, with counts.
        metadata: ``__metadata__`` of a safetensors file (of the first shard, when sharded).
        provenance: what ckpt-tools wrote about its own output, if it is one.
        shards: tensor name to file name, for a sharded checkpoint.
        pattern: what was parsed for this header, and holds for files with an equal one; known as long as one of
            their headers is in use. None where nothing is kept.
        lent: `content` is the pattern's, and the tensors in it stand at these places of some file like this one.
    """

    path: Path
    format: str
    content: Any
    files: tuple[Stamp, ...]
    foreign: Counter[str] = field(default_factory=Counter)
    metadata: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    shards: dict[str, str] = field(default_factory=dict)
    pattern: object = None
    lent: bool = False

    @cached_property
    def tree(self) -> Any:
        """What was saved, with tensors of this very file; a copy of its own, made when it is first asked for."""
        return moved(self.content, self.files[0].path) if self.lent else self.content

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return sum(stamp.nbytes for stamp in self.files)
