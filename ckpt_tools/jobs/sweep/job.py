"""The sweep: candidates, scores, ranking, verdict, and the best one written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.ema_updates import stored_updates
from ...checkpoints.open import Checkpoint
from ...compute.threads import check_threads
from ...errors import AlignmentError, CkptError, SeriesError, UsageError
from ...evaluation.evaluators import Scores
from ...series.candidates import Candidate, candidates
from ...series.find import Series, find_series
from ...series.member import Member
from ...series.rules.amounts import parse_span
from ...series.schedules import Schedule
from ...series.search import LOG, SCALES, Optimum, golden_section
from ...series.soup import Soup, greedy
from ...storage.journal import alone_in
from ...storage.staged import remove
from ...tensors import parse_dtype
from ..lined_up import selected
from ..options import Matching, Network, Options, takes
from ..outputs import Target, check_target
from ..provenance import short_names
from ..reports import Report
from ..run import write
from .bench import Aim, Bench
from .evaluation import Opened, opened
from .files import Files
from .making import Maker
from .options import (
    Evaluation,
    Honesty,
    Order,
    Rules,
    Searching,
    Selections,
    Sweeping,
    SweptImages,
    SweptOutput,
    check,
)
from .page import Background
from .results import Result, Results
from .running_sum import RunningSum
from .verdict import Comparison, apart, compared, fallen, in_words, intervals

if TYPE_CHECKING:
    from ...batchnorm.report import BatchNormReport
    from ..look import LookReport

SEARCHED = ("decay", "half_life", "sigma_rel", "gamma", "warmup_gamma", "warmup_power", "min_decay")
"""Options that can be searched."""
EDGE = 3
"""Values of an option from which on the best one at an end is told."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate and its place.

    Attributes:
        label: what tells it from the others.
        same: labels of candidates that are the same average.
        same_options: their options.
        options: of `average`, by which it is made from the same paths; empty for a checkpoint alone, and for a soup.
        checkpoints, coefficients: which, and how much each counts.
        single: a checkpoint alone.
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
    single: bool
    metrics: Mapping[str, float]
    same_options: tuple[Mapping[str, Any], ...] = ()
    low: float | None = None
    high: float | None = None
    error: str | None = None
    seconds: float = 0.0
    file: str | None = None


@dataclass(frozen=True, slots=True)
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
        other_data: the comparisons are on data that had no part in the choice.
        paths: of the best one, for `average`.
        options: of `average`, that make the best one.
        recalibration: options of `recalibrate_checkpoint` for it, if its statistics were measured before its score.
        recalibrated: BatchNorm statistics were measured before every score.
        evaluations: to be made; after the work, that were made.
        reused: results known from before.
        bytes_read, bytes_written: to make the candidates.
        notes: decisions and warnings, in words.
        results: file of all results.
        out: the target; None if none was asked for.
        written: False for a plan.
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
    recalibration: Mapping[str, Any]
    recalibrated: bool
    evaluations: int
    reused: int
    bytes_read: int
    bytes_written: int
    notes: tuple[str, ...]
    results: str
    out: str | None
    written: bool = False


