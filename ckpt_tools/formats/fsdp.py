"""Rank files of FSDP: a folder in which each process saved its part of a state dict with `torch.save`.

verl names the files ``model_world_size_8_rank_0.pt``. Files of other names count if their names differ in the rank
alone (``rank0``, ``rank_0``), and their tensors are DTensors or ShardedTensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptError, ReadError, UnsupportedError
from ..storage.source import store_of
from ..tensors import RankPart, TensorSpec
from .format import Format
from .header import Header
from .rank_join import joined_trees, known_apart
from .torch_zip import TORCH_ZIP
from .tree import tensors_in, walk

_FILE = re.compile(
    r"(?P<before>(?:.*?(?<![A-Za-z]))??)(?<!(?<![A-Za-z])[a-z]p_)rank[-_=]?(?P<rank>\d{1,6})(?P<after>(?:\D.*)?)",
    re.DOTALL,
)
_WORLD_SIZE = re.compile(r"world_size_(\d{1,6})_$")
# What is saved beside the weights, in files of its own.
_OTHER = re.compile(r"(?<![a-z])(optim|extra|rng|random|sched|scaler|data|train)")
_FLAT = ("_flat_param", "flat_param")
_COUNTER = re.compile(r"(global_|num_)?(step|iter|iteration|epoch|update)s?")


@dataclass(frozen=True, slots=True)
class RankFiles:
    """Names that differ in the rank alone.

    Attributes:
        by_rank: rank to name.
        size: the number of ranks, if the names have it.
        twice: two names of one rank, if there are such.
    """

    by_rank: Mapping[int, str]
    size: int | None
    twice: tuple[str, str] | None


def rank_files(names: list[str]) -> list[RankFiles]:
    """Group the names of a folder that may be the rank files of weights."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    twice: dict[tuple[str, str], tuple[str, str]] = {}
    for name in names:
        found = _FILE.fullmatch(name) if name.endswith(TORCH_ZIP.suffixes) and not _OTHER.search(name.lower()) else None
        if found is not None:
            key = (found["before"], found["after"])
            other = groups.setdefault(key, {}).setdefault(int(found["rank"]), name)
            if other != name:
                twice.setdefault(key, (other, name))
    sizes = {key: _WORLD_SIZE.search(key[0]) for key in groups}
    found_groups = [
        RankFiles(dict(sorted(by_rank.items())), None if size is None else int(size[1]), twice.get(key))
        for (key, by_rank), size in zip(groups.items(), sizes.values(), strict=True)
        if size is not None or (0 in by_rank and len(by_rank) > 1)
    ]
    return [each for each in found_groups if each.size is not None] or found_groups


class FSDP(Format):
    """The format of a folder with rank files."""

    name = "fsdp-ranks"
    folder = True
    nests = True

    @property
    def written_as(self) -> Format:
        return TORCH_ZIP

    def sniff(self, path: Path, start: bytes) -> bool:
        if start:
            return False
        store = store_of(path)
        # Only a few names, if any, are to be looked up.
        named = [name for name in store.names(path) if _FILE.fullmatch(name) and store.is_file(path / name)]
        groups = rank_files(named)
        return any(each.size is not None or _has_parts(path / next(iter(each.by_rank.values()))) for each in groups)

    def read(self, path: Path) -> Header:
        """Read the headers of all ranks, and join their tensors.

        Raises:
            CorruptError: a rank is missing, or the parts of a tensor do not make it.
            UnsupportedError: several checkpoints, or flat parameters, which have no shapes.
        """
        groups = rank_files(store_of(path).names(path))
        if len(groups) > 1:
            first = [next(iter(each.by_rank.values())) for each in groups[:4]]
            raise UnsupportedError(
                f"{path}: has the rank files of several checkpoints: {', '.join(first)}. "
                "Move each into a folder of its own."
            )
        (group,) = groups
        if group.twice is not None:
            raise CorruptError(
                f"{path}: {' and '.join(group.twice)} are of the same rank. One is of another save: move it out."
            )
        headers = {rank: TORCH_ZIP.parse(path / name) for rank, name in group.by_rank.items()}
        _check_ranks(path, group, headers)
        _check_steps(path, headers.values())
        for header in headers.values():
            _refuse_flat(header)
        _refuse_whole(path, headers.values())
        foreign: Counter[str] = sum((known_apart(header.foreign) for header in headers.values()), Counter())
        tree = joined_trees(path, [header.tree for header in headers.values()])
        return Header(path, self, tree, tuple(each.files[0] for each in headers.values()), foreign)


