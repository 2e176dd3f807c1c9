"""Schedules: how much each checkpoint counts.

A rule is a pure function that returns N float64 coefficients, oldest checkpoint first; the average is the sum of
coefficient times tensor. A new rule is a module in `rules/` and an item of `SCHEDULES`, from which `average` and `ckpt
avg` take its options. Code outside the package adds a rule with `register`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, get_args

from ..errors import UsageError, unknown_word
from .rules import decay, difference, ema, posthoc, power, stock, uniform, weights
from .rules.option import Numbers, Option, one_of
from .rules.rule import Rule

_MODES = {"swa": "uniform", "mean": "uniform", "average": "uniform", "avg": "uniform", "exponential": "ema"}
"""Other names of modes, as other tools call them."""


class Schedule:
    """A rule and its options.

    Args:
        mode: name of a rule in `SCHEDULES`, or what other tools call it; if None, the rule that takes the options.
        options: of the rule; the others have their defaults.
    """

    title: ClassVar[str] = "How much each checkpoint counts"

    def __init__(self, mode: str | None = None, **options: Any) -> None:
        self._given = {
            name: tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
            for name, value in options.items()
        }
        self._asked = mode
        self.mode = self._meant() if mode is None else named(mode)

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """Return `mode`, and the options of all rules."""
        *most, last = SCHEDULES
        implied = "the one that takes the other options, else uniform"
        said = f"{', '.join(most)} or {last}."
        mode = Option("mode", one_of((*SCHEDULES, *_MODES)), None, said, implied, offered=tuple(SCHEDULES))
        found = {option.name: option for rule in SCHEDULES.values() for option in rule.options}
        return (mode, *found.values())

    def _meant(self) -> str:
        """Return the one mode that takes the options that were given; uniform if there is none or several."""
        given = {name for name, value in self._given.items() if value != _defaults()[name]}
        takers = [mode for mode, rule in SCHEDULES.items() if given <= {option.name for option in rule.options}]
        return takers[0] if given and len(takers) == 1 else "uniform"

    @property
    def given(self) -> dict[str, Any]:
        """What was asked for: the mode, if it was, and options that are not at their defaults."""
        mode = {} if self._asked is None else {"mode": self.mode}
        return mode | {name: value for name, value in self._given.items() if value != _defaults().get(name, value)}

    @property
    def rule(self) -> Rule:
        """The rule of the mode."""
        return SCHEDULES[self.mode]

    @property
    def values(self) -> dict[str, Any]:
        """All options of the rule."""
        return {option.name: self._given.get(option.name, option.default) for option in self.rule.options}

    def arguments(self, facts: Sequence[Any]) -> Mapping[str, Any]:
        """Return the options to record; without paths, and lists of numbers, which the coefficients repeat."""
        values = self.values | self.fitted(facts)
        return {
            option.name: values[option.name]
            for option in self.rule.options
            if values[option.name] != option.default
            and isinstance(values[option.name], (str, int, float))
            and Path not in get_args(option.type)
        }

    def check(self) -> None:
        """Check the options before any file is read.

        Raises:
            UsageError: an unknown mode, an option of another mode, or a number out of range.
        """
        every = {option.name: option for option in self.options()}
        for name, value in self._given.items():
            if value is not None and every[name].type in (int, float, Numbers):
                for number in value if every[name].type is Numbers else [value]:
                    if isinstance(number, bool) or not isinstance(number, Real):
                        raise UsageError(f"`{name}` takes numbers, not {number!r}.")
        if self.mode not in SCHEDULES:
            raise unknown_word("mode", self.mode, tuple(SCHEDULES), also=_MODES)
        for name, value in self._given.items():
            if value != every[name].default and every[name] not in self.rule.options:
                given = f"`{name}=False`" if value is False else f"`{name}`"
                takers = [f"`mode={mode!r}`" for mode, other in SCHEDULES.items() if every[name] in other.options]
                raise UsageError(f"{given} goes with {' or '.join(takers)}.")
        if self.rule.check is not None:
            self.rule.check(**self.values)

    def fitted(self, facts: Sequence[Any]) -> dict[str, Any]:
        """Return the options that the rule has chosen for the series, for `facts` see `coefficients`."""
        return {} if self.rule.fitted is None else self.rule.fitted(facts, **self.values)

    def remarks(self, facts: Sequence[Any]) -> Sequence[str]:
        """Return what a user should know of the result."""
        return () if self.rule.remarks is None else self.rule.remarks(facts, **self.values)

    def along(self, facts: Sequence[Any]) -> str | None:
        """Return the name of the option by which training steps count, or None where files do."""
        return None if self.rule.along is None else self.rule.along(facts, **self.values)

    def coefficients(self, facts: Sequence[Any]) -> tuple[float, ...]:
        """Return the coefficients of checkpoints.

        Args:
            facts: what the rule needs of each checkpoint, oldest first.

        Raises:
            UsageError: the rule does not fit the series.
        """
        return tuple(self.rule.coefficients(facts, **self.values | self.fitted(facts)))


def named(mode: object) -> str:
    """Return the mode that a name means."""
    name = mode.lower() if isinstance(mode, str) and mode not in SCHEDULES else str(mode)
    return _MODES.get(name, name)


def _defaults() -> Mapping[str, Any]:
    return {option.name: option.default for rule in SCHEDULES.values() for option in rule.options}


def dominant(coefficients: Sequence[float]) -> tuple[int, float] | None:
    """Return (index, share) of a first or last checkpoint with over half the weight, for three or more; else None."""
    total = math.fsum(map(abs, coefficients))
    ends = (0, len(coefficients) - 1) if len(coefficients) > 2 and total else ()
    shares = ((index, abs(coefficients[index]) / total) for index in ends)
    return next((end for end in shares if end[1] > 0.5), None)


SCHEDULES: dict[str, Rule] = {
    "uniform": uniform.RULE,
    "ema": ema.RULE,
    "weights": weights.RULE,
    "decay": decay.RULE,
    "power": power.RULE,
    "difference": difference.RULE,
    "posthoc": posthoc.RULE,
    "stock": stock.RULE,
}
"""Mode to rule."""


def register(mode: str, coefficients: Callable[..., Sequence[float]], *options: Option, **more: Any) -> None:
    """Add a rule of averaging.

    Args:
        mode: its name; an existing rule of this name is replaced.
        coefficients, options: see `Rule`.
        more: `check` and `advice`, see `Rule`.
    """
    SCHEDULES[mode] = Rule(coefficients, options, **more)
