"""What the header of a checkpoint says, whatever its file format."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROVENANCE = "ckpt_tools"
"""Name under which an output says where it came from: a zip record, or a key of ``__metadata__``."""


def parse_provenance(text: str | bytes | None) -> dict[str, Any] | None:
    """Return what an output says about itself; None if it says nothing, or nothing that can be read."""
    try:
        provenance = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    return provenance if isinstance(provenance, dict) else None


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """A checkpoint without its payload.

    Attributes:
        path: the file or folder.
        format: ``torch-zip``, ``torch-legacy``, ``safetensors`` or ``sharded``.
        tree: what was saved; tensors stand in it as TensorSpec or UnsupportedTensor,
            objects of unknown classes as Inert. Safetensors and sharded: a flat dict.
        files: every file that the checkpoint consists of, with its size in bytes.
        foreign: globals of the pickle that were not understood, with counts.
        metadata: ``__metadata__`` of a safetensors file (of the first shard, when sharded).
        provenance: what ckpt-tools wrote about its own output, if it is one.
        shards: tensor name to file name, for a sharded checkpoint.
    """

    path: Path
    format: str
    tree: Any
    files: tuple[tuple[Path, int], ...]
    foreign: Counter[str] = field(default_factory=Counter)
    metadata: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    shards: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return sum(size for _, size in self.files)
