"""Schedules: how much each checkpoint counts.

A rule is a pure function that returns N float64 coefficients, oldest checkpoint first; the average is
the sum of coefficient times tensor. A recursion v_n = d_n v_(n-1) + (1 - d_n) x_n unrolls to
c_i = (1 - d_i) * prod_{j>i} d_j, with c_1 = prod_{j>1} d_j for a start from the first checkpoint.

A new rule is a function from training steps to coefficients, and an item of `SCHEDULES` with its options, from which
`average` and `ckpt avg` take them. Code outside the package adds a rule with `register`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, ClassVar

from ..errors import UsageError

DEFAULT_DECAY = 0.99
Numbers = Sequence[float]


@dataclass(frozen=True, slots=True)
class Option:
    """A parameter of a public function, and the option of its command.

    Attributes:
        name: of the parameter.
        type: of its values, such as ``float`` or ``Numbers``; None is allowed where it is the default.
        default: the default value.
        help: one line; names other parameters in backticks, like messages.
        implied: the meaning of a default of None, as a value or in words.
        metavar: placeholder of the value in the help of the command.
    """

    name: str
    type: Any
    default: Any
    help: str
    implied: Any = None
    metavar: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of averaging.

    Attributes:
        coefficients: called with the training steps (None if unknown) of the checkpoints, oldest first, and with
            the rule's options as keyword arguments; returns one coefficient per checkpoint.
        options: of the rule.
        check: called with the options before any file is read; raises UsageError.
        advice: how to spread an average that is mostly the oldest checkpoint, or mostly the newest; None for no advice.
    """

    coefficients: Callable[..., Sequence[float]]
    options: tuple[Option, ...] = ()
    check: Callable[..., object] | None = None
    advice: tuple[str, str] | None = None


