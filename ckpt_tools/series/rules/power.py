"""Power: averages whose length is a part of the training so far (EDM2, arXiv 2312.02696).

The profile at step t of T is (gamma + 1) t^gamma / T^(gamma + 1). Its width relative to T is sigma_rel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ...errors import UsageError
from .axis import BY, check_axis, positions
from .option import Option
from .rule import Rule

LARGEST_SIGMA = 1 / math.sqrt(12)
"""The width of a uniform profile: gamma = 0."""


def power(steps: Sequence[float], *, gamma: float) -> tuple[float, ...]:
    """Weigh by the part of a power profile between a checkpoint and the one before it.

    c_i = (t_i / T)^(gamma + 1) - (t_(i-1) / T)^(gamma + 1), t_0 = 0: the recursion with
    beta_i = (t_(i-1) / t_i)^(gamma + 1).

    Args:
        steps: t_i, increasing, above 0 but for the first.
        gamma: exponent, 0 or more.
    """
    shares = [0.0, *((step / steps[-1]) ** (gamma + 1) for step in steps)]
    return tuple(later - earlier for earlier, later in pairwise(shares))


def sigma_of(gamma: float) -> float:
    """Return the relative width of the profile of an exponent: sqrt(g + 1) / ((g + 2) sqrt(g + 3))."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


LARGEST_GAMMA = 1e7
"""A profile with a larger exponent is that of the last step alone, in any training."""


def gamma_of(sigma_rel: float, name: str | None = None) -> float:
    """Return the exponent of a profile of this relative width.

    It is the largest root of (g + 2)^2 (g + 3) = (g + 1) / sigma^2 (EDM2, algorithm 2).

    Args:
        sigma_rel: the width.
        name: of the parameter and its value, for the message.

    Raises:
        UsageError: a width outside [1e-7, 1 / sqrt(12)).
    """
    given = f"`{name or f'sigma_rel={sigma_rel}'}`"
    if not 0 < sigma_rel < LARGEST_SIGMA:
        raise UsageError(
            f"{given}: the width is above 0 and below {LARGEST_SIGMA:.4f} (1 / sqrt(12), where all of the training "
            "counts the same)."
        )
    if sigma_rel < 1 / LARGEST_GAMMA:
        raise UsageError(
            f"{given}: so narrow an average is the last checkpoint alone. Give {1 / LARGEST_GAMMA} or more."
        )
    gamma = 1 / sigma_rel  # above the root, from where Newton's steps go down to it, for the function is convex there
    for _ in range(100):
        a, b = gamma + 2, gamma + 3
        value = a * a * b - (gamma + 1) / sigma_rel**2
        step = value / (2 * a * b + a * a - sigma_rel**-2)
        if abs(step) <= 1e-16 * gamma:
            break
        gamma -= step
    return gamma


def _exponent(sigma_rel: float | None, gamma: float | None) -> float:
    if (sigma_rel is None) == (gamma is None):
        raise UsageError("`mode='power'` needs one of `sigma_rel` and `gamma`.")
    if sigma_rel is not None:
        return gamma_of(sigma_rel)
    if gamma is None or not 0 <= gamma <= LARGEST_GAMMA:
        raise UsageError(f"`gamma={gamma}`: must be 0 or more, and {LARGEST_GAMMA:.0e} at most.")
    return gamma


def _power(steps: Sequence[int | None], *, sigma_rel: float | None, gamma: float | None, by: str) -> tuple[float, ...]:
    at = positions(steps, by, needed="mode='power'") or range(1, len(steps) + 1)
    if at[-1] <= 0:
        return (1.0,)  # one checkpoint, at step 0
    return power(at, gamma=_exponent(sigma_rel, gamma))


def _along(steps: Sequence[int | None], *, by: str, **_: object) -> str | None:
    return None if positions(steps, by, needed="mode='power'") is None else "by"


def _check(*, sigma_rel: float | None, gamma: float | None, by: str) -> None:
    check_axis(by)
    _exponent(sigma_rel, gamma)


RULE = Rule(
    _power,
    (
        Option("sigma_rel", float, None, "power: width of the average, as a part of the training so far.", metavar="S"),
        Option("gamma", float, None, "power: instead, its exponent.", metavar="G"),
        BY,
    ),
    check=_check,
    along=_along,
)
