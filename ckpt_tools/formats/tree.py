"""Trees: the objects of a checkpoint, nested in one another; walks, copies, and access by paths of keys.

Nothing is changed in place. A copy shares with the tree what did not change.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from ..tensors import Tensor, TensorSpec, UnsupportedTensor
from .pickle_read import Inert

Path = tuple[Any, ...]
"""Keys that lead from the top of a tree to an entry."""

ITEM = "[]"
"""In a path of `map_tree`: an item of a list, tuple or set."""
LEFT_OUT = object()
"""What `map_tree` leaves out of the copy."""


def contents(node: Any) -> Iterable[tuple[Any, Any]]:
    """Return what a container holds as (key, value): dicts, lists, tuples, namespaces and pickled objects."""
    if isinstance(node, (TensorSpec, UnsupportedTensor, str, int)):  # by far the most, so tested first
        return ()
    if isinstance(node, dict):
        return node.items()
    if isinstance(node, (list, tuple)):
        return enumerate(node)
    if isinstance(node, argparse.Namespace):
        return vars(node).items()
    if isinstance(node, Inert):
        return chain(enumerate(node.args), [("state", node.state)], enumerate(node.items))
    return ()


def entries(node: Any) -> Collection[tuple[Any, Any]]:
    """Return what a dict, list or tuple holds as (key, value); empty for anything else."""
    if isinstance(node, dict):
        return node.items()
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else ()


def walk(
    tree: Any, children: Callable[[list[Any], Any], Iterable[tuple[Any, Any]]] = lambda path, node: contents(node)
) -> Iterator[tuple[list[Any], Any]]:
    """Walk a tree depth first and yield (path, node), a container before its contents.

    A container in several places is yielded at each, but its contents once. The memory in use is linear in the depth.

    Args:
        children: what to visit below a node, given its path: (key, value) pairs in order.

    Yields:
        The path is one list, which changes as the walk goes on: copy it to keep it.
    """
    path: list[Any] = []
    yield path, tree
    seen = {id(tree)}
    levels = [iter(children(path, tree))]
    while levels:
        for key, node in levels[-1]:
            path.append(key)
            yield path, node
            below = children(path, node)
            if below and id(node) not in seen:
                seen.add(id(node))
                levels.append(iter(below))
                break
            path.pop()
        else:
            levels.pop()
            del path[-1:]


def tensors_in(tree: Any) -> Iterator[tuple[Path, Tensor]]:
    """Walk a tree in order and yield (path, tensor)."""
    kinds = (TensorSpec, UnsupportedTensor)  # a union takes longer to test
    return ((tuple(path), node) for path, node in walk(tree) if isinstance(node, kinds))


def map_tree(tree: Any, replace: Callable[[list[Any], Any], Any]) -> Any:
    """Copy a tree; a container in several places, or inside itself, is so in the copy.

    Dicts, namespaces, lists, tuples and sets become new dicts, lists, tuples and sets. An OrderedDict stays one, and
    keeps the ``_metadata`` that torch sets on a state dict.

    Args:
        replace: called with (path, node) for every node, and returns what the copy has for it: LEFT_OUT for
            nothing, NotImplemented for a copy of a container. The path is one list, as that of `walk`, with ITEM for
            each item of a list, tuple or set.

    Raises:
        RecursionError: nested deeper than Python can follow.
    """
    path: list[Any] = []
    copies: dict[int, Any] = {}

    def copy(node: Any) -> Any:
        replaced = replace(path, node)
        if replaced is not NotImplemented:
            return replaced
        if id(node) in copies:
            return copies[id(node)]
        if isinstance(node, (dict, argparse.Namespace)):
            mapping: Any = OrderedDict() if isinstance(node, OrderedDict) else {}
            copies[id(node)] = mapping
            for key, value in contents(node):
                path.append(key)
                if (replaced := copy(value)) is not LEFT_OUT:
                    mapping[key] = replaced
                path.pop()
            metadata = getattr(node, "_metadata", None) if isinstance(node, OrderedDict) else None
            if metadata is not None and (replaced := copy(metadata)) is not LEFT_OUT:
                mapping._metadata = replaced
            return mapping
        path.append(ITEM)
        items: list[Any] = []
        if isinstance(node, list):
            copies[id(node)] = items
        items += [replaced for value in node if (replaced := copy(value)) is not LEFT_OUT]
        path.pop()
        # A tuple that holds itself, by way of a list, has been copied further in.
        made = items if isinstance(node, list) else tuple(items) if isinstance(node, tuple) else set(items)
        return copies.setdefault(id(node), made)

    return copy(tree)


def follow(tree: Any, path: Path | None) -> Any:
    """Return what stands at a path; None where nothing does, or there is no path."""
    return None if path is None or not holds(tree, path) else _at(tree, path)


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def holds(tree: Any, path: Path) -> bool:
    """True if something stands at a path, None included."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def put(tree: Any, path: Path, value: Any) -> Any:
    """Copy a tree with a value at a path, in the place of what stood there or last; levels that lack are made."""
    if not path:
        return value
    key, *below = path
    level = tree if isinstance(tree, Mapping) else {}
    return {**level, key: put(level.get(key), tuple(below), value)}


def without(tree: Any, path: Path, *, prune: bool = False) -> Any:
    """Copy a tree without what stands at a path; where `prune`, without the levels that are empty then, too."""
    if not path or not holds(tree, path):
        return tree
    key, *below = path
    inner = without(tree[key], tuple(below), prune=prune) if below else None
    gone = not below or (prune and not inner)
    return {k: inner if k == key else value for k, value in tree.items() if k != key or not gone}
