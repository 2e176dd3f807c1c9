"""Schedules: how much each checkpoint counts.

Every rule is a pure function to N float64 coefficients, oldest checkpoint first; the average is
the sum of coefficient times tensor. A recursion v_n = d_n v_(n-1) + (1 - d_n) x_n unrolls to
c_i = (1 - d_i) * prod_{j>i} d_j, with c_1 = prod_{j>1} d_j for a start from the first checkpoint.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

from ..errors import UsageError

MODES = ("uniform", "ema", "weights")
DEFAULT_DECAY = 0.99


@dataclass(frozen=True, slots=True)
class Schedule:
    """A rule and its options, as a user gives them.

    Attributes:
        mode: ``uniform``, ``ema`` or ``weights``.
        decay: ema: for a checkpoint, or with `per_step` for a training step; 0.99 when None.
        per_step, warmup, bias_correction: ema: see the functions below; one of them at most.
        weights: with mode ``weights``, one number a checkpoint; divided by their sum if `normalize`.
    """

    mode: str = "uniform"
    decay: float | None = None
    per_step: bool = False
    warmup: str | None = None
    bias_correction: bool = False
    weights: tuple[float, ...] | None = None
    normalize: bool = True

    def check(self) -> None:
        """Refuse what no series could make sense of, before any file is read.

        Raises:
            UsageError: an unknown mode, an option of another mode, or a number out of range.
        """
        numbers = [] if self.weights is None else list(self.weights)
        for option, value in (("--decay", self.decay), *(("--weights", number) for number in numbers)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise UsageError(f"{option} takes numbers, not {value!r}.")
        if self.mode not in MODES:
            raise UsageError(f"--mode is one of {', '.join(MODES)}, not {self.mode!r}.")
        variants = {
            "--per-step": self.per_step,
            "--warmup": self.warmup is not None,
            "--bias-correction": self.bias_correction,
        }
        ema_options = {"--decay": self.decay is not None, **variants}
        weights_options = {"--weights": self.weights is not None, "--no-normalize": not self.normalize}
        for belongs, options in (("ema", ema_options), ("weights", weights_options)):
            for option, given in options.items():
                if given and self.mode != belongs:
                    raise UsageError(f"{option} goes with --mode {belongs}.")
        chosen = [option for option, given in variants.items() if given]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(chosen)} cannot go together.")
        if self.mode == "weights" and self.weights is None:
            raise UsageError("--mode weights needs --weights, one number a checkpoint.")
        # A series as short as can be finds an impossible decay, warm-up or sum of weights.
        self.coefficients([0, 1] if self.weights is None else [None] * len(self.weights))

    def coefficients(self, steps: Sequence[int | None]) -> tuple[float, ...]:
        """Return the coefficients for checkpoints at these training steps, oldest first.

        Raises:
            UsageError: the rule does not fit the series.
        """
        n = len(steps)
        decay = DEFAULT_DECAY if self.decay is None else self.decay
        if self.mode == "uniform":
            return uniform(n)
        if self.mode == "weights":
            given = self.weights or ()
            if len(given) != n:
                raise UsageError(
                    f"--weights has {len(given)} numbers for {n} checkpoints. See their order with --dry-run."
                )
            return weights(given, normalize=self.normalize)
        if self.per_step:
            known = [step for step in steps if step is not None]
            if len(known) < n:
                raise UsageError(
                    "--per-step: a checkpoint tells no step, neither inside nor in its name; see --dry-run."
                )
            return ema_per_step(known, decay=decay)
        if self.warmup is not None:
            return ema_warmup(n, decay=decay, warmup=self.warmup)
        return ema(n, decay=decay, bias_correction=self.bias_correction)


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
    if len(values) * max(map(abs, values), default=0.0) > sys.float_info.max:
        raise UsageError("--weights are too large to be summed. Divide them all by the largest.")
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
        raise UsageError(f"a decay of {decay} is outside [0, 1]. Choose one such as 0.99.")


def _unroll(decays: Sequence[float]) -> tuple[float, ...]:
    """Turn the decays of updates 2..N into the coefficients of checkpoints 1..N."""
    coefficients = []
    kept = 1.0  # product of the decays of all later updates
    for decay in reversed(decays):
        coefficients.append((1.0 - decay) * kept)
        kept *= decay
    return (kept, *reversed(coefficients))
