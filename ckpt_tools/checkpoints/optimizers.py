"""Optimizers and other training state: which entries of a checkpoint they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate
from typing import Any

from ..formats.tree import Path, entries, is_flat, is_plain, tensors_in, walk

_DEEPEST = 4
"""Levels above an optimizer's state: a framework's own dict, a list of optimizers, their names."""

SLOTS = frozenset(
    ("exp_avg", "exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "prev", "step_size", "row_var", "col_var")
    + ("exp_avg_sq_row", "exp_avg_sq_col", "momentum_buffer", "old_dirs", "grad_avg", "sqr_avg")
)
"""What optimizers keep for each parameter, by names that no weights have; ASGD's ``ax`` is not here, being weights."""


# Names of entries that only a running training needs.
_TRAINING_STATE = re.compile(
    r"optim|optims?_.*|optimizer.*"  # optimizers of other forms than torch's, and lists of them
    r"|(lr_|param_|opt_param_)?scheduler.*|lr_sched"
    r"|amp|(amp_|grad_|loss_)?scaler(_state_dict)?|loss_scale|native_amp_scaling_state"
    r"|rng(_.*)?|\w+_rng_states?|random_states"
    r"|loops|callbacks|saver|metric|train_state|dataloaders?"
)


def is_optimizer(value: Any) -> bool:
    """True for what the optimizers of torch and fastai give as their state."""
    if not isinstance(value, dict) or "state" not in value:
        return False
    of_fastai = isinstance(value["state"], list) and isinstance(value.get("hypers"), list)
    return "param_groups" in value or of_fastai


def looks_like_training_state(key: Any, value: Any) -> bool:
    """True for what a run needs to go on and finished weights do not: optimizers, scalers, random states."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    if is_optimizer(value) or (len(children) > 0 and all(map(is_optimizer, children))):
        return True
    if key == "optimizer_history":  # a file without it is one of before 2018 to fairseq, and not loaded
        return any(True for _ in tensors_in(value))
    return isinstance(key, str) and not isinstance(value, str) and _TRAINING_STATE.fullmatch(key) is not None


# In a dict without nesting, what marks a name as one of an optimizer: `sum` and its like may be in a name of weights.
_KEPT = SLOTS - {"sum", "prev", "step_size"}
_MASTER = re.compile(r"fp32_param.*|(fp32_)?master(_.*)?|main_params?")
_FLAT_OTHERS = re.compile(r"((?:\w+_)?scheduler|rng|\w+_rng_states?|random_states|param_groups)(_.*|/.*)?")


def flat_training_state(names: Iterable[Any]) -> dict[str, list[str]]:
    """Find training state among the names of a dict without nesting, by what optimizers keep for each parameter.

    Returns:
        First component or components, such as ``optimizer``, to the names that begin with it.
    """
    texts = [name for name in names if isinstance(name, str)]
    likely = (name.split(".") for name in texts if "optim" in name or name.startswith("state."))
    heads = {head for parts in likely if (head := _optimizer_of(parts)) is not None}
    found: dict[str, list[str]] = {}
    for name in texts if heads else ():
        first, *more = name.split(".", 3)
        begins = accumulate([first, *more[:2]], "{}.{}".format)
        head = next((begin for begin in begins if begin in heads), None)
        if head is not None or _FLAT_OTHERS.fullmatch(first):
            found.setdefault(head or first, []).append(name)
    return found


def _optimizer_of(parts: list[str]) -> str | None:
    """Return the begin of a name that is the optimizer's: ``optimizer`` of ``optimizer.state.exp_avg.NAME``."""
    for i, part in enumerate(parts[:3]):
        below = parts[i + 1 :]
        flattened = below[:1] == ["state"] and below[-1] in SLOTS
        if part.startswith("optim") and (flattened or any(p in _KEPT or _MASTER.fullmatch(p) for p in below)):
            return ".".join(parts[: i + 1])
    return "state" if parts[0] == "state" and len(parts) > 2 and parts[-1] in _KEPT else None


def find_optimizers(tree: Any, weights: Collection[Path] = ()) -> Iterator[tuple[Path, Any]]:
    """Yield (path, state) of what torch's optimizers have saved, at the top level and in dicts and lists below.

    Args:
        weights: paths of sets of weights, which are not searched.
    """

    def below(path: list[Any], node: Any) -> Collection[tuple[Any, Any]]:
        deeper = len(path) < _DEEPEST and isinstance(node, (dict, list)) and not is_optimizer(node)
        if not deeper or (path and tuple(path) in weights) or is_flat(node):
            return ()
        # A state of plain values alone is that of an optimizer that has not made a step.
        return [(key, child) for key, child in entries(node) if not is_plain(child) or is_optimizer(child)]

    return ((tuple(path), node) for path, node in walk(tree, below) if is_optimizer(node))
