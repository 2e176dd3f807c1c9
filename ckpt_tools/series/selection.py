"""Selection: which checkpoints of a series are averaged, by step, spacing or metric."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from ..checkpoints.steps import telling_names
from ..errors import SeriesError, UsageError
from .member import Member
from .metrics import METRIC, rank
from .paths import as_path
from .rules.amounts import Amount, Span, Steps, parse_span, parse_steps

_PER_STEPS = re.compile(r"(.*?)[ _-]?steps?")


class Choice:
    """A selection, applied in the order of its parameters.

    Args:
        from_step, to_step: inclusive bounds of the step.
        window: keep those at most so many steps before the last, or a part of the run such as ``5%``.
        best: keep the best N by `metric`, at a tie the earlier one; the order stays.
        metric: key of a number in the files, dotted if nested, or in one of the places of `metrics`.
        lower_is_better: for a metric such as a loss; if None, the name of the metric decides.
        metrics: a table of metrics, CSV or JSON lines.
        every: keep every K-th, counted back from the last; or text such as ``5000steps``: of each stretch of so many
            steps, counted back from the last, the latest.
        min_gap: leave out those less than so many steps before the next one that stays, from the last on.
        last: keep the last N.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(
        self,
        *,
        from_step: Steps | None = None,
        to_step: Steps | None = None,
        window: Span | None = None,
        best: Steps | None = None,
        metric: str = METRIC,
        lower_is_better: bool | None = None,
        metrics: str | Path | None = None,
        every: Steps | None = None,
        min_gap: Steps | None = None,
        last: Steps | None = None,
    ) -> None:
        self._from = _count("from_step", from_step, least=None)
        self._to = _count("to_step", to_step, least=None)
        self._window: Amount | None = None if window is None else parse_span("window", window)
        self._said_window = window
        self._best, self._last = _count("best", best), _count("last", last)
        per_steps = _PER_STEPS.fullmatch(every) if isinstance(every, str) else None
        self._every = None if per_steps else _count("every", every)
        self._stretch = _count("every", per_steps[1]) if per_steps else None
        self._min_gap = _count("min_gap", min_gap)
        if best is None and (lower_is_better is not None or metric != METRIC or metrics is not None):
            raise UsageError("`metric`, `metrics` and `lower_is_better` go with `best`.")
        if not (isinstance(metric, str) and metric.strip(".")):
            raise UsageError(f"`metric={metric!r}` is not the name of a metric.")
        if self._from is not None and self._to is not None and self._from > self._to:
            raise UsageError(f"`from_step={self._from}` is after `to_step={self._to}`.")
        self._metric, self._lower = metric, lower_is_better
        self._table = None if metrics is None else as_path(metrics)

    def of(self, members: Sequence[Member], notes: list[str]) -> Sequence[Member]:
        """Return the selected checkpoints, oldest first.

        Args:
            members: oldest first.
            notes: receives decisions to report.

        Raises:
            SeriesError: nothing is left, or a checkpoint lacks a step or a metric that it needs.
        """
        members = self._between(members)
        if self._window is not None:
            members = self._in_window(members, self._window)
        if self._best is not None:
            members = self._ranked(members, self._best, notes)
        if self._every is not None:
            members = members[:: -self._every][::-1]
        if self._stretch is not None:
            members = _of_several(members, _latest_of_each(members, self._stretch), f"`every='{self._stretch}steps'`")
        if self._min_gap is not None:
            members = _of_several(members, _apart(members, self._min_gap), f"`min_gap={self._min_gap}`")
        if self._last is not None:
            if self._last > len(members):
                notes.append(f"`last={self._last}`: there are only {len(members)}; all are used.")
            members = members[-self._last :]
        return members

    def _between(self, members: Sequence[Member]) -> Sequence[Member]:
        asked = [f"`{o}={n}`" for o, n in (("from_step", self._from), ("to_step", self._to)) if n is not None]
        if not asked:
            return members
        steps = _steps_of(members, " and ".join(asked))
        low = -math.inf if self._from is None else self._from
        high = math.inf if self._to is None else self._to
        kept = [member for member, step in zip(members, steps, strict=True) if low <= step <= high]
        if not kept:
            what = "number" if members[0].counter == "name" else members[0].counter
            raise SeriesError(
                f"{' '.join(asked)}: no checkpoint in this range; they go from {what} {min(steps)} to {max(steps)}."
            )
        return kept

    def _in_window(self, members: Sequence[Member], window: Amount) -> Sequence[Member]:
        asked = f"`window={self._said_window!r}`"
        steps = _steps_of(members, asked)
        end = max(steps)
        length = window.of(end)
        kept = [member for member, step in zip(members, steps, strict=True) if step >= end - length]
        if len(kept) == 1 < len(members):
            nearest = max(step for step in steps if step < end - length)
            raise SeriesError(
                f"{asked}: only {kept[0].path} is in it; the checkpoint before it is {end - nearest} "
                f"step{'' if end - nearest == 1 else 's'} older. "
                "Choose a longer window."
            )
        return kept

    def _ranked(self, members: Sequence[Member], best: int, notes: list[str]) -> Sequence[Member]:
        ranking = rank(members, self._metric, lower_is_better=self._lower, table=self._table)
        if best > len(members):
            notes.append(f"`best={best}`: there are only {len(members)}; all are used.")
        chosen = ranking.members[:best]
        unusable = next((m for m in chosen if math.isinf(ranking.measured[m].value)), None)
        if unusable is not None:
            raise SeriesError(
                f"{unusable.path}: its '{self._metric}' is {ranking.measured[unusable].value}, and it would be among "
                f"the best {best}. Leave this file out, or choose fewer."
            )
        names = dict(zip(members, telling_names([m.path for m in members]), strict=True))
        shown = ", ".join(f"{names[m]} {ranking.measured[m].value:.6g}" for m in chosen[:10])
        more = f" and {len(chosen) - 10} more" if len(chosen) > 10 else ""
        places = " and ".join(dict.fromkeys(ranking.measured[m].where for m in members))
        direction = "lower" if ranking.lower_is_better else "higher"
        notes.append(
            f"Best {len(chosen)} of {len(members)} by '{self._metric}', from {places} ({direction} is better, "
            f"{ranking.why}): {shown}{more}."
        )
        return [member for member in members if member in chosen]


