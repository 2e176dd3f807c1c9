"""Trees: the nested objects of a checkpoint; walks, copies, and access by key path.

No function changes a tree in place. Copies share the unchanged subtrees.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from ..tensors import Tensor, TensorSpec, UnsupportedTensor
from .pickle_objects import Inert

Path = tuple[Any, ...]
"""Keys from the root of a tree to an entry."""

ITEM = "[]"
"""In a path of `map_tree`: an item of a list, tuple or set."""
LEFT_OUT = object()
"""Result of `replace` in `map_tree` for a node that the copy lacks."""


class Instead(NamedTuple):
    """Result of `replace` in `map_tree` for a node in whose place another one is copied."""

    node: Any


def contents(node: Any) -> Iterable[tuple[Any, Any]]:
    """Return the (key, value) pairs of a dict, list, tuple, namespace or Inert; empty for anything else."""
    if isinstance(node, (TensorSpec, UnsupportedTensor, str, int)):  # by far the most frequent
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
    """Return the (key, value) pairs of a dict, list or tuple; empty for anything else."""
    if isinstance(node, dict):
        return node.items()
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else ()


PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
"""Types of plain values, of which a log may have millions."""


def is_flat(node: Any) -> bool:
    """True for a dict, list or tuple of plain values alone."""
    if isinstance(node, dict):
        return PLAIN.issuperset(map(type, node.values()))
    return type(node) in (list, tuple) and PLAIN.issuperset(map(type, node))


def is_plain(node: Any) -> bool:
    """True for a plain value, and for a flat container."""
    return type(node) in PLAIN or is_flat(node)


def branches(node: Any) -> Collection[tuple[Any, Any]]:
    """Return `contents` but for plain values and flat containers, which hold no tensor and need no visit."""
    if is_plain(node):
        return ()
    return [(key, child) for key, child in contents(node) if type(child) not in PLAIN and not is_flat(child)]


def walk(
    tree: Any, children: Callable[[list[Any], Any], Iterable[tuple[Any, Any]]] = lambda path, node: contents(node)
) -> Iterator[tuple[list[Any], Any]]:
    """Walk a tree depth first and yield (path, node), a container before its contents.

    A container in several places is yielded at each, but its contents only once. Memory is linear in the depth.

    Args:
        children: from (path, node) to the (key, value) pairs to visit below the node.

    Yields:
        (path, node); the path is one list that the walk changes, so copy it to keep it.
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
    classes = (TensorSpec, UnsupportedTensor)  # a union takes longer to test
    return (
        (tuple(path), node) for path, node in walk(tree, lambda path, node: branches(node)) if isinstance(node, classes)
    )


def map_tree(tree: Any, replace: Callable[[list[Any], Any], Any], plain: Collection[type] = ()) -> Any:
    """Copy a tree; shared and recursive containers stay so in the copy.

    Dicts, namespaces, lists, tuples and sets become new dicts, lists, tuples and sets. An OrderedDict stays one, and
    keeps the ``_metadata`` that torch sets on a state dict.

    Args:
        replace: called with (path, node) for every node; returns its replacement, LEFT_OUT to leave it out, Instead to
            copy another node, or NotImplemented to copy a container. The path is one list, as in `walk`, with ITEM for
            each item of a list, tuple or set.
        plain: types of values that `replace` returns as they are wherever they stand; it is not called for those in a
            list or tuple of such values alone.

    Raises:
        RecursionError: nested beyond Python's recursion limit.
    """
    path: list[Any] = []
    copies: dict[int, Any] = {}
    kept = frozenset(plain)

    def copy(node: Any) -> Any:
        replaced = replace(path, node)
        if isinstance(replaced, Instead):
            return copy(replaced.node)
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
        if type(node) in (list, tuple) and kept.issuperset(map(type, node)):
            return copies.setdefault(id(node), node if type(node) is tuple else [*node])
        path.append(ITEM)
        items: list[Any] = []
        if isinstance(node, list):
            copies[id(node)] = items
        items += [replaced for value in node if (replaced := copy(value)) is not LEFT_OUT]
        path.pop()
        # A tuple that contains itself, through a list, has already been copied at a deeper level.
        made = items if isinstance(node, list) else tuple(items) if isinstance(node, tuple) else set(items)
        return copies.setdefault(id(node), made)

    return copy(tree)


def follow(tree: Any, path: Path | None) -> Any:
    """Return the value at a path; None if there is no value or no path."""
    return None if path is None or not holds(tree, path) else _at(tree, path)


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def holds(tree: Any, path: Path) -> bool:
    """Return True if there is a value at a path; None is a value."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def put(tree: Any, path: Path, value: Any) -> Any:
    """Copy a tree with a value at a path: replaced, or added last; missing levels are created."""
    if not path:
        return value
    key, *below = path
    level = tree if isinstance(tree, Mapping) else {}
    return {**level, key: put(level.get(key), tuple(below), value)}


def without(tree: Any, path: Path, *, prune: bool = False) -> Any:
    """Copy a tree without the value at a path; if `prune`, also without levels that become empty.

    The path may lead through lists, which keep their items.
    """
    if not path:
        return tree
    key, *below = path
    if isinstance(tree, (list, tuple)) and below and type(key) is int and 0 <= key < len(tree):
        inner = without(tree[key], tuple(below), prune=prune)
        if inner is tree[key]:
            return tree
        return type(tree)(inner if i == key else item for i, item in enumerate(tree))
    if not isinstance(tree, Mapping) or key not in tree:
        return tree
    inner = without(tree[key], tuple(below), prune=prune) if below else None
    if below and inner is tree[key]:
        return tree
    gone = not below or (prune and not inner)
    return {k: inner if k == key else value for k, value in tree.items() if k != key or not gone}
