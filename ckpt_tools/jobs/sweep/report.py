"""The report of a sweep: what it consists of, and what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...series.candidates import Kind
from ...series.usable import Skipped
from ..reports import Report
from .verdict import Comparison


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate and its place.

    Attributes:
        label: what tells it from the others.
        same: labels of candidates that are the same average.
        same_options: their options.
        options: of `average`, by which it is made from the same paths; empty for the other kinds.
        checkpoints, coefficients: which, and how much each counts.
        kind: an average by options, a checkpoint alone, or a soup.
        metrics: on the data by which candidates are chosen; empty before, and if the evaluation failed.
        low, high: 95 % interval of the metric that decides, over the samples; None without values of samples.
        error: why it has none.
        seconds: that the evaluation took.
        file: where it is kept; None if it is not.
    """

    label: str
    same: tuple[str, ...]
    options: Mapping[str, Any]
    checkpoints: tuple[str, ...]
    coefficients: tuple[float, ...]
    kind: Kind
    metrics: Mapping[str, float]
    same_options: tuple[Mapping[str, Any], ...] = ()
    low: float | None = None
    high: float | None = None
    error: str | None = None
    seconds: float = 0.0
    file: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class SweepReport(Report):
    """What a sweep consists of; the plan before the work, and the result after it.

    Attributes:
        checkpoints: names of the series, oldest first.
        steps: of each; None if unknown.
        ordered_by: what their order is taken from, in words.
        candidates: best first; before the work as they will be made.
        refused: combinations that cannot be made, with the reason.
        metric: that decides; None before the work.
        lower_is_better: of it.
        best, best_single, last: labels.
        verdict: whether the best is better than the last checkpoint, in words.
        against_last: comparisons on the data of the report, metric by metric.
        failure: why the best and the last checkpoint could not be compared, so that `out` is not written; else empty.
        other_data: the comparisons are on data that had no part in the choice.
        paths: of the best one, for `average`.
        options: of `average`, that make the best one; with `recal_bn` if its statistics were measured before its score.
        recalibrated: BatchNorm statistics were measured before every score.
        evaluations: to be made; after the work, that were made.
        reused: results known from before.
        bytes_read, bytes_written: to make the candidates.
        notes: decisions and warnings, in words.
        results: file of all results.
        out: the target; None if none was asked for.
        written: False for a plan.
        skipped: checkpoints that were left out, and why.
    """

    checkpoints: tuple[str, ...]
    steps: tuple[int | None, ...]
    ordered_by: str
    candidates: tuple[Ranked, ...]
    refused: Mapping[str, str]
    metric: str | None
    lower_is_better: bool | None
    best: str | None
    best_single: str | None
    last: str
    verdict: str
    against_last: tuple[Comparison, ...]
    other_data: bool
    paths: tuple[str, ...]
    options: Mapping[str, Any]
    recalibrated: bool
    evaluations: int
    reused: int
    bytes_read: int
    bytes_written: int
    notes: tuple[str, ...]
    results: str
    out: str | None
    failure: str = ""
    written: bool = False
    skipped: tuple[Skipped, ...] = ()
