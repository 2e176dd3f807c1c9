"""Axis: where the checkpoints of a series stand, in training steps or as files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ...errors import UsageError, unknown_word
from .option import Option, one_of

AXES = ("auto", "steps", "files")
BY = Option("by", one_of(AXES), "auto", "Count along steps, or files; auto takes the steps where all are known.")


def check_axis(by: str) -> None:
    """Raise UsageError for another axis than those in `AXES`."""
    if by not in AXES:
        raise unknown_word("by", by, AXES)


def positions(numbers: Sequence[int | None], by: str, *, needed: str | None = None) -> list[int] | None:
    """Return the training steps of checkpoints, oldest first, or None where files count.

    Args:
        numbers: the steps; None if unknown.
        by: ``auto``, ``steps`` or ``files``.
        needed: the option that means steps, so that ``auto`` takes no files in their place.

    Raises:
        UsageError: steps are needed, and one is unknown, or they do not increase.
    """
    if by == "files":
        return None
    known = [number for number in numbers if number is not None]
    complete = len(known) == len(numbers)
    increasing = complete and all(a < b for a, b in pairwise(known))
    if increasing:
        return known
    if by == "auto" and needed is None:
        return None
    what = f"`{needed}`" if needed is not None and by == "auto" else "`by='steps'`"
    if not complete:
        raise UsageError(
            f"{what} counts training steps, and a checkpoint has none, neither inside nor in its name; see `dry_run`. "
            "To count files instead, add `by='files'`."
        )
    at = next((b for a, b in pairwise(known) if a >= b))
    raise UsageError(
        f"{what} counts training steps, and they do not increase from file to file: two are at {at}, or the order is "
        "another; see `dry_run`. To count files instead, add `by='files'`."
    )
