"""Ultralytics: pickled modules, whose tensors are found without their classes being imported or run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...formats.pickle_objects import Inert
from ...tensors import Tensor
from .layout import Encoding, Layout, Names, Sets, StateDict

MOST_NAMES = 300_000
"""A pickled module may hold one child a thousand times, and that one another: its names have no end."""


def _attributes(node: Any) -> dict[Any, Any] | None:
    """Return the attributes of a pickled nn.Module, as its ``__dict__`` had them; None for anything else."""
    state = node.state if isinstance(node, Inert) else None
    if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
        state = state[0]
    parts = ("_parameters", "_buffers", "_modules")
    return state if isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in parts) else None


def _read(node: Any, names: Names, raw: Names) -> Sets:
    tensors: dict[str, Tensor] = {}
    for name, tensor in _tensors(node, "", (), set()):
        tensors[name] = tensor
        if len(tensors) > MOST_NAMES:
            return {"raw": StateDict({}, fault=f"a pickled module of over {MOST_NAMES} tensors.")}
    return {"raw": StateDict(tensors)} if tensors else {}


def _tensors(node: Any, prefix: str, above: tuple[int, ...], barren: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Walk as ``state_dict`` does: parameters, persistent buffers, then children in order.

    Args:
        above: modules that this one is part of, which none contains in earnest.
        barren: modules known to hold no tensor, so that they are passed through once.
    """
    attributes = _attributes(node)
    if attributes is None or id(node) in above or id(node) in barren or len(above) > 200:
        return
    passing = attributes.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, (set, frozenset)) else ()
    found = False
    for part in ("_parameters", "_buffers"):
        for name, tensor in attributes[part].items():
            if isinstance(name, str) and isinstance(tensor, Tensor) and not (part == "_buffers" and name in passing):
                found = True
                yield f"{prefix}{name}", tensor
    for name, child in attributes["_modules"].items():
        if isinstance(name, str):
            for pair in _tensors(child, f"{prefix}{name}.", (*above, id(node)), barren):
                found = True
                yield pair
    if not found:
        barren.add(id(node))


MODULE_ENCODING = Encoding("module", lambda node: _attributes(node) is not None, _read)
ULTRALYTICS = Layout(
    "ultralytics", "Ultralytics: pickled modules, model and ema",
    ("model",), ("ema",), ema_encoding=MODULE_ENCODING, written=False, exponential=True,
)  # fmt: skip