def _count(name: str, value: Any, least: int | None = 1) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        of_files = ("; write one such as 5",) if name in ("last", "best") else ()
        value = parse_steps(name, value, *of_files)
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise UsageError(f"`{name}` is a whole number, not {value!r}.")
    if least is not None and value < least:  # type: ignore[operator]
        raise UsageError(f"`{name}={value}`: must be {least} or more.")
    return int(value)


def _steps_of(members: Sequence[Member], asked: str) -> list[int]:
    """Return the steps of checkpoints; refuse a selection that one cannot be placed in."""
    steps = [member.step for member in members if member.step is not None]
    if len(steps) < len(members):
        unknown = next(member for member in members if member.step is None)
        raise SeriesError(f"{unknown.path}: its step is unknown, so {asked} cannot apply to it.")
    return steps


def _latest_of_each(members: Sequence[Member], length: int) -> Sequence[Member]:
    steps = _steps_of(members, f"`every='{length}steps'`")
    latest: dict[int, Member] = {}
    for member, step in zip(members, steps, strict=True):
        latest[(max(steps) - step) // length] = member
    return [member for member in members if member in latest.values()]


def _of_several(members: Sequence[Member], kept: Sequence[Member], asked: str) -> Sequence[Member]:
    if len(kept) == 1 < len(members):
        raise SeriesError(
            f"{asked}: of {len(members)} checkpoints, only {kept[0].path} is left. Choose a smaller number."
        )
    return kept


def _apart(members: Sequence[Member], gap: int) -> Sequence[Member]:
    steps = _steps_of(members, f"`min_gap={gap}`")

    def kept() -> Iterator[Member]:
        after = math.inf
        for member, step in sorted(zip(members, steps, strict=True), key=lambda pair: -pair[1]):
            if after - step >= gap:
                after = step
                yield member

    staying = set(kept())
    return [member for member in members if member in staying]
