"""Replaying: an average that ckpt wrote, made again from the inputs and coefficients in its record."""

from __future__ import annotations

import filecmp
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..checkpoints.layouts import StateDict
from ..compute.progress import Progress, uncounted
from ..errors import CkptError, LayoutError, SeriesError, UsageError
from ..formats import read_header
from ..formats.header import Header
from ..series.member import Member
from ..series.paths import as_path, folder_of_index, one_checkpoint
from ..series.schedules import Schedule
from ..series.weighted_sums import is_running
from ..storage.source import LOCAL, sha256, stamp_at, store_of
from ..storage.staged import same_file
from ..tensors import DTYPES
from .addends import (
    Addends,
    recorded_dtype,
    recorded_matching,
    recorded_rule,
    refuse_contradictions,
    with_state,
)
from .lined_up import every_set, selected
from .options import AveragedOutput, Matching, Selection, Summing
from .outputs import Target, default_target, named_after, named_target
from .provenance import Record, read_record
from .recorded_inputs import Found, digests, look_for
from .stock import recorded, sets

if TYPE_CHECKING:
    from .diff import DiffReport

_ROUNDING = {8: 2.0**-50, 4: 2.0**-20, 2: 2.0**-5, 1: 0.5}
"""Bytes of a number to some units in its last place, relative to its value."""