@takes(Rules, Selections, Searching, Order, Matching, Evaluation, Honesty, Network, SweptImages, SweptOutput, Sweeping)
def sweep(
    paths: str | Path | Iterable[str | Path],
    rules: Rules,
    selections: Selections,
    searching: Searching,
    order: Order,
    matching: Matching,
    evaluation: Evaluation,
    honesty: Honesty,
    which: Network,
    images: SweptImages,
    output: SweptOutput,
    running: Sweeping,
) -> SweepReport:
    """Average a series in many ways, score each average, and choose the best.

    The candidates are all combinations of the values that are given, and each checkpoint alone. The inputs are read
    once for several of them. Each result is kept in `scratch`, so that a sweep that was stopped goes on.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones).
        {options}

    Returns:
        The ranking, and whether the best is better than the last checkpoint.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`. A candidate that cannot be made or scored is none: the
            others go on, and the report says why.
    """
    check(evaluation, honesty, output, searching)
    if matching.lora == "product":
        raise UsageError("`lora='product'` does not go with a sweep. Merge each adapter into its model first.")
    check_threads(running.threads)
    dtype = parse_dtype(output.dtype)
    given = [paths] if isinstance(paths, (str, Path)) else [*paths]
    series = find_series(given, order=order.order, include_outputs=order.include_outputs)
    if len(series.members) < 2:
        raise SeriesError(f"{series.members[0].path} is one checkpoint alone. Give a series of two or more.")
    target = None if output.out is None else Target.of(output.out)
    if target is not None:
        check_target(target.path, series.given, nbytes=0, force=output.force, names=None)
    files = Files.of(output, series.given)
    maker = Maker.of(series.members, short_names([each.path for each in series.members]), matching, dtype, running)
    _refuse_other_names(maker)
    grid = _Grid(series, rules, selections, searching, order, matching, evaluation)
    found, refused = grid.candidates()
    paths_of = [str(path) for path in given]
    plan = _planned(series, found, refused, maker, grid, output, paths_of, files.notes)
    if running.on_plan is not None:
        running.on_plan(plan)
    if running.dry_run:
        return plan
    folder = Path(output.scratch)
    show = running.on_progress or (lambda *_: None)
    example = Checkpoint(series.members[-1].header, state_of(matching))
    made = {**given_of(matching), **({} if dtype is None else {"dtype": dtype.name})}
    with alone_in(folder), opened(evaluation, honesty, which, images, running, example, show) as scoring:
        bench = Bench(
            make=lambda some, places: maker.make(some, places, lambda done, total: show("averaging", done, total)),
            nbytes=plan.bytes_written // max(plan.evaluations, 1),
            suffix=maker.suffix,
            made={name: repr(value) for name, value in made.items()},
            evaluator=scoring.evaluator,
            usual=scoring.usual,
            results=Results(folder),
            folder=folder,
            keep=output.keep,
            asked=evaluation.metric,
            lower=evaluation.lower_is_better,
            holdout=None if honesty.holdout is None else (honesty.holdout, images.seed),
            jobs=evaluation.jobs,
            on_result=running.on_result,
        )
        geometry = _measured(given, order, matching, running.threads)
        bench.scores(found)
        notes = [*grid.search(bench), *grid.soup(bench, maker)]
        notes += () if isinstance(geometry, str) else geometry.warnings
        shared = {**made, **given_of(order)}
        shared.pop("metrics", None)  # of `best`, and among the options of its candidates
        how = {name: value for name, value in given_of(running).items() if name in ("device", "amp", "channels_last")}
        recalibration = {**given_of(which, images), **how} if scoring.recalibrates else {}
        report = _judged(plan, bench, scoring, maker, honesty, images.seed, notes, shared, recalibration)
        if target is not None:
            _write_best(report, bench, maker, scoring, target, which, images, output, running, series)
            report = replace(report, written=True)
        files.write(report, lambda: _background(bench, maker, scoring, geometry), running.on_words)
    return report


def _refuse_other_names(maker: Maker) -> None:
    """Refuse a series in which names differ: which names an average has would depend on the checkpoints in it."""
    aligned = maker.lined_up.aligned
    name = next(iter([*maker.lined_up.left_out, *(name for name, each in aligned.items() if None in each)]), None)
    if name is not None:
        raise AlignmentError(
            f"only some checkpoints of the series have '{name}', so its averages would have different tensors, and "
            f"`keys={maker.matching.keys!r}` does not go with a sweep. Give only checkpoints that have the same names."
        )


def given_of(*groups: Options) -> dict[str, Any]:
    """Return the options that are not at their defaults."""
    return {
        option.name: vars(group)[option.name]
        for group in groups
        for option in group.options()
        if vars(group)[option.name] not in (option.default, [option.default])
    }


