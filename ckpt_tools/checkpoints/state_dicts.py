"""State dicts: the dicts of tensors anywhere in a checkpoint, in known layouts or not, outside of training state."""

from __future__ import annotations

from typing import Any

from ..formats.tree import Path, branches, walk
from .layouts.layout import has_tensors
from .optimizers import is_optimizer, looks_like_training_state


def state_dicts(tree: Any) -> dict[Path, dict[Any, Any]]:
    """Find the dicts whose text keys hold tensors, by path, in order; those of optimizers are passed over."""
    found: dict[Path, dict[Any, Any]] = {}
    seen: set[int] = set()
    for path, node in walk(tree, _outside_training_state):
        if not isinstance(node, dict) or id(node) in seen or is_optimizer(node):
            continue
        seen.add(id(node))
        # Of callbacks, Lightning's StochasticWeightAveraging holds weights; others, a best score or two.
        if has_tensors(node) and ("callbacks" not in path or path[-1] == "average_model_state"):
            found[tuple(path)] = node
    return found


def _outside_training_state(path: list[Any], node: Any) -> list[tuple[Any, Any]]:
    inside = branches(node) if isinstance(node, (dict, list, tuple)) and not is_optimizer(node) else ()
    return [(key, child) for key, child in inside if not _is_private(key, child)]


def _is_private(key: Any, value: Any) -> bool:
    """True for training state, and for the extra state of a module: their names are not those of weights."""
    own = isinstance(key, str) and key.endswith("_extra_state")
    return key != "callbacks" and (own or looks_like_training_state(key, value))
