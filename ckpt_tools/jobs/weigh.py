"""Weighing: the checkpoints of a series, and what each counts by a rule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoints.ema_updates import is_exponential, weights_in_mean
from ..checkpoints.layouts import StateDict
from ..errors import SeriesError, UsageError
from ..series.find import Series, find_series
from ..series.member import Member
from ..series.paths import folder_of_index, one_checkpoint
from ..series.schedules import Schedule, dominant
from ..series.stored_profiles import stored_profiles
from ..tensors import DType, parse_dtype
from .addends import Addends, state_asked
from .lined_up import every_set, selected
from .options import AveragedOutput, Matching, Selection, Summing
from .provenance import short_names
from .stock import measured, with_start


def weighed(
    paths: Iterable[str | Path],
    schedule: Schedule,
    selection: Selection,
    matching: Matching,
    output: AveragedOutput,
    running: Summing,
) -> Addends:
    """Plan to average a series as a rule does.

    Args:
        paths: of the checkpoints.
        schedule: the rule.
        selection: among those at `paths`.

    Raises:
        CkptError: there is no such series, or the rule does not fit it.
    """
    start = None
    if schedule.rule.needs == "products":
        start = folder_of_index(one_checkpoint(schedule.values["base"]))
    how = {"dry_run": running.dry_run, "on_progress": running.on_progress, **vars(selection)}
    series = find_series(paths, state=matching.state, start=start, **how)
    members, chosen, by_tensor = series.members, None, None
    if schedule.rule.needs == "profile":
        members, chosen = every_set(members, matching)
    elif start is not None:
        members, chosen = with_start(series, start, matching)
        by_tensor = partial(measured, schedule, members, matching, running)
    names = _names(members, chosen)
    facts = facts_of(schedule, series, members, names, matching, chosen)
    coefficients = _coefficients(schedule, facts, series) if by_tensor is None else ()
    dtype = parse_dtype(output.dtype)
    return Addends(
        members=members,
        names=names,
        coefficients=coefficients,
        chosen=chosen,
        matching=matching,
        dtype=dtype,
        mode=schedule.mode,
        arguments=arguments_of(schedule, facts, matching, dtype, running),
        ordered_by=series.ordered_by,
        notes=(*series.notes, *_remarks(schedule, facts, members, coefficients)),
        given=(*series.given, *(member.path for member in members)),
        skipped=series.skipped,
        by_tensor=by_tensor,
    )


def arguments_of(
    schedule: Schedule, facts: Sequence[Any], matching: Matching, dtype: DType | None, running: Summing
) -> dict[str, Any]:
    """Return the options to record in the output; None for those at their defaults."""
    return {
        **schedule.arguments(facts),
        "state": None if (state := state_asked(matching)) == "auto" else state,
        "match": None if matching.match == "name" else matching.match,
        "keys": None if matching.keys == "strict" else matching.keys,
        "buffers": None if matching.buffers == "average" else matching.buffers,
        "lora": None if matching.lora == "factors" else matching.lora,
        "dequantize": matching.dequantize or None,
        "dtype": dtype and dtype.name,
        "allow_nonfinite": running.allow_nonfinite or None,
    }


def _names(members: Sequence[Member], states: Sequence[StateDict] | None) -> list[str]:
    """Return short names; of a checkpoint with several sets of weights, with the set."""
    paths = list(dict.fromkeys(member.path for member in members))
    short = dict(zip(paths, short_names(paths), strict=True))
    if states is None or len(paths) == len(members):
        return [short[member.path] for member in members]
    return [f"{short[member.path]} ({state.label})" for member, state in zip(members, states, strict=True)]


def facts_of(
    schedule: Schedule,
    series: Series,
    members: Sequence[Member],
    names: Sequence[str],
    matching: Matching,
    states: Sequence[StateDict] | None = None,
) -> Sequence[Any]:
    """Return what the rule needs of each checkpoint.

    Args:
        members: some of the series.
        names: of them.
        states: the weights of each that are meant; None to select them.

    Raises:
        CkptError: a checkpoint does not tell.
    """
    needs = schedule.rule.needs
    if needs == "products":
        return ()
    if needs == "place":
        return [series.given.index(member.path) for member in members]
    if needs == "step":
        return [member.step for member in members]
    sources = [*zip(members, states or selected(members, names, matching), strict=True)]
    if needs == "profile":
        return stored_profiles(sources, schedule.values["profile"])
    return [_in_mean(member, state) for member, state in sources]


def _in_mean(member: Member, state: StateDict) -> int:
    """Return how many weights are in a mean.

    Raises:
        SeriesError: the checkpoint does not say it, or it is no mean.
    """
    if is_exponential(member.header, state):
        raise SeriesError(
            f"{member.path}: its {state.label} is an EMA, and `mode='difference'` takes means of weights that count "
            "the same. To make another EMA of several, use `mode='posthoc'`."
        )
    number = weights_in_mean(member.header, state)
    if number is None:
        raise SeriesError(
            f"{member.path}: does not say how many weights are in its {state.label}, and `mode='difference'` needs "
            "it: batch_idx_train of icefall, n_averaged, or the inputs of a uniform average by ckpt."
        )
    return number


def _coefficients(schedule: Schedule, facts: Sequence[Any], series: Series) -> tuple[float, ...]:
    try:
        return schedule.coefficients(facts)
    except UsageError as error:  # the notes may tell why
        raise UsageError(" ".join([str(error), *series.notes])) from error


def _remarks(
    schedule: Schedule, facts: Sequence[Any], members: Sequence[Member], coefficients: Sequence[float]
) -> Iterator[str]:
    """Report results that a user of this schedule may not expect."""
    yield from schedule.remarks(facts)
    if schedule.rule.needs == "place" and len(members) > 1:
        pairs = sorted(zip(facts, members, coefficients, strict=True), key=lambda pair: pair[0])
        shown = ", ".join(f"{member.path.name} {c:.6g}" for _, member, c in pairs[:10])
        yield f"The weights of the files: {shown}{f' and {len(pairs) - 10} more' if len(pairs) > 10 else ''}."
    along = schedule.along(facts)
    if along is not None and members[0].counter in ("epoch", "name"):
        what = "epochs" if members[0].counter == "epoch" else "the numbers in the names"
        yield f"The steps are {what}, for the files store no step."
    elif along == "by" and len({b - a for a, b in pairwise(facts)}) > 1:
        yield "The files are not evenly spaced, so it counts along training steps; `by='files'` counts files."
    end = dominant(coefficients)
    if schedule.rule.advice is not None and end is not None and not schedule.fitted(facts):
        index, share = end
        which, advice = [*zip(("oldest", "newest"), schedule.rule.advice(**schedule.values), strict=True)][index > 0]
        yield f"The {which} checkpoint, {members[index].path.name}, holds {share:.1%} of this average. {advice}"
