"""Trees: what stands where in a checkpoint, by paths of keys. Nothing is changed in place; what stays is shared."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from ..tensors import Tensor
from .pickle_read import Inert

Path = tuple[Any, ...]


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


def tensors_in(tree: Any) -> Iterator[tuple[Path, Tensor]]:
    """Walk a tree in order and yield (path of keys, tensor); a container met again is passed over."""
    seen: set[int] = set()
    path: list[Any] = []  # of one container at a time: together, the paths of nested ones are the square of the depth
    walks = [iter([(None, tree)])]
    while walks:
        for key, node in walks[-1]:
            if isinstance(node, Tensor):
                yield (*path, key)[1:], node
            elif id(node) not in seen:
                seen.add(id(node))
                path.append(key)
                walks.append(_children(node))
                break
        else:
            walks.pop()
            del path[-1:]


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)
    elif isinstance(node, argparse.Namespace):
        yield from vars(node).items()
    elif isinstance(node, Inert):
        yield from enumerate(node.args)
        yield "state", node.state
        yield from enumerate(node.items)
