"""The report of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..provenance import Origin
from ..reports import Report
from ..sweep.verdict import Comparison


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A checkpoint and its scores.

    Attributes:
        path: of the file or folder.
        name: a short name, distinct among those that are scored.
        origin: what it was made of, by its record.
        what: the same in words, such as ``average of 5, recalibrated``.
        step: training step or epoch; None if unknown, and for an average.
        metrics: name to value; empty if the evaluation failed.
        low, high: 95 % interval of the metric that decides, over the samples; None without values of samples.
        against: an average compared with the best single checkpoint by the metric that decides; else None.
        error: why it has no score.
        seconds: that the evaluation took.
    """

    path: str
    name: str
    origin: Origin
    what: str
    step: int | None
    metrics: Mapping[str, float]
    low: float | None = None
    high: float | None = None
    against: Comparison | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def is_average(self) -> bool:
        """True if ckpt averaged it."""
        return self.origin.averaged is not None


@dataclass(frozen=True, slots=True, repr=False)
class EvaluationReport(Report):
    """What checkpoints score; the plan before the work, and the result after it.

    Attributes:
        checkpoints: best first, then those without a score; before the work in the order given.
        metric: that decides; None before the work.
        lower_is_better: of it.
        best: name of the best.
        best_single, best_average: names of the best of each kind; None where there is none.
        compared_with: name of the checkpoint that the best is compared with.
        comparisons: of these two, metric by metric.
        samples: number of samples; None if it is not known.
        verdict: which is the best, and whether the difference is more than chance, in words.
        notes: decisions and warnings, in words.
        logs: folder of what the evaluations printed, kept if one failed; else None.
    """

    checkpoints: tuple[Evaluated, ...]
    notes: tuple[str, ...] = ()
    metric: str | None = None
    lower_is_better: bool | None = None
    best: str | None = None
    best_single: str | None = None
    best_average: str | None = None
    compared_with: str | None = None
    comparisons: tuple[Comparison, ...] = ()
    samples: int | None = None
    verdict: str = ""
    logs: str | None = None

    @property
    def failed(self) -> tuple[Evaluated, ...]:
        """Those without a score, after the work."""
        return tuple(each for each in self.checkpoints if each.error is not None)
