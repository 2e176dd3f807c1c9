"""Selecting: which set of weights was meant; what misleads, or would lose an entry, is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import LayoutError
from ...formats.header import Header
from ...formats.pickle_read import Inert
from ...tensors import Tensor
from ..tree import tensors_in
from .find import set_at, state_dict, states
from .state import StateDict, dotted, looks_like_training_state
from .table import SET_KEYS, SWAPPERS

_SWAPPING = ("mmengine", "lightning")


def select(header: Header, state: str = "auto", names: Mapping[str, Tensor] | None = None) -> StateDict:
    """Find a set of weights in a checkpoint.

    Args:
        names: a state dict of the same model, for forms that keep no names (lists) or spoil them (LitEma's).
        state: ``auto`` (the EMA where there is one), ``raw``, ``ema``, or a dotted path such as ``model.teacher``.

    Raises:
        LayoutError: it is not there, is empty, or would lose an entry; or the layout's names mislead.
    """
    tree = header.tree
    if state not in ("auto", "raw", "ema"):
        return _at_path(header, state, names)
    # A name may mislead, so what is asked for goes before it.
    found = states(header, names, by_name=state != "raw")
    known = any(state.layout in _SWAPPING for state in found.values())
    if not known and isinstance(tree, dict) and _holds_tensors(tree.get("state_dict")):
        swapper = next((key for key in SWAPPERS if _holds_tensors(tree.get(key))), None)
        if swapper is not None:
            raise LayoutError(
                f"{header.path}: holds 'state_dict' and '{swapper}'. Some libraries swap raw and averaged weights, "
                f"so say which you mean: `state='state_dict'` or `state={swapper!r}`."
            )
    which = ("ema" if "ema" in found else "raw") if state == "auto" else state
    if which in found:
        if found[which].fault is not None:
            raise LayoutError(f"{header.path}: its {found[which].label} is {found[which].fault}")
        _refuse_nested(header, found[which])
        return found[which]
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
    return f"Choose with `state={first!r}`.{each}"


def _nothing(header: Header, found: Mapping[str, StateDict], which: str) -> str:
    if found:
        other = next(iter(found.values()))
        twin = header.path.with_name(f"{header.path.stem}-EMA{header.path.suffix}")
        if which == "ema" and twin.is_file():
            return f"has no ema weights; those are in {twin}, beside it."
        return f"has no {which} weights, only {other.label}. Use `state={other.which!r}`."
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


def _at_path(header: Header, asked: str, names: Mapping[str, Tensor] | None) -> StateDict:
    path, node, rest = _follow(header.tree, asked)
    here = dotted(path)
    reading = None if rest else set_at(node, (), "ema", names)
    if reading is None and not isinstance(node, dict):
        where = f"'{here}'" if path else "it"
        missing = f"nothing at '{asked}': " if rest else ""
        raise LayoutError(
            f"{header.path}: {missing}{where} is {_in_words(node)}, not a state dict. "
            "Give the path of a dict of tensors; ckpt inspect shows what is inside."
        )
    if rest:
        names_here = [dotted([key]) for key in node]
        known = ", ".join(names_here[:8]) + (f" and {len(names_here) - 8} more" if len(names_here) > 8 else "")
        raise LayoutError(f"{header.path}: nothing at '{asked}'. {here or 'The top level'} holds: {known}.")
    fault = _fault(node, path) if isinstance(node, dict) else None
    if fault is None and reading is None:
        below = [(*path, *inner) for inner, _ in tensors_in(node)]
        fault = f"'{asked}' is no state dict: no tensor stands directly in it. {_choice(header, below)}"
    if fault is None and reading is not None and reading.fault is not None:
        fault = f"'{asked}' is {reading.fault}"
    if fault is not None or reading is None:
        raise LayoutError(f"{header.path}: {fault}")
    found = states(header, names)
    # What is found without a path would be found again in an output, and taken for its weights.
    places = dict.fromkeys((path, *(place for each in found.values() for place in each.places)))
    which, layout = (asked, "dotted path") if reading.form in ("plain", "module") else ("ema", reading.form)
    return state_dict(reading, path, which, layout, path, tuple(places))


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
