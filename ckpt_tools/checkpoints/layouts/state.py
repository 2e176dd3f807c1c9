"""State dicts: one set of weights inside a checkpoint, and what stands beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...tensors import Tensor, TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class StateDict:
    """One set of weights inside a checkpoint.

    Attributes:
        tensors: by the names that the bare model has; wrapper prefixes such as DDP's stay.
        keys: these names to the keys of the dict at `path`; None where the set does not stand in one dict.
        extras: the other entries of that dict.
        rest: what of it belongs to the other set, in words: ``model_ema.*``.
        counters: where it is said how often the average was updated, and how: paths from the top.
        path: keys that lead to it from the top of the checkpoint; empty for a plain one.
        which: ``raw``, ``ema``, or the dotted path that was asked for, where nothing there says which it is.
        layout: name of the layout.
        home: where the layout keeps weights that have no second set beside them.
        places: all places of the layout, this one among them.
        updates: how often the average was updated: a number, a tensor of one, or None.
        decay: of an EMA, likewise.
        fault: why it cannot be taken, in words; None if it can.
    """

    tensors: dict[str, Tensor]
    keys: Mapping[str, str] | None
    extras: dict[Any, Any]
    path: tuple[Any, ...]
    which: str
    layout: str
    home: tuple[Any, ...]
    places: tuple[tuple[Any, ...], ...]
    rest: tuple[str, ...] = ()
    counters: tuple[tuple[Any, ...], ...] = ()
    updates: int | TensorSpec | None = None
    decay: float | TensorSpec | None = None
    fault: str | None = None

    @property
    def label(self) -> str:
        """What to call it in a table: ``ema (state_dict_ema)``."""
        where = dotted(self.path)
        return self.which if self.which == where else f"{self.which} ({where or 'the whole file'})"


def dotted(path: Iterable[Any]) -> str:
    """Write a path of keys as the parameter `state` takes it."""
    try:
        return ".".join(map(str, path))
    except ValueError:  # Python writes no integer of more than 4300 digits out
        return "(a number too long to show)"


def is_optimizer(value: Any) -> bool:
    """True for what torch's optimizers give as their state."""
    return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()


def looks_like_training_state(key: Any, value: Any) -> bool:
    """True for what a run needs to go on and finished weights do not: optimizers, scalers, random states."""
    if is_optimizer(value):
        return True
    return isinstance(key, str) and not isinstance(value, str) and _TRAINING_STATE.fullmatch(key) is not None


_TRAINING_STATE = re.compile(
    r"optim|optims?_.*|optimizer.*"  # optimizers of other forms than torch's, and lists of them
    r"|(lr_|param_|opt_param_)?scheduler.*|lr_sched"
    r"|amp|(amp_|grad_|loss_)?scaler(_state_dict)?|loss_scale|native_amp_scaling_state"
    r"|rng(_.*)?|\w+_rng_states?|random_states"
    r"|loops|callbacks|saver|metric|train_state|dataloaders?"
)
# What is no parameter by its name: BatchNorm's statistics.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def is_buffer(name: str, tensor: Tensor) -> bool:
    """Tell a buffer from a parameter by dtype and name, which is all that a state dict has: integers, BatchNorm's."""
    return not isinstance(tensor, TensorSpec) or not tensor.dtype.averaged or name.rpartition(".")[2] in _BUFFERS
