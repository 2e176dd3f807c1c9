"""Metrics: numbers stored in a checkpoint, such as a validation accuracy."""

from __future__ import annotations

import math
from typing import Any

from ..checkpoints.scalars import as_number
from ..checkpoints.steps import trainer_state
from ..formats.header import Header


def metric_of(header: Header, key: str) -> float | None:
    """Return a number stored in a checkpoint under a key, dotted if nested; None if there is none."""
    value = stored_under(header, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return None if math.isnan(value) else float(value)
    except OverflowError:  # an integer too large for a float
        return None


def stored_under(header: Header, key: str) -> Any:
    """Return the value of a checkpoint at a key, dotted if nested, or the number in a tensor; None if there is none."""
    node: Any = measured(header)
    for part in [key] if key in node else key.split("."):
        if not isinstance(node, dict):
            return None
        node = node.get(part)
    return as_number(header, node)


def measured(header: Header) -> dict[Any, Any]:
    """Return the top-level entries of a checkpoint, and the values that Hugging Face's Trainer logged at its step."""
    state = trainer_state(header)
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    logged = {key: e[key] for e in entries if e.get("step") == state.get("global_step") for key in e}
    return logged | (header.content if isinstance(header.content, dict) else {})
