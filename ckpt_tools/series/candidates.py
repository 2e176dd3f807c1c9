"""Candidates: many averages of one series, as lists and ranges of the options of an average say them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..errors import CkptError, UsageError, unknown_word
from .member import Member
from .rules.amounts import parse_span
from .rules.option import Option
from .rules.rule import Rule
from .schedules import SCHEDULES, Schedule, named
from .selection import Choice

Values = Sequence[Any]
NumbersOf = Callable[[Schedule, Sequence[Member]], Sequence[Any]]
"""From a schedule and checkpoints to what its rule needs of each."""
Kind = Literal["average", "checkpoint", "soup"]

SELECTED = ("last", "best", "window", "min_gap", "every", "from_step", "to_step")
"""Options of a selection that may have several values."""
_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")
_NUMBER = re.compile(r"\s*(-?[0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE]-?[0-9]{1,3})?)\s*([kKmMbB%]?)\s*")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
MAX_CANDIDATES = 1000
"""Candidates of one sweep, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One average of a series.

    Attributes:
        label: what tells it from the others, such as ``decay=0.9 last=5``; the name of a checkpoint for one alone.
        kind: an average by options, a checkpoint alone, or a soup.
        options: of `average`, that make it from the same paths; empty for the other kinds.
        schedule: with its options.
        members: the checkpoints, oldest first.
        numbers: what the rule needs of each.
        coefficients: one per checkpoint.
        same: labels of other candidates with the same checkpoints and coefficients.
        same_options: their options.
    """

    label: str
    kind: Kind
    options: Mapping[str, Any]
    schedule: Schedule
    members: tuple[Member, ...]
    numbers: Sequence[Any]
    coefficients: tuple[float, ...]
    same: tuple[str, ...] = ()
    same_options: tuple[Mapping[str, Any], ...] = ()

    def row(self, members: Sequence[Member]) -> tuple[float, ...]:
        """Return one coefficient for each of these checkpoints, which contain its own; 0 for the others."""
        own = dict(zip(self.members, self.coefficients, strict=True))
        return tuple(own.get(member, 0.0) for member in members)


@dataclass(frozen=True, slots=True)
class Combinations:
    """What the values of options mean.

    Attributes:
        candidates: of which those with the same checkpoints and coefficients are one.
        refused: labels of combinations that cannot be made, with the reasons.
        notes: decisions to report.
    """

    candidates: tuple[Candidate, ...]
    refused: Mapping[str, str]
    notes: tuple[str, ...]


def several(option: Option) -> bool:
    """Return True if an option of a rule may have several values: a number, an amount or a word."""
    kinds = option.kinds
    return bool in kinds or any(kind in kinds for kind in (int, float, str)) and Path not in kinds


def values(option: Option, given: Any) -> list[Any]:
    """Return the values of an option: from one, a list, or text such as ``3,5,8`` or ``0.01:0.25:0.01``.

    A range holds its end; its three numbers have one unit, such as ``20k:100k:10k`` or ``1%:5%:1%``.

    Raises:
        UsageError: text that is neither a value, a list nor a range; names the option.
    """
    if not isinstance(given, str):
        return [*given] if isinstance(given, Iterable) else [given]
    found: list[Any] = []
    for part in given.split(","):
        match = _RANGE.fullmatch(part)
        found += [_as(option, text) for text in (_range(option, match) if match else [part.strip()])]
    return found


def _range(option: Option, match: re.Match[str]) -> list[str]:
    numbers = [_NUMBER.fullmatch(text) for text in match.groups()]
    if None in numbers or len({number[2] == "%" for number in numbers if number}) > 1:
        raise UsageError(
            f"`{option.name}={match[0]!r}`: write first:last:step, such as 0.05:0.25:0.05, 20k:100k:10k or 1%:5%:1%."
        )
    unit = numbers[0][2] if numbers[0] and numbers[0][2] == "%" else ""
    first, last, step = (Decimal(n[1]) * _UNITS.get(n[2].lower(), 1) for n in numbers if n)
    if step <= 0 or last < first or (last - first) / step >= MAX_CANDIDATES:
        raise UsageError(
            f"`{option.name}={match[0]!r}`: first:last:step go up, by a step above 0, in fewer than {MAX_CANDIDATES} "
            "steps."
        )
    return [f"{(first + i * step).normalize():f}{unit}" for i in range(int((last - first) / step) + 1)]


def _as(option: Option, text: str) -> Any:
    """Return one value as the library takes it; amounts with a unit stay text."""
    kinds = option.kinds
    closed = {word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)}
    if closed and text.lower() not in closed:
        raise unknown_word(option.name, text, option.words, also=closed)
    if bool in kinds:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"`{option.name}={text!r}` is neither true nor false.")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    raise UsageError(f"`{option.name}={text!r}` is not a number.")


def number_of(value: Any) -> tuple[float, bool] | None:
    """Return a value of an option as a number, and whether it is in percent of the run; None if it is a word."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value), False
    try:
        amount = parse_span("", value)
    except UsageError:
        return None
    return (100 * amount.value, True) if amount.share else (amount.value, False)


