"""Other entries: what of a checkpoint, besides the weights, goes along into another layout, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...formats.tree import Path, follow, without
from ...tensors import Tensor
from .layout import Layout, Sets, dotted, swapped_keys
from .parameter_lists import SETTINGS
from .schedule_free import outdated


def other_entries(tree: Any, sets: Sets) -> dict[Any, Any]:
    """Return what goes along into a nested checkpoint: all but the weights and what says how they were averaged."""
    if not _is_nested(tree, sets):
        return {}
    others: dict[Any, Any] = tree
    for path in (*_paths(sets), *_misleading(tree, sets), *outdated(tree, sets.values())):
        others = without(others, path, prune=True)
    return others


def _paths(sets: Sets) -> list[Path]:
    return [path for each in sets.values() for path in (each.path, *each.set_paths, *each.ema_paths)]


def _is_nested(tree: Any, sets: Sets) -> bool:
    return isinstance(tree, dict) and all(each.path for each in sets.values())


def _misleading(tree: Any, sets: Sets) -> list[Path]:
    """Find entries of no set that would make the sets of the output look like others."""
    known = set(_paths(sets))
    keys = swapped_keys() if _is_nested(tree, sets) else ()
    return [(key,) for key in keys if key in tree and (key,) not in known]


def left_behind(tree: Any, sets: Sets, layout: Layout, *, nested: bool) -> list[str]:
    """List the entries of a checkpoint that a layout cannot hold, by dotted path.

    Args:
        sets: those that go along.
        nested: so do the other entries.
    """
    paths = {each.path for each in sets.values()}
    ema_paths = {path for each in sets.values() for path in each.ema_paths}
    carried = paths | {path for path in ema_paths if layout.keeps(_what(path[-1].rpartition(".")[2]))}
    written = {tensor for each in sets.values() for tensor in each.tensors.values()}
    tops = dict.fromkeys(path for each in sets.values() for path in each.set_paths) if nested else [()]
    left = [path for top in tops for path in _left(tree, top, carried, written)]
    if nested:
        left += _overwritten(other_entries(tree, sets), layout, pair=len(sets) == 2)
        left += [*_misleading(tree, sets), *outdated(tree, sets.values())]
    for each in sets.values():
        left += [(*each.path, key) for key in each.other_entries]
        if len(paths) == len(sets):  # else this is the other set
            left += [(*each.path, words) for words in each.other_set]
        left += [path for path in each.ema_paths if path not in carried and path[: len(each.path)] == each.path]
    return [*dict.fromkeys(map(dotted, left))]


def _what(key: str) -> str:
    """Return what of an average is stored under a key, as `Layout.keeps` takes it."""
    return "settings" if key in SETTINGS else "decay" if key == "decay" else "updates"


def _left(tree: Any, path: Path, carried: set[Path], written: set[Tensor]) -> Iterator[Path]:
    node = follow(tree, path)
    if node is None or path in carried:
        return
    if isinstance(node, (list, tuple)) and any(other[: len(path)] == path for other in carried):
        yield from ((*path, i) for i in range(len(node)) if (*path, i) not in carried)
    elif isinstance(node, Mapping) and any(other[: len(path)] == path for other in carried):
        for key in node:
            yield from _left(tree, (*path, key), carried, written)
    elif not (isinstance(node, dict) and node and all(isinstance(v, Tensor) and v in written for v in node.values())):
        yield path


def _overwritten(others: Mapping[Any, Any], layout: Layout, *, pair: bool) -> Iterator[Path]:
    """Find other entries at paths where the layout puts something of its own."""
    ema = layout.ema if pair or not layout.alone else None
    for path in filter(None, (layout.raw, ema, layout.updates)):
        for depth in range(1, len(path) + 1):
            node = follow(others, path[:depth])
            if node is not None and (depth == len(path) or not isinstance(node, Mapping)):
                yield path[:depth]
                break
