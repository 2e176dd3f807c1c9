"""The safetensors format: an 8-byte header length, a JSON header, then the data without gaps."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import JSONDecoder
from pathlib import Path
from sys import intern
from typing import Any
from weakref import WeakValueDictionary

from ..errors import AlignmentError, CorruptError, UnsupportedError
from ..storage.source import InputFile
from ..storage.splice import Span, Splice, whole_blocks
from ..tensors import BY_SAFETENSORS, Storage, TensorSpec, UnsupportedTensor, make_spec
from .file_plan import FilePlan, OutTensor, Payload, constant
from .format import Format, Named, Renaming, Writing
from .header import PROVENANCE, Header, damage, parse_provenance
from .json_file import parse_json
from .template import Template

MAX_HEADER = 100_000_000
"""Bytes; the library's own limit."""
# Keys of HuggingFaceStorageWriter: the offsets of the chunks in a file, and a version.
_CHUNKS, _CHUNKS_VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"
_UNSPLIT = re.compile(r"model-\d+-of-\d+\.safetensors")  # its file of whole tensors, saved by one process
_MAX_DIMENSIONS = 64  # torch's own limit; bounds the product of a false shape
_METADATA = "__metadata__"
_SPACE = " \t\n\r"  # of JSON
# How headers begin that the library wrote.
_METADATA_FIRST = re.compile(r'\{[ \t\n\r]*"__metadata__"[ \t\n\r]*:[ \t\n\r]*')

Tensors = dict[str, TensorSpec | UnsupportedTensor]


