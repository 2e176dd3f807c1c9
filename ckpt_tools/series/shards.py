"""Shards and ranks: files that hold a part of the weights, and are no checkpoints by themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import SeriesError
from ..formats.deepspeed_files import folder_of
from ..formats.fsdp import rank_files_of
from ..formats.ranks import rank_files
from ..formats.sharded import FURTHER_MODEL
from ..storage.source import LOCAL, store_of
from .numbered import glob_of

_RANK = re.compile(
    r"mp_rank_\d\d(?:_\d{3})*(?!\d)"  # Megatron, DeepSpeed
    r"|(?<![A-Za-z])rank[-_=]?\d+"
    r"|(?<![^/])consolidated\.\d+(?=\.\w+$)"  # Meta
    r"|(?<![^/])layer_\d+(?:-model_\d+)?(?=-model_states)"  # DeepSpeed's pipelines
    r"|-(?:model_part-|shard)\d+(?=\.\w+$)"  # fairseq
)
_NUMBERS = re.compile(r"\d+")
_SHARD = re.compile(r"-\d+(?=-of-\d+\.\w+$)")
_SEVERAL = re.compile(r"-\d+-of-(?!0*1\.)\d+\.\w+$")
_FILE_OF_RANK = re.compile(rf"{_RANK.pattern}|pytorch_model_fsdp_\d+")  # the last by Accelerate


def is_part(path: Path) -> bool:
    """True for a shard, and for a further model of a checkpoint."""
    place = f"{path.parent.name}/{path.name}"
    return bool(FURTHER_MODEL.fullmatch(path.name) or _SHARD.search(place) or _FILE_OF_RANK.search(place))


def refuse_parts(paths: Sequence[Path]) -> None:
    """Refuse what holds a part of the weights only.

    Raises:
        SeriesError: the file of a rank whose folder is the checkpoint, several shards of one, or one rank of several.
    """
    files = [path for path in paths if not store_of(path).is_folder(path)]
    of_ranks = {folder: rank_files_of(folder) for folder in {path.parent for path in files}}
    for path in files:
        if path.name in of_ranks[path.parent]:
            raise SeriesError(
                f"{path} is the file of one rank, and holds a part of the weights. Give the folder, whose ranks are "
                f"put together: {path.parent}"
            )
    if (pair := _alike(paths, _SHARD)) is not None:
        raise SeriesError(
            f"{pair[0]} and {pair[1]} are shards of one checkpoint, not two. Give the folder that has their index."
        )
    if (pair := _alike(paths, _FILE_OF_RANK)) is not None:
        raise SeriesError(
            f"{pair[0]} and {pair[1]} differ only in the rank, so they are shards of one checkpoint, not two."
            f"{_way_on(pair[1])}"
        )
    for path in paths:
        if (note := rank_note(path)) is not None:
            raise SeriesError(note)


def refuse_part(path: Path) -> None:
    """Refuse a shard, or the file of a rank, where one whole checkpoint is asked for.

    Raises:
        SeriesError: it is one.
    """
    if _SEVERAL.search(path.name):
        raise SeriesError(
            f"{path} is a shard, and holds a part of the weights. Give the folder that has its index: {path.parent}"
        )
    if (note := rank_note(path)) is not None:
        raise SeriesError(note)


def _alike(paths: Sequence[Path], pattern: re.Pattern[str]) -> tuple[Path, Path] | None:
    """Find two paths that differ only in what a pattern matches."""
    seen: dict[str, Path] = {}
    for path in paths:
        without, times = pattern.subn("", str(path.absolute()))
        other = seen.setdefault(without, path) if times else path
        if other != path:
            return other, path
    return None


def rank_note(path: Path) -> str | None:
    """Say that a checkpoint is one rank of several, and holds a part of the weights; None if it is not."""
    whole = path.absolute() if store_of(path) is LOCAL else path
    for place in (whole, *whole.parents):
        other = _other_rank(place, whole.relative_to(place)) if _RANK.search(place.name) else None
        if other is not None:
            return (
                f"{path} is one rank of several, and holds a part of the weights; {other} holds another.{_way_on(path)}"
            )
    return None


def _way_on(rank: Path) -> str:
    """Say what to give instead of a rank: the folder of all ranks, if their files are read together."""
    folder = next((folder for folder in [*rank.parents][:2] if rank_files(folder)), None)
    if folder is None and folder_of(rank.parent) == rank.parent:
        return f" Give the folder: {rank.parent}"
    if folder is None:
        return " Merge the ranks first, with the tools of the program that wrote them."
    folder = folder if folder.name else folder.absolute()
    glob = glob_of(folder)
    return f" Give the folder of all ranks: {folder}" + (f", or '{glob}' for a series." if glob != folder else ".")


def _other_rank(place: Path, inside: Path) -> Path | None:
    """Find the same file of another rank, where a file or folder is named by its rank."""
    store = store_of(place)
    with suppress(OSError):  # a folder that may be searched, but not listed
        names = [n for n in store.names(place.parent) if _RANK.sub("", n) == _RANK.sub("", place.name)]
        # Ranks count from 0; folders named lora_rank_8 and lora_rank_16 are none. Some layers have no file.
        if place.name.startswith("layer_") or any(
            int(_NUMBERS.findall(_RANK.findall(name)[-1])[-1]) == 0 for name in names
        ):
            others = (place.with_name(name) / inside for name in names if name != place.name)
            return next((other for other in others if store.is_file(other) or store.is_folder(other)), None)
    return None
