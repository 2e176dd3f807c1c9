"""Rule: one way of averaging, as a function to coefficients and its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .option import Option

Products = Sequence[Sequence[float]]
"""Inner products of N checkpoints, (N, N), as `ckpt_tools.compute.gram.gram` gives them: rows and columns are the
differences from the last, and the last itself."""
Needs = Literal["step", "updates", "place", "profile", "products"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of averaging.

    Attributes:
        coefficients: called with what the rule needs of each checkpoint, oldest first, and with the rule's options as
            keyword arguments; returns one coefficient per checkpoint.
        options: of the rule.
        check: called with the options before any file is read; raises UsageError.
        advice: called with the options; returns how to spread an average that is mostly the oldest checkpoint, and how
            one that is mostly the newest; None for no advice.
        fitted: called like `coefficients`; returns values for options that were left to the rule.
        remarks: called like `coefficients`; returns what a user should know of the result.
        along: called like `coefficients`; returns the name of the option by which training steps count, or None where
            files do.
        needs: what `coefficients` takes of a checkpoint: ``step`` (of training, an int; None if unknown), ``updates``
            (an int: how many weights are in the average that it holds), ``place`` (an int: among the paths as they were
            given), ``profile`` (a `Profile`: which steps it is an average of), or ``products`` (called for each tensor,
            with the `Products` of the checkpoints and their start, which is the last).
    """

    coefficients: Callable[..., Sequence[float]]
    options: tuple[Option, ...] = ()
    check: Callable[..., object] | None = None
    advice: Callable[..., tuple[str, str]] | None = None
    fitted: Callable[..., dict[str, Any]] | None = None
    remarks: Callable[..., Sequence[str]] | None = None
    along: Callable[..., str | None] | None = None
    needs: Needs = "step"
