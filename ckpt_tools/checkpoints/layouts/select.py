"""Sets of weights in a checkpoint: all of them, or the one that was asked for, unless it misleads or loses tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from os.path import commonprefix
from typing import Any

from ...errors import LayoutError, did_you_mean
from ...formats.deepspeed import FLAT_KEYS
from ...formats.deepspeed_files import folder_of
from ...formats.header import Header
from ...formats.pickle_objects import NUMPY_ARRAYS, Inert
from ...formats.tree import tensors_in
from ...storage.source import store_of
from ...tensors import Tensor, TensorSpec
from ..optimizers import is_optimizer, looks_like_training_state
from .counterparts import chosen_in, completed, is_average
from .layout import (
    DETECTED,
    LAYOUTS,
    Names,
    Sets,
    StateDict,
    dotted,
    has_tensors,
    is_buffer,
    one_of,
    read_sets,
    set_keys,
    split,
    swapped_keys,
)
from .schedule_free import evaluated


def states(header: Header, names: Names = None, *, by_name: bool = True) -> Sets:
    """Return the sets of weights that a checkpoint holds in a known layout: ``raw``, ``ema`` or both.

    Args:
        names: a state dict of the same model, for encodings that keep no names (lists) or change them (LitEma's).
        by_name: let the name of a file with one set say that it is an EMA.
    """
    tree = header.tree
    whole = read_sets(tree, names)
    found = _in_layouts(tree, names) if isinstance(tree, dict) else {}
    if whole and found.keys() <= {"ema"}:
        found = whole  # a flat state dict, one of whose modules has such a name
    elif not found and isinstance(tree, dict):
        found = _one_below(tree, names)
    if isinstance(tree, dict):
        found = completed(tree, found)
    for layout in LAYOUTS if list(found) == ["raw"] else ():
        facts = layout.ema_file(header)
        if facts is not None:
            raw = replace(found["raw"], **facts)
            return {"ema": replace(raw, which="ema", layout=layout.name)} if by_name else {"raw": raw}
    return found


def _in_layouts(tree: Mapping[Any, Any], names: Names) -> Sets:
    """Read an average with its raw weights, or else raw weights alone."""
    for read in (*(layout.read for layout in DETECTED), *(layout.read_alone for layout in LAYOUTS)):
        found = read(tree, names)
        if found:
            return found
    return {}


def _one_below(tree: Mapping[Any, Any], names: Names) -> Sets:
    """Look into the one entry that is a checkpoint itself, as torch's recipe for FSDP has it: app.model, app.optim."""
    inside = {
        key: found
        for key, value in tree.items()
        if isinstance(value, dict) and not is_optimizer(value) and (found := _in_layouts(value, names))
    }
    if len(inside) != 1:
        return {}
    ((key, found),) = inside.items()
    return {which: each.below((key,)) for which, each in found.items()}


def called(header: Header, state: StateDict) -> str:
    """Return what to call a set of weights that was selected: ``weights`` for ``raw``, where there is no other set."""
    alone = state.which == "raw" and not header.ranks and [*states(header)] == ["raw"]
    return state.label.replace("raw", "weights", 1) if alone else state.label


def is_ema_by_name(header: Header) -> bool:
    """True for a file or folder that holds an EMA alone, as its name or its configuration says."""
    return any(layout.ema_file(header) is not None for layout in LAYOUTS)


def select(header: Header, state: str = "auto", names: Names = None) -> StateDict:
    """Find a set of weights in a checkpoint.

    Args:
        names: a state dict of the same model, for encodings that keep no names (lists) or change them (LitEma's).
        state: ``auto`` (the EMA where there is one), ``raw``, ``ema``, ``eval`` (what a schedule-free optimizer would
            leave in the model), or a dotted path such as ``model.teacher``.

    Raises:
        LayoutError: it is not there, is empty, or would lose an entry; or the layout's names mislead.
    """
    tree = header.tree
    if header.ranks:
        raise LayoutError(
            f"{header.path}: each of its {len(header.ranks)} files has the part of one rank, so it is no whole set of "
            "weights. Merge the ranks first, with the tools of the program that wrote them."
        )
    if state == "eval":
        return evaluated(header, select(header, "raw", names))
    if state not in ("auto", "raw", "ema"):
        return _at_path(header, state, names)
    # A name may mislead, so what is asked for goes before it.
    found = states(header, names, by_name=state != "raw")
    swapped = {layout.name for layout in LAYOUTS if layout.swaps}
    if swapped.isdisjoint(each.layout for each in found.values()) and isinstance(tree, dict):
        swapper = next((key for key in swapped_keys() if has_tensors(tree.get(key))), None)
        if swapper is not None and has_tensors(tree.get("state_dict")):
            raise LayoutError(
                f"{header.path}: holds 'state_dict' and '{swapper}'. Some libraries swap raw and averaged weights, "
                f"so say which you mean: `state='state_dict'` or `state={swapper!r}`."
            )
    which = ("ema" if "ema" in found else "raw") if state == "auto" else state
    if which in found:
        if found[which].fault is not None:
            raise LayoutError(f"{header.path}: its {found[which].label} is {found[which].fault}")
        _refuse_nested(header, found[which])
        return _with_weights(header, found[which])
    raise LayoutError(f"{header.path}: {_nothing(header, found, which)}")


def _fault(node: Mapping[Any, Any], path: tuple[Any, ...]) -> str | None:
    """Describe an entry of a dict of weights that is not a tensor with a name, and so would be lost silently."""
    for key, value in node.items():
        if isinstance(value, Tensor) and not isinstance(key, str):
            return f"the tensor '{dotted((*path, key))}' has a name that is no text. Save it under a text."
        is_array = isinstance(value, Inert) and type(value).global_name in NUMPY_ARRAYS
        if is_array and not looks_like_training_state(key, value):
            return f"'{dotted((*path, key))}' is a NumPy array, not a tensor. Save it as one: torch.from_numpy(array)."
    return None


def _refuse_nested(header: Header, state: StateDict) -> None:
    """Refuse a dict that holds stray tensors, not the weights, which are further in: best_acc next to net."""
    fault = _fault(state.other_entries, state.path)
    if fault is not None:
        raise LayoutError(f"{header.path}: {fault}")
    for key, value in state.other_entries.items():
        if looks_like_training_state(key, value) or str(key).endswith("_extra_state"):
            continue
        outer = (*state.path, key)
        below = [(*outer, *path) for path, _ in tensors_in(value)]
        if below:
            raise LayoutError(
                f"{header.path}: tensors are both in {dotted(state.path) or 'the top level'} and below "
                f"'{dotted(outer)}', so it is not clear which are the weights. {_choice(header, below)}"
            )


def _with_weights(header: Header, state: StateDict) -> StateDict:
    """Refuse weights that are elsewhere: ZeRO-3 leaves an empty tensor in the place of each that it splits."""
    absent = _absent(header, state.tensors)
    if absent is None:
        return state
    raise LayoutError(
        f"{header.path}: {state.label} has {absent}. DeepSpeed's ZeRO-3 keeps the weights in *_optim_states.pt files"
        + _beside(header)
    )


def _absent(header: Header, tensors: Mapping[str, Tensor]) -> str | None:
    """Describe one of the weights that are not there.

    ZeRO-3 splits large ones alone, so in a plain file many, but not all, have to be empty.
    """
    weights = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, TensorSpec) and not is_buffer(name, tensor)
    }
    stored = header.tree.get("param_shapes") if isinstance(header.tree, dict) else None
    shapes: dict[Any, Any] = {}
    for group in stored if isinstance(stored, list) else [stored]:  # one for each group of the optimizer
        shapes.update(group if isinstance(group, dict) else {})
    empty = [name for name, tensor in weights.items() if tensor.shape == (0,) and name.endswith("weight")]
    wrong = [name for name, tensor in weights.items() if shapes.get(name, tensor.shape) != tensor.shape]
    if not wrong and 4 * len(empty) <= len(weights):
        return None
    where = "from which its 'param_shapes' differ" if wrong else "which is empty"
    return f"'{(wrong or empty)[0]}' of shape {[*weights[(wrong or empty)[0]].shape]}, {where}"


