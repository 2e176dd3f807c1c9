"""Sharded checkpoints: an index that maps tensor names to files in the same folder."""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sys import intern
from typing import Any
from weakref import WeakValueDictionary

from ..errors import CorruptError, UnsupportedError, UsageError
from ..storage.source import store_of
from ..storage.splice import Splice
from .file_plan import FilePlan, OutTensor, whole_file
from .format import Format, Named, Renaming, Writing, read_single
from .header import Header, record_fault
from .json_file import parse_json, read_small
from .safetensors import SAFETENSORS
from .template import Template
from .torch_zip import TORCH_ZIP

INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
"""A folder with one of these files is a Hugging Face checkpoint."""
FURTHER_MODEL = re.compile(r"(pytorch_)?model_\d+\.(safetensors|bin)")
"""A file with the second model, and so on, of Accelerate; the first has a name of `SINGLE`."""
_INDEXES = tuple(f"{stem}.index.json" for stem in SINGLE)


class Sharded(Format):
    """A folder of safetensors or torch files with an index, or with a single file named as in `SINGLE`."""

    name = "sharded"
    folder = True
    singles = SINGLE
    indexes = INDEX_SUFFIXES
    writes = True

    def sniff(self, path: Path, start: bytes) -> bool:
        if start:
            return path.name.endswith(INDEX_SUFFIXES)
        return store_of(path).is_folder(path) and checkpoint_inside(path) is not None

    def read(self, path: Path) -> Header:
        """Read the header of a folder, or of the folder of an index.

        Raises:
            CorruptError: the index is invalid, leads outside its folder, or differs from its shards.
            UnsupportedError: the folder has several models.
        """
        inside = checkpoint_inside(path) if store_of(path).is_folder(path) else None
        if inside is not None and inside.name in SINGLE:
            further = sorted(filter(FURTHER_MODEL.fullmatch, store_of(path).names(path)))
            if further:
                raise UnsupportedError(
                    f"{path}: has several models: {', '.join((inside.name, *further))}. Give one by the path of its "
                    f"file, such as {path / further[0]}."
                )
        inside = inside or path
        if inside.name.endswith(INDEX_SUFFIXES):
            return _read_index(self, inside, path)
        return replace(read_single(inside), path=path)

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        like, stem = writing.like, writing.stem
        shards_like = like.shards if like is not None else {}
        as_torch = stem is None and any(name.endswith(TORCH_ZIP.suffixes) for name in shards_like.values())
        suffix = ".bin" if as_torch else ".safetensors"
        single = "" if like is None else like.files[0].path.name.removesuffix(".index.json")
        if stem is None:
            stem = "pytorch_model" if as_torch else "model"
        if single in SINGLE and single.endswith(suffix):
            stem = single.removesuffix(suffix)  # diffusers and PEFT expect other names
        shards = plan_shards(content, max_bytes=writing.max_bytes, stem=stem, suffix=suffix, like=shards_like or None)
        inner = TORCH_ZIP if as_torch else SAFETENSORS
        plans: list[FilePlan] = []
        for name, keys in shards.items():
            plans += inner.plan(OrderedDict((key, content[key]) for key in keys), replace(writing, name=name))
        if list(shards) != [stem + suffix]:
            plans.append(whole_file(f"{stem}{suffix}.index.json", index_json(shards, content)))
        return tuple(plans)

    def rename(self, header: Header) -> Named:
        index, *shards = (stamp.path for stamp in header.files)
        return _Named(index, tuple(each.format.rename(each) for each in map(read_single, shards)))

    def replaced(self, folder: Path, names: Collection[str]) -> Collection[str]:
        store = store_of(folder)
        found = (name for name in store.names(folder) if name.endswith(INDEX_SUFFIXES))
        index = next((n for n in found if store.is_file(folder / n) or store.is_folder(folder / n)), None)
        return SINGLE if index is None else (*SINGLE, index, *read_weight_map(folder / index).values())


SHARDED = Sharded()


def checkpoint_inside(folder: Path) -> Path | None:
    """Return the index or the single file of a checkpoint folder; None for other folders."""
    store = store_of(folder)
    for name in (*_INDEXES, *SINGLE):
        if store.is_file(folder / name):
            return folder / name
    found = (name for name in store.names(folder) if name.endswith(INDEX_SUFFIXES))
    indexes = [name for name in found if store.is_file(folder / name)]  # a pipe would be waited for
    return folder / indexes[0] if len(indexes) == 1 else None


@dataclass(frozen=True, eq=False)
class _Union(Template):
    """The tensors of all shards of a checkpoint, in the files of the templates of the shards.

    Attributes:
        weight_map: of the index: tensor name to file name.
        shards: the templates of the shards, in order.
    """

    weight_map: dict[str, str]
    shards: tuple[Template, ...]


_KNOWN: WeakValueDictionary[bytes, _Union] = WeakValueDictionary()
"""Templates by the bytes of the index, kept while a header uses them."""