class Schedule:
    """A rule and its options.

    Args:
        mode: name of a rule in `SCHEDULES`.
        options: of the rule; the others have their defaults.
    """

    title: ClassVar[str] = "How much each checkpoint counts"

    def __init__(self, mode: str = "uniform", **options: Any) -> None:
        self.mode = mode
        self._given = {
            name: tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
            for name, value in options.items()
        }

    @classmethod
    def options(cls) -> tuple[Option, ...]:
        """Return `mode`, and the options of all rules."""
        *most, last = SCHEDULES
        mode = Option("mode", str, "uniform", f"{', '.join(most)} or {last}.")
        found = {option.name: option for rule in SCHEDULES.values() for option in rule.options}
        return (mode, *found.values())

    @property
    def rule(self) -> Rule:
        """The rule of the mode."""
        return SCHEDULES[self.mode]

    @property
    def values(self) -> Mapping[str, Any]:
        """All options of the rule."""
        given = ((option, self._given.get(option.name, option.default)) for option in self.rule.options)
        return {option.name: option.implied if value is None else value for option, value in given}

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The options to record; without lists of numbers, which the coefficients repeat."""
        values = ((option, self.values[option.name]) for option in self.rule.options)
        return {
            option.name: value
            for option, value in values
            if value != option.default and isinstance(value, (str, int, float))
        }

    def check(self) -> None:
        """Check the options before any file is read.

        Raises:
            UsageError: an unknown mode, an option of another mode, or a number out of range.
        """
        every = {option.name: option for option in self.options()}
        for name, value in self._given.items():
            if value is not None and every[name].type in (float, Numbers):
                for number in value if every[name].type is Numbers else [value]:
                    if isinstance(number, bool) or not isinstance(number, Real):
                        raise UsageError(f"`{name}` takes numbers, not {number!r}.")
        if self.mode not in SCHEDULES:
            raise UsageError(f"`mode` is one of {', '.join(SCHEDULES)}, not {self.mode!r}.")
        for name, value in self._given.items():
            if value != every[name].default and every[name] not in self.rule.options:
                given = f"`{name}=False`" if value is False else f"`{name}`"
                takers = [f"`mode={mode!r}`" for mode, other in SCHEDULES.items() if every[name] in other.options]
                raise UsageError(f"{given} goes with {' or '.join(takers)}.")
        if self.rule.check is not None:
            self.rule.check(**self.values)

    def coefficients(self, steps: Sequence[int | None]) -> tuple[float, ...]:
        """Return the coefficients for checkpoints at these training steps, oldest first.

        Raises:
            UsageError: the rule does not fit the series.
        """
        return tuple(self.rule.coefficients(steps, **self.values))


def uniform(n: int) -> tuple[float, ...]:
    """Give each of n checkpoints the same weight (SWA; torch's AveragedModel by default)."""
    return (1.0 / n,) * n


def ema(n: int, *, decay: float, bias_correction: bool = False) -> tuple[float, ...]:
    """Weigh as an exponential moving average with one update per checkpoint.

    Args:
        n: number of checkpoints.
        decay: d in v = d v + (1 - d) x, in [0, 1].
        bias_correction: start from zero and divide by 1 - d^n, instead of starting from the
            first checkpoint like timm's ModelEma and ModelEmaV2.

    Raises:
        UsageError: decay outside [0, 1], or 1 with bias correction.
    """
    _check_decay(decay)
    if not bias_correction:
        return _unroll([decay] * (n - 1))
    if decay == 1.0:
        raise UsageError("`bias_correction` divides by 1 - decay^N, which is 0 for a decay of 1. Choose a smaller one.")
    total = 1.0 - decay**n
    return tuple((1.0 - decay) * decay ** (n - i) / total for i in range(1, n + 1))


def ema_per_step(steps: Sequence[int], *, decay: float) -> tuple[float, ...]:
    """Weigh as an exponential moving average over training steps, sampled at the checkpoints.

    Args:
        steps: training step of each checkpoint, increasing.
        decay: d for one training step; a gap of g steps counts as d^g.

    Raises:
        UsageError: decay outside [0, 1], or steps that do not increase.
    """
    _check_decay(decay)
    gaps = [later - earlier for earlier, later in zip(steps, steps[1:], strict=False)]
    if any(gap <= 0 for gap in gaps):
        raise UsageError("`per_step` needs steps that increase from file to file; see them with `dry_run`.")
    return _unroll([decay**gap for gap in gaps])


def ema_warmup(n: int, *, decay: float, warmup: str) -> tuple[float, ...]:
    """Weigh as an exponential moving average whose decay grows; file i is update number i - 1.

    Args:
        warmup: ``litema``: min(d, (1 + n) / (10 + n)), n = 1, 2, ..., as LitEma counts num_updates;
            ``timm``: 1 - (1 + s)^(-2/3) up to d, with s = n - 1, as ModelEmaV3 with use_warmup.

    Raises:
        UsageError: decay outside [0, 1], or an unknown warm-up.
    """
    _check_decay(decay)
    if warmup not in WARMUPS:
        raise UsageError(f"unknown warm-up {warmup!r}; there are {', '.join(WARMUPS)}.")
    return _unroll([WARMUPS[warmup](update, decay) for update in range(1, n)])


WARMUPS: dict[str, Callable[[int, float], float]] = {
    "litema": lambda update, decay: min(decay, (1 + update) / (10 + update)),
    "timm": lambda update, decay: min(decay, 1 - float(update) ** (-2 / 3)),
}


def weights(values: Sequence[float], *, normalize: bool = True) -> tuple[float, ...]:
    """Weigh by given numbers, which may be negative or 0.

    Raises:
        UsageError: a number that is not finite, or a sum of 0 with `normalize`.
    """
    if not all(math.isfinite(value) for value in values):
        raise UsageError("`weights` must be finite numbers.")
    if len(values) * max(map(abs, values), default=0.0) > sys.float_info.max:
        raise UsageError("`weights` are too large to be summed. Divide them all by the largest.")
    if not normalize:
        return tuple(float(value) for value in values)
    total = math.fsum(values)
    # Dividing by a sum that is 0 up to rounding would amplify the rounding.
    if abs(total) <= 1e-12 * math.fsum(map(abs, values)):
        raise UsageError("`weights` sum to 0 and cannot be normalised. Change them, or add `normalize=False`.")
    return tuple(value / total for value in values)


def dominant(coefficients: Sequence[float]) -> tuple[int, float] | None:
    """Return (index, share) of a first or last checkpoint with over half the weight, for three or more; else None."""
    total = math.fsum(map(abs, coefficients))
    ends = (0, len(coefficients) - 1) if len(coefficients) > 2 and total else ()
    shares = ((index, abs(coefficients[index]) / total) for index in ends)
    return next((end for end in shares if end[1] > 0.5), None)


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise UsageError(f"a decay of {decay} is outside [0, 1]. Choose one such as 0.99.")


def _unroll(decays: Sequence[float]) -> tuple[float, ...]:
    """Turn the decays of updates 2..N into the coefficients of checkpoints 1..N."""
    coefficients = []
    kept = 1.0  # product of the decays of all later updates
    for decay in reversed(decays):
        coefficients.append((1.0 - decay) * kept)
        kept *= decay
    return (kept, *reversed(coefficients))


def _ema(
    steps: Sequence[int | None], *, decay: float, per_step: bool, warmup: str | None, bias_correction: bool
) -> tuple[float, ...]:
    variants = {"per_step": per_step, "warmup": warmup is not None, "bias_correction": bias_correction}
    chosen = [f"`{name}`" for name, given in variants.items() if given]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} cannot go together.")
    if per_step:
        known = [step for step in steps if step is not None]
        if len(known) < len(steps):
            raise UsageError("`per_step`: a checkpoint has no step, neither inside nor in its name; see `dry_run`.")
        return ema_per_step(known, decay=decay)
    if warmup is not None:
        return ema_warmup(len(steps), decay=decay, warmup=warmup)
    return ema(len(steps), decay=decay, bias_correction=bias_correction)


