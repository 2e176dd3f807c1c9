"""Decay: averages in place of a learning-rate decay at the end of training (WSM, arXiv 2507.17634, Theorem 3.1).

A decay that would have scaled the update between checkpoints j and j + 1 by w_j, 1 >= w_1 >= ... >= 0, is the average
with c_i = w_(i-1) - w_i, c_N = w_(N-1) and w_0 = 1. With w_j = f(j / N) the shapes ``linear`` and ``1-sqrt`` are the
merge styles ``linear`` and ``minus-sqrt`` of Megatron-LM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from ...errors import unknown_word
from .axis import BY, check_axis, positions
from .option import Option, one_of
from .rule import Rule

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    # WSM calls a concave curve inverse square root, and draws it as this one (figure 2).
    "inverse-sqrt": lambda x: 1 - math.sqrt(x),
}
"""Shape to the factor of the learning rate at x in [0, 1] of the decay."""


def decay(steps: Sequence[float], *, shape: str) -> tuple[float, ...]:
    """Weigh as if the learning rate had decayed from the first checkpoint on.

    The decay ends one mean gap behind the last checkpoint, so that evenly spaced checkpoints are at x = i / N.

    Args:
        steps: positions of the checkpoints, increasing.
        shape: one of `SHAPES`.
    """
    n = len(steps)
    if n == 1:
        return (1.0,)
    whole = (steps[-1] - steps[0]) * n / (n - 1)
    factors = [1.0, *(SHAPES[shape]((step - steps[0]) / whole) for step in steps[1:]), 0.0]
    return tuple(a - b for a, b in pairwise(factors))


_USUAL = "1-sqrt"


def _decay(steps: Sequence[int | None], *, shape: str | None, by: str) -> tuple[float, ...]:
    return decay(positions(steps, by) or range(len(steps)), shape=shape or _USUAL)


def _along(steps: Sequence[int | None], *, by: str, **_: object) -> str | None:
    return None if positions(steps, by) is None else "by"


def _remarks(steps: Sequence[int | None], *, by: str, **_: object) -> list[str]:
    known = [step for step in steps if step is not None]
    if by != "auto" or len(known) < len(steps) or positions(steps, by) is not None:
        return []
    return ["The training steps do not increase from file to file, so it counts files."]


def _check(*, shape: str | None, by: str) -> None:
    check_axis(by)
    if shape is not None and shape not in SHAPES:
        raise unknown_word("shape", shape, tuple(SHAPES))


RULE = Rule(
    _decay,
    # Without a default, so that `shape` alone says which rule it is.
    (
        Option(
            "shape",
            one_of(SHAPES),
            None,
            f"decay: {', '.join(SHAPES)}; of the learning rate that it stands for.",
            _USUAL,
        ),
        BY,
    ),
    check=_check,
    remarks=_remarks,
    along=_along,
)
