"""Counterparts: the averaged weights of raw ones, or the raw weights of an average, at a path that no layout names.

They are known by their tensors, which have the names and shapes of those of the other set. Many training scripts keep
an average in a dict of their own making: ``ema.module``, ``ema.shadow``, ``net_avg``, the state of a callback.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...formats.pickle_objects import Inert
from ...formats.tree import Path, branches, entries, follow, tensors_in, walk
from ...tensors import Tensor, TensorSpec
from ..optimizers import is_optimizer, looks_like_training_state
from .layout import Sets, StateDict, dotted, has_tensors, is_buffer, one_of, read_sets, split

_AVERAGE_WORDS = frozenset({"ema", "emas", "swa", "avg", "average", "averaged", "averages", "shadow", "polyak"})
# Averages of something else than weights, or of weights of an earlier time.
_OTHER_WORDS = frozenset(
    {"grad", "grads", "gradient", "sq", "square", "momentum", "exp", "var", "variance", "std", "fisher", "stats",
     "loss", "meter", "best", "last", "optim", "optimizer", "opt"}
)  # fmt: skip
_WRAPPERS = frozenset(
    {"module", "_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
_DEEPEST = 8
"""Levels at which sets are looked for; a hostile file may have any number."""


_SHOWN = 6


def completed(tree: Mapping[Any, Any], found: Sets) -> Sets:
    """Add the set that the layout of a checkpoint does not name, and let none stay beside a new average.

    Args:
        tree: of the checkpoint.
        found: its sets in a known layout.
    """
    known = found.get("raw") or found.get("ema")
    if known is None or not known.path:
        return found
    taken = {each.path for each in found.values()}
    base = known.path if "raw" in found else ()  # no key of raw weights says that they are an average
    alike = {
        other.path: other
        for each in found.values()
        for other in _counterparts(tree, each, base, also_raw=len(taken) == 1)
    }
    others = [each for path, each in alike.items() if path not in taken]
    averages = [each for each in others if is_average(each.path, base)]
    twins = [each for each in others if each not in averages]
    raws = [] if "raw" in found else _of_this_name(twins, known)
    of_twins = [_without_average(each.path) for each in twins if len(raws) != 1 or each not in raws]
    gone = [each for each in averages if _without_average(each.path) not in of_twins]
    averages = _of_this_name(averages, known)
    found = dict(found)
    if averages and "ema" not in found:
        fault = averages[0].fault if len(averages) == 1 else f"not the only average. There are {_all_of(averages)}"
        found["ema"] = replace(averages[0], which="ema", layout=known.layout, fault=fault)
    if len(raws) > 1:
        found["ema"] = replace(known, fault=f"the average of {_any_of(raws)}")
    places = [*known.set_paths, *(whole_entry(each.path, base) for each in gone)]
    home = known.home
    if len(raws) == 1:  # the script loads its weights from there
        found["raw"] = replace(raws[0], which="raw", layout=known.layout)
        home = raws[0].path
        places.append(home)
    return {which: replace(each, home=home, set_paths=tuple(dict.fromkeys(places))) for which, each in found.items()}


def _of_this_name(sets: list[StateDict], known: StateDict) -> list[StateDict]:
    """Return the one set whose path is that of the known one but for what says that it is an average, or else all."""
    same = [each for each in sets if _without_average(each.path) == _without_average(known.path)]
    return same if len(same) == 1 else sets


def _without_average(path: Path) -> list[str]:
    return [word for key in path for word in _words(key) if word not in _AVERAGE_WORDS]


def chosen_in(tree: Any, chosen: StateDict) -> StateDict:
    """Return a set that was asked for by its path, with the places at which its counterparts are."""
    if not isinstance(tree, dict):
        return chosen
    which = "ema" if is_average(chosen.path, ()) else "raw"
    return replace(completed(tree, {which: chosen})[which], which=chosen.which, layout=chosen.layout, fault=None)


def _all_of(sets: Sequence[StateDict]) -> str:
    *others, last = [dotted(each.path) for each in sets]
    shown = f"{', '.join(others[:_SHOWN])} and {last if len(sets) <= _SHOWN + 1 else f'{len(sets) - _SHOWN} more'}"
    return f"{shown}. Choose with `state={others[0]!r}`."


def _any_of(sets: Sequence[StateDict]) -> str:
    paths = [dotted(each.path) for each in sets]
    more = f" or one of {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{' or '.join(paths[:_SHOWN])}{more}. Choose with `state={paths[0]!r}`."


def with_names_of(raw: StateDict, ema: StateDict) -> StateDict | None:
    """Give an average the names of the raw weights, and what it lacks of them: buffers, and all that is of a loss.

    Returns:
        None if it has other names or shapes, or lacks parameters, so that it cannot take their place.
    """
    if ema.tensors.keys() == raw.tensors.keys():
        return ema
    names = _named(ema.tensors, raw.tensors)
    if names is None:
        part = _named_part(ema.tensors, raw.tensors)
        if part is None or _fault_of_part(part[0], raw) is not None:
            return None
        names = part[1]
    # A tied tensor is in an average once, under one of its names.
    tied = {raw.tensors[name]: ema.tensors[own] for name, own in names.items()}
    tensors = {name: tied.get(tensor, tensor) for name, tensor in raw.tensors.items()}
    tensors |= {name: ema.tensors[own] for name, own in names.items()}
    whole = names.keys() == raw.tensors.keys()
    return replace(
        ema, tensors=tensors, keys=ema.keys and {n: ema.keys[o] for n, o in names.items()} if whole else None
    )


def _counterparts(tree: Mapping[Any, Any], known: StateDict, base: Path, *, also_raw: bool) -> Iterator[StateDict]:
    """Find the sets at other paths whose tensors have the names and shapes of these.

    Args:
        base: path of the raw weights, if that is known.
        also_raw: not averages alone.
    """
    fewest = len({tensor for name, tensor in known.tensors.items() if is_parameter(name, tensor)})

    def below(path: list[Any], node: Any) -> list[tuple[Any, Any]]:
        if len(path) >= _DEEPEST or is_optimizer(node) or isinstance(node, Inert) or tuple(path) == known.path:
            return []
        inside = ((key, child) for key, child in branches(node) if isinstance(child, (dict, list, tuple, Inert)))
        return [
            (key, child) for key, child in inside if key == "callbacks" or not looks_like_training_state(key, child)
        ]

    for path, node in walk(tree, below):
        place = tuple(path)
        if not isinstance(node, (dict, Inert)):  # which may be a pickled module
            continue
        if known.path[: len(place)] == place or place[: len(known.path)] == known.path:
            continue
        averaged = is_average(place, base)
        if not averaged and (not also_raw or (isinstance(node, dict) and has_tensors(node) and len(node) < fewest)):
            continue
        if _not_begun(follow(tree, place[:-1])):  # there is no average before it began
            continue
        each = one_of(read_sets(node, known.tensors, known.tensors), "ema")
        if each is None:
            continue
        if each.fault is None and _named(each.tensors, known.tensors) is None:
            part = _named_part(each.tensors, known.tensors) if averaged else None
            if part is None:
                continue
            each = replace(each, fault=_fault_of_part(part[0], known))
        elif each.fault is not None and _fits_another(tree, node, place):
            continue
        yield each.below(place)


def _named_part(own: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> tuple[str, dict[str, str]] | None:
    """Map names as `_named` does for an average of one module of the known set, such as its net without the loss.

    Returns:
        (what is before the names of that module, the map); None if it is not such an average.
    """
    first = next((name for name, tensor in own.items() if is_parameter(name, tensor)), None)
    leads = [name.removesuffix(f".{first}") for name in known if name.endswith(f".{first}")][:_DEEPEST]
    for lead in leads:
        inside = {name: tensor for name, tensor in known.items() if name.startswith(f"{lead}.")}
        found = _named(own, inside) if len(inside) < len(known) else None
        if found is not None:
            return f"{lead}.", found
    return None


def _fault_of_part(lead: str, known: StateDict) -> str | None:
    """Return why an average of one module cannot stand for all: others have weights, too."""
    other = next(
        (name for name, tensor in known.tensors.items() if not name.startswith(lead) and is_weight(name, tensor)), None
    )
    if other is None:
        return None
    return f"the average of '{lead}*' alone, and '{other}' has none. Use `state='raw'` for the raw weights of both."


def is_weight(name: str, tensor: object) -> bool:
    """True for what only a network has: other tensors, such as the center of a loss, are not of the model."""
    return isinstance(tensor, TensorSpec) and tensor.dtype.averaged and name.rpartition(".")[2] in ("weight", "bias")


def _fits_another(tree: Mapping[Any, Any], node: Any, place: Path) -> bool:
    """True for an average without names that fits other weights in the checkpoint, another part of the model."""
    others = (child for path, child in walk(tree, _dicts) if has_tensors(child) and tuple(path) != place)
    found = (one_of(read_sets(node, split(other)[0], None), "ema") for other in others)
    return any(each is not None and each.fault is None for each in found)


def _dicts(path: list[Any], node: Any) -> list[tuple[Any, Any]]:
    inside = entries(node) if len(path) < _DEEPEST and not is_optimizer(node) else ()
    return [(key, child) for key, child in inside if isinstance(child, (dict, list, tuple))]


def _not_begun(above: Any) -> bool:
    return isinstance(above, dict) and above.get("n_averaged") == 0


def _named(own: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, str] | None:
    """Map names of the known set to those of another one; None if it is not of the same model.

    It may lack buffers, but no parameter. Names may differ by wrappers, and by what one set has before all of them.
    """
    ours, theirs = ({without_wrappers(name): name for name in names} for names in (known, own))
    if len(ours) != len(known) or len(theirs) != len(own):
        return None
    leads = [
        _lead(name for name in names if getattr(names_of[names[name]], "shape", ()))
        for names, names_of in ((ours, known), (theirs, own))
    ]
    for to, lead in dict.fromkeys((("", ""), (leads[0], ""), ("", leads[1]))):
        pairs = {to + name.removeprefix(lead): name for name in theirs}
        found = {ours[name]: theirs[pairs[name]] for name in ours if name in pairs}
        strays = (own[theirs[name]] for name in theirs if to + name.removeprefix(lead) not in ours)
        if any(getattr(tensor, "shape", ()) for tensor in strays):  # a count or a decay may be among them
            continue
        averaged = {known[name] for name in found}
        if not any(is_parameter(name, known[name]) for name in found):
            continue
        if any(is_parameter(name, tensor) and tensor not in averaged for name, tensor in known.items()):
            continue
        if all(_alike(known[name], own[other]) for name, other in found.items()):
            return found
    return None


def is_parameter(name: str, tensor: Tensor) -> bool:
    """True for what is trained, as far as a state dict tells."""
    return not is_buffer(name, tensor) and not name.endswith("_extra_state")


def without_wrappers(name: str) -> str:
    """Return a name without the components that wrappers of modules add, wherever they are."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def are_twins(one: StateDict, other: StateDict) -> bool:
    """True for sets of the same model: the names and shapes of one are those of the other."""
    return _named(one.tensors, other.tensors) is not None


