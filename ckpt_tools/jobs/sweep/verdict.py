"""The verdict: whether the best average is better than the last checkpoint, on data that had no part in the choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import DataError
from ...evaluation.evaluators import Scores
from ...evaluation.significance import mcnemar, mean_intervals, paired_interval, share_interval
from ...series.metrics import lower_by_name
from .aim import Aim

CONFIDENCE = 0.95
MIN_SAMPLES = 6
"""Samples that differ, from which on a difference can be shown: all on one side, they have a chance of 2 ** -5."""
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints on one metric.

    Attributes:
        metric: its name.
        best, other: values of the two.
        difference: best - other.
        low, high: of its 95 % bootstrap interval over the samples; None without values of samples.
        p: of McNemar's exact test, where each sample is right or wrong; else None.
        samples: number of samples; None if it is not known.
        differing: number of those on which the two differ.
    """

    metric: str
    best: float
    other: float
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    samples: int | None = None
    differing: int = 0

    @property
    def shown(self) -> bool:
        """True if the interval excludes 0, the exact test agrees, and enough samples differ."""
        by_chance = self.p is not None and self.p >= 1 - CONFIDENCE
        excluded = self.low is not None and self.high is not None and not self.low <= 0 <= self.high
        return self.differing >= MIN_SAMPLES and excluded and not by_chance


def compared(best: Scores, other: Scores, *, seed: int) -> list[Comparison]:
    """Compare two checkpoints on all metrics that both have.

    Raises:
        DataError: they have values of different numbers of samples.
    """
    return [_compared(name, best, other, seed) for name in best.metrics if name in other.metrics]


def _compared(name: str, best: Scores, other: Scores, seed: int) -> Comparison:
    a, b = best.samples.get(name), other.samples.get(name)
    plain = Comparison(name, best.metrics[name], other.metrics[name], best.metrics[name] - other.metrics[name])
    if a is None or b is None:
        return plain
    interval = paired_interval(a, b, confidence=CONFIDENCE, seed=seed)
    right = _right(a, b)
    return Comparison(
        name,
        plain.best,
        plain.other,
        interval.difference,
        interval.low,
        interval.high,
        None if right is None else mcnemar(*right),
        len(a),
        int((a != b).sum()),
    )


def intervals(values: Mapping[Key, Tensor], *, seed: int) -> dict[Key, tuple[float, float]]:
    """Return the 95 % interval of each mean, by itself: that of a difference on the same samples is narrower.

    Where samples are right or wrong it is the score interval, else the bootstrap interval.
    """
    found: dict[Key, tuple[float, float]] = {}
    unit = _unit(*values.values()) if values else None
    if unit:
        for key, each in values.items():
            low, high = share_interval(each != 0, confidence=CONFIDENCE)
            found[key] = (unit * low, unit * high)
        return found
    for n in {len(each) for each in values.values()}:
        some = [key for key, each in values.items() if len(each) == n]
        own = mean_intervals(torch.stack([values[key] for key in some]), confidence=CONFIDENCE, seed=seed)
        found.update(zip(some, own, strict=True))
    return found


def _right(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return which samples each has right, if all values are right or wrong; else None."""
    return None if _unit(a, b) is None else (a != 0, b != 0)


def _unit(*values: Tensor) -> float | None:
    """Return the value of a right sample, 1 or 100, if all others are 0; 0 if all are, and None if some are others."""
    found = torch.unique(torch.cat(values))
    right = [each for each in found.tolist() if each] or [0.0]
    return right[0] if right in ([0.0], [1.0], [100.0]) else None


def split_samples(scores: Scores, part: float, seed: int, *, held_out: bool) -> Scores:
    """Return the scores on one of two parts of the samples; metrics without values of samples are left out.

    Args:
        part: of the samples that is held out.
        held_out: True for that part, False for the others.

    Raises:
        DataError: no metric has values of samples, or one part would be empty.
    """
    if not scores.samples:
        raise DataError(
            "`holdout` needs the values of each sample: the evaluation gives none. Print or return them as "
            "'per_sample', or give other data with `test`."
        )
    samples: dict[str, Tensor] = {}
    for name, values in scores.samples.items():
        n = len(values)
        count = round(part * n)
        if not 0 < count < n:
            raise DataError(f"`holdout={part}` of {n} samples leaves one of the two parts empty.")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        samples[name] = values[order[:count] if held_out else order[count:]]
    return Scores({name: float(values.mean()) for name, values in samples.items()}, samples)


def in_words(found: Comparison, *, lower_is_better: bool, other: str) -> str:
    """Say what a comparison shows."""
    by = f"{found.best:.6g} against {found.other:.6g}"
    if found.low is None or found.high is None:
        return f"{found.metric} is {by} of {other}. Without per-sample values no interval can be given."
    interval = f"95 % interval of the difference {found.low:+.4g} to {found.high:+.4g}"
    tested = "" if found.p is None else f", McNemar's exact test p = {found.p:.2g}"
    on = f"on {found.samples} samples ({interval}{tested})"
    if not found.shown:
        return f"No difference from {other} is shown: {found.metric} is {by} {on}."
    better = (found.difference < 0) == lower_is_better
    return f"{'Better' if better else 'Worse'} than {other}: {found.metric} is {by} {on}."


def worse_metrics(comparisons: Mapping[str, Comparison], aim: Aim) -> Iterator[str]:
    """Yield the other metrics that are worse although the one that decides is not; their names tell the direction."""

    def worse(name: str, *, lower_is_better: bool) -> bool:
        return name in comparisons and (comparisons[name].difference * (1 if lower_is_better else -1)) > 0

    if not worse(aim.metric, lower_is_better=aim.lower):
        yield from (
            name for name in comparisons if name != aim.metric and worse(name, lower_is_better=lower_by_name(name))
        )
