"""What the header of a checkpoint says, whatever its file format."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..storage.source import Stamp
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
