"""Schedule-free optimizers: the averages that are not in a checkpoint which was saved while such an optimizer trained.

"The Road Less Scheduled" (arXiv 2405.15682) has three sequences: the model holds y while it trains, the optimizer keeps
z for each parameter, and x = y / beta + (1 - 1 / beta) z is the average, which `eval()` of the optimizer puts into the
model. Beta is the first of `betas` (AdamWScheduleFree, RAdamScheduleFree) or `momentum` (SGDScheduleFree) of the group
of the parameter, and `train_mode` of the group tells what the model holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, takewhile
from typing import Any

from ...errors import LayoutError
from ...formats.header import Header
from ...formats.tree import Path
from ...tensors import SummedSpec, Tensor, TensorSpec
from ..optimizers import find_optimizers
from .counterparts import without_wrappers
from .layout import StateDict, dotted
from .parameter_lists import parameters

_SAVE = "Call optimizer.eval() before you save to have the averages in the file."


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """What an optimizer keeps for a parameter: its z, None before its first step; and the name, if it knows it."""

    z: TensorSpec | None
    name: str | None


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """A group of parameters of a schedule-free optimizer, in its order."""

    slots: tuple[_Slot, ...]
    training: bool
    beta: float


def was_training(optimizer: Mapping[Any, Any]) -> bool:
    """True if a schedule-free optimizer was saved while it trained, as it notes in each group."""
    return any(group.get("train_mode") for group in _groups_in(optimizer))


def training_mode_note(tree: Any, weights: Collection[Path]) -> str | None:
    """Say that raw weights are not the averages that a schedule-free optimizer makes of them; None if they may be.

    Args:
        weights: paths of sets of weights, which are not searched.
    """
    found = (path for path, optimizer in find_optimizers(tree, weights) if was_training(optimizer))
    if (path := next(found, None)) is None:
        return None
    return (
        f"'{dotted(path)}' is of a schedule-free optimizer that was training: the raw weights are what it trains, "
        "not its averages. To have these, use `state='eval'`, or call optimizer.eval() before you save."
    )


def is_computed(state: StateDict) -> bool:
    """True if tensors of a set are in no file; see `evaluated`."""
    return any(type(tensor) is SummedSpec for tensor in state.tensors.values())


def outdated(tree: Any, sets: Iterable[StateDict]) -> list[Path]:
    """Return the paths of schedule-free optimizers that do not fit weights which `evaluated` made.

    They say that the model holds what they train, and training would go on from there.
    """
    computed = [each for each in sets if is_computed(each)]
    inside = [part.path for each in computed for part in each.parts or (each,)]
    found = [path for path, optimizer in find_optimizers(tree, inside) if _keeps_z(optimizer)] if computed else []
    # An item of a list cannot go alone, for the numbers of the others would change.
    return [tuple(takewhile(lambda key: not isinstance(key, int), path)) or path for path in found]


def evaluation_note(state: StateDict) -> str | None:
    """Say what `evaluated` did, where a user may not expect it."""
    if state.which != "eval":
        return None
    if not is_computed(state):
        return "The schedule-free optimizer was not training, so the weights are its averages as they are."
    if any(name.rpartition(".")[2] == "running_mean" for name in state.tensors):
        return (
            "The running statistics of BatchNorm are those of the weights that the schedule-free optimizer trains, not "
            "of its averages. Recalibrate them on some data."
        )
    return None


def refuse_computed(header: Header, state: StateDict) -> None:
    """Refuse weights that are in no file.

    Raises:
        LayoutError: they are to be computed from what a schedule-free optimizer keeps.
    """
    if is_computed(state):
        raise LayoutError(
            f"{header.path}: the weights of `state='eval'` are in no file, but computed. Write them first: "
            "`convert(state='eval')`."
        )


def evaluated(header: Header, raw: StateDict) -> StateDict:
    """Return the weights that the `eval()` of a schedule-free optimizer would leave in the model.

    Buffers, and parameters that it does not train, stay as they are.

    Args:
        raw: the raw weights of the checkpoint.

    Returns:
        The set, with a SummedSpec for each parameter if the optimizer was training.

    Raises:
        LayoutError: the checkpoint has no such optimizer, or it is not certain which tensor of it belongs to which
            parameter.
    """
    inside = [part.path for part in raw.parts or (raw,)]
    found = [(path, optimizer) for path, optimizer in find_optimizers(header.tree, inside) if _keeps_z(optimizer)]
    if not found:
        raise LayoutError(
            f"{header.path}: holds no state of a schedule-free optimizer, so `state='eval'` has nothing to compute the "
            f"averages from. Use `state='raw'` for the weights as they are. {_SAVE}"
        )
    groups = [group for path, optimizer in found for group in _groups(header, path, optimizer)]
    tensors: Mapping[str, Tensor] = raw.tensors
    if any(group.training and any(slot.z is not None for slot in group.slots) for group in groups):
        pairs = _paired(groups, raw)
        if pairs is None:
            raise LayoutError(
                f"{header.path}: the order of the parameters in '{dotted(found[0][0])}' is not certain: their shapes "
                f"do not match those of {raw.label} one to one. {_SAVE}"
            )
        sums = {
            y: SummedSpec.of([(y, 1 / group.beta), (slot.z, 1 - 1 / group.beta)])
            for y, group, slot in pairs
            if group.training and slot.z is not None
        }
        tensors = {
            name: sums.get(spec, spec) if isinstance(spec, TensorSpec) else spec for name, spec in tensors.items()
        }
    return replace(raw, tensors=tensors, which="eval")


def _groups_in(optimizer: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
    groups = optimizer.get("param_groups")
    return (group for group in groups if isinstance(group, dict)) if isinstance(groups, list) else iter(())


def _keeps_z(optimizer: Mapping[Any, Any]) -> bool:
    state = optimizer.get("state")
    kept = state.values() if isinstance(state, dict) else ()
    return any("train_mode" in group for group in _groups_in(optimizer)) or any(
        isinstance(entry, dict) and isinstance(entry.get("z"), TensorSpec) for entry in kept
    )


def _groups(header: Header, path: Path, optimizer: Mapping[Any, Any]) -> Iterator[_Group]:
    state = optimizer["state"] if isinstance(optimizer["state"], dict) else {}
    for group in _groups_in(optimizer):
        numbers, names = group.get("params"), group.get("param_names")
        numbers = numbers if isinstance(numbers, list) and all(type(each) is int for each in numbers) else []
        if not isinstance(names, list) or len(names) != len(numbers):
            names = [None] * len(numbers)
        slots = []
        for number, name in zip(numbers, names, strict=True):
            kept = state.get(number)
            z = kept.get("z") if isinstance(kept, dict) else None
            slots.append(_Slot(z if isinstance(z, TensorSpec) else None, name if isinstance(name, str) else None))
        if not any(slot.z is not None for slot in slots):
            yield _Group(tuple(slots), training=False, beta=1.0)
            continue
        betas = group.get("betas")
        beta = betas[0] if isinstance(betas, (list, tuple)) and betas else group.get("momentum")
        training = group.get("train_mode")
        if not isinstance(training, bool) or not isinstance(beta, (int, float)) or not 0 < beta <= 1:
            raise LayoutError(
                f"{header.path}: '{dotted(path)}' keeps a 'z' for each parameter, as schedule-free optimizers do, but "
                f"does not say what the model holds (train_mode, and betas or momentum). {_SAVE}"
            )
        yield _Group(tuple(slots), training, float(beta))


_MOST_PARTS = 4
_Pair = tuple[TensorSpec, _Group, _Slot]


def _paired(groups: Sequence[_Group], raw: StateDict) -> list[_Pair] | None:
    """Find the parameter of each slot that has a z; None if more than one assignment is possible, or none.

    Torch numbers parameters in the order of the groups, and a group has them in the order of the model. Which of them
    it has is proven by names, if it knows them, or else by shapes.
    """
    slots = [(group, slot) for group in groups for slot in group.slots]
    if all(slot.name is not None for _, slot in slots if slot.z is not None):
        return _by_name(slots, raw.tensors)
    if len(raw.parts) > _MOST_PARTS:
        return None
    # Nothing tells in which order an optimizer was given the parts of a model.
    found = [_in_order(groups, slots, order) for order in permutations(raw.parts or (raw,))]
    able = [pairs for pairs in found if pairs is not None]
    same = {tuple((id(slot), id(y)) for y, _, slot in sorted(pairs, key=lambda pair: id(pair[2]))) for pairs in able}
    return able[0] if len(same) == 1 else None


def _in_order(
    groups: Sequence[_Group], slots: Sequence[tuple[_Group, _Slot]], parts: Sequence[StateDict]
) -> list[_Pair] | None:
    """Find the parameter of each slot that has a z, where the parameters have this order; None as `_paired`."""
    own = [each for part in parts for each in parameters(part.tensors).values() if isinstance(each, TensorSpec)]
    if len(groups) == 1 and len(slots) == len(own):
        return _checked((y, group, slot) for y, (group, slot) in zip(own, slots, strict=True))
    groups_of: dict[tuple[int, ...], set[int]] = {}
    for i, group in enumerate(groups):
        for slot in group.slots:
            if slot.z is not None:
                groups_of.setdefault(slot.z.shape, set()).add(i)
    if any(len(each) > 1 for each in groups_of.values()):
        return None
    pairs: list[_Pair] = []
    for i, group in enumerate(groups):
        kept = [slot for slot in group.slots if slot.z is not None]
        able = [y for y in own if i in groups_of.get(y.shape, ())]
        shapes, wanted = [y.shape for y in able], [slot.z.shape for slot in kept if slot.z is not None]
        first = _places(wanted, shapes)
        last = _places(wanted[::-1], shapes[::-1])
        if first is None or last is None or first != [len(able) - 1 - place for place in last[::-1]]:
            return None
        pairs += [(able[place], group, slot) for place, slot in zip(first, kept, strict=True)]
    return _checked(pairs)


def _by_name(slots: Sequence[tuple[_Group, _Slot]], tensors: Mapping[str, Tensor]) -> list[_Pair] | None:
    bare = {without_wrappers(name): tensor for name, tensor in tensors.items()}
    named = [(without_wrappers(slot.name), group, slot) for group, slot in slots if slot.name is not None]
    if len(bare) < len(tensors) or len({name for name, _, _ in named}) < len(named):
        return None
    return _checked((bare.get(name), group, slot) for name, group, slot in named)


def _checked(pairs: Any) -> list[_Pair] | None:
    """Return pairs in which parameter and z have one shape; None if one has not."""
    found: list[_Pair] = []
    for y, group, slot in pairs:
        if slot.z is None:
            continue
        if not isinstance(y, TensorSpec) or not _belong(y, slot.z):
            return None
        found.append((y, group, slot))
    return found


def _belong(y: TensorSpec, z: TensorSpec) -> bool:
    return y.shape == z.shape and y.dtype.averaged and y.dtype.category is z.dtype.category


def _places(wanted: Sequence[Any], able: Sequence[Any]) -> list[int] | None:
    """Find a sequence within another one, each element as early as possible; None if it is not in it."""
    places, at = [], 0
    for each in wanted:
        while at < len(able) and able[at] != each:
            at += 1
        if at == len(able):
            return None
        places.append(at)
        at += 1
    return places