class Safetensors(Format):
    """The safetensors format."""

    name = "safetensors"
    suffixes = (".safetensors",)
    usual_suffix = ".safetensors"
    writes = True

    def sniff(self, path: Path, start: bytes) -> bool:
        return start[8:9] == b"{"

    def read(self, path: Path) -> Header:
        """Read the header of a safetensors file, with the tied tensors that ``__metadata__`` records (`_is_tie`).

        Raises:
            CorruptError: truncated, or offsets that overlap, leave gaps or do not match the shapes.
            UnsupportedError: its tensors are chunks of larger ones.
        """
        header, offsets = self.parse(path)
        if offsets is not None and not (_UNSPLIT.fullmatch(path.name) and not any(map(any, offsets.values()))):
            raise UnsupportedError(
                f"{path}: holds the tensor chunks of one process, and is not a checkpoint by itself. "
                f"Give the folder that has the files of all processes: {path.parent}"
            )
        return header

    def parse(self, path: Path, start: int = 0) -> tuple[Header, dict[str, tuple[int, ...]] | None]:
        """Read the header of a file that may hold chunks of tensors.

        Args:
            path: of the file.
            start: where it begins, in bytes, if other things are before it.

        Returns:
            The header, and of a file that HuggingFaceStorageWriter wrote, the offsets of each chunk in its tensor.

        Raises:
            CorruptError: as for `read`.
        """
        with InputFile(path) as file:
            size = file.stamp.nbytes - start
            (length,) = struct.unpack("<Q", file.read(start, 8).ljust(8, b"\0"))
            if size < 8 or length > MAX_HEADER or 8 + length > size:
                raise CorruptError(
                    f"{path}: truncated: its header is {length} bytes, the file {size}. Get a fresh copy."
                )
            raw = file.read(start + 8, length)
        data = Storage(path, start + 8 + length, size - 8 - length)
        metadata, text = _split(path, raw)
        key = text, tuple((alias, kept) for alias, kept in metadata.items() if _is_tie(alias, kept))
        template = _KNOWN.get(key) or _parse(path, text, metadata, data)
        if template.nbytes != data.nbytes:
            what = "truncated" if template.nbytes > data.nbytes else "longer than its header says"
            raise CorruptError(
                f"{path}: {what}: {template.nbytes} bytes of data declared, {data.nbytes} found. Get a fresh copy."
            )
        _KNOWN[key] = template
        metadata = {**metadata, **template.metadata}
        offsets = _offsets(path, metadata.pop(_CHUNKS), template.content) if _CHUNKS in metadata else None
        if offsets is not None:
            metadata.pop(_CHUNKS_VERSION, None)
        shift = data.offset - template.base
        provenance = parse_provenance(metadata.get(PROVENANCE))
        header = Header(
            path,
            self,
            template.content,
            (file.stamp,),
            metadata=metadata,
            provenance=provenance,
            record_fault=damage(metadata.get(PROVENANCE), provenance),
            template=template,
            places={template.files[0]: (path, shift)} if shift or template.files[0] != path else {},
        )
        return header, offsets

    def plan(self, content: Mapping[str, OutTensor], writing: Writing) -> tuple[FilePlan, ...]:
        """Lay out a safetensors file.

        A tied tensor (one OutTensor under several names) is written once with aliases in the metadata, unless
        `writing.untie`; a name that `_is_tie` would not recognise as an alias is always written.

        Raises:
            UnsupportedError: the format lacks a dtype, or a name is not allowed.
        """
        name = writing.name
        metadata = {"format": "pt", **writing.metadata}
        if writing.provenance is not None:
            metadata[PROVENANCE] = json.dumps(writing.provenance)
        kept: dict[OutTensor, str] = {}
        aliases: dict[str, str] = {}
        unique: dict[str, OutTensor] = {}
        for key, tensor in content.items():
            if key == _METADATA:
                raise UnsupportedError(
                    f"{name}: '{key}' cannot name a tensor in safetensors. Write a .pth file instead."
                )
            if not writing.untie and tensor in kept and key not in metadata and _is_tie(key, kept[tensor]):
                aliases[key] = kept[tensor]
            else:
                kept.setdefault(tensor, key)
                unique[key] = tensor
            if tensor.dtype.safetensors is None:
                raise UnsupportedError(
                    f"'{key}' is {tensor.dtype.name}, which safetensors does not support. "
                    "Write a .pth file instead, with `out`."
                )
        entries: dict[str, Any] = {_METADATA: {**metadata, **aliases}}
        position = 0
        offsets: list[tuple[OutTensor, int]] = []
        # Large elements first, as in the library, so that every tensor is aligned to its element size.
        for key, tensor in sorted(unique.items(), key=lambda item: -item[1].dtype.itemsize):
            end = position + tensor.nbytes
            entries[key] = {
                "dtype": tensor.dtype.safetensors,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            offsets.append((tensor, position))
            position = end
        try:
            header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UnsupportedError(f"{name}: a tensor name is not valid Unicode. Write a .pth file instead.") from error
        header += b" " * (-len(header) % 8)
        if len(header) > MAX_HEADER:
            raise UnsupportedError(
                f"{name}: a header of {len(header)} bytes is over the limit of {MAX_HEADER}. Write a .pth file instead."
            )
        base = 8 + len(header)
        payloads = [Payload(tensor, base + offset) for tensor, offset in offsets]
        start = constant(0, struct.pack("<Q", len(header)) + header)
        return (FilePlan(name, base + position, (start, *payloads)),)

    def rename(self, header: Header) -> Named:
        return _Named(header)


SAFETENSORS = Safetensors()


@dataclass(frozen=True, eq=False)
class _Parsed(Template):
    """The parsed tensors of a header.

    Attributes:
        base: offset of the data, in bytes.
        nbytes: length of the data.
        metadata: of a header in which it is not first.
    """

    base: int
    nbytes: int
    metadata: dict[str, str]


_KNOWN: WeakValueDictionary[tuple[str, tuple[tuple[str, str], ...]], _Parsed] = WeakValueDictionary()
"""Templates by (header text after the metadata, ties in the metadata), kept while a header uses them."""


def _split(path: Path, raw: bytes) -> tuple[dict[str, str], str]:
    """Return the metadata of a header if it is first, and the text after it."""
    metadata: Any = {}
    at = 0
    # A tensor takes 50 bytes with one brace and two brackets; an empty list or dict takes 30 times its two bytes.
    if raw.count(b"{") > 250_000 + len(raw) // 16 or raw.count(b"[") > 250_000 + len(raw) // 8:
        raise CorruptError(f"{path}: its header has more lists and objects than tensors need. The file is damaged.")
    try:
        text = raw.decode()
        if (first := _METADATA_FIRST.match(text)) is not None:
            metadata, at = _STRICT.raw_decode(text, first.end())
            _check_portable(metadata)
        rest = text[at:].strip(_SPACE)
        if at and rest != "}" and (rest[:1] != "," or rest[1:].lstrip(_SPACE)[:1] == "}"):
            raise ValueError("no entry follows its __metadata__")
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: its header is not valid JSON ({error}). The file is damaged.") from error
    return _metadata(path, metadata), rest


def _parse(path: Path, text: str, metadata: Mapping[str, str], data: Storage) -> _Parsed:
    """Parse a header; see `_split` for its text and metadata."""
    split = not text.startswith("{")
    entries = _entries(path, "{" + text.removeprefix(",") if split else text)
    if split and _METADATA in entries:
        raise CorruptError(f"{path}: its header has two entries named {_METADATA}. The file is damaged.")
    inside = _metadata(path, entries.pop(_METADATA, None))
    tensors, nbytes = _tensors(path, entries, data)
    for alias, kept in (inside or metadata).items():
        if alias not in tensors and kept in entries and _is_tie(alias, kept):
            tensors[alias] = tensors[kept]
    return _Parsed(tensors, (path,), data.offset, nbytes, inside)


def _metadata(path: Path, metadata: object) -> dict[str, str]:
    """Return the metadata that JSON has; null stands for none, as for the safetensors library."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptError(f"{path}: its __metadata__ is not a map of text to text. The file is damaged.")
    return metadata


def _offsets(path: Path, text: str, tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name to offsets in the whole tensor, in the order of the record."""
    try:
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path}: its {_CHUNKS} is not a map of names to offsets. The file is damaged.") from error
    if offsets.keys() != tensors.keys():
        raise CorruptError(f"{path}: its {_CHUNKS} does not list the tensors of the file. The file is damaged.")
    if not all(_INTEGERS.issuperset(map(type, each)) for each in offsets.values()):
        raise CorruptError(f"{path}: its {_CHUNKS} holds impossible numbers. The file is damaged.")
    return offsets