def candidates(
    members: Sequence[Member],
    names: Sequence[str],
    rules: Mapping[str, Values],
    selections: Mapping[str, Values],
    numbers_of: NumbersOf,
    **fixed: Any,
) -> Combinations:
    """Return all combinations of values that are averages, and each checkpoint alone.

    Args:
        members: of the whole series, oldest first.
        names: of the checkpoints, distinct.
        rules: option of a rule, or ``mode``, to its values; options go with the modes that take them. Without modes,
            those that take the options are meant.
        selections: option of `SELECTED` to its values.
        numbers_of: what a rule needs of checkpoints.
        fixed: options of `Choice` that are the same for all candidates with ``best``.

    Raises:
        UsageError: an option that no mode takes, a value that is wrong in every combination, or too many combinations.
        CkptError: why the first combination cannot be made, if none can.
    """
    found: dict[Any, Candidate] = {}
    refused: dict[str, CkptError] = {}
    outcomes: dict[str, list[CkptError | None]] = {}  # of each value
    noted: dict[str, list[str]] = {}  # note to labels
    varying = {name for given in (rules, selections) for name, each in given.items() if len(each) > 1}
    # Before they are listed; options of a mode are combined among themselves.
    _check_number(math.prod(len(each) for each in selections.values()))
    combinations = [*_schedules(rules)]
    if len({mode for mode, _ in combinations}) > 1:
        varying.add("mode")
    chosen = [*_combinations(selections)]
    _check_number(len(chosen) * len(combinations))
    for picked, (mode, of_rule) in itertools.product(chosen, combinations):
        options = {**picked, "mode": mode, **of_rule}
        label = " ".join(f"{name}={value}" for name, value in options.items() if name in varying) or mode
        error: CkptError | None = None
        try:
            candidate, notes = combination(label, mode, of_rule, picked, members, numbers_of, **fixed)
        except CkptError as caught:
            refused[label] = error = caught
        else:
            for note in notes:
                noted.setdefault(note, []).append(label)
            _add(found, candidate)
        for name, value in options.items():
            outcomes.setdefault(f"{name}={value!r}", []).append(error)
    for each in outcomes.values():
        wrong = [error for error in each if isinstance(error, UsageError)]
        if len(wrong) == len(each):  # a typing error, not what the series lacks
            raise wrong[0]
    if not found and refused:
        raise next(iter(refused.values()))
    taken = {each.label for each in found.values()}
    for member, name in zip(members, names, strict=True):
        label = f"{name} alone" if name in taken else name
        _add(found, Candidate(label, "checkpoint", {}, Schedule("uniform"), (member,), (member.step,), (1.0,)))
    return Combinations(
        tuple(found.values()),
        {label: str(error) for label, error in refused.items()},
        tuple(_said(note, labels) for note, labels in noted.items()),
    )


