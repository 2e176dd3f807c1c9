"""Renaming: a file with other names for its tensors and not another byte changed, in each format that has one file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import AlignmentError, CorruptError, UnsupportedError
from ..storage.splice import Span, Splice, moved
from . import rezip, safetensors, torch_legacy, torch_zip
from .header import Header
from .pickle_edit import Spelling, differs, spell


@dataclass(frozen=True, slots=True, eq=False)
class Renaming:
    """What becomes of the names in one state dict.

    Attributes:
        state: the dict, as it stands in the tree.
        names: its keys that change, and to what.
        modules: the same for the modules in torch's ``_metadata``, of which two may become one: the last counts.
    """

    state: Mapping[Any, Any]
    names: Mapping[str, str]
    modules: Mapping[str, str]


class Named(Protocol):
    """A file whose names can be changed."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def tree(self) -> Any:
        """What was saved, as in its header."""

    def renamed(self, renamings: Sequence[Renaming]) -> Splice:
        """Lay out the file with other names.

        Raises:
            ReadError: the names are written in a way that cannot be followed.
        """


def read(header: Header) -> Named:
    """Read a file, whose header is known, once more for the places of its names.

    Raises:
        ReadError: damaged, or of a format whose names cannot be changed in place.
    """
    path = header.files[0].path
    if header.format == "safetensors":
        return _Safetensors(header)
    if header.format == "torch-legacy":
        with path.open("rb") as file:
            start, end = torch_legacy.object_span(file, where=str(path))
            file.seek(start)
            return _Legacy(path, spell(file.read(end - start), where=str(path)), Span(start, end), header.nbytes)
    if header.format == "torch-zip":
        record, pickled = torch_zip.pickled(path)
        return _Zip(path, spell(pickled, where=str(path)), record)
    raise UnsupportedError(f"{header.path}: names of a {header.format} checkpoint cannot be changed as it stands.")


def _respelled(spelling: Spelling, renamings: Sequence[Renaming], path: Path) -> bytes:
    wanted = []
    changed: dict[int, dict[str, str]] = {}
    for renaming in renamings:
        metadata = getattr(renaming.state, "_metadata", None)
        for mapping, names in ((renaming.state, renaming.names), (metadata, renaming.modules)):
            if isinstance(mapping, dict) and names:
                wanted += [(key, names[key]) for key in spelling.keys(mapping) if key in names]
                changed.setdefault(id(mapping), {}).update(names)
    try:
        pickled = spelling.respelled(wanted)
    except (CorruptError, UnsupportedError) as error:
        raise UnsupportedError(f"{path}: {error} Load and save it with torch once.") from error
    if differs(spelling.tree, spell(pickled, where=str(path)).tree, changed):
        raise UnsupportedError(
            f"{path}: its pickle does not let names be changed one by one. Load and save it with torch once."
        )
    return pickled


@dataclass(frozen=True, slots=True, eq=False)
class _Zip:
    path: Path
    spelling: Spelling
    record: str

    @property
    def tree(self) -> Any:
        return self.spelling.tree

    def renamed(self, renamings: Sequence[Renaming]) -> Splice:
        pickled = _respelled(self.spelling, renamings, self.path)
        with self.path.open("rb") as file:
            return Splice(self.path, rezip.replace(file, self.record, pickled, where=str(self.path)))


@dataclass(frozen=True, slots=True, eq=False)
class _Legacy:
    path: Path
    spelling: Spelling
    span: Span
    size: int

    @property
    def tree(self) -> Any:
        return self.spelling.tree

    def renamed(self, renamings: Sequence[Renaming]) -> Splice:
        pickled = _respelled(self.spelling, renamings, self.path)
        return Splice(self.path, (Span(0, self.span.start), pickled, Span(self.span.stop, self.size)))


@dataclass(frozen=True, slots=True, eq=False)
class _Safetensors:
    header: Header

    @property
    def path(self) -> Path:
        return self.header.files[0].path

    @property
    def tree(self) -> Any:
        return self.header.tree

    def renamed(self, renamings: Sequence[Renaming]) -> Splice:
        path = self.path
        names = renamings[0].names
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        metadata = entries.get("__metadata__", {})
        # A tensor that was left out, with the name of the one that it was tied to.
        ties = {key for key in metadata if key in self.header.tree and key not in entries}
        renamed = {names.get(key, key): value for key, value in entries.items()}
        if "__metadata__" in names.values():
            raise UnsupportedError(f"{path}: '__metadata__' cannot name a tensor in safetensors.")
        if metadata:
            aliases = {
                names.get(key, key) if key in ties else key: names.get(value, value) if key in ties else value
                for key, value in metadata.items()
            }
            if len(aliases) != len(metadata):
                raise AlignmentError(
                    f"{path}: a tied tensor would have the name of another entry of __metadata__. Rename it first."
                )
            renamed["__metadata__"] = aliases
        head = _spaced(_json(renamed), length)
        if len(head) > safetensors.MAX_HEADER:
            raise UnsupportedError(f"{path}: its header would be over the limit of {safetensors.MAX_HEADER} bytes.")
        return Splice(path, (struct.pack("<Q", len(head)), head, Span(8 + length, self.header.nbytes)))


def _json(entries: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character in __metadata__, which JSON can only spell
        return json.dumps(entries, separators=(",", ":")).encode()


def _spaced(head: bytes, length: int) -> bytes:
    """Pad a header so that the data keep their place, or move by whole blocks where there is room for that."""
    wanted = length + moved(len(head) - length)
    return head.ljust(wanted if wanted <= safetensors.MAX_HEADER else len(head) + -len(head) % 8)
