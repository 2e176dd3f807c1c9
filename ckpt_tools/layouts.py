"""Layouts: where the weights stand inside a checkpoint, raw and averaged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import LayoutError
from .formats.header import Header
from .formats.unpickle import Inert, tensors_in
from .tensors import DTYPES, Tensor, TensorSpec


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
SET_KEYS = tuple(key for layout in LAYOUTS for key in (layout.raw, layout.ema))
"""Where a set of weights may stand."""
# Beside these, `state_dict` is not what its name says: mmengine and Lightning swap the sets on saving.
_SWAPPERS = ("ema_state_dict", "current_model_state")


@dataclass(frozen=True, slots=True, eq=False)
class StateDict:
    """One set of weights inside a checkpoint.

    Attributes:
        tensors: name to tensor, as stored.
        extras: its other entries.
        path: keys that lead to it from the top of the checkpoint; empty for a plain one.
        which: ``raw``, ``ema``, or the dotted path that was asked for.
        layout: name of the layout.
    """

    tensors: dict[str, Tensor]
    extras: dict[Any, Any]
    path: tuple[Any, ...]
    which: str
    layout: str

    @property
    def label(self) -> str:
        """What to call it in a table: ``ema (state_dict_ema)``."""
        where = dotted(self.path)
        return self.which if self.which == where else f"{self.which} ({where or 'the whole file'})"


def dotted(path: Iterable[Any]) -> str:
    """Write a path of keys as ``--state`` takes it."""
    try:
        return ".".join(map(str, path))
    except ValueError:  # Python writes no integer of more than 4300 digits out
        return "(a number too long to show)"


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
        LayoutError: it is not there, is empty, or would lose an entry; or the layout's names mislead.
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
    if state != "auto" and isinstance(tree, dict) and _holds_tensors(tree.get(state)):
        return _at_path(header, state)  # such as the `ema` of DiT, in no layout here
    raise LayoutError(f"{header.path}: {_nothing(header, found, which)}")


def _fault(node: Mapping[Any, Any], path: tuple[Any, ...]) -> str | None:
    """Say what in a dict of weights is no tensor with a name, and so would be lost without a word."""
    for key, value in node.items():
        if isinstance(value, Tensor) and not isinstance(key, str):
            return f"the tensor '{dotted((*path, key))}' has a name that is no text. Save it under a text."
        if _is_array(value) and not looks_like_training_state(key, value):
            return f"'{dotted((*path, key))}' is a NumPy array, not a tensor. Save it as one: torch.from_numpy(array)."
    return None


def _is_array(value: Any) -> bool:
    return isinstance(value, Inert) and type(value).global_name in _ARRAYS


# By these NumPy 1 and 2 pickle an array; the last two since protocol 5.
_ARRAYS = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
    "numpy._core.numeric._frombuffer",
)


def _refuse_nested(header: Header, state: StateDict) -> None:
    """Refuse a dict where more than the weights was found: a stray tensor beside them, such as best_acc beside net."""
    fault = _fault(state.extras, state.path)
    if fault is not None:
        raise LayoutError(f"{header.path}: {fault}")
    for key, value in state.extras.items():
        if looks_like_training_state(key, value) or str(key).endswith("_extra_state"):
            continue
        place = (*state.path, key)
        below = [(*place, *path) for path, _ in tensors_in(value)]
        if below:
            raise LayoutError(
                f"{header.path}: tensors stand both in {dotted(state.path) or 'the top level'} and below "
                f"'{dotted(place)}', so it is not clear which are the weights. {_choice(header, below)}"
            )


def _choice(header: Header, tensors: Iterable[tuple[Any, ...]]) -> str:
    """Say how to choose among the dicts that hold these tensors."""
    places = dict.fromkeys(dotted(path[:-1]) for path in tensors)
    reached = (place for place in places if place and _holds_tensors(_follow(header.tree, place)[1]))
    first = next(reached, None)
    if first is None:
        return "Save the weights as one dict of names to tensors."
    each = " Each of these is averaged by a run of its own." if any(reached) else ""
    return f"Choose with --state {first}.{each}"


def _nothing(header: Header, found: Mapping[str, StateDict], which: str) -> str:
    if found:
        other = next(iter(found.values()))
        return f"has no {which} weights, only {other.label}. Use --state {other.which}."
    from_code = "not a state dict; it was not loaded. Save its state_dict() from the code that made it."
    if isinstance(header.tree, Inert):
        return f"{_in_words(header.tree)}, {from_code}"
    top = header.tree if isinstance(header.tree, dict) else {}
    for key in SET_KEYS:
        value = top.get(key)
        if isinstance(value, Inert):
            return f"its '{key}' is {_in_words(value)}, {from_code}"
        fault = _fault(value, (key,)) if isinstance(value, dict) else None
        if fault is not None:
            return fault
        if isinstance(value, dict) and not any(True for _ in tensors_in(value)):
            return f"its '{key}' holds no tensor. Nothing to average."
    tensors = [
        path
        for path, _ in tensors_in(header.tree)
        if not path or path[0] not in top or not looks_like_training_state(path[0], top[path[0]])
    ]
    places = list(dict.fromkeys(dotted(path[:-1]) for path in tensors if len(path) > 1))
    if places:
        shown = ", ".join(places[:6]) + (", ..." if len(places) > 6 else "")
        return f"in no known layout. Tensors stand in {shown}. {_choice(header, tensors)}"
    fault = _fault(top, ())
    if fault is not None:
        return fault
    if tensors:
        return "holds tensors without names, so it is no state dict. Save a dict of names to tensors."
    return "no tensor inside. It is a checkpoint file, but holds no weights."


def _at_path(header: Header, asked: str) -> StateDict:
    path, node, rest = _follow(header.tree, asked)
    here = dotted(path)
    if not isinstance(node, dict):
        where = f"'{here}'" if path else "it"
        missing = f"nothing at '{asked}': " if rest else ""
        raise LayoutError(
            f"{header.path}: {missing}{where} is {_in_words(node)}, not a state dict. "
            "Give the path of a dict of tensors; ckpt inspect shows what is inside."
        )
    if rest:
        known = ", ".join(dotted([key]) for key in node)[:200]
        raise LayoutError(f"{header.path}: nothing at '{asked}'. {here or 'The top level'} holds: {known}.")
    fault = _fault(node, path)
    if fault is None and not _holds_tensors(node):
        below = [(*path, *inner) for inner, _ in tensors_in(node)]
        fault = f"'{asked}' is no state dict: no tensor stands directly in it. {_choice(header, below)}"
    if fault is not None:
        raise LayoutError(f"{header.path}: {fault}")
    return _state(node, path, asked, "dotted path")


def _follow(tree: Any, asked: str) -> tuple[tuple[Any, ...], Any, str]:
    """Follow a dotted path as far as it leads: the keys, what stands there, and the rest of it."""
    node, rest = tree, asked
    path: tuple[Any, ...] = ()
    while rest and isinstance(node, dict):
        # Keys may hold dots themselves, so the longest key that fits is taken.
        names: dict[str, Any] = {key: key for key in node if isinstance(key, str) and f"{rest}.".startswith(f"{key}.")}
        number = rest.partition(".")[0]
        if number.isdecimal() and int(number) in node:
            names.setdefault(number, int(number))
        if not names:
            break
        name = max(names, key=len)
        path = (*path, names[name])
        node = node[names[name]]
        rest = rest[len(name) + 1 :]
    return path, node, rest


def _in_words(value: Any) -> str:
    if isinstance(value, Inert):
        return f"a pickled object ({type(value).global_name})"
    return next((words for kinds, words in _WORDS if isinstance(value, kinds)), f"of type {type(value).__name__}")


_WORDS: tuple[tuple[Any, str], ...] = (
    (Tensor, "a tensor"),
    ((int, float, complex), "a number"),
    (str, "a text"),
    ((list, tuple, set, frozenset), "a list"),
    (type(None), "None"),
)


def _holds_tensors(node: Any) -> bool:
    return isinstance(node, dict) and any(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in node.items()
    )


def _state(node: Mapping[Any, Any], path: tuple[Any, ...], which: str, layout: str) -> StateDict:
    tensors = {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, Tensor)}
    extras = {k: v for k, v in node.items() if k not in tensors}
    if _is_averaged_model(tensors):
        # The counter of torch's AveragedModel belongs to the wrapper, not to the weights.
        del tensors["n_averaged"]
    return StateDict(tensors, extras, path, which, layout)


def _is_averaged_model(tensors: Mapping[str, Tensor]) -> bool:
    counter = tensors.get("n_averaged")
    if not isinstance(counter, TensorSpec) or counter.shape != () or counter.dtype is not DTYPES["int64"]:
        return False
    return len(tensors) > 1 and all(name.startswith("module.") for name in tensors if name != "n_averaged")


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
    r"|loops|callbacks|saver|metric"
)