def combination(
    label: str,
    mode: str,
    of_rule: Mapping[str, Any],
    picked: Mapping[str, Any],
    members: Sequence[Member],
    numbers_of: NumbersOf,
    **fixed: Any,
) -> tuple[Candidate, list[str]]:
    """Return one average, and decisions to report.

    Args:
        label: of the candidate.
        mode, of_rule: the rule, and its options.
        picked: options of a selection.
        members, numbers_of, fixed: see `candidates`.

    Raises:
        CkptError: it cannot be made.
    """
    fixed = fixed if "best" in picked else {}
    notes: list[str] = []
    schedule = Schedule(mode, **of_rule)
    schedule.check()
    own = tuple(Choice(**picked, **fixed).of(members, notes))
    numbers = numbers_of(schedule, own)
    notes += schedule.remarks(numbers)
    coefficients = schedule.coefficients(numbers)
    kept = [i for i, coefficient in enumerate(coefficients) if coefficient or i == len(own) - 1]
    candidate = Candidate(
        label,
        "average",
        {**picked, **fixed, "mode": mode, **of_rule},
        schedule,
        tuple(own[i] for i in kept),
        [numbers[i] for i in kept],
        tuple(coefficients[i] for i in kept),
    )
    return candidate, notes


def _said(note: str, labels: Sequence[str]) -> str:
    others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return f"{labels[0]}{others}: {note}"


def _check_number(combinations: int) -> None:
    if combinations > MAX_CANDIDATES:
        raise UsageError(
            f"{combinations} combinations of these values, and {MAX_CANDIDATES} are the most. Give fewer values, or "
            "search one option: `search`."
        )


def _add(found: dict[Any, Candidate], candidate: Candidate) -> None:
    """Add a candidate, or join it with one of the same checkpoints and coefficients."""
    # The last one gives the tensors that are copied, also if it does not count.
    key = (candidate.members[-1], *zip(candidate.members, candidate.coefficients, strict=True))
    known = found.get(key)
    found[key] = candidate if known is None else joined(known, candidate)


def joined(known: Candidate, other: Candidate) -> Candidate:
    """Return one candidate for two that are the same average; that of a checkpoint alone keeps its name."""
    first, second = (other, known) if other.kind == "checkpoint" else (known, other)
    return replace(
        first,
        same=(*first.same, second.label, *second.same),
        same_options=(*first.same_options, *([second.options] if second.options else []), *second.same_options),
    )


def _schedules(rules: Mapping[str, Values]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each mode with each combination of the values of its options."""
    options = {name: each for name, each in rules.items() if name != "mode"}
    takers = {name: modes_with(name) for name in options}
    modes = [named(mode) for mode in rules.get("mode", ())] or _meant(takers)
    for name, taking in takers.items():
        if not set(taking) & set(modes):
            raise UsageError(f"`{name}` goes with {' or '.join(f'`mode={mode!r}`' for mode in taking)}.")
    for mode in dict.fromkeys(modes):
        own = _names_of(SCHEDULES[mode]) if mode in SCHEDULES else []
        _check_number(math.prod(len(each) for name, each in options.items() if name in own))
        for combination in _combinations({name: each for name, each in options.items() if name in own}):
            yield mode, combination


def _meant(takers: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the modes that options mean: those that alone take one of them, else the first that takes all."""
    alone = [taking[0] for taking in takers.values() if len(taking) == 1]
    together = [mode for mode in SCHEDULES if all(mode in taking for taking in takers.values())]
    return [*dict.fromkeys(alone)] or (together[:1] if takers else ["uniform"])


def modes_with(name: str) -> list[str]:
    """Return the modes that take an option."""
    return [mode for mode, rule in SCHEDULES.items() if name in _names_of(rule)]


def _names_of(rule: Rule) -> list[str]:
    return [option.name for option in rule.options]


def _combinations(options: Mapping[str, Values]) -> Iterator[dict[str, Any]]:
    for each in itertools.product(*options.values()):
        yield dict(zip(options, each, strict=True))
