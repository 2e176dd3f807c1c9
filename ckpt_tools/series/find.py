"""Series: the checkpoints that paths lead to, without copies and averages, in order, and those that are selected."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, SupportsIndex

from ..checkpoints.steps import named_positions, stored_positions, telling_names
from ..errors import SeriesError, UsageError
from ..formats import read_header
from ..formats.header import Header
from ..storage.source import LOCAL, store_of
from ..tensors import TensorSpec
from .copies import without_copies
from .metrics import measured, metric_of, stored_under
from .numbered import natural_key
from .paths import as_path, find, listed

_AVERAGE = re.compile(r"(?<![a-z])(ave|avg|averaged?|swa|ema|soup|merged)(?![a-z])", re.IGNORECASE)
ORDERS = ("auto", "given", "natural", "mtime")


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One checkpoint of a series.

    Attributes:
        path: as found.
        header: of the checkpoint.
        step: training step or epoch; None if unknown.
        counter: source of `step`: a key of the file (``global_step``, ``epoch``) or ``name``.
    """

    path: Path
    header: Header
    step: int | None = None
    counter: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """The selected checkpoints, oldest first.

    Attributes:
        members: the checkpoints to average.
        given: all checkpoints found, selected or not, except ckpt-tools outputs that were left out.
        ordered_by: in words.
        notes: decisions to report: duplicates, outputs and averages left out, ties.
    """

    members: tuple[Member, ...]
    given: tuple[Path, ...]
    ordered_by: str
    notes: tuple[str, ...]


def find_series(
    paths: Iterable[str | Path],
    *,
    order: str = "auto",
    last: int | None = None,
    best: int | None = None,
    metric: str = "metric",
    lower_is_better: bool = False,
    every: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    include_outputs: bool = False,
) -> Series:
    """Find, read, order and select checkpoints; the payload is read only of suspected copies.

    Selections apply in this order: from_step and to_step, best, every, last.

    Args:
        paths: files, globs, folders.
        order: ``auto`` (step or epoch stored in all files, else the numbers in the names),
            ``given``, ``natural`` (names), ``mtime``.
        last: keep the last N.
        best: keep the best N by `metric`, at a tie the earlier one; the order stays.
        metric: key in the files, dotted if nested.
        lower_is_better: for a metric such as a loss.
        every: keep every K-th, counted back from the last.
        from_step, to_step: inclusive bounds of the step.
        include_outputs: include files that ckpt-tools wrote, and averages by other tools, known by their names.

    Raises:
        UsageError, SeriesError: an invalid selection; no checkpoint found or left; one left beside averages; an export
            among checkpoints.
        ReadError: a file is not a checkpoint.
    """
    counts = {"last": last, "best": best, "every": every}
    for name, value in (counts | {"from_step": from_step, "to_step": to_step}).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, SupportsIndex)):
            raise UsageError(f"`{name}` is a whole number, not {value!r}.")
        if value is not None and name in counts and value < 1:
            raise UsageError(f"`{name}={value}`: must be 1 or more.")
    if order not in ORDERS:
        raise UsageError(f"`order` is one of {', '.join(ORDERS)}, not {order!r}.")
    if best is None and (lower_is_better or metric != "metric"):
        raise UsageError("`metric` and `lower_is_better` go with `best`.")
    notes: list[str] = []
    paths = listed(paths)
    found = find(paths, notes)
    headers = [read_header(path) for path in found]
    ours = set() if include_outputs else _outputs(headers, notes)
    given = tuple(path for path in found if path not in ours)
    headers = without_copies([header for header in headers if header.path not in ours], notes)
    _refuse_exports_among_others(headers)
    if not include_outputs:
        headers = _without_averages(headers, {as_path(each) for each in paths}, notes)
    members, ordered_by = _ordered(headers, order, notes)
    members = _between(members, from_step, to_step)
    if best is not None:
        members = _best(members, best, metric, lower_is_better, notes)
    if every is not None:
        members = members[::-1][::every][::-1]
    if last is not None:
        if last > len(members):
            notes.append(f"`last={last}`: there are only {len(members)}; all are used.")
        members = members[-last:]
    return Series(tuple(members), given, ordered_by, tuple(notes))


def _is_average(made: Any) -> bool:
    """True for an output of `avg` or `recal-bn`, converted or not; not for a converted training checkpoint."""
    while isinstance(made, dict) and made.get("command") in ("convert", "strip"):
        source = made.get("input")
        made = source.get("made") if isinstance(source, dict) else None
    return made is not None


def _outputs(headers: Sequence[Header], notes: list[str]) -> set[Path]:
    """Return the ckpt-tools outputs to leave out; none if there are no other checkpoints."""
    ours = {header.path for header in headers if _is_average(header.provenance)}
    if len(ours) == len({header.path for header in headers}):
        return set()
    notes.extend(
        f"{path.name} was written by ckpt-tools: left out (add it with `include_outputs`)."
        for path in sorted(ours, key=natural_key)
    )
    return ours