def state_of(matching: Matching) -> str:
    """Return the set of weights that is asked for, as one name; several are asked for by path alone."""
    return matching.state if isinstance(matching.state, str) else next(iter(matching.state), "auto")


class _Grid:
    """The candidates that the options mean: all combinations, then those that depend on scores."""

    def __init__(
        self,
        series: Series,
        rules: Rules,
        selections: Selections,
        searching: Searching,
        order: Order,
        matching: Matching,
        evaluation: Evaluation,
    ) -> None:
        self._series, self._matching, self._searching = series, matching, searching
        self._rules, self._selections = rules.values, selections.values
        self._fixed: dict[str, Any] = {
            "metrics": None if order.metrics is None else str(order.metrics),
            "lower_is_better": evaluation.lower_is_better,
        }
        if evaluation.metric is not None:
            self._fixed["metric"] = evaluation.metric
        self.names = short_names([member.path for member in series.members])
        self._range: tuple[float, float] | None = None
        self._searched = None if searching.search is None else searching.search.replace("-", "_")
        if self._searched is not None:
            self._range = self._bounds(self._searched)

    @property
    def further(self) -> int:
        """Evaluations of candidates that depend on scores, at most."""
        searched = 0 if self._range is None else self._searching.evaluations
        return searched + (len(self._series.members) - 1 if self._searching.greedy else 0)

    def candidates(self) -> tuple[list[Candidate], dict[str, str]]:
        """Return the combinations that do not depend on scores, and why others cannot be made."""
        rules = {name: each for name, each in self._rules.items() if name != self._searched}
        if self._range is not None and not rules and not self._selections:
            rules = {"mode": ["uniform"]}
        return self._made(rules, self._selections)

    def search(self, bench: Bench) -> Iterator[str]:
        """Search for the best value of one option, and say what was found."""
        name = self._searched
        if name is None or self._range is None:
            return
        rules = {other: each for other, each in self._rules.items() if other != name}
        search = golden_section(*self._range, evaluations=self._searching.evaluations, scale=SCALES.get(name, LOG))
        asked = next(search)
        while True:
            made = []
            for value in asked:
                # As many digits as a person would type, so that the command that is shown is the same average.
                short = float(f"{value:.4g}") if name != "decay" else 1 - float(f"{1 - value:.3g}")
                short = round(short, 12)
                found, refused = self._made({**rules, name: [short]}, self._selections)
                if refused:
                    raise UsageError(f"`search={name!r}` at {short:g}: {next(iter(refused.values()))}")
                own = replace(found[0], label=f"{name}={short:g}")
                made.append(own)
            results = bench.scores(made)
            aim = bench.aim
            try:
                asked = search.send([float("nan") if aim is None else aim.score(each) for each in results])
            except StopIteration as stop:
                yield from _of_optimum(name, stop.value)
                return

    def soup(self, bench: Bench, maker: Maker) -> Iterator[str]:
        """Make the greedy soup, and say what is in it."""
        if not self._searching.greedy or bench.aim is None:
            return
        aim = bench.aim
        members = self._series.members
        alone = {each.members[0]: each for each in bench.found if len(each.members) == 1}
        search = greedy([aim.score(bench.found[alone[member]]) for member in members])
        running = RunningSum(maker, bench.folder / "sum.safetensors") if maker.complete else None
        soup: Soup = ()
        try:
            asked = next(search)
            while True:
                if running is not None and asked[:-1] != soup:
                    # The last one stays: asked differs from the soup before by one that was added, and one more.
                    running.start(members[asked[0]]) if not soup else running.add(members[asked[-2]])
                soup = asked[:-1]
                made = bench.make if running is None else running.make
                (result,) = bench.scores([self._uniform(asked)], made)
                asked = search.send(aim.score(result))
        except StopIteration as stop:
            soup = stop.value
        finally:
            if running is not None:
                running.end()
        yield f"Greedy soup: {', '.join(self.names[i] for i in soup)}."

    def _uniform(self, soup: Soup) -> Candidate:
        members = [self._series.members[i] for i in sorted(soup)]
        label = "greedy " + "+".join(self.names[i] for i in soup)
        steps = [member.step for member in members]
        coefficients = Schedule("uniform").coefficients(steps)
        return Candidate(label, {}, Schedule("uniform"), tuple(members), steps, coefficients)

    def _made(self, rules: Mapping[str, Any], selections: Mapping[str, Any]) -> tuple[list[Candidate], dict[str, str]]:
        fixed = {name: value for name, value in self._fixed.items() if value is not None}
        return candidates(self._series.members, self.names, rules, selections, self._numbers, **fixed)

    def _numbers(self, schedule: Schedule, members: Sequence[Member]) -> Sequence[Any]:
        if schedule.rule.needs == "step":
            return [member.step for member in members]
        states = selected(members, short_names([member.path for member in members]), self._matching)
        return [stored_updates(member.header, state) for member, state in zip(members, states, strict=True)]

    def _bounds(self, name: str) -> tuple[float, float]:
        """Return the ends of a search.

        Raises:
            UsageError: there are none, or other options have several values.
        """
        if name not in SEARCHED:
            raise UsageError(f"`search={name!r}`: one of {', '.join(SEARCHED)}.")
        given = [_number(name, each) for each in self._rules.get(name, ())]
        n = len(self._series.members)
        usual = {"decay": (0.3, 1 - 1 / (2 * n)), "sigma_rel": (0.01, 0.28)}.get(name)
        others = [
            other
            for each in (self._rules, self._selections)
            for other, values in each.items()
            if other != name and len(values) > 1
        ]
        if others:
            raise UsageError(f"`search={name!r}` takes one value of every other option, and `{others[0]}` has several.")
        if not given and usual is not None:
            return usual
        if len(given) != 2:
            raise UsageError(
                f"`search={name!r}` needs two numbers, the ends of the search: `{name}` with one value below and one "
                "above what may be best, and a comma between them."
            )
        return given[0], given[1]