def _beside(header: Header) -> str:
    """Say where the files of all ranks are, which DeepSpeed puts into one folder."""
    folder = folder_of(header.path if header.in_folder else header.path.parent)
    if folder is None or not any(name.endswith("_optim_states.pt") for name in store_of(folder).names(folder)):
        return ", which are not here. Give the folder that has those of all ranks."
    return f". Give the folder that has them all: {folder}"


def _of_one_rank(header: Header) -> str | None:
    """Describe one file of a DeepSpeed checkpoint with ZeRO; None if it is no such file."""
    top = header.tree if isinstance(header.tree, dict) else {}
    optimizer = top.get("optimizer_state_dict")
    if isinstance(optimizer, dict) and not optimizer.keys().isdisjoint(FLAT_KEYS):
        return f"the optimizer states of one rank of DeepSpeed. Each rank has a part of the weights{_beside(header)}"
    module = top.get("module")
    if "ds_version" not in top or top.get("param_shapes") is None or not isinstance(module, dict):
        return None
    where = f"are in *_optim_states.pt files{_beside(header)}"
    if _absent(header, split(module)[0]) is not None:
        return f"the model states of DeepSpeed's ZeRO-3, and the weights {where}"
    return (
        "the model states of DeepSpeed. Use `state='module'` for the weights as the network computes with them. "
        f"Those in float32 {where}"
    )


