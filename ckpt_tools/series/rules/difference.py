"""Difference: the mean of a window, from the running means at its two ends (icefall's and wenet's model_avg).

With A_s over n_s weights and A_e over n_e, the mean over those between is (n_e A_e - n_s A_s) / (n_e - n_s).
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UsageError
from .rule import Rule


def difference(updates: Sequence[int | None]) -> tuple[float, ...]:
    """Weigh the first and the last of several running means.

    Args:
        updates: how many weights are in each mean, oldest first; those between the ends count 0.

    Raises:
        UsageError: fewer than two, a number that is not known, or numbers that do not grow.
    """
    if len(updates) < 2:
        raise UsageError(
            "`mode='difference'` takes the running means at the ends of a window: two checkpoints or more."
        )
    start, end = updates[0], updates[-1]
    if start is None or end is None:
        raise UsageError(
            "`mode='difference'` needs to know how many weights are in the mean at each end (batch_idx_train, "
            "n_averaged, num_updates, or the inputs of an average by ckpt), and one of the files does not say."
        )
    if not 0 <= start < end:
        raise UsageError(
            f"`mode='difference'`: the mean of the last file is over {end} weights and that of the first over {start}; "
            "it must be over more."
        )
    return (-start / (end - start), *[0.0] * (len(updates) - 2), end / (end - start))


def _remarks(updates: Sequence[int | None]) -> list[str]:
    start, end = updates[0] or 0, updates[-1] or 0
    return [
        f"The mean of {end - start} weights, from those of the first {start} and of the first {end}, in which each is "
        "taken to count the same."
    ]


RULE = Rule(difference, remarks=_remarks, needs="updates")
