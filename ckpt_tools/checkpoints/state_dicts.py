"""Names: the state dicts inside a checkpoint, and what their names become without wrapper prefixes, or with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import AlignmentError, UsageError
from ..formats.pickle_read import Inert
from ..formats.tree import Path, entries, walk
from ..tensors import DTYPES, Tensor, TensorSpec
from .layouts import dotted
from .optimizers import is_optimizer, looks_like_training_state
from .prefixes import WRAPPERS, unwrapping

COUNTERS = ("n_averaged", "steps")
"""What torch's AveragedModel and mmengine's count their updates in, beside names that all start with ``module.``."""
_OWN = "module."

Rule = Callable[[str], str]
"""From a name to what it becomes."""


@dataclass(frozen=True, slots=True)
class StateNames:
    """The names in one state dict, and what becomes of them.

    Attributes:
        place: dotted path in the checkpoint; empty for the checkpoint itself.
        names: how many there are.
        removed: prefix to how many names lose it.
        added: prefix to how many names get it.
        example: one name before and after, None where all stay.
    """

    place: str
    names: int
    removed: dict[str, int]
    added: dict[str, int]
    example: tuple[str, str] | None


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What becomes of one state dict.

    Attributes:
        names: those that change, and to what.
        rule: for any name.
        report: for people.
    """

    names: Mapping[str, str]
    rule: Rule
    report: StateNames

    def modules(self, state: Mapping[Any, Any]) -> dict[str, str]:
        """Return what becomes of the modules in the ``_metadata`` that torch keeps beside a state dict."""
        metadata = getattr(state, "_metadata", None)
        old = [key for key in metadata if isinstance(key, str)] if isinstance(metadata, dict) and self.names else []
        return {module: new for module in old if (new := _module(module, self.rule)) != module}


def _module(name: str, rule: Rule) -> str:
    """Rename a module as what stands in it is renamed; the model itself has the empty name."""
    inside = rule(f"{name}.\0" if name else "\0").removesuffix("\0")
    if inside and not inside.endswith("."):  # a prefix without a dot joins names, and makes no module
        return name
    return inside.removesuffix(".")


def state_dicts(tree: Any) -> dict[Path, dict[Any, Any]]:
    """Find the dicts whose text keys hold tensors, by path, in order; those of optimizers are passed over."""
    found: dict[Path, dict[Any, Any]] = {}
    seen: set[int] = set()
    for path, node in walk(tree, _outside_training_state):
        if not isinstance(node, dict) or id(node) in seen or is_optimizer(node):
            continue
        seen.add(id(node))
        # Of callbacks, Lightning's StochasticWeightAveraging holds weights; others, a best score or two.
        if _tensors(node) and ("callbacks" not in path or path[-1] == "average_model_state"):
            found[tuple(path)] = node
    return found


def _outside_training_state(path: list[Any], node: Any) -> list[tuple[Any, Any]]:
    inside = () if is_optimizer(node) else entries(node)
    return [(key, child) for key, child in inside if not _is_private(key, child)]