def _number(name: str, value: Any) -> float:
    """Return an end of a search, which may be a number of steps such as 20k."""
    if isinstance(value, str):
        amount = parse_span(name, value)
        if amount.share:
            raise UsageError(f"`{name}={value!r}`: the ends of a search are numbers of steps, not parts of the run.")
        return amount.value
    return float(value)


def _of_optimum(name: str, found: Optimum) -> Iterator[str]:
    yield (
        f"Search of {name}: {found.value:.4g} is best, between {found.bracket[0]:.4g} and {found.bracket[1]:.4g} if "
        "there is one optimum."
    )
    if found.at_edge:
        yield f"It is at the edge of the search: look beyond it, with other ends of {name}."
    if not found.unimodal:
        yield (
            f"The metric goes up and down more than once over {name}, so there may be better values elsewhere. Give a "
            "range of values in place of a search."
        )


def _planned(
    series: Series,
    found: Sequence[Candidate],
    refused: Mapping[str, str],
    maker: Maker,
    grid: _Grid,
    output: SweptOutput,
    paths: Sequence[str],
    notes: Sequence[str],
) -> SweepReport:
    read, written = maker.bytes_moved(found)
    names = dict(zip(maker.members, grid.names, strict=True))
    return SweepReport(
        checkpoints=tuple(grid.names),
        steps=tuple(member.step for member in series.members),
        ordered_by=series.ordered_by,
        candidates=tuple(_ranked(each, names, None, None) for each in found),
        refused=refused,
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
        recalibration={},
        recalibrated=False,
        evaluations=len(found) + grid.further,
        reused=0,
        bytes_read=read,
        bytes_written=written,
        notes=tuple(dict.fromkeys([*series.notes, *maker.lined_up.notes, *notes])),
        results=str(Path(output.scratch) / "results.jsonl"),
        out=None if output.out is None else str(output.out),
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
        single=len(candidate.members) == 1,
        metrics={} if result is None else result.metrics,
        same_options=candidate.same_options,
        low=interval[0],
        high=interval[1],
        error=None if result is None else result.error,
        seconds=0.0 if result is None else result.seconds,
        file=None if file is None or not file.exists() else str(file),
    )


