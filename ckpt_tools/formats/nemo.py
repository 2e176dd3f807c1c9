"""NeMo's archives: a tar file with a configuration, and the weights as a torch zip. Read only."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import CorruptError, UnsupportedError
from ..storage.source import InputFile
from .format import Format
from .header import Header
from .torch_zip import TORCH_ZIP, read_archive
from .zip import Archive

if TYPE_CHECKING:
    from tarfile import TarInfo

_MOST_MEMBERS = 10_000
_LONGEST_RECORD = 4 << 10
"""Bytes of a record of names and times before a member; a hostile file may claim any number."""


class _Bounded:
    """A file for `tarfile`, which reads as many bytes at once as the archive claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, nbytes: int) -> bytes:
        if nbytes > _LONGEST_RECORD:
            raise ValueError(f"a record of {nbytes} bytes")
        return self._file.read(nbytes)


class Nemo(Format):
    """A `.nemo` file of NeMo that is not compressed."""

    name = "nemo"
    suffixes = (".nemo",)
    nests = True

    @property
    def written_as(self) -> Format:
        return TORCH_ZIP

    def sniff(self, path: Path, start: bytes) -> bool:
        return start[257:262] == b"ustar"

    def read(self, path: Path) -> Header:
        """Read the header of the one torch zip in a tar file.

        Raises:
            UnsupportedError: not one `.ckpt` or `.pt` file is in it.
            CorruptError: truncated or damaged.
        """
        with InputFile(path) as file:
            found = [
                member
                for member in _members(file, path)
                if member.isreg() and not member.issparse() and member.name.endswith(".ckpt")
            ]
            if len(found) != 1:
                raise UnsupportedError(
                    f"{path}: a tar file with {len(found)} torch files in it, and a .nemo file has one. "
                    "Unpack it (tar -xf), and give the checkpoint."
                )
            (member,) = found
            archive = Archive(file, member.offset_data, member.size, where=f"{path}: {member.name}")
            _, tree, foreign = read_archive(archive, path, where=f"{path}: {member.name}")
            return Header(path, self, tree, (file.stamp,), foreign)


def _members(file: InputFile, path: Path) -> list[TarInfo]:
    import tarfile  # loads compression modules

    with file.as_file() as whole:
        bounded: Any = _Bounded(whole)
        try:
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                members = [*islice(archive, _MOST_MEMBERS)]
        except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
            raise CorruptError(f"{path}: a damaged tar file ({error}). Get a fresh copy.") from error
    for member in members:
        if member.isreg() and member.offset_data + member.size > file.stamp.nbytes:
            raise CorruptError(f"{path}: a tar file that ends within '{member.name}'. Get a complete copy.")
    return members


NEMO = Nemo()
