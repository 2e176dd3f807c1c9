"""What a file format is: one object that says how its files are called, recognised, read, written and renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """How an output is to be written; a format takes from it what it can.

    Attributes:
        name: of the file, for messages and in sharded outputs.
        provenance: what the output says about where it came from.
        metadata: text by key, for formats that keep such.
        untie: write a tied tensor under each of its names instead of once.
        max_bytes: the largest payload of a file of a folder, in bytes.
        like: a checkpoint whose shards and file names a folder takes over.
        stem: how the shards are called; ``model``, or as those of `like`, if None.
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
    """What becomes of the names in one state dict.

    Attributes:
        state: the dict, as it is in the tree.
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
        """Describe the file with other names.

        Raises:
            ReadError: the names are written in a way that cannot be followed.
        """


class Format:
    """A file format. A new one is a subclass with an instance in `ckpt_tools.formats.FORMATS`.

    Attributes:
        name: as in reports, such as ``safetensors``.
        suffixes: of its files; the first is the usual one. Empty for folders.
        folder: a checkpoint is a folder, not a file.
        nests: it keeps the objects around the weights: dicts in dicts, numbers, text. If not: names to tensors.
        writes: it can be written.
        usual_suffix: of a file that is written from such checkpoints, if nobody chooses another.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    folder: bool = False
    nests: bool = False
    writes: bool = False
    usual_suffix: str = ".pth"

    @property
    def written_as(self) -> Format:
        """The format in which a changed checkpoint of this format is written."""
        return self

    def sniff(self, path: Path, start: bytes) -> bool:
        """Return True if a file that begins with these bytes, or a folder (then there are none), has this format."""
        raise NotImplementedError

    def read(self, path: Path) -> Header:
        """Read the header of a checkpoint, trusting none of its numbers.

        Raises:
            ReadError: truncated, damaged, or of a form that is not read.
        """
        raise NotImplementedError

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        """Lay out a checkpoint; a pure function.

        Args:
            content: a tree of plain data with OutTensors if the format nests, else a dict of names to OutTensors. One
                OutTensor under several names is tied.

        Returns:
            Its files, in the order of writing; one unless it is a folder.

        Raises:
            UnsupportedError: the format cannot hold it.
        """
        raise UnsupportedError(f"{writing.name}: {self.name} is read, not written. Choose another name for the output.")

    def rename(self, header: Header) -> Named:
        """Read a file, whose header is known, once more for the places of its names.

        Raises:
            UnsupportedError: names cannot be changed in place in this format.
        """
        raise UnsupportedError(f"{header.path}: names of a {self.name} checkpoint cannot be changed as it stands.")

    def __repr__(self) -> str:
        return f"<Format {self.name}>"


FORMATS: list[Format] = []
"""All formats, in the order in which they are tried; `ckpt_tools.formats` fills it."""


def read_single(path: Path) -> Header:
    """Read the header of a file, by its content and never by its suffix.

    Raises:
        ReadError: missing, of no known format, or damaged.
    """
    if not store_of(path).is_file(path) and store_of(path).is_folder(path):
        raise ReadError(f"{path}: neither a file nor a folder of a checkpoint.")
    with InputFile(path) as file:
        start = file.read(0, _START)
    if not start:
        raise CorruptError(f"{path}: empty file. Get a fresh copy.")
    for each in FORMATS:
        if each.sniff(path, start):
            return each.read(path)
    if start[257:262] == b"ustar":
        raise UnsupportedError(
            f"{path}: a tar file; torch has not written any since 0.1.10. Load and save it with torch once."
        )
    raise NotACheckpointError(
        f"{path}: not a checkpoint: neither a torch file (zip or legacy) nor safetensors.{_hint(start)}"
    )


_START = 512  # bytes that tell a format


def _hint(start: bytes) -> str:
    if start.startswith(b"version https"):
        return " It is a Git LFS pointer; run git lfs pull."
    if start.startswith(b"\x80"):
        return " It is a pickle that torch.save did not write."
    if start.startswith(b"\x89HDF"):
        return " It is an HDF5 file."
    return ""