FSDP_FOLDER = FSDP()


def rank_files_of(folder: Path) -> set[str]:
    """Return the names of the rank files, if the folder is such a checkpoint."""
    if not FSDP_FOLDER.sniff(folder, b""):
        return set()
    return {name for each in rank_files(store_of(folder).names(folder)) for name in each.by_rank.values()}


def _has_parts(path: Path) -> bool:
    try:
        return any(type(tensor) is RankPart for _, tensor in tensors_in(TORCH_ZIP.parse(path).content))
    except ReadError:
        return False


def _check_ranks(path: Path, group: RankFiles, headers: Mapping[int, Header]) -> None:
    """Refuse a checkpoint of which a rank is missing, or one too many is there."""
    size = group.size
    if size is None:
        parts = (tensor for each in headers.values() for _, tensor in tensors_in(each.content))
        size = max((part.ranks for part in parts if isinstance(part, RankPart)), default=1)
    rank, name = next(iter(group.by_rank.items()))
    missing = next((rank for rank in range(min(size, len(headers) + 1)) if rank not in headers), None)
    if missing is not None:
        at = name.rindex(str(rank), 0, len(name) - len(_FILE.fullmatch(name)["after"]))  # type: ignore[index]
        lost = f"{name[:at]}{missing}{name[at + len(str(rank)) :]}"
        raise CorruptError(
            f"{path}: {lost} is missing, with the part of one of {size} ranks. Was the save interrupted? "
            "Get a complete copy."
        )
    if group.size is not None and len(headers) > size:
        raise CorruptError(f"{path}: has {len(headers)} files of a checkpoint of {size} ranks. Get a fresh copy.")


def _check_steps(path: Path, headers: Iterable[Header]) -> None:
    """Refuse files of which two say that they are of different steps."""
    first: dict[Any, tuple[int, str]] = {}
    for header in headers:
        for key, value in header.content.items() if isinstance(header.content, dict) else ():
            if type(value) is not int or not isinstance(key, str) or not _COUNTER.fullmatch(key):
                continue
            known, name = first.setdefault(key, (value, header.path.name))
            if known != value:
                raise CorruptError(
                    f"{path}: its files are not of one step: {name} has the {key} {known}, and {header.path.name} has "
                    f"{value}. Get a complete copy of one step."
                )


def _refuse_whole(path: Path, headers: Collection[Header]) -> None:
    """Refuse files of several ranks in which no tensor says which part of the whole it is."""
    found = [type(tensor) for header in headers for _, tensor in tensors_in(header.content)]
    if len(headers) > 1 and found and {*found} == {TensorSpec}:
        raise UnsupportedError(
            f"{path}: no tensor in the files of its {len(headers)} ranks is a DTensor or ShardedTensor, so nothing "
            "says whether each is whole, or how the parts make one. Save a full state dict with the program that wrote "
            "them."
        )


def _refuse_flat(header: Header) -> None:
    for path, _ in walk(header.content, lambda _, node: node.items() if isinstance(node, dict) else ()):
        key = path[-1] if path else None
        if isinstance(key, str) and key.rpartition(".")[2] in _FLAT:
            raise UnsupportedError(
                f"{header.path}: '{key}' is a flat parameter of FSDP (a LOCAL_STATE_DICT): the values of several "
                "parameters in a row, without their shapes. Load it with the program that wrote it, and save it with "
                "StateDictType.FULL_STATE_DICT or SHARDED_STATE_DICT."
            )
