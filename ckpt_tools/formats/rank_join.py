"""Rank parts put together: the trees of all processes become one tree with whole tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError
from ..tensors import Chunk, DType, RankPart, Storage, Tensor, TensorSpec, UnsupportedTensor, join, make_spec
from .header import Header
from .rank_parts import CLASSES
from .tree import map_tree, tensors_in

_DEEPEST = 100  # levels of nesting in which parts are joined


def known_apart(foreign: Counter[str]) -> Counter[str]:
    """Return unknown globals without those that rank parts consist of."""
    known = {"torch.serialization._get_layout"}
    if any(name.endswith(".ShardedTensor") for name in foreign):
        known.add("builtins.getattr")  # of a class inside ShardedTensor
    return Counter({name: n for name, n in foreign.items() if not CLASSES.fullmatch(name) and name not in known})


def whole_alone(header: Header) -> Header:
    """Make tensors of the parts in a single file, where it has all of each: of one process, or replicated.

    Raises:
        UnsupportedError: it holds one rank's part of the weights.
    """
    if not any(map(CLASSES.fullmatch, header.foreign)):
        return header
    partial = [
        (path, part) for path, part in tensors_in(header.content) if type(part) is RankPart and not part.complete
    ]
    # A whole state dict may have the parts of an optimizer beside it.
    path, part = next((each for each in partial if not any("optim" in str(key) for key in each[0])), ((), None))
    if part is not None:
        raise UnsupportedError(
            f"{header.path}: '{'.'.join(map(str, path))}' is {part.reason}, so the file is not a checkpoint by itself. "
            f"Give the folder that has the files of all ranks, named by rank_0, rank_1 and so on: {header.path.parent}"
        )

    def replaced(path: list[Any], node: Any) -> Any:
        if type(node) is RankPart and node.complete:
            return _joined(header.path, tuple(path), [node])
        return node if not isinstance(node, _CONTAINERS) else NotImplemented

    tree = map_tree(header.tree, replaced)
    return replace(header, content=tree, foreign=known_apart(header.foreign), template=None, places={})


_CONTAINERS = (dict, list, tuple)


def joined_trees(where: Path, trees: Sequence[Any]) -> Any:
    """Join the trees that all ranks saved; what is no distributed tensor is that of the first rank that has it.

    Args:
        where: the folder, for messages.
        trees: in the order of the ranks.

    Raises:
        CorruptError: the parts of a tensor do not make it, or contradict each other.
        UnsupportedError: a tensor that is not distributed differs in dtype or shape between ranks.
    """
    done: dict[tuple[int, ...], Any] = {}  # what one rank has in two places, another one may not

    def merged(path: tuple[Any, ...], nodes: Sequence[Any]) -> Any:
        first = nodes[0]
        if isinstance(first, (TensorSpec, RankPart)):
            return _tensor(where, path, nodes)
        if not isinstance(first, _CONTAINERS) or len(path) > _DEEPEST:
            return first
        same = tuple(map(id, nodes))
        if same in done:
            return done[same]
        alike = [node for node in nodes if isinstance(node, dict) == isinstance(first, dict)]
        if isinstance(first, dict):
            made: Any = OrderedDict() if isinstance(first, OrderedDict) else {}
            done[same] = made
            for key in dict.fromkeys(key for node in alike for key in node):
                made[key] = merged((*path, key), [node[key] for node in alike if key in node])
            if hasattr(first, "_metadata"):
                made._metadata = first._metadata
            return made
        items: list[Any] = []
        done[same] = items
        alike = [node for node in alike if isinstance(node, _CONTAINERS) and len(node) == len(first)]
        items += [merged((*path, at), each) for at, each in enumerate(zip(*alike, strict=True))]
        return items if isinstance(first, list) else tuple(items)

    return merged((), trees)


def _tensor(where: Path, path: tuple[Any, ...], nodes: Sequence[Any]) -> Tensor:
    parts = [node for node in nodes if isinstance(node, RankPart)]
    if len(parts) == len(nodes):
        return _joined(where, path, parts)
    unread = next((node for node in nodes if type(node) is UnsupportedTensor), None)
    if unread is not None:  # which only those who need this tensor refuse
        return unread
    name = ".".join(map(str, path))
    described = {
        (type(node), node.dtype.name, node.shape) if isinstance(node, (TensorSpec, RankPart)) else type(node)
        for node in nodes
    }
    if len(described) > 1:
        raise UnsupportedError(
            f"{where}: '{name}' differs in dtype or shape between ranks, and is not a DTensor, so nothing says how its "
            "parts make one tensor. Save a full state dict with the program that wrote these files."
        )
    return nodes[0]  # type: ignore[no-any-return]


def _joined(where: Path, path: tuple[Any, ...], parts: Sequence[RankPart]) -> TensorSpec:
    """Join the parts of one tensor; of copies, the first is taken."""
    name, first = ".".join(map(str, path)), parts[0]
    other = next((part for part in parts if (part.dtype, part.shape) != (first.dtype, first.shape)), None)
    if other is not None:
        raise CorruptError(
            f"{where}: '{name}' is {first.dtype.name} {list(first.shape)} for one rank, and {other.dtype.name} "
            f"{list(other.shape)} for another. The files are of different models, or damaged."
        )
    fewer, more = min(part.ranks for part in parts), max(part.ranks for part in parts)
    if fewer != more:
        raise CorruptError(
            f"{where}: '{name}' is shared by {fewer} ranks in one file, and by {more} in another. The files are of two "
            "saves: keep those of one."
        )
    return join_chunks(where, name, first.dtype, first.shape, [chunk for part in parts for chunk in part.chunks])


def join_chunks(where: Path, name: str, dtype: DType, shape: tuple[int, ...], chunks: Iterable[Chunk]) -> TensorSpec:
    """Join chunks of a tensor as `join` does; of copies of one chunk, the first is taken.

    Raises:
        CorruptError: see `join`.
    """
    boxes: dict[Any, Chunk] = {}
    for offsets, chunk in chunks:
        boxes.setdefault((offsets, chunk.shape), (offsets, chunk))
    if not boxes and 0 in shape:
        return make_spec(dtype, shape, Storage(where, 0, 0))
    return join(where, name, dtype, shape, [*boxes.values()])
