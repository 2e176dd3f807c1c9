"""The safetensors format: an 8-byte header length, a JSON header, then the data without holes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from ..errors import CorruptError, UnsupportedError
from ..storage.source import Stamp
from ..tensors import BY_SAFETENSORS, Storage, TensorSpec, UnsupportedTensor, make_spec
from .file_plan import FilePlan, OutTensor
from .header import PROVENANCE, Header, parse_provenance

MAX_HEADER = 100_000_000  # the library's own limit
_PARTS = "DCP_SHARDING_INFO"  # where in the tensors those of this file begin, of HuggingFaceStorageWriter
MAX_DIMENSIONS = 64  # torch's own; keeps the product of a lying shape small


def read(path: Path) -> Header:
    """Read the header of a safetensors file, trusting none of its numbers.

    What ``__metadata__`` says of tied tensors is taken up: see `_is_tie`.

    Raises:
        CorruptError: truncated, or offsets that overlap, leave holes or do not fit the shapes.
        UnsupportedError: the tensors in it are parts of larger ones.
    """
    with path.open("rb") as file:
        stamp = Stamp.of(path, file.fileno())
        size = stamp.nbytes
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if size < 8 or length > MAX_HEADER or 8 + length > size:
            raise CorruptError(f"{path}: truncated: its header is {length} bytes, the file {size}. Get a fresh copy.")
        raw = file.read(length)
    listing = _KNOWN.get(raw)
    if listing is None:
        listing = _KNOWN[raw] = _listing(path, raw)
    position, payload = listing.end, size - 8 - length
    if position != payload:
        what = "truncated" if position > payload else "longer than its header says"
        raise CorruptError(f"{path}: {what}: {position} bytes of data declared, {payload} there. Get a fresh copy.")
    metadata = dict(listing.metadata)
    provenance = parse_provenance(metadata.get(PROVENANCE))
    return Header(
        path,
        "safetensors",
        listing.tensors,
        (stamp,),
        metadata=metadata,
        provenance=provenance,
        pattern=listing,
        lent=True,
    )


@dataclass(frozen=True, eq=False)
class _Listing:
    """What a header says, in whichever file it stands: what its bytes alone decide.

    Attributes:
        tensors: by name, in the file that it was read from first.
        end: how long the data are.
    """

    tensors: dict[str, TensorSpec | UnsupportedTensor]
    metadata: dict[str, str]
    end: int


# The files of a series mostly have the same header, byte for byte; it is known as long as one of them is in use.
_KNOWN: WeakValueDictionary[bytes, _Listing] = WeakValueDictionary()


def _listing(path: Path, raw: bytes) -> _Listing:
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_checked)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: its header is no valid JSON ({error}). The file is damaged.") from error
    if not isinstance(entries, dict):
        raise CorruptError(f"{path}: its header is no JSON object. The file is damaged.")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptError(f"{path}: its __metadata__ is not a map of text to text. The file is damaged.")
    if _PARTS in metadata:
        raise UnsupportedError(
            f"{path}: holds the parts of tensors that one process saved, and is no checkpoint by itself. "
            "Put the parts together first: consolidate_safetensors_files of torch.distributed.checkpoint does it, "
            "or enable_consolidation where they are saved."
        )
    tensors: dict[str, TensorSpec | UnsupportedTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        tensors[name], begin, end = _parse(path, name, entry, base=8 + len(raw))
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise CorruptError(f"{path}: '{name}' {what}. The header lies; get a fresh copy.")
        position = end
    for alias, kept in metadata.items():
        if alias not in tensors and kept in entries and _is_tie(alias, kept):
            tensors[alias] = tensors[kept]
    return _Listing(tensors, metadata, position)


def _is_tie(alias: str, kept: str) -> bool:
    """True if an entry of ``__metadata__`` is a tensor left out, with the name of the one it was tied to.

    So ``safetensors.torch.save_model`` records it. ``license``, ``author`` and the like are no names of tensors,
    whatever stands in them: an alias has a dot, or ends as the other name does.
    """
    return "." in alias or alias == kept.rpartition(".")[2]


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands in it twice")
    if not all(map(str.isascii, entries)):
        "".join(entries).encode()  # a JSON escape can spell half a character, which has no encoding
    return entries


def _parse(path: Path, name: str, entry: Any, *, base: int) -> tuple[TensorSpec | UnsupportedTensor, int, int]:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptError(f"{path}: the entry of '{name}' is incomplete. The file is damaged.") from error
    whole = isinstance(shape, list) and {type(begin), type(end), *map(type, shape)} == {int}
    if not whole or not 0 <= begin <= end or len(shape) > MAX_DIMENSIONS:
        raise CorruptError(f"{path}: the entry of '{name}' holds impossible numbers. The file is damaged.")
    dtype = BY_SAFETENSORS.get(code) if isinstance(code, str) else None
    if dtype is None or dtype.name == "float4_e2m1fn_x2":
        return UnsupportedTensor(f"of dtype {code}"), begin, end
    spec = make_spec(dtype, tuple(shape), Storage(path, base + begin, end - begin))
    if spec.nbytes != end - begin:
        raise CorruptError(
            f"{path}: '{name}' of shape {shape} and dtype {code} needs {spec.nbytes} bytes, its header gives "
            f"{end - begin}. The file is damaged; get a fresh copy."
        )
    return spec, begin, end


def plan(
    tensors: Mapping[str, OutTensor],
    *,
    name: str,
    metadata: Mapping[str, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    untie: bool = False,
) -> FilePlan:
    """Lay out a safetensors file. Tied names (one OutTensor under several names) are written once.

    Args:
        tensors: what to write, by name.
        name: file name, for messages and sharded outputs.
        metadata: goes into ``__metadata__``, as it is.
        provenance: goes there, too, as JSON.
        untie: write a tied tensor under each of its names instead of once with aliases in the metadata
            (where `_is_tie` would not know a name again, it is written in any case).

    Raises:
        UnsupportedError: a dtype that the format does not have.
    """
    metadata = {"format": "pt", **(metadata or {})}
    if provenance is not None:
        metadata[PROVENANCE] = json.dumps(provenance)
    kept: dict[OutTensor, str] = {}
    aliases: dict[str, str] = {}
    unique: dict[str, OutTensor] = {}
    for key, tensor in tensors.items():
        if key == "__metadata__":
            raise UnsupportedError(f"{name}: '{key}' cannot name a tensor in safetensors. Write a .pth file instead.")
        if not untie and tensor in kept and key not in metadata and _is_tie(key, kept[tensor]):
            aliases[key] = kept[tensor]
        else:
            kept.setdefault(tensor, key)
            unique[key] = tensor
        if tensor.dtype.safetensors is None:
            raise UnsupportedError(
                f"'{key}' is {tensor.dtype.name}, which safetensors does not have. "
                "Write a .pth file instead, with `out`."
            )
    entries: dict[str, Any] = {"__metadata__": {**metadata, **aliases}}
    # Large elements first, as the library itself does, so that every tensor is aligned to its own size.
    ordered = sorted(unique.items(), key=lambda item: -item[1].dtype.itemsize)
    position = 0
    slots: list[tuple[OutTensor, int]] = []
    for key, tensor in ordered:
        end = position + tensor.nbytes
        entries[key] = {
            "dtype": tensor.dtype.safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        slots.append((tensor, position))
        position = end
    try:
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnsupportedError(f"{name}: a name in it is no Unicode text. Write a .pth file instead.") from error
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        raise UnsupportedError(
            f"{name}: a header of {len(header)} bytes is over the limit of {MAX_HEADER}. Write a .pth file instead."
        )
    base = 8 + len(header)
    head = struct.pack("<Q", len(header)) + header
    return FilePlan(
        name=name,
        size=base + position,
        slots=tuple((tensor, base + offset) for tensor, offset in slots),
        patches=lambda crcs: [(0, head)],
        needs_crc=False,
    )
