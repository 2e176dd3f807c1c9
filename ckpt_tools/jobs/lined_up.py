"""Weights lined up: of each checkpoint of a series the set that is averaged, without wrappers, name by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.layouts import StateDict, select
from ..checkpoints.layouts import states as states_of
from ..checkpoints.layouts.layout import dotted
from ..checkpoints.layouts.schedule_free import evaluation_note, training_mode_note
from ..checkpoints.layouts.select import is_ema_by_name
from ..checkpoints.parts import in_place, not_averaged, of_ranks, select_parts, unwrapped
from ..checkpoints.prefixes import renamed
from ..checkpoints.quantized import dequantized, refuse_without_scales
from ..errors import AlignmentError, LayoutError
from ..formats import without_collector
from ..formats.file_plan import Files
from ..formats.ranks import masters_beside
from ..series.align import KeyPlan, align
from ..series.find import average_words
from ..series.lora import factor_names, is_factor
from ..series.member import Member
from ..tensors import Tensor, TensorSpec
from .options import Matching
from .reports import some


@dataclass(frozen=True, slots=True, eq=False)
class LinedUp:
    """The weights of a series; with `shared`, `states`, `renamed` and `aligned` have those of the last checkpoint.

    Attributes:
        states: the set of weights in each checkpoint.
        renamed: their names to names without wrapper prefixes.
        aligned: name to one tensor a checkpoint, None where it has none.
        left_out: names that only some checkpoints have.
        shared: each file of the last checkpoint to the files in its place, if all headers are identical.
        notes: decisions worth knowing.
    """

    states: Sequence[StateDict]
    renamed: Sequence[Mapping[str, str]]
    aligned: Mapping[str, tuple[TensorSpec | None, ...]]
    left_out: tuple[str, ...]
    shared: Mapping[Path, Files]
    notes: tuple[str, ...]


@without_collector()
def line_up(
    members: Sequence[Member],
    names: Sequence[str],
    matching: Matching,
    *,
    mixed_dtypes: bool,
    chosen: Sequence[StateDict] | None = None,
) -> LinedUp:
    """Select the weights of each checkpoint, and match their tensors.

    Args:
        members: oldest first.
        names: of the checkpoints, for messages.
        matching: with ``lora="product"``, what updates consist of is not among the aligned tensors.
        mixed_dtypes: allow floating-point dtypes to differ.
        chosen: the set of weights in each checkpoint, if it is known.

    Raises:
        AlignmentError: names, shapes, dtypes or ranks differ.
        LayoutError: a checkpoint has no such weights, or some have averages and others have none.
        UnsupportedError: quantized weights, or an update that is no product of two factors.
    """
    shared = {} if matching.lora == "product" or chosen is not None else _shared(members)
    # Files with identical headers have the same tensors.
    own = members[-1:] if shared else members
    states = selected(own, names, matching) if chosen is None else chosen
    if matching.dequantize:
        states = [dequantized(member.header, state) for member, state in zip(own, states, strict=True)]
        refuse_without_scales(members[-1].header, states)
    bare = [unwrapped(state) for state in states]
    tensors: list[Mapping[str, Tensor]] = [renamed(state.tensors, own) for state, own in zip(states, bare, strict=True)]
    if matching.lora == "product":
        tensors = [_without(each, factor_names(each)) for each in tensors]
    plan = align(tensors, names[-len(states) :], keys=matching.keys, match=matching.match, mixed_dtypes=mixed_dtypes)
    return LinedUp(states, bare, plan.aligned, plan.left_out, shared, tuple(_notes(members, states, plan)))


def _without(tensors: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _shared(members: Sequence[Member]) -> dict[Path, Files]:
    """Return, for each file of the last checkpoint, the files in its place in all checkpoints of identical headers.

    Empty if one is not, or if the names of the files do not say the same about an EMA.
    """
    headers = [member.header for member in members]
    template = headers[-1].template
    if template is None or any(each.template is not template for each in headers):
        return {}
    if len({is_ema_by_name(each) for each in headers}) > 1:
        return {}
    shared = {}
    for file in template.files:
        places = [each.places.get(file, (file, 0)) for each in headers]
        last, before = places[-1]
        shared[last] = tuple((path, shift - before) for path, shift in places)
    return shared


def every_set(members: Sequence[Member], matching: Matching) -> tuple[tuple[Member, ...], tuple[StateDict, ...]]:
    """Return each checkpoint as often as it has sets of weights that are asked for, and these sets."""
    asked = states_asked(matching)
    sources = [
        (member, in_place(member.header, select(member.header, state)))
        for member in members
        for state in (asked if asked != ["auto"] else [*states_of(member.header)] or asked)
    ]
    return tuple(member for member, _ in sources), tuple(state for _, state in sources)


def states_asked(matching: Matching) -> list[str]:
    """Return the sets of weights that were asked for; several for the parts of a model."""
    return [matching.state] if isinstance(matching.state, str) else [*matching.state]


def selected(members: Sequence[Member], names: Sequence[str], matching: Matching) -> list[StateDict]:
    """Select the weights of each checkpoint.

    Raises:
        LayoutError: there are none; or some are averages, by layout or by name, and others are not.
    """
    asked = states_asked(matching)
    _check_ranks(members, names)
    found = [
        of_ranks(member.header, lambda header: in_place(header, select_parts(header, asked))) for member in members
    ]
    _check_parts(found, names)
    which = {state.which for state in found}
    if "ema" in which and len(which) > 1:
        having = [name for name, state in zip(names, found, strict=True) if state.which == "ema"]
        lacking = [name for name, state in zip(names, found, strict=True) if state.which != "ema"]
        raise LayoutError(
            f"{having[0]} holds EMA weights, {lacking[0]} does not ({len(having)} of {len(names)} do). "
            "Raw and averaged weights cannot be mixed: use `state='raw'`, or leave the others out."
        )
    marked = [name for name in names if "ema" in average_words(name)]
    if "auto" in asked and "ema" not in which and 0 < len(marked) < len(names):
        raise LayoutError(
            f"Only {len(marked)} of {len(names)} checkpoints look{'s' * (len(marked) == 1)} like an EMA by name: "
            f"{', '.join(marked[:3])}. Raw and averaged weights cannot be mixed: leave the others out, or use "
            "`state='raw'` if the names are wrong."
        )
    return found


def _check_parts(states: Sequence[StateDict], names: Sequence[str]) -> None:
    """Refuse a series in which one checkpoint has several parts of the model, and another one only one of them.

    Raises:
        AlignmentError: it has.
    """
    homes = [{part.home: dotted(part.home) for part in state.parts or (state,)} for state in states]
    if {len(own) > 1 for own in homes} != {True, False} or any(() in own for own in homes):
        return  # where all have several parts, the names tell
    counts = Counter(home for own in homes for home in own)
    for home, count in counts.items():
        if count < len(states):
            lacking = next(name for name, own in zip(names, homes, strict=True) if home not in own)
            shared = next((dotted(each) for each, times in counts.items() if times == len(states)), None)
            alone = f", or use `state={shared!r}`, which all have" if shared is not None else ""
            raise AlignmentError(
                f"{lacking} has no weights at '{dotted(home)}', a part of the model ({count} of {len(states)} "
                f"checkpoints have it). Leave it out{alone}."
            )


def _check_ranks(members: Sequence[Member], names: Sequence[str]) -> None:
    """Refuse a series in which one checkpoint lacks the file of a rank that another one has.

    Raises:
        AlignmentError: it does.
    """
    for rank in {rank: None for member in members for rank in member.header.ranks}:
        lacking = [name for name, member in zip(names, members, strict=True) if rank not in member.header.ranks]
        if lacking:
            raise AlignmentError(
                f"{lacking[0]} has no file {rank} ({len(members) - len(lacking)} of {len(members)} checkpoints have "
                "it), and each file is averaged with its namesakes. Leave out what is incomplete, or was trained with "
                "another number of ranks."
            )


def _notes(members: Sequence[Member], states: Sequence[StateDict], plan: KeyPlan) -> Iterator[str]:
    """Report what a user of these weights may not expect."""
    last, chosen = members[-1], members[-len(states) :]
    partial = [name for name, tensors in plan.aligned.items() if not all(tensors)]
    if partial:
        yield f"Not in every checkpoint, so averaged over those that have them: {some(partial)}."
    if plan.differing:
        yield f"Of another shape or dtype in other checkpoints, so taken from the last one: {some(plan.differing)}."
    borrowed = not_averaged(last.header, states[-1])
    if borrowed:
        yield f"Not in the EMA, so averaged from the raw weights: {some(borrowed)}."
    factor = next((name for name in plan.aligned if is_factor(name)), None) if len(members) > 1 else None
    if factor is not None:
        yield (
            f"'{factor}' is a factor of a LoRA update. The factors are averaged apart, and their product is not the "
            "average of the products: far from it for adapters of different runs. To average the updates themselves, "
            "use `lora='product'`, or merge each adapter into its model first."
        )
    masters = masters_beside(last.path) if last.header.ranks else None
    if masters is not None:
        yield (
            f"The weights in the files of layers are averaged. The float32 masters of ZeRO ({masters}) are not read "
            "where a model is a pipeline or has experts."
        )
    for member, state in zip(chosen, states, strict=True):
        if state.which in ("ema", "eval"):
            continue
        note = training_mode_note(member.header.tree, [part.path for part in state.parts or (state,)])
        if note is not None:
            yield f"{member.path.name}: {note}"
            break
    yield from dict.fromkeys(note for state in states if (note := evaluation_note(state)) is not None)