def _judged(
    plan: SweepReport,
    bench: Bench,
    scoring: Opened,
    maker: Maker,
    honesty: Honesty,
    seed: int,
    notes: Sequence[str],
    shared: Mapping[str, Any],
    recalibration: Mapping[str, Any],
) -> SweepReport:
    """Rank the candidates, and compare the best with the last checkpoint, on other data if there are any."""
    ranking = bench.ranking()
    aim = bench.chosen
    best = ranking[0]
    singles = [each for each in ranking if len(each.members) == 1]
    last = next(each for each in bench.found if each.members == maker.members[-1:])
    scores = {each: _report_scores(each, bench, scoring, maker, honesty) for each in dict.fromkeys([best, last])}
    other_data = scoring.test is not None or honesty.holdout is not None
    comparisons = compared(scores[best], scores[last], seed=seed) if best is not last else []
    failed = [each for each in bench.found if bench.found[each].error is not None]
    order = [*ranking, *failed]
    names = dict(zip(maker.members, plan.checkpoints, strict=True))
    sampled = {each: bench.found[each].samples for each in ranking if bench.found[each].samples}
    chosen_on = {each: bench.selection(Scores({}, samples)).samples for each, samples in sampled.items()}
    around = intervals({each: by[aim.metric] for each, by in chosen_on.items() if aim.metric in by}, seed=seed)
    return replace(
        plan,
        candidates=tuple(
            _ranked(each, names, bench.found[each], bench.path(each), around.get(each, (None, None))) for each in order
        ),
        metric=aim.metric,
        lower_is_better=aim.lower,
        best=best.label,
        best_single=singles[0].label if singles else None,
        last=last.label,
        verdict=_verdict(comparisons, aim, last.label, other_data=other_data, error=bench.found[last].error),
        against_last=tuple(comparisons),
        other_data=other_data,
        paths=plan.paths if best.options else tuple(str(member.path) for member in best.members),
        options={**best.options, **shared} if best.options else shared,
        recalibration=recalibration,
        recalibrated=scoring.recalibrates,
        evaluations=len(bench.found) - bench.reused,
        reused=bench.reused,
        notes=tuple(dict.fromkeys([*plan.notes, *scoring.notes, *notes, *_warnings(bench, best, failed, comparisons)])),
    )


def _report_scores(candidate: Candidate, bench: Bench, scoring: Opened, maker: Maker, honesty: Honesty) -> Scores:
    """Score a candidate on the data of the report; on those of the choice if there are no others."""
    result = bench.found[candidate]
    if result.error is not None:
        return Scores({})
    if scoring.test is None:
        scores = Scores(result.metrics, result.samples)
        return scores if bench.holdout is None else apart(scores, *bench.holdout, held_out=True)
    key = bench.key_by(scoring.test.identity, candidate)
    known = bench.results.get(key)
    if known is None:
        try:
            with _file_of(candidate, bench, maker) as path:
                found = scoring.test.score(path, bench.log(candidate, "test"))
        except CkptError as error:
            raise type(error)(
                f"`test` of {candidate.label}: {error} All scores are kept in {bench.results.path}, and the same sweep "
                "goes on from there."
            ) from error
        known = replace(result, key=key, metrics=found.metrics, samples=found.samples)
        bench.results.add(known)
    return Scores(known.metrics, known.samples)