def _entries(path: Path, text: str) -> dict[str, Any]:
    """Parse a header; refuse duplicate names on either level."""
    try:
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise CorruptError(f"{path}: its header is not a JSON object. The file is damaged.")
        # Each (name, value) has a colon, so the counts differ if one pair has replaced another.
        pairs = len(entries) + sum([len(entry) for entry in entries.values() if type(entry) is dict])
        if text.count(":") != pairs or "-0" in text:
            entries = _STRICT.decode(text)
        if pairs != 4 * len(entries) or "\\u" in text:  # a key that is not known, or an escape
            _check_portable(entries)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: its header is not valid JSON ({error}). The file is damaged.") from error
    return entries  # type: ignore[no-any-return]


def _check_portable(entries: Any) -> None:
    """Raise ValueError for what Python alone reads in JSON: NaN, infinity, and a lone surrogate as an escape."""
    json.dumps(entries, ensure_ascii=False, allow_nan=False).encode()


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("it has a duplicate name")
    return entries


def _integer(digits: str) -> int:
    if digits == "-0":  # the safetensors library takes it for a fraction
        raise ValueError("it has a whole number -0")
    return int(digits)


_STRICT = JSONDecoder(object_pairs_hook=_checked, parse_int=_integer)


def _is_tie(alias: str, kept: str) -> bool:
    """True if an entry of ``__metadata__`` maps a tied name to the name stored in its place.

    ``safetensors.torch.save_model`` records ties this way. Entries such as ``license`` or ``author`` are told apart by
    their keys: an alias contains a dot, or is the last component of the other name.
    """
    return "." in alias or alias == kept.rpartition(".")[2]


