"""Rule: one way of averaging, as a function to coefficients and its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
        coefficients: called with one number a checkpoint, oldest first (None if unknown), and with the rule's options
            as keyword arguments; returns one coefficient per checkpoint.
        options: of the rule.
        check: called with the options before any file is read; raises UsageError.
        advice: called with the options; returns how to spread an average that is mostly the oldest checkpoint, and how
            one that is mostly the newest; None for no advice.
        fitted: called like `coefficients`; returns values for options that were left to the rule.
        remarks: called like `coefficients`; returns what a user should know of the result.
        along: called like `coefficients`; returns the name of the option by which training steps count, or None where
            files do.
        needs: which number of a checkpoint `coefficients` takes: ``step`` (of training), ``updates`` (how many weights
            are in the average that it holds), ``place`` (among the paths as they were given), ``profile`` (which
            steps it is an average of), or ``products`` (called for each tensor, with the inner products of its
            differences from one start).
    """

    coefficients: Callable[..., Sequence[float]]
    options: tuple[Option, ...] = ()
    check: Callable[..., object] | None = None
    advice: Callable[..., tuple[str, str]] | None = None
    fitted: Callable[..., dict[str, Any]] | None = None
    remarks: Callable[..., Sequence[str]] | None = None
    along: Callable[..., str | None] | None = None
    needs: str = "step"