def _alike(known: Tensor, other: Tensor) -> bool:
    return getattr(known, "shape", None) == getattr(other, "shape", None)


def _lead(names: Iterable[str]) -> str:
    """Return the components with which all names begin: wrappers, and the attribute that has the model."""
    split = [name.split(".")[:-1] for name in names]
    common = 0
    while split and all(len(each) > common and each[common] == split[0][common] for each in split):
        common += 1
    return "".join(f"{part}." for part in (split[0][:common] if split else ()))


def nameless_averages(tree: Any, sets: Sequence[StateDict]) -> Iterator[Path]:
    """Yield the entries that are averages of these weights by their keys and shapes, without names, such as lists.

    Args:
        tree: with something else than specs in the place of the sets.
    """
    wanted = [
        Counter(t.shape for name, t in each.tensors.items() if isinstance(t, TensorSpec) and is_parameter(name, t))
        for each in sets
    ]

    def below(path: list[Any], node: Any) -> list[tuple[Any, Any]]:
        return [*node.items()] if isinstance(node, dict) and not is_optimizer(node) else []

    for path, node in walk(tree, below):
        named = isinstance(node, dict) and all(isinstance(key, str) for key in node)
        if path and not named and is_average((path[-1],), ()):
            shapes = Counter(spec.shape for _, spec in tensors_in(node) if isinstance(spec, TensorSpec))
            if any(own and own <= shapes for own in wanted):
                yield tuple(path)


def is_average(path: Path, raw: Path) -> bool:
    """True if a word of a path says so, from where it leaves that of the raw weights."""
    words = {word for key in _apart(path, raw) for word in _words(key)}
    return not words.isdisjoint(_AVERAGE_WORDS) and words.isdisjoint(_OTHER_WORDS)


def _words(key: Any) -> list[str]:
    """Return the words of a key, in small letters: ``net_avg``, ``ModelEMA``."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key) if isinstance(key, str) else ""
    return [word for word in re.split(r"[^a-z]+", apart.lower()) if word]


def _apart(path: Path, raw: Path) -> Path:
    """Return the keys of a path from where it leaves that of the raw weights."""
    same = 0
    while same < min(len(path), len(raw)) and path[same] == raw[same]:
        same += 1
    return path[same:]


def whole_entry(path: Path, raw: Path) -> Path:
    """Return the path of the entry that is all about an average: the first key that says so."""
    apart = _apart(path, raw)
    first = next(i for i, key in enumerate(apart) if not _AVERAGE_WORDS.isdisjoint(_words(key)))
    return path[: len(path) - len(apart) + first + 1]
