"""What the header of a checkpoint says, whatever its file format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.source import Stamp
from .template import Places, Template, relocated

if TYPE_CHECKING:
    from .format import Format

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
        format: the file format.
        content: what was saved, to look at and not to change; a tensor is a TensorSpec or UnsupportedTensor in it, an
            object of an unknown class is an Inert. In formats that do not nest: a flat dict. The tensors of a template
            are in the files of the template; see `tree`.
        files: every file that the checkpoint consists of.
        foreign: globals of the pickle that were not understood, with counts.
        metadata: ``__metadata__`` of a safetensors file (of the first shard, when sharded).
        provenance: what ckpt-tools wrote about its own output, if it is one.
        shards: tensor name to file name, for a sharded checkpoint.
        shard_format: the format of its files, likewise.
        template: the parsed content that this header shares with others; None where nothing is shared.
        places: where the files of the template have gone in this checkpoint; empty where `content` is its own.
    """

    path: Path
    format: Format
    content: Any
    files: tuple[Stamp, ...]
    foreign: Counter[str] = field(default_factory=Counter)
    metadata: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    shards: Mapping[str, str] = field(default_factory=dict)
    shard_format: Format | None = None
    template: Template | None = None
    places: Places = field(default_factory=dict)

    @cached_property
    def tree(self) -> Any:
        """What was saved, with tensors of this very checkpoint; a copy of its own where the content is shared."""
        if self.template is None or not self.template.shareable:
            return self.content
        return relocated(self.content, self.places)

    @property
    def view(self) -> Any:
        """What was saved, with tensors of this very checkpoint; shared with others, so not to be changed."""
        return self.tree if self.places else self.content

    @property
    def file_format(self) -> Format:
        """The format of the files: that of the shards if it is sharded."""
        return self.shard_format or self.format

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return sum(stamp.nbytes for stamp in self.files)
