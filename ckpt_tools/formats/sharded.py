"""Sharded checkpoints: an index that maps tensor names to files beside it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError, NotACheckpointError, UsageError
from ..storage.source import Stamp
from .file_plan import OutTensor
from .header import Header

INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
"""A folder with one of these is one checkpoint in the manner of Hugging Face."""
_INDEXES = tuple(f"{stem}.index.json" for stem in SINGLE)

ReadFile = Callable[[Path], Header]


def checkpoint_inside(folder: Path) -> Path | None:
    """Return the index, or the single file, that makes a folder one checkpoint; None if it is none."""
    for name in (*_INDEXES, *SINGLE):
        if (folder / name).is_file():
            return folder / name
    indexes = sorted(p for p in folder.iterdir() if p.name.endswith(INDEX_SUFFIXES))
    return indexes[0] if len(indexes) == 1 else None


def read_folder(folder: Path, read_file: ReadFile) -> Header:
    """Read the header of a folder that is one checkpoint.

    Raises:
        NotACheckpointError: nothing in it says so.
    """
    inside = checkpoint_inside(folder)
    if inside is None:
        files = any(child.is_file() for child in folder.iterdir())
        raise NotACheckpointError(
            f"{folder}: a folder without model.safetensors, an index.json or *.distcp: no checkpoint."
            + (" Give one of its files." if files else "")
        )
    if inside.name.endswith(INDEX_SUFFIXES):
        return read_index(inside, folder, read_file)
    return replace(read_file(inside), path=folder)


def read_index(index: Path, path: Path, read_file: ReadFile) -> Header:
    """Read the headers of all shards that an index names.

    Raises:
        CorruptError: the index is no index, points outside its folder, or its shards hold other names.
    """
    with index.open("rb") as file:
        stamp = Stamp.of(index, file.fileno())
    weight_map = read_weight_map(index)
    folder = index.parent
    headers = {}
    for name in dict.fromkeys(weight_map.values()):
        shard = member(folder, name, index)
        headers[name] = read_file(shard)
    tree: dict[str, Any] = {}
    for key, name in weight_map.items():
        tensors = headers[name].tree
        if not isinstance(tensors, dict) or key not in tensors:
            raise CorruptError(f"{index}: says that {name} holds '{key}'; it does not. Get a fresh copy.")
        tree[key] = tensors[key]
    for name, header in headers.items():
        extra = [key for key in header.tree if weight_map.get(key) != name and key not in header.metadata]
        if extra:
            raise CorruptError(
                f"{index}: does not list '{extra[0]}', which stands in {name}. The index is stale; rewrite it."
            )
    foreign: Counter[str] = Counter()
    for header in headers.values():
        foreign.update(header.foreign)
    first = next(iter(headers.values()))
    files = (stamp, *(file for header in headers.values() for file in header.files))
    return Header(path, "sharded", tree, files, foreign, first.metadata, first.provenance, shards=weight_map)


def member(folder: Path, name: str, index: Path) -> Path:
    """Return a file that an index names, if it stands in the folder.

    Raises:
        CorruptError: it is missing, or stands elsewhere.
    """
    if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise CorruptError(f"{index}: points outside its folder ({name!r}); refused.")
    file = folder / name
    # A symlink may leave the folder only as the Hugging Face cache lays its files out: to ../../blobs.
    target = Path(os.path.realpath(file))
    if target.parent != folder.resolve() and target.parent != (folder.resolve() / "../../blobs").resolve():
        raise CorruptError(f"{index}: its shard {name!r} is a link out of the folder ({target}); refused.")
    if not file.is_file():
        raise CorruptError(f"{index}: its shard {name!r} is missing. Get a complete copy.")
    return file


def read_weight_map(index: Path) -> dict[str, str]:
    """Return which file each tensor is in, as an index says.

    Raises:
        CorruptError: it is no index.
    """
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise TypeError("weight_map should map tensor names to file names")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{index}: no index of a sharded checkpoint ({type(error).__name__}: {error}).") from error
    return dict(weight_map)


def parse_size(size: str | int, name: str = "max_shard_size") -> int:
    """Return the bytes in '5GB' (decimal, as Hugging Face counts), '5GiB' or a number.

    Args:
        name: of the parameter, for the message.

    Raises:
        UsageError: no such size, or less than one byte.
    """
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    base = 1024 if match and match[3] else 1000
    nbytes = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if nbytes < 1:
        raise UsageError(f"`{name}={size!r}` is not a size; use e.g. 5GB or 500MB.")
    return nbytes


def plan_shards(
    tensors: Mapping[str, OutTensor],
    *,
    max_bytes: int | None,
    stem: str,
    suffix: str,
    like: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Share names out over files; tied names stay together.

    Args:
        max_bytes: the largest payload of a file; a tensor larger than that has a file of its own.
        stem, suffix: ``model``, ``.safetensors`` gives ``model-00001-of-00002.safetensors``.
        like: name to file of an input whose layout is to be kept, when it names every tensor.

    Returns:
        File name to the tensor names in it, in order.
    """
    if like is not None and max_bytes is None and like.keys() >= tensors.keys():
        groups: dict[str, list[str]] = {}
        for name in tensors:
            groups.setdefault(like[name], []).append(name)
        return {Path(file).stem + suffix: names for file, names in sorted(groups.items())}
    shards: list[list[str]] = [[]]
    filled = 0
    place: dict[OutTensor, int] = {}
    for name, tensor in tensors.items():
        if tensor in place:
            shards[place[tensor]].append(name)
            continue
        if max_bytes is not None and filled and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        place[tensor] = len(shards) - 1
        shards[-1].append(name)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {stem + suffix: shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}{suffix}": names for i, names in enumerate(shards, 1)}


def index_json(shards: Mapping[str, Sequence[str]], tensors: Mapping[str, OutTensor]) -> bytes:
    """Write the index of these shards."""
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in set(tensors.values()))},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def renamed_index(index: Path, names: Mapping[str, str]) -> bytes:
    """Write an index again, with other names for some tensors."""
    content = json.loads(index.read_bytes())
    content["weight_map"] = {names.get(name, name): file for name, file in content["weight_map"].items()}
    return (json.dumps(content, indent=2) + "\n").encode()
