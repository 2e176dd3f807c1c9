"""Trees: walks and copies of nested objects, shared and cyclic ones among them."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools.formats.tree import ITEM, LEFT_OUT, PLAIN, branches, entries, map_tree, tensors_in, walk
from ckpt_tools.tensors import DTYPES, Storage, TensorSpec


def steps(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return [(tuple(path), node) for path, node in walk(tree)]


def test_walk_yields_containers_before_their_contents_in_order() -> None:
    tree = {"a": [1, (2,)], "b": Namespace(x=3)}

    assert steps(tree) == [
        ((), tree),
        (("a",), [1, (2,)]),
        (("a", 0), 1),
        (("a", 1), (2,)),
        (("a", 1, 0), 2),
        (("b",), Namespace(x=3)),
        (("b", "x"), 3),
    ]


def test_walk_yields_a_shared_container_at_each_place_and_its_contents_once() -> None:
    shared = {"w": 1}

    assert [path for path, _ in steps([shared, shared])] == [(), (0,), (0, "w"), (1,)]


def test_walk_ends_in_a_tree_that_contains_itself() -> None:
    tree: dict[str, Any] = {}
    tree["self"] = tree

    assert [path for path, _ in steps(tree)] == [(), ("self",)]


def test_walk_visits_what_children_gives() -> None:
    tree = {"a": {"b": 1}, "c": {"d": 2}}
    visited = walk(tree, lambda path, node: [] if path == ["c"] else list(reversed(entries(node))))

    assert [tuple(path) for path, _ in visited] == [(), ("c",), ("a",), ("a", "b")]


def test_walk_has_no_limit_of_depth() -> None:
    tree: Any = 1
    for _ in range(100_000):
        tree = [tree]

    assert max(len(path) for path, _ in walk(tree)) == 100_000


def same(path: list[Any], node: Any) -> Any:
    return node if isinstance(node, int) else NotImplemented


def test_map_tree_copies_containers_and_keeps_what_is_shared() -> None:
    shared = [1, 2]
    copy = map_tree({"a": shared, "b": (shared, {3, 4}), "n": Namespace(x=5)}, same)

    assert copy == {"a": [1, 2], "b": ([1, 2], {3, 4}), "n": {"x": 5}}
    assert copy["a"] is copy["b"][0]
    assert copy["a"] is not shared


def test_map_tree_keeps_cycles() -> None:
    items: list[Any] = [1]
    tree = (items,)
    items += [items, tree]
    copy = map_tree(tree, same)

    assert copy[0] is not items
    assert copy[0][1] is copy[0]
    assert copy[0][2] is copy


def test_map_tree_replaces_and_leaves_out_by_path() -> None:
    seen = []

    def replace(path: list[Any], node: Any) -> Any:
        seen.append(tuple(path))
        if path[-1:] == ["gone"]:
            return LEFT_OUT
        return node * 10 if isinstance(node, int) else NotImplemented

    assert map_tree({"a": [1, 2], "gone": 3}, replace) == {"a": [10, 20]}
    assert seen == [(), ("a",), ("a", ITEM), ("a", ITEM), ("gone",)]


def test_map_tree_keeps_the_metadata_of_a_state_dict() -> None:
    state: Any = OrderedDict(w=1)
    state._metadata = {"": {"version": 2}}
    copy = map_tree(state, same)

    assert type(copy) is OrderedDict
    assert copy._metadata == {"": {"version": 2}}
    assert copy._metadata is not state._metadata


def test_map_tree_of_a_deep_tree_raises_recursion_error() -> None:
    tree: Any = 1
    for _ in range(100_000):
        tree = [tree]

    with pytest.raises(RecursionError, match="recursion"):
        map_tree(tree, same)


LOGS: list[Any] = [
    [*range(50)],
    [0.5] * 50,
    [[i, 0.5, None] for i in range(50)],
    [{"step": i, "loss": 0.5} for i in range(50)],
    {i: "text" for i in range(50)},
]


@pytest.mark.parametrize("log", LOGS)
def test_a_walk_for_tensors_does_not_visit_a_log(log: Any) -> None:
    """A run may keep a million numbers."""
    spec = TensorSpec(DTYPES["float32"], (1,), (1,), 0, Storage(Path("f"), 0, 4))
    tree = {"log": log, "model": {"w": spec}, "both": [*(log if isinstance(log, list) else [log]), [spec]]}
    visited = [node for _, node in walk(tree, lambda path, node: branches(node))]
    assert len(visited) <= 7
    assert [path for path, _ in tensors_in(tree)] == [("model", "w"), ("both", len(tree["both"]) - 1, 0)]


@pytest.mark.parametrize("log", LOGS)
def test_a_copy_of_a_log_is_equal_and_its_lists_are_new(log: Any) -> None:
    tree = {"log": log, "again": log, "pair": (1, 2.0)}
    copied = map_tree(tree, lambda path, node: NotImplemented if isinstance(node, (dict, list, tuple)) else node, PLAIN)
    assert copied == tree
    assert copied["log"] is copied["again"] is not log
    assert all(a is not b for a, b in zip(copied["log"], log, strict=True) if isinstance(a, (list, dict)))
