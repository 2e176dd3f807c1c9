"""Formats: one object per file format, which recognises, reads, plans and renames its files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CorruptError, NotACheckpointError, ReadError, UnsupportedError
from ..storage.source import InputFile, store_of
from .file_plan import FilePlan
from .header import Header

if TYPE_CHECKING:
    from ..storage.splice import Splice


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """Options of an output; a format ignores those that do not apply to it.

    Attributes:
        name: of the file, for messages and in sharded outputs.
        provenance: the record of how the output was made.
        metadata: text by key, for formats that store it.
        untie: write a tied tensor under each of its names instead of once.
        max_bytes: the largest payload of a file of a folder, in bytes.
        like: a checkpoint whose shards and file names a folder takes over.
        stem: of the names of shards; if None, that of `like` or ``model``.
    """

    name: str
    provenance: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    untie: bool = False
    max_bytes: int | None = None
    like: Header | None = None
    stem: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Renaming:
    """New names in one state dict.

    Attributes:
        state: the dict, as it is in the tree.
        names: old to new, for the keys that change.
        modules: from a state dict to new names for its ``_metadata``, which torch sets; of two modules with one new
            name, the last is kept.
    """

    state: Mapping[Any, Any]
    names: Mapping[str, str]
    modules: Callable[[Mapping[Any, Any]], Mapping[str, str]]


class Named(Protocol):
    """A checkpoint whose tensor names can be changed."""

    @property
    def tree(self) -> Any:
        """The content, as in its header."""

    def renamed(self, renamings: Sequence[Renaming]) -> tuple[Splice, ...]:
        """Describe its files with new names.

        Raises:
            ReadError: a name is not stored as a plain string.
        """


class Format:
    """A file format. A new one is a subclass with an instance in `ckpt_tools.formats.FORMATS`.

    Attributes:
        name: as in reports, such as ``safetensors``.
        suffixes: of its files; the first is the usual one. Empty for folders.
        folder: a checkpoint is a folder, not a file.
        singles: names of files that make their folder a checkpoint.
        indexes: suffixes of files that list the tensors of the folder.
        nests: it stores nested objects (dicts, numbers, text), not only names to tensors.
        export: a model made ready for use; training saves other files, so a folder is not searched for it.
        writes: it can be written.
        keeps_folder: an average that goes into a folder has this format; otherwise it is sharded.
        averaged_note: what the user of such an average has to know.
        rewritten: an edited copy of such a checkpoint can be written, with all that is in it.
        usual_suffix: the default suffix of a file converted from this format.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    folder: bool = False
    singles: tuple[str, ...] = ()
    indexes: tuple[str, ...] = ()
    nests: bool = False
    export: bool = False
    writes: bool = False
    keeps_folder: bool = False
    averaged_note: str = ""
    rewritten: bool = True
    usual_suffix: str = ".pth"

    @property
    def written_as(self) -> Format:
        """The format of edited copies of such a checkpoint."""
        return self

    def sniff(self, path: Path, start: bytes) -> bool:
        """Return True if a file with these first bytes, or a folder (no bytes), has this format."""
        raise NotImplementedError

    def read(self, path: Path) -> Header:
        """Read the header of a checkpoint, trusting none of its numbers.

        Raises:
            ReadError: truncated, damaged or unsupported.
        """
        raise NotImplementedError

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        """Lay out a checkpoint; a pure function.

        Args:
            content: a tree of plain data with OutTensors if the format nests, else a dict of names to OutTensors. An
                OutTensor under several names is tied.

        Returns:
            Its files, in the order of writing; one unless it is a folder.

        Raises:
            UnsupportedError: the format cannot store it.
        """
        raise UnsupportedError(f"{writing.name}: {self.name} is read, not written. Choose another name for the output.")

    def rename(self, header: Header) -> Named:
        """Read the positions of the names in a checkpoint.

        Raises:
            UnsupportedError: names cannot be changed in place in this format.
        """
        raise UnsupportedError(
            f"{header.path}: names of a {self.name} checkpoint cannot be changed in place. "
            "Make plain weights of it first: `convert(to='plain')`."
        )

    def replaced(self, folder: Path, names: Collection[str]) -> Collection[str]:
        """Return the names of files in a folder, an older output, that a new one with files of `names` may replace."""
        return ()

    def __repr__(self) -> str:
        return f"<Format {self.name}>"


FORMATS: list[Format] = []
"""All formats, in the order in which they are tried; `ckpt_tools.formats` fills it."""


def read_single(path: Path) -> Header:
    """Read the header of a single file.

    Raises:
        ReadError: missing, of an unknown format, or damaged.
    """
    if not store_of(path).is_file(path) and store_of(path).is_folder(path):
        raise ReadError(f"{path}: neither a file nor a folder of a checkpoint.")
    with InputFile(path) as file:
        start = file.read(0, _START)
    if not start:
        raise CorruptError(f"{path}: empty file. Get a fresh copy.")
    other: NotACheckpointError | None = None
    for each in FORMATS:
        if each.sniff(path, start):
            try:
                return each.read(path)
            except NotACheckpointError as error:  # several formats are zip files
                other = other or error
    raise other or NotACheckpointError(
        f"{path}: not a checkpoint: neither a torch file (zip or legacy) nor safetensors.{_hint(start)}"
    )


_START = 512  # bytes that identify a format


def _hint(start: bytes) -> str:
    if start.startswith(b"version https"):
        return " It is a Git LFS pointer; run git lfs pull."
    if start.startswith(b"\x80"):
        return " It is a pickle that torch.save did not write."
    if start.startswith(b"\x1f\x8b"):
        return " It is compressed; run gunzip."
    if start.startswith(b"\x89HDF"):
        return " It is an HDF5 file."
    return ""