def _read_index(sharded: Format, index: Path, path: Path) -> Header:
    raw, stamp = read_small(index)
    template = _KNOWN.get(raw)  # the last one with this index; its shards may differ
    weight_map = read_weight_map(index, raw) if template is None else template.weight_map
    headers = {name: read_single(shard) for name, shard in members(index, dict.fromkeys(weight_map.values())).items()}
    shards = tuple([header.template for header in headers.values() if header.template is not None])
    shared = len(shards) == len(headers)
    if template is not None and template.shards == shards:
        content = template.content
    else:
        trees = {name: header.content if shared else header.tree for name, header in headers.items()}
        content = _union(index, weight_map, headers, trees)
        files = tuple([file for shard in shards for file in shard.files])
        template = _Union(content, files, weight_map, shards) if shared else None
        if template is not None:
            _KNOWN[raw] = template
    first = next(iter(headers.values()))
    return Header(
        path,
        sharded,
        content,
        (stamp, *(file for header in headers.values() for file in header.files)),
        sum((header.foreign for header in headers.values()), Counter()),
        first.metadata,
        first.provenance,
        record_fault(headers),
        shards=weight_map,
        shard_format=first.format,
        template=template,
        places={old: new for header in headers.values() for old, new in header.places.items()} if shared else {},
    )


def _union(
    index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header], trees: Mapping[str, Any]
) -> dict[str, Any]:
    """Return tensor name to tensor, in the order of the index."""
    for key, name in weight_map.items():
        if not isinstance(trees[name], dict) or key not in trees[name]:
            raise CorruptError(f"{index}: says that {name} holds '{key}'; it does not. Get a fresh copy.")
    for name, header in headers.items():
        extra = [key for key in trees[name] if weight_map.get(key) != name and key not in header.metadata]
        if extra:
            raise CorruptError(
                f"{index}: does not list '{extra[0]}', which is in {name}. The index is stale; rewrite it."
            )
    return {key: trees[name][key] for key, name in weight_map.items()}


def members(index: Path, names: Sequence[str] | Mapping[str, object]) -> dict[str, Path]:
    """Return file name to path for the files of an index.

    Raises:
        CorruptError: a file is missing, or outside the folder.
    """
    folder, store = index.parent, store_of(index)
    found = {}
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise CorruptError(f"{index}: points outside its folder ({name!r}); refused.")
        if name.endswith(INDEX_SUFFIXES):  # it might list this one
            raise CorruptError(f"{index}: its shard {name!r} is an index itself. It is damaged.")
        file = found[name] = folder / name
        if not stays_inside(file):
            target = store.real_path(file)
            raise CorruptError(f"{index}: its shard {name!r} is a link out of the folder ({target}); refused.")
        if not store.is_file(file):
            raise CorruptError(f"{index}: its shard {name!r} is missing. Get a complete copy.")
    return found


def stays_inside(file: Path) -> bool:
    """Return True unless a file is a link out of its folder.

    The cache of the Hugging Face Hub keeps ``snapshots/REVISION/.../NAME`` as links into ``blobs`` of the same
    repository. These stay inside; a ``blobs`` that is itself a link elsewhere does not count.
    """
    store = store_of(file)
    folder, home = store.real_path(file.parent), store.real_path(file).parent
    return home == folder or any(
        above.name == "snapshots" and home == above.parent / "blobs" for above in folder.parents
    )


def read_weight_map(index: Path, raw: bytes | None = None) -> dict[str, str]:
    """Return tensor name to file name from an index.

    Args:
        raw: the content of the index, if already read.

    Raises:
        CorruptError: it is not an index.
    """
    try:
        weight_map = parse_json(read_small(index)[0] if raw is None else raw)["weight_map"]
        if not weight_map or not {*map(type, weight_map.values())} <= {str}:
            raise TypeError("weight_map should map tensor names to file names")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptError(
            f"{index}: not the index of a sharded checkpoint ({type(error).__name__}: {error})."
        ) from error
    return {intern(name): intern(file) for name, file in weight_map.items()}


def parse_size(size: str | int, name: str = "max_shard_size") -> int:
    """Return the bytes in '5GB' (decimal, as Hugging Face counts), '5GiB' or a number.

    Args:
        name: of the parameter, for the message.

    Raises:
        UsageError: not a size, or less than one byte.
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
    """Distribute tensors over files; tied names stay together.

    Args:
        max_bytes: the largest payload of a file; a larger tensor has a file of its own.
        stem, suffix: ``model``, ``.safetensors`` gives ``model-00001-of-00002.safetensors``.
        like: tensor name to file name of an input; used if it has every tensor and `max_bytes` is None.

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
    shard_of: dict[OutTensor, int] = {}
    for name, tensor in tensors.items():
        if tensor in shard_of:
            shards[shard_of[tensor]].append(name)
            continue
        if max_bytes is not None and filled and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shard_of[tensor] = len(shards) - 1
        shards[-1].append(name)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {stem + suffix: shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}{suffix}": names for i, names in enumerate(shards, 1)}


def index_json(shards: Mapping[str, Sequence[str]], tensors: Mapping[str, OutTensor]) -> bytes:
    """Return the index of these shards."""
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in set(tensors.values()))},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    return (json.dumps(index, indent=2) + "\n").encode()


@dataclass(frozen=True, slots=True, eq=False)
class _Named:
    """One state dict in many files: each gets the same new names."""

    index: Path
    shards: tuple[Named, ...]

    @property
    def tree(self) -> Any:
        return {name: tensor for shard in self.shards for name, tensor in shard.tree.items()}

    def renamed(self, renamings: Sequence[Renaming]) -> tuple[Splice, ...]:
        (whole,) = renamings
        splices = [splice for shard in self.shards for splice in shard.renamed([replace(whole, state=shard.tree)])]
        content = parse_json(read_small(self.index)[0])
        content["weight_map"] = {whole.names.get(name, name): file for name, file in content["weight_map"].items()}
        return (*splices, Splice(self.index, ((json.dumps(content, indent=2) + "\n").encode(),)))
