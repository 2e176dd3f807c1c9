"""Headers: a checkpoint without its payload, in any file format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.source import Stamp, store_of
from .json_file import parse_json
from .template import Places, Template, in_own_files

if TYPE_CHECKING:
    from .format import Format

PROVENANCE = "ckpt_tools"
"""Name of the provenance of an output: a zip entry, or a key of ``__metadata__``."""


def parse_provenance(text: str | bytes | None) -> dict[str, Any] | None:
    """Return the provenance of an output; None if it is missing, not readable, nested deeply, or no plain JSON."""
    try:
        provenance = parse_json(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    return provenance if isinstance(provenance, dict) and _is_plain(provenance) else None


_DEEPEST_PROVENANCE = 50


def _is_plain(value: Any) -> bool:
    """False for lists and dicts nested so deeply that functions that call themselves would fail, or with NaN.

    Python alone reads NaN, and takes what is too large for infinity; other programs would not read outputs with those.
    """
    level = [value]
    for _ in range(_DEEPEST_PROVENANCE):
        children = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        if any(isinstance(child, float) and not math.isfinite(child) for child in children):
            return False
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return True
    return False


@dataclass(frozen=True, eq=False)
class Header:
    """A checkpoint without its payload.

    Attributes:
        path: the file or folder.
        format: the file format.
        content: as `tree`, but with tensors in the files of the template, if it has one.
        files: all files of the checkpoint.
        foreign: unknown globals of the pickle, with counts.
        metadata: ``__metadata__`` of a safetensors file (of the first shard, when sharded).
        provenance: the ckpt-tools record of how the file was made, if any; that of the first of several files.
        record_fault: why `provenance` is not to be relied on, in words: it is damaged, or files have different ones;
            empty if nothing is known against it.
        shards: tensor name to file name, for a sharded checkpoint.
        shard_format: the format of the shards.
        ranks: file name to header, for a checkpoint with a part of the model in each file; the first keys of `tree` are
            the names of the files.
        template: the parsed content that this header shares with others, or None.
        places: its own files by those of the template; a missing file has no other place.
    """

    path: Path
    format: Format
    content: Any
    files: tuple[Stamp, ...]
    foreign: Counter[str] = field(default_factory=Counter)
    metadata: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] | None = None
    record_fault: str = ""
    shards: Mapping[str, str] = field(default_factory=dict)
    shard_format: Format | None = None
    ranks: Mapping[str, Header] = field(default_factory=dict)
    template: Template | None = None
    places: Places = field(default_factory=dict)

    @cached_property
    def tree(self) -> Any:
        """The saved object, which may be shared and must not be changed.

        A tensor is a TensorSpec or UnsupportedTensor, an object of an unknown class an Inert. In formats that do not
        nest, it is a flat dict.
        """
        return in_own_files(self.content, self.places) if self.places else self.content

    @property
    def file_format(self) -> Format:
        """The format of the files: `shard_format` if sharded."""
        return self.shard_format or self.format

    @property
    def in_model_order(self) -> bool:
        """True if names are in the order in which they were saved: safetensors files and indexes sort them."""
        return self.format.nests and not self.format.folder

    @property
    def in_folder(self) -> bool:
        """True if its path is a folder, even one with a single file."""
        return store_of(self.path).is_folder(self.path)

    @property
    def names(self) -> dict[str, Path]:
        """Its files by their names in the folder, with the folders inside it before them."""
        home = self.path if self.in_folder else self.path.parent
        return {
            (path.relative_to(home).as_posix() if path.is_relative_to(home) else path.name): path
            for path in (stamp.path for stamp in self.files)
        }

    @property
    def copied_to_folder(self) -> bool:
        """True if an edited copy of it is a folder; the files of several processes become one file."""
        return self.in_folder and (self.format.written_as.folder or not self.format.folder)

    @property
    def nbytes(self) -> int:
        """Size on disk, in bytes."""
        return sum(stamp.nbytes for stamp in self.files)


def damage(text: object, provenance: Mapping[str, Any] | None) -> str:
    """Say that there is a record that cannot be read, in words; empty if there is none, or it was read."""
    return "" if text is None or provenance is not None else "there is a record of ckpt-tools, and it cannot be read"


def record_fault(parts: Mapping[str, Header]) -> str:
    """Say which file of a checkpoint has a damaged record, or another one than the first, as one of another output has.

    Args:
        parts: the header of each file by its name, at least one.
    """
    first, *others = parts
    damaged = next((name for name in parts if parts[name].record_fault), None)
    if damaged is not None:
        return f"{damaged}: {parts[damaged].record_fault}"
    other = next((name for name in others if parts[name].provenance != parts[first].provenance), None)
    return "" if other is None else f"{other} has another record than {first}"
