"""Training state: the entries that only a running training needs, to be stripped, and the weights inside them.

What is stripped is a set of paths in the object tree; it never includes a set of weights.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import reduce
from operator import getitem
from typing import Any

from ..formats.header import Header
from ..formats.tree import Path, branches, entries, tensors_in, walk
from ..tensors import Tensor
from .layouts.counterparts import without_wrappers
from .layouts.layout import StateDict, dotted, is_buffer
from .layouts.schedule_free import was_training
from .optimizers import SLOTS, find_optimizers, is_optimizer, looks_like_training_state
from .prefixes import unwrapping
from .state_dicts import state_dicts

# Averages that a callback or an optimizer keeps; not `exp_avg`, which is Adam's.
_AVERAGES = re.compile(r"(.*_)?(ema|swa|shadow|averaged?)(_(?!sq$).*)?|.*average_model.*")
_MASTERS = re.compile(r".*(fp32|master|float32).*")
_DEEPEST_NAME = 64  # modules in one another; all endings of a name of any length would fill the memory
_DEEPEST = 8
"""Levels at which weights are looked for in training state; a hostile file may have any number."""


def training_state(
    tree: Any, sets: Sequence[StateDict], notes: list[str], *, alone: bool, tops: Sequence[Path] = ((),)
) -> Iterator[Path]:
    """Find entries to strip: at the top level, and at every level that holds optimizers.

    Args:
        tree: of the header.
        sets: of weights, which stay wherever they are.
        notes: receives notes for the user.
        alone: no other weights stay.
        tops: paths of the top levels: one, or those of the files of ranks.
    """
    known = None
    if not alone:
        found = [each.tensors for each in sets] or state_dicts(tree).values()
        known = [_WeightNames(key for key in names if isinstance(key, str)) for names in found]
    seen: set[int] = set()
    stack: list[tuple[Path, Any]] = [(top, reduce(getitem, top, tree)) for top in tops]
    while stack:
        outer, node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        # Among weights there may be a module that is called like a scheduler.
        weights = any(each.path == outer for each in sets)
        for key, value in entries(node):
            path = (*outer, key)
            if isinstance(value, Tensor) and (weights or "." in str(key)):
                continue
            if _goes(key, value):
                yield from _all_but_weights(path, value, sets, known, notes)
            elif any(True for _ in find_optimizers(value)):
                stack.append((path, value))


def _goes(key: Any, value: Any) -> bool:
    """True for training state of some size: numbers, such as the metric, are kept."""
    empty = isinstance(value, (dict, list, tuple, set)) and not value
    if empty or value is None or isinstance(value, (int, float, str)) or key == "metric":
        return False
    return looks_like_training_state(key, value)


def _all_but_weights(
    path: Path, value: Any, sets: Sequence[StateDict], known: Sequence[_WeightNames] | None, notes: list[str]
) -> Iterator[Path]:
    """Yield the path of an entry; if it holds weights, the paths of all that is in it but them."""
    inside = [each.path for each in sets if leads(path, each.path)]
    # Entries next to a set of a known layout belong to it, such as its EMA update count.
    kept = [each[: max(len(path) + 1, len(each) - 1)] for each in inside]
    found = () if known is None else [(*path, *inner) for inner in _weights_in(value, known)]
    kept += [each for each in found if not any(leads(outer, each) for outer in kept)]
    if kept:
        notes.append(f"'{dotted(path)}' holds weights, which stay: {', '.join(map(dotted, kept))}.")
    named = ((inner, node) for inner, node in nodes(value) if inner and _MASTERS.fullmatch(str(inner[-1])))
    if (inner := next((inner for inner, node in named if any_tensor(node)), None)) is not None:
        notes.append(
            f"'{dotted((*path, *inner))}' looks like a float32 copy of the weights, which optimizers keep. "
            "It goes, too."
        )
    taken = any(each.which == "eval" for each in sets)
    if not taken and any(was_training(optimizer) for _, optimizer in find_optimizers(value)):
        notes.append(
            f"'{dotted(path)}' is of a schedule-free optimizer that was training: the averaged weights are made from "
            "its 'z', which goes. To have them in the file, use `state='eval'`, or call optimizer.eval() before you "
            "save."
        )
    yield from _around(path, value, kept)


def _around(path: Path, value: Any, kept: Collection[Path]) -> Iterator[Path]:
    if not any(leads(path, to) for to in kept):
        yield path
    elif path not in kept:
        for key, child in entries(value):
            yield from _around((*path, key), child, kept)


def other_weights(
    header: Header, chosen: StateDict, sets: Collection[StateDict], gone: Sequence[Path], notes: list[str]
) -> Iterator[Path]:
    """Find the sets of weights that were not chosen: those of the layout, and dicts with the same names."""
    own = set(chosen.tensors.values())
    names = _WeightNames(chosen.tensors)
    for each in sets:
        if each.path == chosen.path and chosen.which != "eval" and not own.issuperset(each.tensors.values()):
            notes.append(
                f"{each.label} is in the same dict as {chosen.label}, and stays. "
                "To take one of them out: `convert(to='plain')`."
            )
    found = [*(each.path for each in sets), *(path for path, node in nodes(header.tree) if names.of(node))]
    held = {without_wrappers(name) for name in chosen.tensors}
    buffers = {
        each.path: [n for n, t in each.tensors.items() if is_buffer(n, t) and without_wrappers(n) not in held]
        for each in sets
    }
    elsewhere = own.difference(tensor for _, tensor in tensors_in(reduce(getitem, chosen.path, header.tree)))
    for path in dict.fromkeys(found):
        if leads(path, chosen.path) or leads(chosen.path, path) or any(leads(other, path) for other in gone):
            continue
        if buffers.get(path):
            notes.append(f"'{dotted(path)}' stays: {chosen.label} lacks its buffers, such as '{buffers[path][0]}'.")
        elif elsewhere.isdisjoint(tensor for _, tensor in tensors_in(reduce(getitem, path, header.tree))):
            yield path
        else:
            notes.append(f"'{dotted(path)}' stays: {chosen.label} takes tensors from it that it lacks itself.")


def stripped(node: Any, gone: Collection[Path], path: Path = ()) -> Any:
    """Copy a tree without the entries at these paths; what did not change is shared."""
    if not any(leads(path, other) for other in gone):
        return node
    kept = [(key, stripped(child, gone, (*path, key))) for key, child in entries(node) if (*path, key) not in gone]
    if isinstance(node, (list, tuple)):
        return type(node)(child for _, child in kept)
    copy: Any = OrderedDict(kept) if isinstance(node, OrderedDict) else dict(kept)
    if (metadata := getattr(node, "_metadata", None)) is not None:
        copy._metadata = metadata
    return copy


def leads(path: Path, to: Path) -> bool:
    """True if a path is the other, or leads to it."""
    return to[: len(path)] == path


def any_tensor(tree: Any) -> bool:
    """True if there is a tensor anywhere in a tree."""
    return any(True for _ in tensors_in(tree))


def nodes(value: Any) -> Iterator[tuple[Path, Any]]:
    """Walk dicts and lists, the last entries first, but not what optimizers keep for each parameter."""

    def below(path: list[Any], node: Any) -> list[tuple[Any, Any]]:
        own = ("state", "param_groups", "hypers") if is_optimizer(node) else ()
        inside = branches(node) if len(path) < _DEEPEST and isinstance(node, (dict, list, tuple)) else ()
        return [(key, child) for key, child in inside if key not in own][::-1]

    return ((tuple(path), node) for path, node in walk(value, below))


def _weights_in(value: Any, known: Collection[_WeightNames]) -> list[Path]:
    """Find weights in training state: dicts with the names of the weights, and what is called an average."""
    found: list[Path] = []
    for path, node in nodes(value):
        if any(leads(outer, path) for outer in found) or (path and path[-1] in SLOTS):
            continue
        called = bool(path) and isinstance(path[-1], str) and _AVERAGES.fullmatch(path[-1]) is not None
        if any(names.of(node) for names in known) or (called and any_tensor(node)):
            found.append(path)
    return found


class _WeightNames:
    """The names of some weights, whatever their prefix: a wrapper, or the attribute that holds the model."""

    def __init__(self, names: Iterable[str]) -> None:
        self.bare = _bare(names)
        self.endings = {ending for name in self.bare for ending in _endings(name)}

    def of(self, node: Any) -> bool:
        """True for a dict of tensors that has at least half of the names."""
        if not isinstance(node, dict):
            return False
        names = _bare(key for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor))
        shared = sum(name in self.endings or not self.bare.isdisjoint(_endings(name)) for name in names)
        return shared > 0 and 2 * shared >= len(self.bare)


def _bare(names: Iterable[str]) -> set[str]:
    """Take off wrapper prefixes, and what all names start with."""
    names = list(names)
    bare = set(map(unwrapping(names), names))
    while len(bare) > 1 and len({name.partition(".")[0] for name in bare}) == 1 and all("." in name for name in bare):
        bare = {name.partition(".")[2] for name in bare}
    return bare


def _endings(name: str) -> Iterator[str]:
    for _ in range(_DEEPEST_NAME):
        if not name:
            return
        yield name
        name = name.partition(".")[2]
