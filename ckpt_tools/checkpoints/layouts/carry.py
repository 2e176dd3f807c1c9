"""Carrying: what stands beside a checkpoint's weights, what of it goes along into another, and what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...formats.tree import follow, without
from ...tensors import Tensor
from .build import keeps
from .state import StateDict, dotted
from .table import SWAPPERS, Layout

Sets = Mapping[str, StateDict]


def beside(tree: Any, sets: Sets) -> dict[Any, Any]:
    """Return what goes along into a nested checkpoint: all that is no weights, nor says how they were averaged."""
    if not isinstance(tree, dict) or not all(each.path for each in sets.values()):
        return {}
    rest = tree
    for each in sets.values():
        for place in (each.path, *each.places, *each.counters):
            rest = without(rest, place, prune=True)
    for place in _misleading(tree, sets):
        rest = without(rest, place, prune=True)
    return rest


def _misleading(tree: Any, sets: Sets) -> Iterator[tuple[Any, ...]]:
    """Find what is none of the sets, and would say of one beside it that it is another."""
    known = {place[:1] for each in sets.values() for place in (each.path, *each.places, *each.counters)}
    if isinstance(tree, dict) and all(each.path for each in sets.values()):
        yield from ((key,) for key in SWAPPERS if key in tree and (key,) not in known)


def left_behind(tree: Any, sets: Sets, layout: Layout, *, nested: bool) -> list[str]:
    """List what of a checkpoint has no place in a layout, by dotted path.

    Args:
        sets: those that go along.
        nested: so does what stands beside them.
    """
    paths = {each.path for each in sets.values()}
    counters = {place for each in sets.values() for place in each.counters}
    carried = paths | {place for place in counters if keeps(layout, place[-1].rpartition(".")[2])}
    written = {tensor for each in sets.values() for tensor in each.tensors.values()}
    roots = dict.fromkeys(place for each in sets.values() for place in each.places) if nested else [()]
    left = [path for root in roots for path in _left(tree, root, carried, written)]
    if nested:
        left += _overwritten(beside(tree, sets), layout, pair=len(sets) == 2)
        left += _misleading(tree, sets)
    for each in sets.values():
        left += [(*each.path, key) for key in each.extras]
        if len(paths) == len(sets):  # else this is the other set
            left += [(*each.path, rest) for rest in each.rest]
        left += [place for place in each.counters if place not in carried and place[: len(each.path)] == each.path]
    return [*dict.fromkeys(map(dotted, left))]


def _left(
    tree: Any, place: tuple[Any, ...], carried: set[tuple[Any, ...]], written: set[Tensor]
) -> Iterator[tuple[Any, ...]]:
    node = follow(tree, place)
    if node is None or place in carried:
        return
    if isinstance(node, Mapping) and any(path[: len(place)] == place for path in carried):
        for key in node:
            yield from _left(tree, (*place, key), carried, written)
    elif not (isinstance(node, dict) and node and all(isinstance(v, Tensor) and v in written for v in node.values())):
        yield place


def _overwritten(rest: Mapping[Any, Any], layout: Layout, *, pair: bool) -> Iterator[tuple[Any, ...]]:
    """Find what stands where the layout puts something of its own."""
    for place in (layout.raw, layout.ema if pair or not layout.alone else None, layout.updates):
        for depth in range(1, len(place or ()) + 1):
            node = follow(rest, (place or ())[:depth])
            if node is not None and (depth == len(place or ()) or not isinstance(node, Mapping)):
                yield (place or ())[:depth]
                break
