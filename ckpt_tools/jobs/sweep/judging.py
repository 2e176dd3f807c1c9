"""Judging: from scores to a ranking, a comparison with the last checkpoint, and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import CkptError
from ...evaluation.evaluators import Scores
from ...series.candidates import Candidate, Combinations, number_of
from ...series.find import Series
from ...series.member import Member
from ...storage.hidden import remove
from .aim import Aim
from .evaluation import Evaluators
from .grid import Grid
from .making import Maker
from .options import Honesty, SweptOutput
from .report import Ranked, SweepReport
from .results import Result
from .scoring import Scoring
from .verdict import Comparison, compared, in_words, intervals, split_samples, worse_metrics

EDGE_MIN_VALUES = 3
"""Values of an option from which on the best one at an end is told."""


def planned(
    series: Series,
    found: Combinations,
    maker: Maker,
    grid: Grid,
    output: SweptOutput,
    paths: Sequence[str],
    notes: Sequence[str],
) -> SweepReport:
    read, written = maker.bytes_moved(found.candidates)
    further, further_read, further_written = grid.further(maker)
    names = dict(zip(maker.members, grid.names, strict=True))
    return SweepReport(
        checkpoints=tuple(grid.names),
        steps=tuple(member.step for member in series.members),
        ordered_by=series.ordered_by,
        candidates=tuple(_ranked(each, names, None, None) for each in found.candidates),
        refused=found.refused,
        metric=None,
        lower_is_better=None,
        best=None,
        best_single=None,
        last=grid.names[-1],
        verdict="",
        against_last=(),
        other_data=False,
        paths=tuple(paths),
        options={},
        recalibrated=False,
        evaluations=len(found.candidates) + further,
        reused=0,
        bytes_read=read + further_read,
        bytes_written=written + further_written,
        notes=tuple(dict.fromkeys([*series.notes, *maker.lined_up.notes, *found.notes, *notes])),
        results=str(Path(output.scratch) / "results.jsonl"),
        out=None if output.out is None else str(output.out),
        skipped=series.skipped,
    )


def _ranked(
    candidate: Candidate,
    names: Mapping[Member, str],
    result: Result | None,
    file: Path | None,
    interval: tuple[float | None, float | None] = (None, None),
) -> Ranked:
    return Ranked(
        label=candidate.label,
        same=candidate.same,
        options=candidate.options,
        checkpoints=tuple(names[member] for member in candidate.members),
        coefficients=candidate.coefficients,
        kind=candidate.kind,
        metrics={} if result is None else result.metrics,
        same_options=candidate.same_options,
        low=interval[0],
        high=interval[1],
        error=None if result is None else result.error,
        seconds=0.0 if result is None else result.seconds,
        file=None if file is None or not file.exists() else str(file),
    )


def judged(
    plan: SweepReport,
    scoring: Scoring,
    evaluators: Evaluators,
    maker: Maker,
    honesty: Honesty,
    seed: int,
    notes: Sequence[str],
    shared: Mapping[str, Any],
) -> SweepReport:
    """Rank the candidates, and compare the best with the last checkpoint, on other data if there are any."""
    ranking = scoring.ranking()
    aim = scoring.chosen
    best = ranking[0]
    singles = [each for each in ranking if len(each.members) == 1]
    last = next(each for each in scoring.found if each.members == maker.members[-1:])
    other_data = evaluators.test is not None or honesty.holdout is not None
    comparisons: list[Comparison] = []
    failure = ""
    try:
        scores = {each: _report_scores(each, scoring, evaluators, maker) for each in dict.fromkeys([best, last])}
        if best is not last:
            comparisons = compared(scores[best], scores[last], seed=seed)
    except CkptError as error:  # the ranking is worth its evaluations without it
        failure = str(error)
    failed = [each for each in scoring.found if scoring.found[each].error is not None]
    order = [*ranking, *failed]
    names = dict(zip(maker.members, plan.checkpoints, strict=True))
    sampled = [each for each in ranking if scoring.found[each].samples]
    chosen_on = {each: scoring.selection(Scores({}, scoring.found[each].samples)).samples for each in sampled}
    around = intervals({each: samples[aim.metric] for each, samples in chosen_on.items()}, seed=seed)
    return replace(
        plan,
        candidates=tuple(
            _ranked(each, names, scoring.found[each], scoring.path(each), around.get(each, (None, None)))
            for each in order
        ),
        metric=aim.metric,
        lower_is_better=aim.lower,
        best=best.label,
        best_single=singles[0].label if singles else None,
        last=last.label,
        verdict=_verdict(comparisons, aim, last.label, other_data=other_data, error=scoring.found[last].error)
        if not failure
        else f"The best is not compared with the last checkpoint ({last.label}): {failure}",
        failure=failure,
        against_last=tuple(comparisons),
        other_data=other_data,
        paths=plan.paths if best.options else tuple(str(member.path) for member in best.members),
        options={**best.options, **shared} if best.options else shared,
        recalibrated=evaluators.recalibrates,
        evaluations=len(scoring.found) - scoring.reused,
        reused=scoring.reused,
        notes=tuple(
            dict.fromkeys([*plan.notes, *evaluators.notes, *notes, *_warnings(scoring, best, failed, comparisons)])
        ),
    )


def _report_scores(candidate: Candidate, scoring: Scoring, evaluators: Evaluators, maker: Maker) -> Scores:
    """Score a candidate on the data of the report; on those of the choice if there are no others."""
    result = scoring.found[candidate]
    if result.error is not None:
        return Scores({})
    if evaluators.test is None:
        scores = scoring.samples(candidate)
        return scores if scoring.holdout is None else split_samples(scores, *scoring.holdout, held_out=True)
    key = scoring.key_by(evaluators.test.identity, candidate)
    known = scoring.results.get(key)
    if known is None:
        try:
            with file_of(candidate, scoring, maker) as path:
                found = evaluators.test.score(path, scoring.log(candidate, "test"))
        except CkptError as error:
            raise type(error)(
                f"`test` of {candidate.label}: {error} All scores are kept in {scoring.results.path}, and the same "
                "sweep goes on from there."
            ) from error
        known = replace(result, key=key, metrics=found.metrics, samples=found.samples)
        scoring.results.add(known)
    return Scores(known.metrics, known.samples)


@contextmanager
def file_of(candidate: Candidate, scoring: Scoring, maker: Maker) -> Iterator[Path]:
    """Give the file of a candidate, made for the while if it was not kept."""
    path = scoring.path(candidate)
    kept = path.exists()
    if not kept:
        maker.make([candidate], [path])
    try:
        yield path
    finally:
        if not kept:
            remove(path)


def _verdict(comparisons: Sequence[Comparison], aim: Aim, last: str, *, other_data: bool, error: str | None) -> str:
    if error is not None:
        return f"The last checkpoint ({last}) could not be scored, so there is nothing to compare the best with."
    if not comparisons:
        return f"The last checkpoint ({last}) is the best: none of these averages is better."
    found = next((each for each in comparisons if each.metric == aim.metric), None)
    if found is None:
        return f"The evaluation on other data gives no '{aim.metric}', so there is nothing to compare."
    said = in_words(found, lower_is_better=aim.lower, other=f"the last checkpoint ({last})")
    if other_data:
        return said
    return f"{said} The best was chosen on the same data, which flatters it: give other data with `test`, or `holdout`."


def _warnings(
    scoring: Scoring, best: Candidate, failed: Sequence[Candidate], comparisons: Sequence[Comparison]
) -> Iterator[str]:
    if failed:
        first = scoring.found[failed[0]]
        others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        yield f"Not scored: {first.label} ({first.error}){others}."
    if scoring.results.torn:
        yield f"{scoring.results.path}: {scoring.results.torn} lines were cut off, as by a kill, and are passed over."
    tried = [options for each in scoring.found for options in (each.options, *each.same_options)]
    for name, value in best.options.items():
        found = [number_of(each[name]) for each in tried if name in each]
        numbers = sorted({each for each in found if each is not None})
        if None in found or len({share for _, share in numbers}) > 1 or len(numbers) < EDGE_MIN_VALUES:
            continue
        if number_of(value) in (numbers[0], numbers[-1]):
            end = "lowest" if number_of(value) == numbers[0] else "highest"
            yield f"{name}={value} is the {end} value that was tried: the best one may lie beyond it."
    worse = [*worse_metrics({each.metric: each for each in comparisons}, scoring.chosen)]
    if worse:
        yield f"Other metrics are worse than those of the last checkpoint: {', '.join(worse)}."
