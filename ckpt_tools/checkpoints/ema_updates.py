"""EMA updates: how many an average has had, and its decay, as its checkpoint stores them."""

from __future__ import annotations

from typing import Any

from ..formats.header import Header
from ..formats.tree import follow
from .layouts import LAYOUTS, Layout, StateDict
from .scalars import as_number


def _number(header: Header, value: Any) -> float | None:
    """Read a number, or a tensor of one element."""
    value = as_number(header, value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _layout(state: StateDict) -> Layout | None:
    """Return the layout of a set; None for an encoding that is no layout."""
    return next((layout for layout in LAYOUTS if layout.name == state.layout), None)


def stored_updates(header: Header, state: StateDict) -> int | None:
    """Read how often the average was updated: its own count, or the number of files that `avg` took."""
    number = None if state.which == "raw" else _number(header, state.updates)  # the count is of the average
    if number is not None:
        return int(number) if 0 <= number < 1 << 63 else None  # LitEma's -1 means unknown
    said = header.provenance or {}
    inputs = said.get("inputs") if said.get("command") == "avg" and said.get("mode") == "uniform" else None
    return len(inputs) if isinstance(inputs, list) else None


def weights_in_mean(header: Header, state: StateDict) -> int | None:
    """Read how many weights are in a mean; None if nobody knows."""
    layout = _layout(state) if state.which == "ema" else None
    if layout is None or layout.batches is None:
        return stored_updates(header, state)
    batches, period = (_number(header, follow(header.content, (key,))) for key in layout.batches)
    if batches is None or not 0 <= batches < 1 << 63:
        return None
    return int(batches - batches % period if period is not None and period >= 1 else batches)


def is_exponential(header: Header, state: StateDict) -> bool:
    """Return True if the average is no mean of weights that count the same, as its layout or its decay tells."""
    layout = _layout(state)
    known = layout is not None and layout.exponential
    return state.which == "ema" and (known or stored_decay(header, state) is not None)


def stored_decay(header: Header, state: StateDict) -> float | None:
    """Read the decay of an average."""
    number = _number(header, state.decay)
    return number if number is not None and 0 <= number <= 1 else None
