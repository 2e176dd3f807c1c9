"""Ranks: one folder with a file for each rank of model parallelism, and a part of the weights in each file.

Each model says how its tensors are split, so the parts are not joined here: each file keeps its name and its place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError
from ..storage.source import store_of
from .file_plan import FilePlan
from .format import Format, Named, Writing, read_single
from .header import Header, record_fault
from .torch_zip import TORCH_ZIP


@dataclass(frozen=True, slots=True, eq=False)
class _Kind:
    """Names with the numbers of a rank, each from 0 on.

    Attributes:
        names: of files, or of folders with one file of weights in each.
        folders: they are those of folders.
        layers: the first number is that of a layer, which has ranks of its own, each the same.
        experts: a layer may have more of them than another one.
    """

    names: re.Pattern[str]
    folders: bool = False
    layers: bool = False
    experts: bool = False


# Those that are beside each other, from the functions of the programs that make the names.
_PROGRAMS = (
    # Megatron-LM: tensor, pipeline and expert rank. NeMo has words for them.
    (_Kind(re.compile(r"mp_rank_\d{2,3}(_\d{3}){0,2}|tp_rank_\d{2,3}_pp_rank_\d{3}"), folders=True),),
    (_Kind(re.compile(r"consolidated\.\d{2}\.pth")),),  # Meta
    (  # DeepSpeed: tensor rank, layers of a pipeline, experts
        _Kind(re.compile(r"mp_rank_\d{2}_model_states\.pt")),
        _Kind(re.compile(r"layer_\d{2,4}(-model_\d{2})?-model_states\.pt"), layers=True),
        _Kind(re.compile(r"layer_\d{1,4}_expert_\d{1,4}_mp_rank_\d{2}_model_states\.pt"), layers=True, experts=True),
    ),
)
_OPTIMIZER = re.compile(r"(distrib_)?optim(izer)?\.pt")
_ZERO = re.compile(r".*zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
UNIVERSAL = "zero"
"""The folder of the weights in a universal checkpoint of DeepSpeed."""
_NUMBER = re.compile(r"\d+")


class Ranks(Format):
    """A folder with a torch file for each rank, or with a folder for each and a torch file in it."""

    name = "ranks"
    folder = True
    nests = True
    writes = True

    def sniff(self, path: Path, start: bytes) -> bool:
        return not start and store_of(path).is_folder(path) and bool(rank_files(path))

    def read(self, path: Path) -> Header:
        """Read the headers of all ranks. The tree has that of each file by its name, with folders before it.

        Raises:
            CorruptError: a rank is missing.
            UnsupportedError: a file is not a torch file.
        """
        names = rank_files(path)
        _check_complete(path, names)
        headers = {name: read_single(path / name) for name in names}
        other = next((each for each in headers.values() if not each.format.nests), None)
        if other is not None:
            raise UnsupportedError(
                f"{other.path}: a {other.format.name} file, and the files of ranks are read as torch files alone. "
                "Save it with torch.save."
            )
        first = next(iter(headers.values()))
        return Header(
            path,
            self,
            {name: header.tree for name, header in headers.items()},
            tuple(stamp for header in headers.values() for stamp in header.files),
            sum((header.foreign for header in headers.values()), Counter()),
            provenance=first.provenance,
            record_fault=record_fault(headers),
            shard_format=first.format,
            ranks={name: header for name, header in headers.items() if not _without_model(header.tree)},
        )

    def plan(self, content: Any, writing: Writing) -> tuple[FilePlan, ...]:
        """Lay out a file for each entry; the names may have folders before them."""
        return tuple(
            plan for name, tree in content.items() for plan in TORCH_ZIP.plan(tree, replace(writing, name=name))
        )

    def rename(self, header: Header) -> Named:
        raise UnsupportedError(
            f"{header.path}: a file for each rank. Change their names one by one: {header.files[0].path}"
        )

    def replaced(self, folder: Path, names: Collection[str]) -> Collection[str]:
        old = rank_files(folder)
        return old if not set(old).isdisjoint(names) else ()


RANKS = Ranks()


def rank_files(folder: Path) -> list[str]:
    """Return the files of the ranks of a checkpoint, by their names in the folder; empty for any other folder."""
    names = sorted(store_of(folder).names(folder))
    if UNIVERSAL in names:
        return []  # its model states have other things than weights
    for kinds in _PROGRAMS:
        found: list[str] = []
        for kind in kinds:
            for name in filter(kind.names.fullmatch, names):
                files = [f"{name}/{file}" for file in _weights_in(folder / name)] if kind.folders else [name]
                if len(files) > 1:  # those of several steps
                    return []
                found += files
        zero = any(map(_ZERO.fullmatch, names)) and not any(name.startswith("layer_") for name in found)
        if found and not zero and (kinds[0].folders or len(found) > 1):
            return found
    return []


def masters_beside(folder: Path) -> str | None:
    """Return the name of a file with float32 masters of ZeRO beside the layers, which have copies of 16 bits."""
    return next(filter(_ZERO.fullmatch, sorted(store_of(folder).names(folder))), None)


def further_files(folder: Path, known: Collection[str]) -> Iterator[str]:
    """Yield the names of files beside those of the ranks, such as those of distributed optimizers."""
    store = store_of(folder)
    places = store.names(folder)
    for above in sorted({name.rpartition("/")[0] for name in rank_files(folder)} - {""}):
        places += [f"{above}/{name}" for name in store.names(folder / above)]
    return (name for name in places if name not in known and store.is_file(folder / name))


def _weights_in(folder: Path) -> list[str]:
    store = store_of(folder)
    names = store.names(folder) if store.is_folder(folder) else []
    return [name for name in names if name.endswith(TORCH_ZIP.suffixes) and not _OPTIMIZER.fullmatch(name)]


def _without_model(tree: Any) -> bool:
    """True for a layer without parameters, and for the state of the training that DeepSpeed keeps beside the layers."""
    return isinstance(tree, dict) and (not tree or ("module" in tree and not tree["module"]))


def _check_complete(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder in which a rank is missing: each number counts from 0, and all combinations are there."""
    groups: dict[tuple[Any, ...], dict[tuple[int, ...], str]] = {}
    for name in names:
        own = name.partition("/")[0]
        kind = next(kind for kinds in _PROGRAMS for kind in kinds if kind.names.fullmatch(own))
        numbers = [int(number) for number in _NUMBER.findall(own)]
        groups.setdefault((kind, *numbers[: kind.layers]), {})[tuple(numbers[kind.layers :])] = own
    for group in groups.values():
        fewest, most = min(group, key=len), max(group, key=len)
        if len(fewest) < len(most):
            raise CorruptError(f"{folder}: has {group[fewest]} and {group[most]}, which are not of one save. Keep one.")
        counts = [max(axis) + 1 for axis in zip(*group, strict=True)]
        # At most one more than there are is looked at.
        missing = next((numbers for numbers in product(*map(range, counts)) if numbers not in group), None)
        if missing is not None:
            first, *rest = group.values()
            more = f" and {len(rest)} more" if rest else ""
            raise CorruptError(
                f"{folder}: has {first}{more}, and not the one of rank {'_'.join(map(str, missing))}. "
                "Was the save interrupted? Get a complete copy."
            )
    layers = [[*group.values()] for (kind, *_), group in groups.items() if kind.layers and not kind.experts]
    short, long = min(layers, key=len, default=[]), max(layers, key=len, default=[])
    if len(short) < len(long):
        raise CorruptError(
            f"{folder}: of the ranks of {short[0]} there are {len(short)}, and {len(long)} of {long[0]}. "
            "Was the save interrupted? Get a complete copy."
        )
