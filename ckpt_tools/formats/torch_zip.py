"""The torch format since 1.6: an uncompressed zip with one pickle and one entry per storage.

``<root>/data.pkl`` is the saved object, ``<root>/data/<key>`` a storage, ``<root>/byteorder`` the byte order.
``<root>/ckpt_tools.json`` is the provenance; `torch.load` ignores unknown entries.
"""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ..errors import CorruptError, NotACheckpointError
from ..storage.source import InputFile
from ..storage.splice import Span
from ..tensors import DType, Storage
from . import pickle_edit, pickle_read
from .file_plan import Computed, FilePlan, OutTensor, Payload, Segment, constant
from .format import Format, Named, Writing
from .header import PROVENANCE, Header, damage, parse_provenance
from .json_file import LARGEST
from .pickle_edit import NamedPickle
from .pickle_write import dump
from .rank_join import whole_alone
from .template import ArchiveTemplate
from .zip import END_SIZE, Archive, NewEntry, end_of, find_directory, replaced

_PROVENANCE_ENTRY = f"{PROVENANCE}.json"
_FILES = (".pth", ".ckpt", ".safetensors")  # of weights, in a zip of something else, such as stable-baselines3's


class TorchZip(Format):
    """The torch format since 1.6."""

    name = "torch-zip"
    suffixes = (".pth", ".pt", ".bin", ".ckpt", ".tar")
    nests = True
    writes = True

    def sniff(self, path: Path, start: bytes) -> bool:
        return start.startswith(b"PK\3\4")

    def read(self, path: Path) -> Header:
        """Read the header of a torch zip file.

        Raises:
            NotACheckpointError: a zip that torch.save did not write.
            UnsupportedError: compressed entries, or one rank's part of a checkpoint.
            CorruptError: truncated or damaged.
        """
        return whole_alone(self.parse(path))

    def parse(self, path: Path) -> Header:
        """Read the header of a file that may be one rank's part of a checkpoint; otherwise as `read`."""
        with InputFile(path) as file:
            start, directory = find_directory(file, 0, file.stamp.nbytes)
            key = file.stamp.nbytes, start
            known = KNOWN.get(key)
            if known is not None and known.describes(file, directory) and known.shareable:
                return Header(
                    path,
                    self,
                    known.content,
                    (file.stamp,),
                    Counter(known.foreign),
                    template=known,
                    places={known.files[0]: (path, 0)},
                )
            archive = Archive(file, where=str(path))
            root, tree, foreign = read_archive(archive, path, where=str(path))
            made = f"{root}/{_PROVENANCE_ENTRY}"
            said = archive.read(made, LARGEST) if made in archive.entries else None
        template = None
        if archive.usual and made not in archive.entries and all(n.startswith(f"{root}/") for n in archive.entries):
            template = ArchiveTemplate(tree, (path,), Counter(foreign), archive, f"{root}/".encode())
            KNOWN[key] = template
        provenance = parse_provenance(said)
        return Header(
            path,
            self,
            tree,
            (file.stamp,),
            foreign,
            provenance=provenance,
            record_fault=damage(said, provenance),
            template=template,
        )

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        """Lay out a torch zip file; see `pickle_write.plain` for its content."""
        pickled, storages = dump(content, name=writing.name)
        contents: list[tuple[str, bytes | OutTensor]] = [("data.pkl", pickled), ("byteorder", b"little")]
        contents += [(f"data/{key}", tensor) for key, tensor in enumerate(storages)]
        contents.append(("version", b"3\n"))
        if writing.provenance is not None:
            contents.append((_PROVENANCE_ENTRY, json.dumps(writing.provenance, indent=1).encode()))
        segments: list[Segment] = []
        entries: list[tuple[NewEntry, int | None]] = []  # with the checksum of its content; None for a tensor
        end = 0
        for short, part in contents:
            crc = None
            if isinstance(part, OutTensor):
                entry = NewEntry(f"archive/{short}".encode(), part.nbytes, end)
                segments.append(Computed(end, entry.data - end, (part,), entry.local_header_of))
                segments.append(Payload(part, entry.data))
            else:
                entry = NewEntry(f"archive/{short}".encode(), len(part), end)
                crc = zlib.crc32(part)
                segments.append(constant(end, entry.local_header(crc) + part))
            entries.append((entry, crc))
            end = entry.end
        size = sum(entry.line_size for entry, _ in entries)

        def directory(checksums: Sequence[int]) -> bytes:
            crcs = iter(checksums)
            lines = [entry.line(next(crcs) if crc is None else crc) for entry, crc in entries]
            return b"".join(lines) + end_of(end, size, len(lines))

        segments.append(Computed(end, size + END_SIZE, tuple(storages), directory))
        return (FilePlan(writing.name, end + size + END_SIZE, tuple(segments)),)

    def rename(self, header: Header) -> Named:
        path = header.files[0].path
        with InputFile(path) as file:
            try:
                archive = Archive(file, where=str(path))
            except CorruptError as error:
                raise CorruptError(f"{path}: changed while it was read. Try again when it is whole.") from error
            name = f"{root_of(archive.entries, where=str(path))}/data.pkl"
            traced = pickle_edit.trace(archive.read(name), where=str(path))

        def around(pickled: bytes) -> tuple[bytes | Span, ...]:
            with InputFile(path) as file:
                return replaced(Archive(file, where=str(path)), name, pickled, where=str(path))

        return NamedPickle(path, traced, around)