def _choice(header: Header, tensors: Iterable[tuple[Any, ...]]) -> str:
    """Say how to choose among the dicts that hold these tensors."""
    places = dict.fromkeys(dotted(path[:-1]) for path in tensors)
    reached = (place for place in places if place and has_tensors(_follow(header.tree, place)[1]))
    first, *others = [*islice(reached, 8)] or [""]
    each = " To average several of them together, give `state` for each." if others else ""
    averages, raws = (
        [place for place in (first, *others) if is_average((place,), ()) is which] for which in (True, False)
    )
    if averages and raws:
        # The raw weights of params_ema are params, and of g_ema g.
        raw = max(raws, key=lambda place: len(commonprefix([place, averages[0]])))
        return f"Choose with `state={averages[0]!r}`, an average by its name, or `state={raw!r}`.{each}"
    return f"Choose with `state={first!r}`.{each}" if first else "Save the weights as one dict of names to tensors."


def _nothing(header: Header, found: Mapping[str, StateDict], which: str) -> str:
    if found:
        other = next(iter(found.values()))
        files = (layout.ema_file_of(header.path) for layout in LAYOUTS if which == "ema")
        other_file = next((path for path in files if path is not None and store_of(path).is_file(path)), None)
        if other_file is not None:
            return f"has no ema weights; they are in {other_file}."
        return f"has no {which} weights, only {other.label}. Use `state={other.which!r}`."
    of_one_rank = _of_one_rank(header)
    if of_one_rank is not None:
        return of_one_rank
    from_code = "not a state dict; it was not loaded. Save its state_dict() from the code that made it."
    if isinstance(header.tree, Inert):
        return f"{_in_words(header.tree)}, {from_code}"
    top = header.tree if isinstance(header.tree, dict) else {}
    if is_optimizer(top):
        return "the state of an optimizer alone, and no weights."
    for key in set_keys():
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
        return f"in no known layout. There are tensors in {shown}. {_choice(header, tensors)}"
    fault = _fault(top, ())
    if fault is not None:
        return fault
    if has_tensors(top):
        return "holds training state alone, and no weights."
    if tensors:
        return "holds tensors without names, so it is no state dict. Save a dict of names to tensors."
    return "no tensor inside. It is a checkpoint file, but holds no weights."


def _at_path(header: Header, asked: str, names: Names) -> StateDict:
    path, node, rest = _follow(header.tree, asked)
    here = dotted(path)
    sets = {} if rest else read_sets(node, names)
    found = one_of(sets, "ema")
    if found is None and not isinstance(node, dict):
        where = f"'{here}'" if path else "it"
        missing = f"nothing at '{asked}': " if rest else ""
        raise LayoutError(
            f"{header.path}: {missing}{where} is {_in_words(node)}, not a state dict. "
            "Give the path of a dict of tensors; ckpt inspect shows what is inside."
        )
    if rest:
        names_here = [dotted([key]) for key in node]
        known = ", ".join(names_here[:8]) + (f" and {len(names_here) - 8} more" if len(names_here) > 8 else "")
        meant = did_you_mean(asked, ("auto", "raw", "ema", "eval", *(dotted((*path, key)) for key in node)))
        raise LayoutError(f"{header.path}: nothing at '{asked}'. {here or 'The top level'} holds: {known}.{meant}")
    fault = _fault(node, path) if isinstance(node, dict) else None
    if fault is None and found is not None and found.fault is not None:
        fault = f"'{asked}' is {found.fault}"
    if fault is not None or found is None:
        below = ((*path, *inner) for inner, _ in tensors_in(node))
        nested = f"'{asked}' is no state dict: no tensor is directly in it. {_choice(header, below)}"
        raise LayoutError(f"{header.path}: {fault or nested}")
    others = states(header, names).values()
    # What is found without a path would be found again in an output, and taken for its weights.
    set_paths = tuple(dict.fromkeys((path, *(p for each in others for p in each.set_paths))))
    which, layout = ("ema", found.layout) if "ema" in sets else (asked, "dotted path")
    chosen = found.below(path, which=which, layout=layout, set_paths=set_paths)
    same = next((each for each in others if each.path == path), None)
    return _with_weights(header, chosen_in(header.tree, chosen if same is None else replace(chosen, home=same.home)))


def _follow(tree: Any, asked: str) -> tuple[tuple[Any, ...], Any, str]:
    """Follow a dotted path as far as it leads: the keys, the object there, and the remainder of the text."""
    node, rest = tree, asked
    path: tuple[Any, ...] = ()
    while rest and isinstance(node, (dict, list, tuple)):
        if not isinstance(node, dict):
            number, _, rest_of_it = rest.partition(".")
            if not (number.isdecimal() and len(number) < 10 and int(number) < len(node)):
                break
            path, node, rest = (*path, int(number)), node[int(number)], rest_of_it
            continue
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
