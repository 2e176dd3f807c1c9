"""Prefixes: what wrappers put before the names of tensors, and what names become without it, or with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import AlignmentError, UsageError
from ..formats.pickle_objects import Inert
from ..formats.tree import Path
from ..tensors import Tensor
from .layouts.averaged_model import COUNTS
from .layouts.layout import Unchanged, dotted, is_scalar, split

# No model uses the private names, so they go anywhere in a name; those that a model may use for a module of its own go
# in front only, and from all names.
_LEADING = ("module.", "_module.")
_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
WRAPPERS = (*_LEADING, *_ANYWHERE)
"""What DataParallel and DDP, Opacus, torch.compile, FSDP, activation checkpointing and Fabric put before names."""


def unwrap(names: Iterable[str]) -> Mapping[str, str]:
    """Map each name to the one without wrapper prefixes.

    A leading prefix goes only where every name carries it, until none is left, in whatever order they were
    put on; the private ones (``_orig_mod.`` and the like) go in the middle of names, too.

    Raises:
        AlignmentError: two names become one.
    """
    names = names if isinstance(names, Mapping) else dict.fromkeys(names)
    text = "\n".join(names)
    if not any(wrapper in text for wrapper in _ANYWHERE) and not next(iter(names), "").startswith(_LEADING):
        return Unchanged(names)
    strip = unwrapping(names)
    mapping = {name: strip(name) for name in names}
    taken: dict[str, str] = {}
    for name, bare in mapping.items():
        if bare in taken:
            raise AlignmentError(
                f"'{taken[bare]}' and '{name}' are both '{bare}' without wrapper prefixes. Rename one first."
            )
        taken[bare] = name
    return mapping


def renamed(tensors: Mapping[str, Tensor], bare: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Return tensors by their new names, as `unwrap` returns them."""
    return tensors if isinstance(bare, Unchanged) else dict(zip(bare.values(), tensors.values(), strict=True))


def unwrapping(names: Iterable[str]) -> Callable[[str], str]:
    """Make the function that takes from a name the wrapper prefixes that go from all these names; see `unwrap`."""
    bare = [_strip_private(name) for name in names]
    gone: list[str] = []
    while (lead := _common(bare)) is not None:
        bare = [_strip_private(name.removeprefix(lead)) for name in bare]
        gone.append(lead)

    def strip(name: str) -> str:
        name = _strip_private(name)
        for lead in gone:
            name = _strip_private(name.removeprefix(lead))
        return name

    return strip


def _common(names: Sequence[str]) -> str | None:
    """Return the wrapper prefix with which all names begin, and of which none consists."""
    lead = next((lead for lead in _LEADING if names and names[0].startswith(lead)), None)
    return lead if lead is not None and all(name.startswith(lead) and name != lead for name in names) else None