def _tensors(node: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _is_private(key: Any, value: Any) -> bool:
    """True for what a training or a module keeps to itself, and what has names of its own kind."""
    if key == "callbacks":
        return False
    own = isinstance(key, str) and key.endswith("_extra_state")
    return own or is_optimizer(value) or looks_like_training_state(key, value)


def plan_changes(
    states: Mapping[Path, Mapping[Any, Any]], strip: Sequence[str], add: Sequence[str], *, where: str, notes: list[str]
) -> list[Change]:
    """Say what becomes of the names in each state dict.

    Args:
        states: by path.
        strip, add: see `fix_prefix`; without either, wrapper prefixes go.
        where: the file's name, for messages.
        notes: receives what is worth saying aloud.

    Raises:
        AlignmentError: two names become one, or a prefix to strip is nowhere.
        UsageError: a prefix to strip ends before a dot.
    """
    changes = []
    carried: Counter[str] = Counter()
    for path, state in states.items():
        place = dotted(path)
        tensors = _tensors(state)
        # What is no tensor but stands for a part of a module, such as the scale of a quantized layer.
        others = [key for key, value in state.items() if key not in tensors and _is_name(key, value)]
        names = [*tensors, *others]
        if strip or add:
            # A stray tensor beside whole state dicts, such as best_acc, belongs to no module.
            stray = any(len(other) > len(path) and other[: len(path)] == path for other in states) and not any(
                "." in name for name in tensors
            )
            added = () if stray else add
            rule: Rule = partial(_literal, strip=tuple(strip), add=tuple(added))
            lost = _carried(names, strip)
            got = dict.fromkeys(added, len(names))
        else:
            rule = _unwrapping(tensors, place or where, notes)
            lost = {wrapper: n for wrapper in WRAPPERS if (n := sum(_loses(name, rule, wrapper) for name in names))}
            got = {}
        carried.update(lost)
        changed = {name: new for name in names if (new := rule(name)) != name}
        if changed:
            _refuse_other_names(path, state, where)
        _check(state, changed, f"{where}: in {place}" if place else where)
        report = StateNames(place, len(names), lost, got, next(iter(changed.items()), None))
        changes.append(Change(changed, rule, report))
    for prefix in strip:
        if not carried[prefix]:
            example = next(name for state in states.values() for name in _tensors(state))
            raise AlignmentError(f"{where}: no name in it starts with '{prefix}'. The first one is '{example}'.")
    return changes


def _is_name(key: Any, value: Any) -> bool:
    return isinstance(key, str) and (
        key.endswith("_extra_state") or ("." in key and not isinstance(value, (dict, list, Tensor)))
    )


def _literal(name: str, *, strip: Sequence[str], add: Sequence[str]) -> str:
    for prefix in strip:
        if name != prefix:
            name = name.removeprefix(prefix)
    for prefix in add:
        name = prefix + name
    return name


def _carried(names: Sequence[str], strip: Sequence[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for prefix in strip:
        counts[prefix] += sum(name.startswith(prefix) and name != prefix for name in names)
        names = [_literal(name, strip=(prefix,), add=()) for name in names]
    return dict(+counts)


def _loses(name: str, rule: Rule, wrapper: str) -> bool:
    part = wrapper.removesuffix(".")
    return name.split(".")[:-1].count(part) > rule(name).split(".")[:-1].count(part)


def _unwrapping(tensors: Mapping[str, Tensor], label: str, notes: list[str]) -> Rule:
    """Make the rule of `prefixes.unwrap` for a state dict; where an average owns a prefix, that stays."""
    outer = _with_dotless(unwrapping(tensors))
    bare = {outer(name): tensor for name, tensor in tensors.items()}
    counter = next((name for name in COUNTERS if name in bare), None)
    inside = [name.removeprefix(_OWN) for name in bare if name.startswith(_OWN) and name != _OWN]
    if counter is None or not _counts(bare[counter]) or not inside or len(inside) != len(bare) - 1:
        if 2 * len(inside) > len(bare):
            notes.append(
                f"{label}: {len(inside)} of {len(bare)} names start with '{_OWN}', but not all, so it may be the "
                f"model's own, and stays. To take it off: `strip={_OWN!r}`."
            )
        return outer
    notes.append(
        f"{label}: the names of an averaged model, which owns one '{_OWN}' beside its {counter}; that stays. "
        f"For plain weights: `convert(to='plain')`."
    )
    inner = unwrapping(inside)

    def rule(name: str) -> str:
        name = outer(name)
        return _OWN + inner(name.removeprefix(_OWN)) if name.startswith(_OWN) else name

    return rule


def _with_dotless(rule: Rule) -> Rule:
    """Extend a rule to the names that latent diffusion's LitEma gives its averages: those of the weights, dotless."""

    def extended(name: str) -> str:
        name = rule(name)
        module, _, rest = name.partition(".")
        if module.endswith("_ema") and "." not in rest:
            for wrapper in WRAPPERS[1:]:  # `module` is a part of common words
                rest = rest.replace(wrapper.removesuffix("."), "")
            return f"{module}.{rest}" if rest else name
        return name

    return extended


def _counts(tensor: Tensor) -> bool:
    return isinstance(tensor, TensorSpec) and tensor.shape == () and tensor.dtype is DTYPES["int64"]


def _refuse_other_names(path: Path, state: Mapping[Any, Any], where: str) -> None:
    """Refuse to fix names by halves: one of numpy.str_ looks like a text, and cannot be respelled."""
    for key, value in state.items():
        if isinstance(value, Tensor) and isinstance(key, Inert):
            raise AlignmentError(
                f"{where}: {f'in {dotted(path)}, ' if path else ''}a tensor has a name that is no plain text, such as "
                "numpy.str_, and would keep its prefix. Save it under a text: str(name)."
            )


def _check(state: Mapping[Any, Any], changed: Mapping[str, str], label: str) -> None:
    taken: dict[Any, Any] = {}
    for key in state:
        new = changed.get(key, key) if isinstance(key, str) else key
        if new in taken:
            raise AlignmentError(
                f"{label}: '{taken[new]}' and '{key}' would both be '{new}'. Rename one of them first."
            )
        taken[new] = key
        if new != key and (not new or new.startswith(".")):
            raise UsageError(
                f"{label}: '{key}' would be '{new}', which is no name. Prefixes end in a dot, as 'model.' does."
            )
