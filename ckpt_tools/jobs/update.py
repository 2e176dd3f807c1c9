"""Updating: an average that ckpt wrote, extended by further checkpoints without its inputs.

If the coefficients of the first N of N + K checkpoints are s times those of N checkpoints alone, the average of N + K
is s times the average of N, plus the new ones. So it is for uniform, exponential and power averages; whether it is, the
coefficients themselves tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from ..checkpoints.layouts import StateDict
from ..checkpoints.steps import named_positions, stored_counters
from ..errors import CkptError, LayoutError, SeriesError, UsageError
from ..formats import read_header
from ..formats.header import Header
from ..series.find import find_series
from ..series.member import Member
from ..series.paths import folder_of_index, one_checkpoint
from ..series.schedules import Schedule
from ..storage.source import sha256
from ..storage.staged import same_file
from .addends import (
    Addends,
    check_state,
    recorded_dtype,
    recorded_matching,
    recorded_rule,
    recorded_schedule,
    refuse_contradictions,
    with_state,
)
from .lined_up import selected
from .options import AveragedOutput, Matching, Selection, Summing
from .outputs import Target, default_target, named_target
from .provenance import Record, read_record, short_names

_TOLERANCE = 1e-12  # of a multiple of the recorded coefficients, relative to the largest


def updated(
    average: str | Path,
    paths: Iterable[str | Path],
    schedule: Schedule,
    selection: Selection,
    matching: Matching,
    output: AveragedOutput,
    running: Summing,
    *,
    measured: bool,
) -> Addends:
    """Plan to extend an average by further checkpoints.

    Args:
        average: what `average` wrote.
        paths: of the checkpoints to add.
        schedule, matching, output: may say what the record says, and nothing else.
        selection: among those at `paths`.
        measured: BatchNorm statistics are measured on the result.

    Raises:
        CkptError: there is no usable record, its rule cannot be extended, or a checkpoint is not newer than its inputs.
    """
    header = read_header(folder_of_index(one_checkpoint(average)))
    record = read_record(header)
    refuse_contradictions(record, schedule, matching, output)
    _refuse_unknown_shares(record)
    if record.measured_on is not None and not measured:
        raise LayoutError(
            f"{record.path}: its BatchNorm statistics were measured, on {record.measured_on}, and those of the average "
            "that extends it are others. Give the images to measure them on with `recal_bn`."
        )
    rule = recorded_schedule(record)
    how = {"dry_run": running.dry_run, "on_progress": running.on_progress, **vars(selection)}
    series = find_series(paths, state=matching.state, **how)
    members = _placed(record, header, series.members)
    names = short_names([member.path for member in members])
    coefficients = _coefficients(record, rule, members)
    matching = with_state(recorded_matching(record), matching)
    states = selected(members, names, matching)
    for name, member, state in zip(names, members, states, strict=True):
        check_state(record, name, state)
        if matching.match == "order" and header.in_model_order != member.header.in_model_order:
            raise LayoutError(
                f"{header.path} and {member.path} keep their tensors in different orders, and this average matches "
                "them by order. Give `out` of the first average the suffix that its inputs have."
            )
    scale = _scale(record, coefficients)
    n = len(record.inputs)
    own = Member(header.path, header, record.inputs[-1].step, record.counter)
    headers = [header, *(member.header for member in members)]
    own_place = Target(header.path, folder=True) if header.in_folder else Target.of(header.path)
    target = named_target(output, headers, default_target(headers)) or own_place
    in_place = output.named is None or same_file(target.path, header.path)
    kept = () if output.named is None else tuple(_inputs_at(record, target.path))
    allowed = running.allow_nonfinite or record.arguments.get("allow_nonfinite")
    return Addends(
        members=(own, *members),
        names=(header.path.name, *names),
        coefficients=(scale, *coefficients[n:]),
        chosen=(_averaged(record, own), *states),
        matching=matching,
        dtype=recorded_dtype(record),
        mode=record.mode,
        arguments={**record.arguments, "allow_nonfinite": allowed or None},
        ordered_by=f"the record of {header.path.name}, and {series.ordered_by}",
        notes=(*series.notes, *_remarks(record, rule, members, scale)),
        given=(*series.given, *kept, *(() if in_place else (header.path,))),
        skipped=(*record.skipped, *series.skipped),
        before=tuple(replace(i, coefficient=c) for i, c in zip(record.inputs, coefficients, strict=False)),
        updates=record.updates + 1,
        target=target,
        replaces=header.files if in_place else (),
    )


def _refuse_unknown_shares(record: Record) -> None:
    """Refuse what an average of its inputs alone does not tell.

    Raises:
        LayoutError: its rule takes more than steps, or the share of an input differs from tensor to tensor.
    """
    if recorded_rule(record).needs != "step":
        _refuse(record, f"`mode={record.mode!r}` gives new checkpoints no weight by itself")
    if record.arguments.get("keys") == "union":
        _refuse(record, "with `keys='union'` it is not recorded which inputs have a tensor")
    if record.arguments.get("lora") == "product":
        _refuse(record, "with `lora='product'` the ranks of the updates add up")


def _refuse(record: Record, reason: str) -> NoReturn:
    raise LayoutError(
        f"{record.path}: cannot be extended: {reason}. Average its inputs and the new checkpoints together; "
        "ckpt inspect lists them, and `replay` with `dry_run` finds them."
    )


def _placed(record: Record, header: Header, members: Sequence[Member]) -> list[Member]:
    """Return new checkpoints with their steps, oldest first.

    Raises:
        SeriesError: one is an input already, or is not newer than the inputs.
    """
    for member in members:
        if same_file(member.path, header.path):
            raise SeriesError(f"{member.path}: is the average itself. Give the checkpoints to add to it.")
        made = member.header.provenance
        if made is not None and made.get("command") == "avg":
            raise SeriesError(f"{member.path}: is an average by ckpt-tools, too. Give the checkpoints to add to it.")
    steps = _steps(record, members)
    placed = [Member(m.path, m.header, step, record.counter) for m, step in zip(members, steps, strict=True)]
    known = [i.step for i in record.inputs if i.step is not None]
    if len(known) == len(record.inputs):
        what = {None: "step", "name": "number in its name"}.get(record.counter, str(record.counter))
        only = "Give newer checkpoints alone" + (f", or add `from_step={max(known) + 1}`." if members[1:] else ".")
        unknown = next((member for member in placed if member.step is None), None)
        if unknown is not None:
            raise SeriesError(
                f"{unknown.path}: has no {what} that counts as those of the inputs of {record.path}, so it is not "
                "known whether it is newer. Average all of them together instead."
            )
        placed.sort(key=lambda member: member.step or 0)
        old = next((member for member in placed if member.step in known), None)
        if old is not None:
            raise SeriesError(
                f"{old.path}: {record.path} has an input at the same {what}, {old.step}, so it is in it already. {only}"
            )
        old = next((member for member in placed if (member.step or 0) < max(known)), None)
        if old is not None:
            raise SeriesError(
                f"{old.path}: its {what}, {old.step}, is before {max(known)}, that of the newest input of "
                f"{record.path}. Only newer checkpoints can be added; average all of them together instead."
            )
        twice = next(((a, b) for a, b in pairwise(placed) if a.step == b.step), None)
        if twice is not None:
            raise SeriesError(f"{twice[0].path} and {twice[1].path} have the same {what}, {twice[0].step}. Give one.")
    for member in placed if len(known) < len(record.inputs) else ():
        if _is_input(record, member):
            raise SeriesError(
                f"{member.path}: an input of {record.path} has its name and size, or its SHA-256, and no step, so it "
                "is taken for the same. Give newer checkpoints alone."
            )
    return placed


def _steps(record: Record, members: Sequence[Member]) -> list[int | None]:
    """Return the steps of checkpoints, counted as those of the inputs are; None where they are not known."""
    recorded = [i.step for i in record.inputs]
    if record.counter not in (None, "name"):
        return [stored_counters(member.header).get(record.counter or "") for member in members]
    paths = [*(Path(i.name) for i in record.inputs), *(member.path for member in members)]
    steps = named_positions(paths).steps
    return [*steps[len(recorded) :]] if [*steps[: len(recorded)]] == recorded else [None] * len(members)


def _is_input(record: Record, member: Member) -> bool:
    """True for a checkpoint of the name and size of an input, or of its content, where that is recorded."""
    alike = [i for i in record.inputs if i.nbytes == member.header.nbytes]
    if not alike:
        return False
    own = {sha256(path) for path in member.header.names.values()} if any(i.sha256 for i in alike) else set()
    for i in alike:
        parts = Path(i.name).parts
        if own == {*i.sha256.values()} if i.sha256 else member.path.absolute().parts[-len(parts) :] == parts:
            return True
    return False


def _inputs_at(record: Record, out: Path) -> Iterator[Path]:
    """Yield the path of an output if an input, by its name and size, is there."""
    try:
        there = read_header(out)
    except CkptError:
        return
    if _is_input(record, Member(out, there)):
        yield out


def _coefficients(record: Record, rule: Schedule, members: Sequence[Member]) -> tuple[float, ...]:
    """Return the coefficients of all inputs and the new checkpoints, as in an average of all of them.

    Raises:
        LayoutError: the rule does not fit them, or gives the inputs alone other coefficients than the record.
    """
    before = [i.step for i in record.inputs]
    try:
        alone = rule.coefficients(before)
        if not all(math.isclose(c, i.coefficient, abs_tol=1e-9) for c, i in zip(alone, record.inputs, strict=True)):
            raise LayoutError(
                f"{record.path}: its record is damaged: the coefficients of the inputs are not those of "
                f"{_described(record)}. Average the checkpoints themselves instead."
            )
        return rule.coefficients([*before, *(member.step for member in members)])
    except UsageError as error:
        raise LayoutError(f"{record.path}: cannot be extended by these checkpoints. {error}") from error


def _scale(record: Record, coefficients: Sequence[float]) -> float:
    """Return what the average counts in the one that extends it.

    Raises:
        LayoutError: the inputs count another part of each other than they do in it.
    """
    before = [i.coefficient for i in record.inputs]
    total = math.fsum(before)
    if total != 0:
        scale = math.fsum(coefficients[: len(before)]) / total
        largest = max(map(abs, before))
        if all(abs(c - scale * b) <= _TOLERANCE * largest for b, c in zip(before, coefficients, strict=False)):
            return scale
    _refuse(record, f"with more checkpoints, {_described(record)} weighs its inputs otherwise against each other")


def _described(record: Record) -> str:
    options = ", ".join(f"`{name}={value!r}`" for name, value in record.arguments.items())
    return f"`mode={record.mode!r}`" + (f" ({options})" if options else "")


def _averaged(record: Record, own: Member) -> StateDict:
    """Find the average in its file, where other weights may be, too."""
    name = own.path.name
    if record.places and own.header.format.nests and not own.header.ranks:
        try:
            return selected([own], [name], Matching(state=record.places))[0]
        except LayoutError:  # it was written without a container, or is converted
            pass
    return selected([own], [name], Matching())[0]


def _remarks(record: Record, rule: Schedule, members: Sequence[Member], scale: float) -> Iterator[str]:
    n = len(record.inputs)
    yield (
        f"{record.path.name} counts {scale:.6g} of the sum, for its {n} input{'s' * (n > 1)}, which "
        f"{'are' if n > 1 else 'is'} not read again."
    )
    steps = [i.step for i in record.inputs]
    for name in record.arguments:
        free = Schedule(record.mode, **{key: value for key, value in rule.values.items() if key != name})
        if free.fitted(steps).get(name) == record.arguments[name]:
            other = free.fitted([*steps, *(member.step for member in members)])[name]
            yield (
                f"`{name}={record.arguments[name]}` was chosen for {n} checkpoint{'s' * (n > 1)} and stays; for "
                f"{n + len(members)} it would be {other}."
            )
    if record.updates:
        yield (
            f"This is update {record.updates + 1} of this average, and each one rounds once more; `replay` makes it in "
            "one go."
        )