@contextmanager
def _file_of(candidate: Candidate, bench: Bench, maker: Maker) -> Iterator[Path]:
    """Give the file of a candidate, made for the while if it was not kept."""
    path = bench.path(candidate)
    kept = path.exists()
    if not kept:
        maker.make([candidate], [path])
    try:
        yield path
    finally:
        if not kept:
            remove(path)


def _measured(paths: Sequence[str | Path], order: Order, matching: Matching, threads: int | None) -> LookReport | str:
    """Measure the geometry of the series; return why, if that cannot be done."""
    from ..look import look

    try:
        return look(
            paths,
            order=order.order,
            include_outputs=order.include_outputs,
            state=matching.state,
            match=matching.match,
            keys=matching.keys,
            threads=threads,
        )
    except CkptError as error:  # a sweep without it is better than none
        return str(error)


def _background(bench: Bench, maker: Maker, scoring: Opened, geometry: LookReport | str) -> Background:
    """Gather what the page shows beyond the report, and measure the statistics of the best."""
    drift: BatchNormReport | str | None = None
    if scoring.measured is not None:
        try:
            with _file_of(bench.ranking()[0], bench, maker) as path:
                drift = scoring.measured(path)
        except CkptError as error:
            drift = str(error)
    test = None if scoring.test is None else scoring.test.identity
    return Background(scoring.evaluator.identity, test, bench.holdout, geometry, drift)


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
    bench: Bench, best: Candidate, failed: Sequence[Candidate], comparisons: Sequence[Comparison]
) -> Iterator[str]:
    if failed:
        first = bench.found[failed[0]]
        others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        yield f"Not scored: {first.label} ({first.error}){others}."
    if bench.results.torn:
        yield f"{bench.results.path}: {bench.results.torn} lines were cut off, as by a kill, and are passed over."
    for name, value in best.options.items():
        swept = dict.fromkeys(each.options[name] for each in bench.found if name in each.options)
        if not all(isinstance(each, (int, float)) for each in swept):
            continue
        if len(swept) >= EDGE and value in (min(swept), max(swept)):
            end = "lowest" if value == min(swept) else "highest"
            yield f"{name}={value:g} is the {end} value that was tried: the best one may lie beyond it."
    aim = bench.aim
    if aim is not None:
        worse = [*fallen({each.metric: each for each in comparisons}, aim.metric)]
        if worse:
            yield f"Other metrics are worse than those of the last checkpoint: {', '.join(worse)}."


def _write_best(
    report: SweepReport,
    bench: Bench,
    maker: Maker,
    scoring: Opened,
    target: Target,
    which: Network,
    images: SweptImages,
    output: SweptOutput,
    running: Sweeping,
    series: Series,
) -> None:
    """Write the best average with the evidence in its provenance, and with measured statistics if it was scored so."""
    best = bench.ranking()[0]
    evidence = {
        "sweep": {
            "candidates": len(bench.found),
            "metric": report.metric,
            "metrics": dict(bench.found[best].metrics),
            "evaluation": dict(scoring.evaluator.identity),
            "other_data": report.other_data,
            "against_last": [
                {name: getattr(each, name) for name in each.__dataclass_fields__} for each in report.against_last
            ],
            "verdict": report.verdict,
        }
    }
    place = target.path if not scoring.recalibrates else bench.path(best).with_name(f"best-{target.name}")
    (assembly,) = maker.planned([best], [place], evidence)
    write(
        assembly,
        maker.stamps,
        force=output.force or scoring.recalibrates,
        threads=running.threads,
        allow_nonfinite=running.allow_nonfinite,
    )
    if scoring.recalibrates:
        from ..recalibrate import recalibrate_checkpoint

        shown = {name: value for name, value in vars(images).items()}
        try:
            recalibrate_checkpoint(
                place,
                **vars(which),
                **shown,
                out=target.path,
                force=output.force,
                device=running.device,
                amp=running.amp,
                channels_last=running.channels_last,
            )
        finally:
            remove(place)