def _weights(steps: Sequence[int | None], *, weights: Numbers | None, normalize: bool) -> tuple[float, ...]:
    if weights is None:
        raise UsageError("`mode='weights'` needs `weights`, one number a checkpoint.")
    if len(weights) != len(steps):
        raise UsageError(
            f"`weights` has {len(weights)} numbers for {len(steps)} checkpoints. See their order with `dry_run`."
        )
    return _divided(weights, normalize=normalize)


def _check_weights(*, weights: Numbers | None, normalize: bool) -> None:
    _weights((None,) * len(weights or ()), weights=weights, normalize=normalize)


_divided = weights  # its name is also that of an option

SCHEDULES: dict[str, Rule] = {
    "uniform": Rule(lambda steps: uniform(len(steps))),
    "ema": Rule(
        _ema,
        (
            Option("decay", float, None, "ema: for a checkpoint; with `per_step`, for a training step.", DEFAULT_DECAY),
            Option("per_step", bool, False, "ema: the decay between two checkpoints is decay^(step gap)."),
            Option("warmup", str, None, f"ema: {' or '.join(WARMUPS)}; the decay grows."),
            Option("bias_correction", bool, False, "ema: start from zero, divide by 1 - decay^N."),
        ),
        check=partial(_ema, (0, 1)),  # the shortest series finds an invalid decay or warm-up
        advice=("A smaller `decay`, `per_step` or `bias_correction` spreads it.", "A larger `decay` spreads it."),
    ),
    "weights": Rule(
        _weights,
        (
            Option("weights", Numbers, None, "With `mode='weights'`: one number a checkpoint, oldest first."),
            Option("normalize", bool, True, "Divide `weights` by their sum."),
        ),
        check=_check_weights,
    ),
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
