"""Layouts: where the weights stand inside a checkpoint, raw and averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import LayoutError
from .formats.header import Header
from .formats.unpickle import Inert, tensors_in
from .tensors import DTYPES, TensorSpec, UnsupportedTensor

Tensor = TensorSpec | UnsupportedTensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one family of training scripts keeps its weights."""

    name: str
    raw: str
    ema: str


LAYOUTS = (
    Layout("timm", "state_dict", "state_dict_ema"),
    Layout("model", "model", "model_ema"),  # DeiT; torchvision's reference scripts
    Layout("model_state_dict", "model_state_dict", "ema_state_dict"),
)
# Beside these, `state_dict` is not what its name says: mmengine and Lightning swap the sets on saving.
_SWAPPERS = ("ema_state_dict", "current_model_state")


@dataclass(frozen=True, slots=True, eq=False)
class StateDict:
    """One set of weights inside a checkpoint.

    Attributes:
        tensors: name to tensor, as stored.
        extras: entries of the state dict that are no tensors.
        path: keys that lead to it from the top of the checkpoint; empty for a plain one.
        which: ``raw``, ``ema``, or the dotted path that was asked for.
        layout: name of the layout.
    """

    tensors: dict[str, Tensor]
    extras: dict[str, Any]
    path: tuple[str, ...]
    which: str
    layout: str

    @property
    def label(self) -> str:
        """What to call it in a table: ``ema (state_dict_ema)``."""
        where = ".".join(self.path)
        return self.which if self.which == where else f"{self.which} ({where or 'the whole file'})"


def states(header: Header) -> dict[str, StateDict]:
    """Return the sets of weights that a checkpoint holds in a known layout: ``raw``, ``ema`` or both."""
    tree = header.tree
    if not isinstance(tree, dict):
        return {}
    found: dict[str, StateDict] = {}
    # Ordered as timm reads them: state_dict_ema, model_ema, state_dict, model.
    for which in ("ema", "raw"):
        for layout in LAYOUTS:
            key = layout.ema if which == "ema" else layout.raw
            if which not in found and _holds_tensors(tree.get(key)):
                found[which] = _state(tree[key], (key,), which, layout.name)
    if "ema" in found and "raw" not in found and _holds_tensors(tree):
        del found["ema"]  # a flat state dict, one of whose modules has such a name
    if found:
        return found
    return {"raw": _state(tree, (), "raw", "plain")} if _holds_tensors(tree) else {}


def select(header: Header, state: str = "auto") -> StateDict:
    """Find a set of weights in a checkpoint.

    Args:
        state: ``auto`` (the EMA where there is one), ``raw``, ``ema``, or a dotted path such as ``model.teacher``.

    Raises:
        LayoutError: it is not there, is empty, or the layout is one whose names mislead.
    """
    tree = header.tree
    if state not in ("auto", "raw", "ema"):
        return _at_path(header, state)
    if isinstance(tree, dict) and _holds_tensors(tree.get("state_dict")):
        swapper = next((key for key in _SWAPPERS if _holds_tensors(tree.get(key))), None)
        if swapper is not None:
            raise LayoutError(
                f"{header.path}: holds 'state_dict' and '{swapper}'. Some libraries swap raw and averaged weights, "
                f"so say which you mean: --state state_dict or --state {swapper}."
            )
    found = states(header)
    which = ("ema" if "ema" in found else "raw") if state == "auto" else state
    if which in found:
        _refuse_nested(header, found[which])
        return found[which]
    raise LayoutError(_nothing(header, found, which))


def _refuse_nested(header: Header, state: StateDict) -> None:
    """Refuse a dict in which a stray tensor stands beside the weights proper, such as best_acc beside net."""
    for key, value in state.extras.items():
        if looks_like_training_state(key, value) or key.endswith("_extra_state"):
            continue
        if any(True for _ in tensors_in(value)):
            place = ".".join((*state.path, key))
            raise LayoutError(
                f"{header.path}: tensors stand both in {'.'.join(state.path) or 'the top level'} and below '{place}', "
                f"so it is not clear which are the weights. Choose with --state, such as --state {place}."
            )