def replayed(
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
    """Plan to make an average again.

    Args:
        average: what `average` wrote.
        paths: files and folders that have its inputs, apart from the places where they are looked for anyway.
        schedule, matching, output: may say what the record says, and nothing else.
        selection: says nothing, for the record does.
        measured: BatchNorm statistics are measured on the result.

    Raises:
        CkptError: there is no usable record, or an input is missing or changed, or there are several.
    """
    header = read_header(folder_of_index(one_checkpoint(average)))
    record = read_record(header)
    refuse_contradictions(record, schedule, matching, output)
    option = next((o for o in selection.options() if vars(selection)[o.name] != o.default), None)
    if option is not None:
        raise UsageError(f"`{option.name}` does not go with `replay`: the record of {header.path} names its inputs.")
    if record.measured_on is not None and not measured:
        raise LayoutError(
            f"{record.path}: its BatchNorm statistics were measured, on {record.measured_on}. Give these images with "
            "`recal_bn` to measure them again."
        )
    if record.measured_on is None and measured:
        raise UsageError(f"`recal_bn`: {record.path} was made without it. Leave the option out.")
    tell = running.on_progress
    found = find_inputs(record, header, paths, hashes=not running.dry_run, on_progress=tell)
    headers = [*found.headers]
    addends = summed_again(header, record, headers, matching)
    target = named_target(output, headers, default_target(headers)) or named_after(header, "-replayed")
    if header.in_folder and output.named is not None and as_path(output.named) == header.path:
        target = Target(header.path, folder=True)
    in_place = target.path == header.path or same_file(target.path, header.path)
    before = digests(header, tell) if in_place and not running.dry_run else None
    return replace(
        addends,
        notes=tuple(_remarks(record, found, running)),
        given=(*(member.path for member in addends.members), *(() if in_place else (header.path,))),
        target=target if output.named is None or in_place else None,
        # A torch file has its name inside.
        name=None if header.in_folder or target.folder else header.path.name,
        compared=partial(_compared, record, header, before, tell),
    )


def find_inputs(
    record: Record,
    header: Header,
    paths: Iterable[str | Path],
    *,
    hashes: bool,
    on_progress: Progress | None = None,
) -> Found:
    """Find the inputs of an average.

    Args:
        paths: files and folders that have inputs, apart from the places where they are looked for anyway.
        hashes: compare SHA-256, where it is recorded.
        on_progress: called with (what is done, bytes hashed, bytes in all).

    Raises:
        SeriesError: some are missing, changed or there several times; names all of them.
        UsageError: a path leads to no input.
    """
    paths = [*paths]
    by_set = needs_sets(record)
    found = look_for(record.inputs, header, paths, by_set=by_set, hashes=hashes, on_progress=on_progress)
    files = [place for path in paths if not store_of(place := as_path(path)).is_folder(place)]
    unused = next((place for place in files if place in found.unused), None)
    if unused is not None and not found.faults:
        raise UsageError(f"{unused}: is no input of {header.path}. ckpt inspect lists them.")
    if found.faults:
        n = len(record.inputs)
        raise SeriesError(
            f"{header.path}: {len(found.faults)} of its {n} input{'s' * (n > 1)} cannot be taken. {found.said}. Give "
            "the paths of the right files, or of folders that have them."
        )
    return found


def summed_again(header: Header, record: Record, headers: Sequence[Header], matching: Matching) -> Addends:
    """Return what was summed for an average.

    Args:
        headers: of its inputs, in the order of the record.
        matching: with the set of weights, if another one than that of the record is asked for.

    Raises:
        LayoutError: an input has no such weights, or the record is of another version.
    """
    matching, dtype = with_state(recorded_matching(record), matching), recorded_dtype(record)
    names = [i.name for i in record.inputs]
    members = tuple(Member(h.path, h, i.step, record.counter) for h, i in zip(headers, record.inputs, strict=True))
    chosen: Sequence[StateDict] | None = _sets(record, members, matching) if needs_sets(record) else None
    by_tensor = None
    if recorded_rule(record).needs == "products":
        chosen = sets(members, matching)
        by_tensor = partial(recorded, record.ratios, members, matching)
    last = selected(members[-1:], names[-1:], matching)[0] if chosen is None else chosen[-1]
    if last.label != record.state:
        raise LayoutError(
            f"{header.path} is an average of {record.state}, and in {members[-1].path} the weights would be "
            f"{last.label}. Add `state={record.which!r}`, if it is the right file."
        )
    return Addends(
        members=members,
        names=names,
        coefficients=tuple(i.coefficient for i in record.inputs) if by_tensor is None else (),
        by_tensor=by_tensor,
        chosen=chosen,
        matching=matching,
        dtype=dtype,
        mode=record.mode,
        arguments=record.arguments,
        ordered_by=f"the record of {header.path.name}",
        notes=(),
        given=(),
        sha256=[i.sha256 for i in record.inputs],
        skipped=record.skipped,
    )


def needs_sets(record: Record) -> bool:
    """True if a checkpoint with several sets of weights counts several times."""
    return recorded_rule(record).needs == "profile"


def _remarks(record: Record, found: Found, running: Summing) -> Iterator[str]:
    yield f"The coefficients are those in the record; the inputs were found {found.how}."
    if running.dry_run and any(i.sha256 for i in record.inputs):
        yield "SHA-256 of the inputs is recorded, and is not checked in a dry run."
    if record.version != __version__:
        yield f"{record.path.name} was written by ckpt-tools {record.version}; this is {__version__}."


def _sets(record: Record, members: Sequence[Member], matching: Matching) -> list[StateDict]:
    """Return the set of weights of each input, as its name says it.

    Raises:
        LayoutError: a checkpoint has no such set.
    """
    found = []
    for member, i in zip(members, record.inputs, strict=True):
        sets = every_set([member], matching)[1]
        asked = [state for state in sets if len(sets) == 1 or i.name.endswith(f" ({state.label})")]
        if len(asked) != 1:
            known = ", ".join(state.label for state in sets)
            raise LayoutError(f"{member.path}: has no set of weights as '{i.name}' names it, but {known}.")
        found += asked
    return found


def _same(a: Path, b: Path) -> bool:
    """True if two files of any stores are the same in every byte."""
    if store_of(a) is LOCAL is store_of(b):
        return filecmp.cmp(a, b, shallow=False)
    return stamp_at(a).nbytes == stamp_at(b).nbytes and sha256(a) == sha256(b)


def _compared(
    record: Record, old: Header, before: Mapping[str, str] | None, on_progress: Progress | None, out: Path
) -> tuple[str, bool | None]:
    """Compare an average with what it was made again from.

    Args:
        before: SHA-256 of its files, if the new one has taken its place.
        on_progress: called with (what is done, how much of it so far, all of it).

    Returns:
        The result in words; and True if the weights are the same in every byte, False if they are not, None if that is
        not known, or is not to be expected.
    """
    from .diff import diff

    new = read_header(one_checkpoint(out))
    if before is not None:
        if digests(new, on_progress) == before:
            return f"It is the same as the old {out} in every byte.", True
        return f"It is not the same as the old {out} in every byte.", None
    pairs = [(new.names.get(name), path) for name, path in old.names.items()]
    if len(old.names) == 1 == len(new.names):
        pairs = [*zip(new.names.values(), old.names.values(), strict=True)]
    with uncounted(on_progress, "comparing with the old average"):
        same = len(new.names) == len(pairs) and all(a is not None and _same(a, b) for a, b in pairs)
    if same:
        return f"It is the same as {old.path} in every byte.", True
    try:
        report = diff(old.path, out, on_progress=on_progress)
    except CkptError as error:
        return f"It is not the same as {old.path} in every byte, and their weights cannot be compared: {error}", None
    if report.verdict in ("identical", "equal"):
        return f"Its weights are those of {old.path} in every byte; something else in the file differs.", True
    if record.measured_on is not None:
        others = tuple(each for each in report.tensors if not is_statistic(each.name))
        rest = replace(report, tensors=others, identical=report.compared - len(others))
        if rest.verdict in ("identical", "equal"):
            return (
                f"Its weights are those of {old.path} in every byte; BatchNorm statistics, measured again, are not: "
                f"{_difference(report)}.",
                None,
            )
        report = rest
    times = f"that was updated {record.updates} time{'s' * (record.updates > 1)}, and each update rounds"
    if record.updates and _is_rounding(report, record.updates):
        return f"It is not the same as {old.path} in every byte: {_difference(report)}; {times}.", None
    why = f"While {times}, that does not explain it: an" if record.updates else "An"
    return (
        f"Its weights are NOT those of {old.path}: {_difference(report)}. {why} input has changed, or the average has.",
        False,
    )


def _is_rounding(report: DiffReport, updates: int) -> bool:
    """True if so many updates may have rounded most values of each tensor to these; a few are sums that cancel out."""
    if report.only_a or report.only_b or report.shapes or report.nonfinite:
        return False
    from .diff import diff

    rounding = max((_ROUNDING[DTYPES[each.dtype].word] for each in report.tensors), default=0.0)
    beyond = diff(report.a.path, report.b.path, rtol=updates * rounding).tensors
    known = {each.name for each in report.tensors}
    return all(2 * each.beyond <= each.values for each in beyond if each.name in known)


def is_statistic(name: str) -> bool:
    """True for what a recalibration replaces."""
    return is_running(name) or name.endswith("num_batches_tracked")


def _difference(report: DiffReport) -> str:
    apart = (*report.only_a, *report.only_b, *(each.name for each in (*report.shapes, *report.dtypes)))
    if apart:
        return f"'{apart[0]}' is in one of them alone, or has another shape or dtype"
    odd = next((each.name for each in report.tensors if each.nonfinite), None)
    if odd is not None:
        return f"in '{odd}', one has NaN or infinity where the other has a number"
    largest, name = report.max_abs
    return f"they differ by up to {largest:.3g}, in '{name}'"