TORCH_ZIP = TorchZip()

KNOWN: WeakValueDictionary[tuple[int, int], ArchiveTemplate] = WeakValueDictionary()
"""Templates by (file size, offset of the central directory), kept while a header uses them."""


def read_archive(
    archive: Archive, path: Path, *, where: str, script: bool = False, torch_values: bool = True
) -> tuple[str, Any, Counter[str]]:
    """Read an archive that `torch.save` wrote.

    Args:
        path: of the file, for the specs.
        where: for messages.
        script: it is of TorchScript instead, see `root_of`.
        torch_values: as `pickle_read.load` takes it.

    Returns:
        (the root folder name of its entries, the object tree, unknown globals of the pickle with counts).

    Raises:
        NotACheckpointError: a zip that torch.save did not write.
        UnsupportedError: compressed entries.
        CorruptError: truncated or damaged.
    """
    entries = archive.entries
    root = root_of(entries, where=where, script=script)
    big_endian = is_big_endian(archive, root)

    def locate(key: str, dtype: DType | None, numel: int, _view: Any) -> Storage:
        name = f"{root}/data/{key}"
        entry = entries.get(name)
        nbytes = numel * (dtype.itemsize if dtype else 1)
        if entry is None or entry.size != nbytes:
            has = "no such entry" if entry is None else f"{entry.size} bytes"
            raise CorruptError(
                f"{where}: storage {key} should have {nbytes} bytes; there is {has}. The file is damaged."
            )
        return Storage(path, archive.offset_of(name), nbytes, big_endian)

    data = io.BytesIO(archive.read(f"{root}/data.pkl"))
    tree, foreign = pickle_read.load(data, locate, where=where, torch_values=torch_values)
    return root, tree, foreign


def is_big_endian(archive: Archive, root: str) -> bool:
    """Return True if an archive of torch says that its numbers have the most significant byte first."""
    name = f"{root}/byteorder"
    return name in archive.entries and archive.read(name, LARGEST).strip() == b"big"


def root_of(entries: Mapping[str, Any], *, where: str, script: bool = False) -> str:
    """Return the name of the folder that is around all in an archive with a torch pickle.

    Args:
        entries: by name.
        where: for messages.
        script: it is of TorchScript, which has constants of a program, too.

    Raises:
        NotACheckpointError: it is not such an archive.
    """
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1 or (f"{roots[0]}/constants.pkl" in entries) is not script:
        found = next((name for name in entries if name.endswith(_FILES)), None)
        holds = "no data.pkl inside" if found is None else f"a file {found} inside; unpack it, and give that"
        raise NotACheckpointError(f"{where}: a zip file, but not one that torch.save wrote ({holds}).")
    return roots[0]