def _nothing(header: Header, found: Mapping[str, StateDict], which: str) -> str:
    if found:
        other = next(iter(found.values()))
        return f"{header.path}: has no {which} weights, only {other.label}. Use --state {other.which}."
    tree = header.tree
    if isinstance(tree, Inert):
        return (
            f"{header.path}: a pickled object ({type(tree).global_name}), not a state dict; it was not loaded. "
            "Save its state_dict() from the code that made it."
        )
    for layout in LAYOUTS:
        for key in (layout.raw, layout.ema):
            value = tree.get(key) if isinstance(tree, dict) else None
            if isinstance(value, dict) and not any(True for _ in tensors_in(value)):
                return f"{header.path}: its '{key}' holds no tensor. Nothing to average."
            if isinstance(value, Inert):
                return (
                    f"{header.path}: its '{key}' is a pickled object ({type(value).global_name}), not a state dict; "
                    "it was not loaded. Save its state_dict() from the code that made it."
                )
    places = [".".join(map(str, path[:-1])) for path, _ in tensors_in(tree) if len(path) > 1]
    if places:
        unique = list(dict.fromkeys(place for place in places if place))
        shown = ", ".join(unique[:4]) + (", ..." if len(unique) > 4 else "")
        return f"{header.path}: in no known layout. Tensors stand in {shown}. Choose with --state {unique[0]}."
    if any(True for _ in tensors_in(tree)):
        return f"{header.path}: holds tensors without names, so it is no state dict. Save a dict of names to tensors."
    return f"{header.path}: no tensor inside. It is a checkpoint file, but holds no weights."


def _at_path(header: Header, dotted: str) -> StateDict:
    node: Any = header.tree
    path: list[str] = []
    rest = dotted
    while rest:
        if not isinstance(node, dict):
            break
        # Keys may hold dots themselves, so the longest key that fits is taken.
        key = max(
            (k for k in node if isinstance(k, str) and (rest == k or rest.startswith(f"{k}."))), key=len, default=None
        )
        if key is None:
            break
        path.append(key)
        node = node[key]
        rest = rest[len(key) + 1 :]
    if rest or not isinstance(node, dict):
        known = ", ".join(str(key) for key in node)[:200] if isinstance(node, dict) else type(node).__name__
        raise LayoutError(f"{header.path}: nothing at '{dotted}'. {'.'.join(path) or 'The top level'} holds: {known}.")
    if not _holds_tensors(node):
        raise LayoutError(f"{header.path}: '{dotted}' is no state dict: no tensor stands directly in it.")
    return _state(node, tuple(path), dotted, "dotted path")


def _holds_tensors(node: Any) -> bool:
    return isinstance(node, dict) and any(
        isinstance(key, str) and isinstance(value, (TensorSpec, UnsupportedTensor)) for key, value in node.items()
    )


def _state(node: Mapping[Any, Any], path: tuple[str, ...], which: str, layout: str) -> StateDict:
    tensors = {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, (TensorSpec, UnsupportedTensor))}
    extras = {k: v for k, v in node.items() if isinstance(k, str) and k not in tensors}
    if _is_averaged_model(tensors):
        # The counter of torch's AveragedModel belongs to the wrapper, not to the weights.
        del tensors["n_averaged"]
    return StateDict(tensors, extras, path, which, layout)


def _is_averaged_model(tensors: Mapping[str, Tensor]) -> bool:
    counter = tensors.get("n_averaged")
    if not isinstance(counter, TensorSpec) or counter.shape != () or counter.dtype is not DTYPES["int64"]:
        return False
    return len(tensors) > 1 and all(name.startswith("module.") for name in tensors if name != "n_averaged")


def looks_like_training_state(key: Any, value: Any) -> bool:
    """True for what a run needs to go on and finished weights do not: optimizers, scalers, random states."""
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        return True
    return isinstance(key, str) and key in _TRAINING_STATE


_TRAINING_STATE = frozenset(
    [
        "optimizer",
        "optimizers",
        "optimizer_state",
        "optimizer_states",
        "optimizer_state_dict",
        "optim",
        "optim_state_dict",
        "opt",
        "opt_state_dict",
        "scheduler",
        "schedulers",
        "scheduler_state_dict",
        "lr_scheduler",
        "lr_schedulers",
        "lr_scheduler_state_dict",
        "lr_sched",
        "param_schedulers",
        "scaler",
        "scaler_state_dict",
        "amp_scaler",
        "grad_scaler",
        "amp",
        "loss_scaler",
        "loss_scale",
        "native_amp_scaling_state",
        "loops",
        "callbacks",
        "rng_state",
        "rng_states",
        "random_rng_state",
        "np_rng_state",
        "torch_rng_state",
        "cuda_rng_state",
        "random_states",
        "saver",
        "metric",
    ]
)
