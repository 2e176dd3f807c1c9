"""EMA: exponential moving averages, with one update a checkpoint or one a training step.

A recursion v_n = d_n v_(n-1) + (1 - d_n) x_n unrolls to c_i = (1 - d_i) * prod_{j>i} d_j, with c_1 = prod_{j>1} d_j for
a start from the first checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from ...errors import UsageError, unknown_word
from .amounts import Span, parse_span
from .axis import BY, check_axis, positions
from .option import Option, one_of
from .rule import Rule

_WARMUP_GAMMA, _WARMUP_POWER = 1.0, 2 / 3  # ModelEmaV3's


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
        return unroll([decay] * (n - 1))
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
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    if any(gap <= 0 for gap in gaps):
        raise UsageError("`per_step` needs steps that increase from file to file; see them with `dry_run`.")
    return unroll([decay**gap for gap in gaps])


def ema_warmup(
    n: int,
    *,
    decay: float,
    warmup: str,
    gamma: float = _WARMUP_GAMMA,
    power: float = _WARMUP_POWER,
    min_decay: float = 0.0,
    update_after: int = 0,
) -> tuple[float, ...]:
    """Weigh as an exponential moving average whose decay grows; file i is update number i - 1.

    Args:
        warmup: ``litema``: min(d, (1 + n) / (10 + n)), n = 1, 2, ..., as LitEma counts num_updates;
            ``timm``: 1 - (1 + s / gamma)^-power between min_decay and d, with s = n - update_after - 1, and 0 while
            s <= 0, as ModelEmaV3 with use_warmup.
        gamma, power, min_decay, update_after: of ``timm``.

    Raises:
        UsageError: decay outside [0, 1], or an unknown warm-up.
    """
    _check_decay(decay)
    if warmup == "litema":
        return unroll([min(decay, (1 + update) / (10 + update)) for update in range(1, n)])
    if warmup != "timm":
        raise unknown_word("warmup", warmup, WARMUPS)
    past = [update - update_after - 1 for update in range(1, n)]
    return unroll([max(min(1 - (1 + s / gamma) ** -power, decay), min_decay) if s > 0 else 0.0 for s in past])


WARMUPS = ("litema", "timm")


def ema_half_life(steps: Sequence[int] | None, n: int, *, half_life: Span, bias_correction: bool) -> tuple[float, ...]:
    """Weigh as an exponential moving average in which a checkpoint counts half as much after a half-life.

    Args:
        steps: of the n checkpoints, increasing; None to count files.
        half_life: h in d = 2^(-1/h), in steps or files, or a part of the run, such as ``5%``: of the last step, or of
            the number of files.
        bias_correction: as for `ema`; for files alone.

    Raises:
        UsageError: not a length, or bias correction along steps.
    """
    length = parse_span("half_life", half_life)
    if steps is None:
        return ema(n, decay=2 ** (-1 / length.of(n)), bias_correction=bias_correction)
    if bias_correction:
        raise UsageError("`bias_correction` counts files: add `by='files'`, or leave it out.")
    run = length.of(steps[-1])
    if run <= 0:
        raise UsageError(f"`half_life={half_life!r}` is a part of a run of {steps[-1]} steps. Give a number of steps.")
    return unroll([2 ** (-(later - earlier) / run) for earlier, later in pairwise(steps)])


def fitting_decay(weigh: Callable[[float], Sequence[float]], steps: Sequence[float]) -> float:
    """Choose the decay with which the average is as old as a third of the series.

    The age of an average is the mean distance of the checkpoints to the last, weighed by their coefficients. It grows
    with the decay.

    Args:
        weigh: from a decay to coefficients.
        steps: positions of the checkpoints, oldest first.

    Returns:
        To four digits behind the point, or of its distance to 1 if that is less than 0.001; the largest decay that is
        not older if none is as old.
    """
    wanted = (steps[-1] - steps[0]) / 3

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _age(weigh(middle), steps) < wanted else (low, middle)
    digits = max(4, 3 - math.floor(math.log10(1 - low))) if low < 1 else 4
    return min(round(low, digits), 1 - 10.0**-digits)


def _age(coefficients: Sequence[float], steps: Sequence[float]) -> float:
    return math.fsum(c * (steps[-1] - at) for c, at in zip(coefficients, steps, strict=True))


def unroll(decays: Sequence[float]) -> tuple[float, ...]:
    """Turn the decays of updates 2..N into the coefficients of checkpoints 1..N."""
    coefficients = []
    kept = 1.0  # product of the decays of all later updates
    for decay in reversed(decays):
        coefficients.append((1.0 - decay) * kept)
        kept *= decay
    return (kept, *reversed(coefficients))


def _check_decay(decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise UsageError(f"a decay of {decay} is outside [0, 1]. Choose one such as 0.99.")


def _ema(
    steps: Sequence[int | None],
    *,
    decay: float,
    half_life: Span | None,
    per_step: bool,
    by: str,
    warmup: str | None,
    warmup_gamma: float,
    warmup_power: float,
    min_decay: float,
    update_after: int,
    bias_correction: bool,
) -> tuple[float, ...]:
    if half_life is not None:
        at = positions(steps, by, needed="half_life")
        return ema_half_life(at, len(steps), half_life=half_life, bias_correction=bias_correction)
    if per_step or by == "steps":
        known = positions(steps, "steps") if by == "steps" else [step for step in steps if step is not None]
        if known is None or len(known) < len(steps):
            raise UsageError("`per_step`: a checkpoint has no step, neither inside nor in its name; see `dry_run`.")
        return ema_per_step(known, decay=decay)
    if warmup is not None:
        return ema_warmup(
            len(steps), decay=decay, warmup=warmup, gamma=warmup_gamma, power=warmup_power, min_decay=min_decay,
            update_after=update_after,
        )  # fmt: skip
    return ema(len(steps), decay=decay, bias_correction=bias_correction)


def _fitted(steps: Sequence[int | None], **options: Any) -> dict[str, Any]:
    """Choose a decay where none is given."""
    if options["decay"] is not None or options["half_life"] is not None:
        return {}
    at = _places(steps, **options)
    return {"decay": fitting_decay(lambda decay: _ema(steps, **options | {"decay": decay}), at)}


def _places(steps: Sequence[int | None], *, per_step: bool, by: str, **_: Any) -> Sequence[int]:
    """Return where the checkpoints are: at steps if these count, else at the numbers from 0 on."""
    known = [step for step in steps if step is not None]
    return known if (per_step or by == "steps") and len(known) == len(steps) else range(len(steps))


def _remarks(steps: Sequence[int | None], **options: Any) -> list[str]:
    found = _fitted(steps, **options)
    if not found or len(steps) == 1:
        return []
    at = _places(steps, **options)
    reached = _age(_ema(steps, **options | found), at) > 0.95 * (at[-1] - at[0]) / 3
    what = "the average is as old as a third of them" if reached else "no decay makes the average as old as a third"
    return [f"`decay={found['decay']}`, which fits {len(steps)} checkpoints: {what}."]


def _along(steps: Sequence[int | None], **options: Any) -> str | None:
    if options["half_life"] is not None:
        return None if options["by"] == "files" else "half_life"
    return "per_step" if options["per_step"] else "by" if options["by"] == "steps" else None


def _advice(*, half_life: Span | None, per_step: bool, by: str, warmup: str | None, **options: Any) -> tuple[str, str]:
    """Return how to spread an average, without options that are on, or that cannot go with these."""
    number = "decay" if half_life is None else "half_life"
    alone = half_life is None and by == "auto" and not (per_step or warmup or options["bias_correction"])
    others = ", or use `per_step` or `bias_correction`" if alone else ""
    if options["decay"] is not None:
        fitting = "To spread it, use `mode='ema'` without `decay`, which then fits the series"
        return f"{fitting}{others}.", f"{fitting}."
    return f"To spread it, use a smaller `{number}`{others}.", f"To spread it, use a larger `{number}`."


def _check(**options: Any) -> None:
    """Check the options before any file is read."""
    check_axis(options["by"])
    chosen = [f"`{name}`" for name in ("per_step", "warmup", "bias_correction") if options[name]]
    if options["half_life"] is not None:
        chosen = ["`half_life`", *(f"`{name}`" for name in ("decay", "per_step", "warmup") if options[name])]
    elif options["by"] == "steps" and not options["per_step"]:
        chosen.insert(0, "`by='steps'`")
    elif options["by"] == "files" and options["per_step"]:
        chosen = ["`by='files'`", "`per_step`"]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} cannot go together.")
    if options["half_life"] is not None:
        parse_span("half_life", options["half_life"])
        return
    if options["warmup"] is not None and options["warmup"] not in WARMUPS:
        raise unknown_word("warmup", options["warmup"], WARMUPS)
    if options["warmup"] != "timm":
        own = next((option.name for option in _OF_TIMM if options[option.name] != option.default), None)
        if own is not None:
            raise UsageError(f"`{own}` goes with `warmup='timm'`.")
    if not (options["warmup_gamma"] > 0 and options["warmup_power"] > 0 and 0 <= options["min_decay"] <= 1):
        raise UsageError("`warmup_gamma` and `warmup_power` are above 0, and `min_decay` is between 0 and 1.")
    if options["update_after"] < 0:
        raise UsageError(f"`update_after={options['update_after']}`: must be 0 or more.")
    if options["decay"] is not None:
        _ema((0, 1), **options)  # the shortest series finds an invalid decay


_OF_TIMM = (
    Option("warmup_gamma", float, _WARMUP_GAMMA, "timm: gamma in 1 - (1 + s / gamma)^-power."),
    Option("warmup_power", float, _WARMUP_POWER, "timm: power in it; 2/3 as in ModelEmaV3.", "2/3"),
    Option("min_decay", float, 0.0, "timm: the smallest decay."),
    Option("update_after", int, 0, "timm: updates that copy the weights before the average begins.", metavar="N"),
)

RULE = Rule(
    _ema,
    (
        Option(
            "decay", float, None, "EMA decay per checkpoint (per training step with `per_step`).",
            "such that the average is as old as a third of the series",
        ),
        Option("half_life", Span, None, "ema: in steps (or files, `by='files'`), or 5% of the run.", metavar="SPAN"),
        Option("per_step", bool, False, "ema: the decay between two checkpoints is decay^(step gap)."),
        BY,
        Option("warmup", one_of(WARMUPS), None, f"ema: {' or '.join(WARMUPS)}; the decay grows."),
        *_OF_TIMM,
        Option("bias_correction", bool, False, "ema: start from zero, divide by 1 - decay^N."),
    ),
    check=_check,
    advice=_advice,
    fitted=_fitted,
    remarks=_remarks,
    along=_along,
)  # fmt: skip