def _without_averages(headers: Sequence[Header], given: Collection[Path], notes: list[str]) -> list[Header]:
    """Leave out averages that other tools made of the series, as their names say.

    A word for an average that all names have tells nothing, and neither does one in several EMAs, which may be a series
    of their own. Paths of `given` stay.

    Raises:
        SeriesError: it would leave one checkpoint only.
    """
    paths = [header.path for header in headers]
    words = [{word.lower() for word in _AVERAGE.findall(name)} for name in telling_names(paths)]
    shared = set.intersection(*words)
    marked = {path: own for path, each in zip(paths, words, strict=True) if (own := each - shared)}
    if len(marked) == len(paths):
        return [*headers]
    asked = [path for path in marked if path in given]
    if asked:
        notes.append(f"By their names these are averages, and count because their paths are given: {_some(asked)}.")
    emas = [path for path, own in marked.items() if own == {"ema"}]
    left_out = [path for path in marked if path not in given and (path not in emas or len(emas) == 1)]
    if left_out and len(paths) - len(left_out) == 1:
        (other,) = (path for path in paths if path not in left_out)
        raise SeriesError(
            f"{_some(left_out)}: averages by their names, beside {other} alone. Give the paths of the checkpoints to "
            "average, or add `include_outputs` to take all of them."
        )
    notes.extend(
        f"{path.name} is an average by its name: left out (add it with `include_outputs`)." for path in left_out
    )
    return [header for header in headers if header.path not in left_out]


def _refuse_exports_among_others(headers: Sequence[Header]) -> None:
    """Refuse an export, which is made after training from any of the checkpoints, as one more of them."""
    exports = [header for header in headers if header.format.export]
    others = [header for header in headers if not header.format.export]
    if exports and others:
        raise SeriesError(
            f"{exports[0].path} is an export ({exports[0].format.name}), and {others[0].path} is none. An export "
            "has the weights of a checkpoint that is there already, or of an average. Leave it out, or give exports "
            "alone."
        )


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _ordered(headers: Sequence[Header], order: str, notes: list[str]) -> tuple[list[Member], str]:
    places = stored_positions(headers) or named_positions([header.path for header in headers])
    members = [
        Member(header.path, header, step, None if step is None else places.counter)
        for header, step in zip(headers, places.steps, strict=True)
    ]
    if order == "given":
        return members, "the arguments"
    if order == "mtime":
        for member in members:
            if store_of(member.path) is not LOCAL:
                raise SeriesError(f"{member.path}: is not a local file, so `order='mtime'` cannot place it.")
        return sorted(members, key=lambda m: (m.path.stat().st_mtime_ns, natural_key(m.path))), "modification time"
    by_name = sorted(members, key=lambda m: natural_key(m.path))
    if order == "natural":
        return by_name, "the names"
    key_of = {member.path: key for member, key in zip(members, places.keys, strict=True)}
    nameless = [member.path for member in by_name if not key_of[member.path]]
    if nameless and len(members) > 1:
        notes.append(
            f"{nameless[0]} has no step, neither inside nor in its name, so the files are ordered by name. "
            "Give the files in order, with `order='given'`, if it should be another."
        )
        return by_name, "the names"
    notes.extend(places.remarks)
    ties: dict[tuple[float, ...], list[Path]] = {}
    for member in by_name:
        ties.setdefault(key_of[member.path], []).append(member.path)
    what = places.counter.replace("name", "number")
    for key, (first, *others) in ties.items():
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            value = ", ".join(map(str, key))
            notes.append(f"{first}, {others[0]}{more} have the same {what}, {value}; they are ordered by name.")
    return sorted(by_name, key=lambda m: key_of[m.path]), places.by


def _between(members: list[Member], from_step: int | None, to_step: int | None) -> list[Member]:
    asked = [f"`{o}={n}`" for o, n in (("from_step", from_step), ("to_step", to_step)) if n is not None]
    if not asked:
        return members
    placed = [(member.step, member) for member in members if member.step is not None]
    unknown = next((member for member in members if member.step is None), None)
    if unknown is not None:
        raise SeriesError(f"{unknown.path}: its step is unknown, so {' and '.join(asked)} cannot apply to it.")
    low, high = (-math.inf if from_step is None else from_step), (math.inf if to_step is None else to_step)
    kept = [member for step, member in placed if low <= step <= high]
    if not kept:
        steps = sorted(step for step, _ in placed)
        what = "number" if members[0].counter == "name" else members[0].counter
        raise SeriesError(
            f"{' '.join(asked)}: no checkpoint in this range; they go from {what} {steps[0]} to {steps[-1]}."
        )
    return kept


def _best(members: Sequence[Member], best: int, key: str, lower_is_better: bool, notes: list[str]) -> list[Member]:
    values: dict[Member, float] = {}
    for member in members:
        if (value := metric_of(member.header, key)) is None:
            raise SeriesError(_unranked(member.header, key))
        values[member] = value
    if best > len(members):
        notes.append(f"`best={best}`: there are only {len(members)}; all are used.")
    if not lower_is_better and re.search(r"loss|error|perplexity|ppl", key, re.IGNORECASE):
        notes.append(f"`best` takes the highest '{key}'; if lower is better, add `lower_is_better`.")
    chosen = set(sorted(values, key=values.__getitem__, reverse=not lower_is_better)[:best])
    return [member for member in members if member in chosen]


def _unranked(header: Header, key: str) -> str:
    """Return the message for a checkpoint without a usable metric."""
    numbers = (k for k in measured(header) if isinstance(k, str) and metric_of(header, k) is not None)
    known = [*islice(numbers, 8)]
    what = f"has no number under '{key}'"
    advice = f"Name another with `metric`; it has {', '.join(known)}." if known else "It stores no numbers."
    stored = stored_under(header, key)
    if isinstance(stored, TensorSpec):
        what, advice = f"its '{key}' is a tensor, and not of one number", "Store metric.item() to have a number."
    elif isinstance(stored, float):
        what, advice = f"its '{key}' is NaN", "Leave this file out."
    return f"{header.path}: {what}, so `best` cannot rank it. {advice}"