def _strip_private(name: str) -> str:
    before = ""
    while name != before:
        before = name
        for wrapper in _ANYWHERE:
            name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def prefixes(names: Iterable[str]) -> Counter[str]:
    """Count the names that carry each wrapper prefix, in front or in the middle."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")[:-1]
        for wrapper in WRAPPERS:
            bare = wrapper.rstrip(".")
            if bare in parts if wrapper in _ANYWHERE else parts[:1] == [bare]:
                counts[wrapper] += 1
    return counts


_OWN = "module."
"""Averaged models keep the model under this name."""

Rename = Callable[[str], str]
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
class NewNames:
    """What becomes of the names in one state dict.

    Attributes:
        names: those that change, and to what.
        rule: for any name.
        report: for people.
    """

    names: Mapping[str, str]
    rule: Rename
    report: StateNames

    def modules(self, state: Mapping[Any, Any]) -> dict[str, str]:
        """Return what becomes of the modules in the ``_metadata`` of a state dict, as torch sets it."""
        metadata = getattr(state, "_metadata", None)
        old = [key for key in metadata if isinstance(key, str)] if isinstance(metadata, dict) and self.names else []
        return {module: new for module in old if (new := _module(module, self.rule)) != module}


def _module(name: str, rule: Rename) -> str:
    """Rename a module as its tensors are renamed; the model itself has the empty name."""
    inside = rule(f"{name}.\0" if name else "\0").removesuffix("\0")
    if inside and not inside.endswith("."):  # a prefix without a dot joins names, and makes no module
        return name
    return inside.removesuffix(".")


def plan_names(
    states: Mapping[Path, Mapping[Any, Any]], strip: Sequence[str], add: Sequence[str], *, where: str, notes: list[str]
) -> list[NewNames]:
    """Plan the new names in each state dict.

    Args:
        states: by path.
        strip, add: see `fix_prefix`; without either, wrapper prefixes go.
        where: the file's name, for messages.
        notes: receives notes for the user.

    Raises:
        AlignmentError: two names become one, or no name has a prefix to strip.
        UsageError: a prefix to strip ends before a dot.
    """
    changes = []
    carried: Counter[str] = Counter()
    for path, state in states.items():
        place = dotted(path)
        tensors = split(state)[0]
        # Entries of modules that are not tensors, such as the scale of a quantized layer.
        others = [key for key, value in state.items() if key not in tensors and _is_name(key, value)]
        names = [*tensors, *others]
        if strip or add:
            # A stray tensor next to whole state dicts, such as best_acc, belongs to no module.
            inner = any(len(other) > len(path) and other[: len(path)] == path for other in states)
            added = () if inner and not any("." in name for name in tensors) else add
            rule: Rename = partial(_literal, strip=tuple(strip), add=tuple(added))
            lost = _carried(names, strip)
        else:
            added, rule = (), _unwrapping(tensors, place or where, notes)
            lost = Counter(wrapper for wrapper in WRAPPERS for name in names if _loses(name, rule, wrapper))
        carried.update(lost)
        changed = {name: new for name in names if (new := rule(name)) != name}
        if changed:
            _refuse_other_names(path, state, where)
        _check(state, changed, f"{where}: in {place}" if place else where)
        got = dict.fromkeys(added, len(names))
        report = StateNames(place, len(names), dict(lost), got, next(iter(changed.items()), None))
        changes.append(NewNames(changed, rule, report))
    for prefix in strip:
        if not carried[prefix]:
            example = next(name for state in states.values() for name in split(state)[0])
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


def _carried(names: Sequence[str], strip: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for prefix in strip:
        counts.update(prefix for name in names if name.startswith(prefix) and name != prefix)
        names = [_literal(name, strip=(prefix,), add=()) for name in names]
    return counts


def _loses(name: str, rule: Rename, wrapper: str) -> bool:
    part = wrapper.removesuffix(".")
    return name.split(".")[:-1].count(part) > rule(name).split(".")[:-1].count(part)


def _unwrapping(tensors: Mapping[str, Tensor], label: str, notes: list[str]) -> Rename:
    """Make the rule of `prefixes.unwrap` for a state dict; where an average owns a prefix, that stays."""
    outer = _with_dotless(unwrapping(tensors))
    bare = {outer(name): tensor for name, tensor in tensors.items()}
    count = next((name for name in COUNTS if name in bare), None)
    inside = [name.removeprefix(_OWN) for name in bare if name.startswith(_OWN) and name != _OWN]
    if count is None or not is_scalar(bare[count], "int64") or not inside or len(inside) != len(bare) - 1:
        if 2 * len(inside) > len(bare):
            notes.append(
                f"{label}: {len(inside)} of {len(bare)} names start with '{_OWN}', but not all, so it may be the "
                f"model's own, and stays. To take it off: `strip={_OWN!r}`."
            )
        return outer
    notes.append(
        f"{label}: the names of an averaged model, which owns one '{_OWN}' and its {count}; that stays. "
        f"For plain weights: `convert(to='plain')`."
    )
    inner = unwrapping(inside)

    def rule(name: str) -> str:
        name = outer(name)
        return _OWN + inner(name.removeprefix(_OWN)) if name.startswith(_OWN) else name

    return rule


def _with_dotless(rule: Rename) -> Rename:
    """Extend a rule to the names that latent diffusion's LitEma gives its averages: those of the weights, dotless."""

    def extended(name: str) -> str:
        name = rule(name)
        module, _, inner = name.partition(".")
        if module.endswith("_ema") and "." not in inner:
            for wrapper in _ANYWHERE:  # `module` is a part of common words
                inner = inner.replace(wrapper.removesuffix("."), "")
            return f"{module}.{inner}" if inner else name
        return name

    return extended


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
        if not isinstance(key, str):
            continue
        new = changed.get(key, key)
        if new in taken:
            raise AlignmentError(
                f"{label}: '{taken[new]}' and '{key}' would both be '{new}'. Rename one of them first."
            )
        taken[new] = key
        if new != key and (not new or new.startswith(".")):
            raise UsageError(
                f"{label}: '{key}' would be '{new}', which is no name. Prefixes end in a dot, as 'model.' does."
            )
