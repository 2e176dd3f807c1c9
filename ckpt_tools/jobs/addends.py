"""Addends: the checkpoints of an average and what each counts, whether a rule says so or the record of an average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ..checkpoints.layouts import StateDict
from ..checkpoints.layouts.layout import Unchanged, dotted
from ..checkpoints.prefixes import prefixes
from ..errors import LayoutError, UsageError
from ..series.member import Member
from ..series.rules.rule import Rule
from ..series.schedules import SCHEDULES, Schedule
from ..series.usable import Skipped
from ..storage.source import Stamp
from ..tensors import DType, parse_dtype
from .lined_up import LinedUp, states_asked
from .options import AveragedOutput, Matching
from .outputs import Target
from .provenance import Input, Record, averaged_inputs, provenance, skipped_inputs


@dataclass(frozen=True, slots=True)
class ByTensor:
    """Coefficients that differ from tensor to tensor.

    Attributes:
        coefficients: of each tensor that is averaged: of the start, then of the others; 0 for those that lack it.
        mean: over all values.
        ratios: name to the coefficients of all but the start together.
        notes: what they are, in words.
        bytes_read: to measure them.
    """

    coefficients: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    mean: tuple[float, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bytes_read: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Addends:
    """What is summed, and what the sum is recorded as.

    Attributes:
        members: oldest first. An average that is extended is the first.
        names: short names of them.
        coefficients: one each.
        chosen: the set of weights in each, if it is known before they are lined up.
        matching: which weights, and how they are matched.
        dtype: of floating-point outputs; None for that of the inputs.
        mode: the schedule, to record.
        arguments: options to record; those that are None are left out.
        ordered_by: in words.
        notes: decisions to report.
        given: paths that the output must not be.
        skipped: checkpoints that were left out, to record.
        before: inputs of an average that is extended.
        sha256: those recorded of each member, by the names of its files; empty where there are none.
        updates: how often the average was extended.
        target: where the output goes; None for the place that is asked for, or the usual one.
        name: what the output calls itself inside; None for its own name.
        replaces: files whose place the output may take, though they are inputs.
        by_tensor: called with the weights lined up, for coefficients that differ from tensor to tensor; `coefficients`
            is empty then. None for a rule that has one row for all.
        compared: called with the target when it is written; returns how it compares with the average that it is made
            again from, in words, and whether the weights are the same (None: not known).
    """

    members: tuple[Member, ...]
    names: Sequence[str]
    coefficients: tuple[float, ...]
    matching: Matching
    dtype: DType | None
    mode: str
    arguments: Mapping[str, Any]
    ordered_by: str
    notes: tuple[str, ...]
    given: tuple[Path, ...]
    chosen: Sequence[StateDict] | None = None
    skipped: tuple[Skipped, ...] = ()
    before: tuple[Input, ...] = ()
    sha256: Sequence[Mapping[str, str]] = ()
    updates: int = 0
    target: Target | None = None
    name: str | None = None
    replaces: tuple[Stamp, ...] = ()
    by_tensor: Callable[[LinedUp], ByTensor] | None = None
    compared: Callable[[Path], tuple[str, bool | None]] | None = None

    @property
    def sources(self) -> tuple[Member, ...]:
        """Those of the members that are inputs themselves, and no average of inputs."""
        return self.members[1:] if self.before else self.members

    @property
    def mixed_dtypes(self) -> bool:
        """True if floating-point dtypes may differ, because the output has its own whatever they are."""
        if self.dtype is not None:
            return True
        # What is computed from codes or from an optimizer has been rounded in an average that is there.
        computed = self.chosen is not None and self.chosen[-1].dtype is not None
        return bool(self.before) and (computed or self.matching.dequantize)


def inputs_of(addends: Addends, lined_up: LinedUp, at: Sequence[int] | None = None) -> tuple[Input, ...]:
    """Describe the checkpoints.

    Args:
        at: their numbers among those that are lined up; all if None.
    """
    found = [
        (chosen.label, tuple(prefixes(chosen.tensors)) if not isinstance(bare, Unchanged) else ())
        for chosen, bare in zip(lined_up.states, lined_up.renamed, strict=True)
    ]
    n = len(addends.members)
    return tuple(
        Input(
            path=str(member.path),
            name=name,
            step=member.step,
            coefficient=coefficient,
            state=label,
            nbytes=member.header.nbytes,
            prefixes=wrappers,
            sha256=hashes,
        )
        for member, name, coefficient, (label, wrappers), hashes in zip(
            addends.members,
            addends.names,
            addends.coefficients,
            [found[i % len(found)] for i in (range(n) if at is None else at)],  # a single set stands for all
            addends.sha256 or [{}] * n,
            strict=True,
        )
    )


def record_of(addends: Addends, inputs: Sequence[Input], state: StateDict, **more: Any) -> dict[str, Any]:
    """Return the provenance of an average.

    Args:
        inputs: oldest first.
        state: the set of weights in the last.
        more: further facts.
    """
    return provenance(
        "avg",
        addends.arguments,
        mode=addends.mode,
        state=inputs[-1].state,
        **_places(addends.members[-1], state),
        **({"updates": addends.updates} if addends.updates else {}),
        inputs=averaged_inputs(inputs),
        **({"skipped": skipped_inputs(addends.skipped)} if addends.skipped else {}),
        **more,
    )


def _places(member: Member, state: StateDict) -> dict[str, Any]:
    """Return what a further update has to know: what the steps are, and where the average is in a file that nests."""
    homes = [dotted(part.home) for part in state.parts or (state,)]
    facts = {"counter": member.counter, "places": homes if all(homes) and not member.header.ranks else None}
    return {name: fact for name, fact in facts.items() if fact is not None}


def recorded_rule(record: Record) -> Rule:
    """Return the rule of an average.

    Raises:
        LayoutError: it is unknown.
    """
    if record.mode not in SCHEDULES:
        raise LayoutError(
            f"{record.path}: its record has the mode '{record.mode}', which this ckpt-tools does not know. It was "
            f"written by version {record.version}."
        )
    return SCHEDULES[record.mode]


def recorded_schedule(record: Record) -> Schedule:
    """Return the rule of an average, with the options that were given or chosen for it.

    Raises:
        LayoutError: they do not fit it.
    """
    known = {option.name for option in recorded_rule(record).options}
    schedule = Schedule(record.mode, **{key: value for key, value in record.arguments.items() if key in known})
    try:
        schedule.check()
    except UsageError as error:
        raise LayoutError(f"{record.path}: the options in its record do not fit its mode: {error}") from error
    return schedule


def recorded_matching(record: Record) -> Matching:
    """Return which weights an average was made of, and how they were matched."""
    return Matching(**{o.name: record.arguments[o.name] for o in Matching.options() if o.name in record.arguments})


def recorded_dtype(record: Record) -> DType | None:
    """Return the dtype that was asked for.

    Raises:
        LayoutError: it is unknown.
    """
    try:
        return parse_dtype(record.arguments.get("dtype"))
    except UsageError as error:
        raise LayoutError(f"{record.path}: the dtype in its record is unknown: {error}") from error


def state_asked(matching: Matching) -> str | list[str]:
    """Return `states_asked`, and where it is one alone, that one: as records and messages have it."""
    asked = states_asked(matching)
    return asked[0] if len(asked) == 1 else asked


def refuse_contradictions(record: Record, schedule: Schedule, matching: Matching, output: AveragedOutput) -> None:
    """Refuse options that say something else than the record of an average.

    Raises:
        UsageError: one does.
    """
    defaults = {option.name: option.default for option in (*Schedule.options(), *Matching.options())}
    asked = schedule.given
    for name, value in (vars(matching) | {"state": state_asked(matching)}).items():
        asked |= {} if value == defaults[name] else {name: value}
    dtype = parse_dtype(output.dtype)
    asked |= {} if dtype is None else {"dtype": dtype.name}
    said = {"mode": record.mode} | dict(record.arguments)
    known = {option.name: option for option in recorded_rule(record).options}
    for name, value in asked.items():
        value = [*value] if isinstance(value, tuple) else value
        if value == said.get(name) or (name == "state" and value == record.which):
            continue
        # Lists and paths are not recorded.
        if name not in said and name in known and (isinstance(value, list) or Path in get_args(known[name].type)):
            raise UsageError(
                f"{_shown(name, value)}: the record of {record.path} has what came of it, and decides. Leave the "
                "option out, or average the checkpoints themselves."
            )
        was = f"with {_shown(name, said[name])}" if name in said else "without it"
        raise UsageError(
            f"{_shown(name, value)}: {record.path} was made {was}, and its record decides. Leave the option out, or "
            "average the checkpoints themselves."
        )


def _shown(name: str, value: Any) -> str:
    return f"`{name}`" if value is True else f"`{name}={value!r}`"


def with_state(recorded: Matching, matching: Matching) -> Matching:
    """Return the recorded way to match weights, with the set of weights that is asked for, if one is."""
    asked = state_asked(matching)
    return recorded if asked == "auto" else Matching(**vars(recorded) | {"state": asked})


def check_state(record: Record, name: str, state: StateDict) -> None:
    """Refuse another kind of weights than the average is of.

    Raises:
        LayoutError: one is raw, and the other averaged.
    """
    kinds = ("raw", "ema", "eval")
    if state.which != record.which and state.which in kinds and record.which in kinds:
        raise LayoutError(
            f"{record.path} is an average of {record.state}, and the weights of {name} would be {state.label}. "
            f"Add `state={record.which!r}`, if it has them."
        )
