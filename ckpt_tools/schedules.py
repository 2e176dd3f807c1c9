"""Schedules: how much each checkpoint counts.

Every rule is a pure function to N float64 coefficients, oldest checkpoint first; the average is
the sum of coefficient times tensor. A recursion v_n = d_n v_(n-1) + (1 - d_n) x_n unrolls to
c_i = (1 - d_i) * prod_{j>i} d_j, with c_1 = prod_{j>1} d_j for a start from the first checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .errors import UsageError


def uniform(n: int) -> tuple[float, ...]:
    """Give each of n checkpoints the same weight (SWA; torch's AveragedModel by default)."""
    return (1.0 / n,) * n


def ema(n: int, *, decay: float, bias_correction: bool = False) -> tuple[float, ...]:
    """Weigh as an exponential moving average updated once a checkpoint.

    Args:
        n: number of checkpoints.
        decay: d in v = d v + (1 - d) x, in [0, 1].
        bias_correction: start from zero and divide by 1 - d^n, instead of starting from the
            first checkpoint as timm's ModelEma and ModelEmaV2 do.

    Raises:
        UsageError: decay outside [0, 1], or 1 with bias correction.
    """
    _check_decay(decay)
    if not bias_correction:
        return _unroll([decay] * (n - 1))
    if decay == 1.0:
        raise UsageError("--bias-correction divides by 1 - decay^N, which is 0 for a decay of 1. Choose a smaller one.")
    total = 1.0 - decay**n
    return tuple((1.0 - decay) * decay ** (n - i) / total for i in range(1, n + 1))


def ema_per_step(steps: Sequence[int], *, decay: float) -> tuple[float, ...]:
    """Weigh as an average over training steps that is sampled at the checkpoints.

    Args:
        steps: training step of each checkpoint, increasing.
        decay: d for one training step; a gap of g steps counts as d^g.

    Raises:
        UsageError: decay outside [0, 1], or steps that do not increase.
    """
    _check_decay(decay)
    gaps = [later - earlier for earlier, later in zip(steps, steps[1:], strict=False)]
    if any(gap <= 0 for gap in gaps):
        raise UsageError("--per-step needs steps that increase from file to file; see them with --dry-run.")
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


def _litema(update: int, decay: float) -> float:
    return min(decay, (1 + update) / (10 + update))


def _timm(update: int, decay: float, gamma: float = 1.0, power: float = 2 / 3) -> float:
    step = max(0, update - 1)
    return 0.0 if step <= 0 else min(1 - (1 + step / gamma) ** -power, decay)


WARMUPS: dict[str, Callable[[int, float], float]] = {"litema": _litema, "timm": _timm}


def weights(values: Sequence[float], *, normalize: bool = True) -> tuple[float, ...]:
    """Weigh by given numbers; negative ones and zeros count as what they are.

    Raises:
        UsageError: a number that is not finite, or a sum of 0 that is to be normalised.
    """
    if not all(math.isfinite(value) for value in values):
        raise UsageError("--weights must be finite numbers.")
    if not normalize:
        return tuple(float(value) for value in values)
    total = math.fsum(values)
    # A sum that is 0 but for rounding would blow the rounding up.
    if abs(total) <= 1e-12 * math.fsum(map(abs, values)):
        raise UsageError("--weights sum to 0 and cannot be normalised. Change them, or add --no-normalize.")
    return tuple(value / total for value in values)


def dominant(coefficients: Sequence[float]) -> tuple[int, float] | None:
    """Return (index, share) of a first or last checkpoint that holds most of an average of three or more."""
    total = math.fsum(map(abs, coefficients))
    if len(coefficients) < 3 or total == 0:
        return None
    for index in (0, len(coefficients) - 1):
        share = abs(coefficients[index]) / total
        if share > 0.5:
            return index, share
    return None


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise UsageError(f"a decay of {decay} is outside [0, 1].")


def _unroll(decays: Sequence[float]) -> tuple[float, ...]:
    """Turn the decays of updates 2..N into the coefficients of checkpoints 1..N."""
    coefficients = []
    kept = 1.0  # product of the decays of all later updates
    for decay in reversed(decays):
        coefficients.append((1.0 - decay) * kept)
        kept *= decay
    return (kept, *reversed(coefficients))