def _tensors(path: Path, entries: Mapping[str, Any], data: Storage) -> tuple[Tensors, int]:
    """Return the spec of each entry, and the length of the data; refuse gaps and overlaps."""
    tensors: Tensors = {}  # all files have one string for a name
    sizes_of: dict[tuple[Any, ...], tuple[tuple[int, ...], tuple[int, ...], int]] = {}
    position, in_order = 0, True
    for name, entry in entries.items():
        try:
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise CorruptError(f"{path}: the entry of '{name}' is incomplete. The file is damaged.") from error
        sound = type(shape) is list and _INTEGERS.issuperset(map(type, (begin, end, *shape)))
        if not sound or not 0 <= begin <= end or len(shape) > _MAX_DIMENSIONS:
            raise CorruptError(f"{path}: the entry of '{name}' holds impossible numbers. The file is damaged.")
        in_order = in_order and begin == position
        position = end
        dtype = _DTYPES.get(code) if type(code) is str else None
        if dtype is None:
            tensors[intern(name)] = UnsupportedTensor(f"of dtype {code}")
            continue
        key = (dtype, *shape)
        known = sizes_of.get(key)
        if known is None or known[2] != end - begin:
            spec = make_spec(dtype, tuple(shape), Storage(path, data.offset + begin, end - begin))
            if spec.nbytes != end - begin:
                raise CorruptError(
                    f"{path}: '{name}' of shape {shape} and dtype {code} needs {spec.nbytes} bytes, its header gives "
                    f"{end - begin}. The file is damaged; get a fresh copy."
                )
            known = sizes_of[key] = spec.shape, spec.stride, spec.nbytes
        sizes, strides, nbytes = known
        start, odd = divmod(begin, dtype.itemsize)
        if odd:
            tensors[intern(name)] = TensorSpec(dtype, sizes, strides, 0, Storage(path, data.offset + begin, nbytes))
        else:
            tensors[intern(name)] = TensorSpec(dtype, sizes, strides, start, data)
    return tensors, position if in_order else _check_spans(path, entries)


_INTEGERS = {int}
_DTYPES = {code: dtype for code, dtype in BY_SAFETENSORS.items() if code != "F4"}


def _check_spans(path: Path, entries: Mapping[str, Any]) -> int:
    """Refuse gaps and overlaps in the data; return its length."""
    position = 0
    for begin, end, name in sorted((*entry["data_offsets"], name) for name, entry in entries.items()):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise CorruptError(f"{path}: '{name}' {what}. The file is damaged; get a fresh copy.")
        position = end
    return position


@dataclass(frozen=True, slots=True, eq=False)
class _Named:
    header: Header

    @property
    def tree(self) -> Any:
        return self.header.tree

    def renamed(self, renamings: Sequence[Renaming]) -> tuple[Splice, ...]:
        path = self.header.files[0].path
        names = renamings[0].names
        with InputFile(path) as file:
            (length,) = struct.unpack("<Q", file.read(0, 8))
            entries = parse_json(file.read(8, length))
        metadata = entries.get(_METADATA, {})
        ties = {key for key in metadata if key in self.header.tree and key not in entries}
        renamed = {names.get(key, key): value for key, value in entries.items()}
        if _METADATA in names.values():
            raise UnsupportedError(f"{path}: '{_METADATA}' cannot name a tensor in safetensors.")
        if metadata:
            aliases = {
                names.get(key, key) if key in ties else key: names.get(value, value) if key in ties else value
                for key, value in metadata.items()
            }
            if len(aliases) != len(metadata):
                raise AlignmentError(
                    f"{path}: a tied tensor would have the name of another entry of {_METADATA}. Rename it first."
                )
            renamed[_METADATA] = aliases
        header = _padded(json.dumps(renamed, separators=(",", ":"), ensure_ascii=False).encode(), length)
        if len(header) > MAX_HEADER:
            raise UnsupportedError(f"{path}: its header would be over the limit of {MAX_HEADER} bytes.")
        return (Splice(path, (struct.pack("<Q", len(header)), header, Span(8 + length, self.header.nbytes))),)


def _padded(header: bytes, length: int) -> bytes:
    """Pad a header so that the data moves by whole blocks, or to a multiple of 8 if that exceeds the limit."""
    wanted = length + whole_blocks(len(header) - length)
    return header.ljust(wanted if wanted <= MAX_HEADER else len(header) + -len(header) % 8)
