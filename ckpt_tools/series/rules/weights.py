"""Weights: each checkpoint counts a given number."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from ...errors import UsageError
from .option import Numbers, Option, Origins
from .rule import Rule


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


def _weights(places: Sequence[int], *, weights: Numbers | None, normalize: bool) -> tuple[float, ...]:
    """Weigh by numbers in the order in which the paths were given.

    Args:
        places: of each checkpoint, oldest first, among the paths.
    """
    if weights is None:
        raise UsageError("`mode='weights'` needs `weights`, one number a checkpoint.")
    if len(weights) != len(places):
        raise UsageError(
            f"`weights` has {len(weights)} number{'s' * (len(weights) != 1)} for {len(places)} "
            f"checkpoint{'s' * (len(places) != 1)}. To see them, leave `weights` out, and add `dry_run`."
        )
    divided = _divided(weights, normalize=normalize)
    rank = {place: i for i, place in enumerate(sorted(places))}
    return tuple(divided[rank[place]] for place in places)


def _check(*, weights: Numbers | None, normalize: bool) -> None:
    _weights(range(len(weights or ())), weights=weights, normalize=normalize)


_divided = weights  # its name is also that of an option

RULE = Rule(
    _weights,
    (
        Option(
            "weights",
            Numbers,
            None,
            "weights: one number a checkpoint, in the order of the paths.",
            origins=Origins(once_only=True),
        ),
        Option("normalize", bool, True, "Divide `weights` by their sum."),
    ),
    check=_check,
    needs="place",
)
