"""Layouts: where the weights are inside a checkpoint, raw and averaged, in which form."""

from __future__ import annotations

from .find import ema_config, is_ema_by_name, states
from .forms import parameters
from .select import select
from .state import StateDict, dotted, is_buffer, is_optimizer, looks_like_training_state
from .table import BY_NAME, LAYOUTS, Layout

__all__ = [
    "BY_NAME",
    "LAYOUTS",
    "Layout",
    "StateDict",
    "dotted",
    "ema_config",
    "is_buffer",
    "is_ema_by_name",
    "is_optimizer",
    "looks_like_training_state",
    "parameters",
    "select",
    "states",
]
