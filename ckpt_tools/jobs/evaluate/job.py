"""The evaluation: each checkpoint scored, the averages compared with the best single one."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ...checkpoints.open import Checkpoint
from ...compute.progress import Activity, Progress, counted
from ...errors import CkptError, DataError, UsageError
from ...evaluation.evaluators import Command, Evaluator, Function, Scores, scored_together
from ...series.find import find_series
from ...series.member import Member
from ...storage.source import LOCAL, store_of
from ...storage.staged import write_file
from ..classifiers import opened_classifiers
from ..option_groups import takes
from ..options import Network, Numerics, State, Statistics
from ..outputs import named
from ..provenance import origin_of, short_names
from ..sweep.aim import Aim, aim_of
from ..sweep.files import checked_file, encoded
from ..sweep.options import Evaluation, given_of
from ..sweep.verdict import Comparison, compared, in_words, intervals
from .options import GROUPS, EvaluatedImages, Evaluating, ScoreTable, Scoring
from .report import Evaluated, EvaluationReport

_EVALUATING = Activity("evaluating", "checkpoints")


@takes(*GROUPS)
def evaluate(
    paths: str | Path | Iterable[str | Path],
    scoring: Scoring,
    weights: State,
    which: Network,
    images: EvaluatedImages,
    output: ScoreTable,
    running: Evaluating,
) -> EvaluationReport:
    """Score checkpoints on the same data, and compare averages with the best single checkpoint.

    Averages are known by the record that ckpt-tools writes into them. One network, that of the first checkpoint, takes
    the weights of each. Copies of one checkpoint are scored once.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones).
        {options}

    Returns:
        The scores, best first, with intervals, and whether the best is better than the next of the other kind.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`. A checkpoint that cannot be scored does not stop the
            others; its `error` gives the reason.
    """
    own = Evaluation(**vars(scoring))
    way = _check(own, weights, which, images, running)
    given = [paths] if isinstance(paths, (str, Path)) else [*paths]
    series = find_series(given, order="given", include_outputs=True, on_progress=running.on_progress)
    names = short_names([member.path for member in series.members])
    rows = [_row(member, name) for member, name in zip(series.members, names, strict=True)]
    if way != "data" and not own.in_memory:
        _refuse_remote(series.members, way)
    table = checked_file("csv", output.csv, series.given, force=output.force)
    first = next((i for i, row in enumerate(rows) if not row.is_average), 0)
    example = Checkpoint(series.members[first].header, weights.state)
    at: list[str] = []  # which checkpoint is at work

    def progress(what: Activity, done: int, total: int | None) -> None:
        if running.on_progress is not None:
            work = Activity(f"{at[-1]}: {what}", what.unit, step=what.step) if at else what
            running.on_progress(work, done, total)

    with ExitStack() as stack:
        if way == "data":
            evaluator, found = stack.enter_context(_on_images(example, weights, which, images, running, progress))
        else:
            evaluator, found = _own(own, weights), []
        notes = [*series.notes, *found, *_of_statistics(rows, series.members, weights, measured=images.recal_bn)]
        plan = EvaluationReport(checkpoints=tuple(rows), notes=tuple(dict.fromkeys(notes)))
        if running.on_plan is not None:
            running.on_plan(plan)
        if running.dry_run:
            return plan
        logs = Path(tempfile.mkdtemp(prefix="ckpt-eval-"))
        stack.callback(shutil.rmtree, logs, ignore_errors=True)

        def score(i: int) -> tuple[Scores, str | None, float]:
            began = time.perf_counter()
            at.append(f"{names[i]} ({i + 1} of {len(rows)})")
            try:
                with named("data", "eval_data"):
                    scores, error = evaluator.score(series.members[i].path, logs / f"{i + 1}.log"), None
            except UsageError:
                raise  # it will not get better with the next one
            except CkptError as failed:
                scores, error = Scores({}), str(failed)
            return scores, error, time.perf_counter() - began

        all_scores: dict[str, Scores] = {}
        aim: Aim | None = None
        tell = counted(None if way == "data" else running.on_progress, _EVALUATING, len(rows))
        for done, (i, (scores, error, seconds)) in enumerate(
            scored_together(range(len(rows)), score, own.jobs, evaluator.end), 1
        ):
            if aim is None and error is None:  # what decides is told by the first, before the others are scored
                usual = "top1" if way == "data" else None
                aim = aim_of([*scores.metrics], own.metric, usual, lower=own.lower_is_better)
            if aim is not None and error is None and aim.metric not in scores.metrics:
                error = f"the evaluation gives no '{aim.metric}'"
            all_scores[names[i]] = scores
            metrics = dict(scores.metrics) if error is None else {}
            rows[i] = replace(rows[i], metrics=metrics, error=error, seconds=seconds)
            if running.on_result is not None:
                running.on_result(rows[i], done, len(rows))
            if tell is not None:
                tell(done)
        if aim is None:
            raise DataError(f"no checkpoint could be scored; {rows[0].name}: {rows[0].error}")
        report = _judged(plan, rows, all_scores, aim, images.seed)
        if report.failed and way == "eval_command":
            stack.pop_all()  # what the commands printed stays
            report = replace(report, logs=str(logs))
    if table is not None:
        with named("csv"):
            write_file(table, _table(report), force=output.force)
    return report


def _check(own: Evaluation, weights: State, which: Network, images: EvaluatedImages, running: Evaluating) -> str:
    """Refuse options that do not go together; return the one that says how a checkpoint is scored."""
    ways = {"data": images.data, "eval_command": own.eval_command, "eval_function": own.eval_function}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            "give one of `data`, `eval_command` and `eval_function`"
            + (f", not {' and '.join(f'`{name}`' for name in given)}" if given else "")
            + ": it says how a checkpoint is scored."
        )
    (way,) = given
    for name, owner in (("in_memory", "eval_function"), ("time_limit", "eval_command")):
        if getattr(own, name) and way != owner:
            raise UsageError(f"`{name}` goes with `{owner}`.")
    if type(own.jobs) is not int or own.jobs < 1:
        raise UsageError(f"`jobs={own.jobs!r}`: a whole number, 1 or more.")
    if own.jobs > 1 and way != "eval_command":
        raise UsageError("`jobs` goes with `eval_command`: images and functions use all cores themselves.")
    if way != "data":
        asked = given_of(which, images, Numerics(**vars(running)))
        others = [name for name in asked if name not in ("seed", "channels_last")]
        if others:
            raise UsageError(f"`{others[0]}` goes with `data`: with `{way}`, your own code builds the model.")
        if given_of(weights) and not own.in_memory:
            raise UsageError(f"`state` goes with `data` or `in_memory`: with `{way}`, your own code reads the file.")
    return way


def _refuse_remote(members: Sequence[Member], way: str) -> None:
    remote = next((member.path for member in members if store_of(member.path) is not LOCAL), None)
    if remote is not None:
        raise UsageError(
            f"{remote}: is not on this machine, and `{way}` is given paths of files. Download it first, or score by "
            "`data`."
        )


def _row(member: Member, name: str) -> Evaluated:
    origin = origin_of(member.header.provenance)
    step = None if origin.averaged is not None else member.step
    return Evaluated(str(member.path), name, origin, origin.words, step, {})


def _own(own: Evaluation, weights: State) -> Evaluator:
    """Return what scores by the user's command or function."""
    if own.eval_command is not None:
        return Command(own.eval_command, own.time_limit)
    from ...evaluation.models import load_factory

    load_factory(str(own.eval_function), "eval_function")
    return Function(str(own.eval_function), in_memory=own.in_memory, state=weights.state)


@contextmanager
def _on_images(
    example: Checkpoint,
    weights: State,
    which: Network,
    images: EvaluatedImages,
    running: Evaluating,
    progress: Progress,
) -> Iterator[tuple[Evaluator, list[str]]]:
    """Yield what scores on labelled images, and notes."""
    data = str(images.data)
    with opened_classifiers(
        example,
        which,
        images,
        Statistics(**vars(images)),
        Numerics(**vars(running)),
        {"data": data},
        ("recal_bn", images.recal_bn),
        state=weights.state,
        seed=images.seed,
        device=running.device,
        on_progress=progress,
    ) as classifiers:
        with named("data", "eval_data"):
            classifier = classifiers.on(data, "data", images.split)
        if images.recal_bn is not None and not classifiers.has_layers:
            classifiers.notes.append("The model has no BatchNorm, so `recal_bn` has no effect.")
        yield classifier, classifiers.notes


def _of_statistics(
    rows: Sequence[Evaluated], members: Sequence[Member], weights: State, *, measured: str | None
) -> Iterator[str]:
    """Tell of averages whose BatchNorm statistics are averages, too."""
    if measured is not None:
        return
    for row, member in zip(rows, members, strict=True):
        if row.is_average and not row.origin.measured:
            names = Checkpoint(member.header, weights.state)
            if any(name.endswith("running_var") for name in names):
                yield (
                    f"{row.name}: its BatchNorm statistics are averaged, not measured, so it may look worse than it "
                    "is. `recalibrate_checkpoint(...)` measures them."
                )


def _judged(
    plan: EvaluationReport, rows: Sequence[Evaluated], scores: Mapping[str, Scores], aim: Aim, seed: int
) -> EvaluationReport:
    """Rank the checkpoints, and compare them."""
    scored = [row for row in rows if row.error is None]
    samples = {row.name: scores[row.name].samples for row in scored if aim.metric in scores[row.name].samples}
    around = intervals({name: each[aim.metric] for name, each in samples.items()}, seed=seed)
    numbers = {len(each[aim.metric]) for each in samples.values()}
    paired = len(numbers) == 1
    # Of equal ones that of lower loss is first, then the earlier one.
    ranking = sorted(scored, key=lambda row: (-aim.score(row.metrics), row.metrics.get("loss", 0.0)))
    singles = [row for row in ranking if not row.is_average]
    averages = [row for row in ranking if row.is_average]

    def pair(one: Evaluated, other: Evaluated, *metrics: str) -> list[Comparison]:
        both = [_only(scores[each.name], metrics, with_samples=paired) for each in (one, other)]
        return compared(*both, seed=seed)

    found = []
    for row in ranking:
        low, high = around.get(row.name, (None, None))
        against = pair(row, singles[0], aim.metric)[0] if singles and row.is_average else None
        found.append(replace(row, low=low, high=high, against=against))
    best = ranking[0]
    others = (singles if best.is_average else averages) or ranking[1:]
    other = others[0] if others else None
    comparisons = () if other is None else tuple(pair(best, other, *best.metrics))
    return replace(
        plan,
        checkpoints=(*found, *(row for row in rows if row.error is not None)),
        metric=aim.metric,
        lower_is_better=aim.lower,
        best=best.name,
        best_single=singles[0].name if singles else None,
        best_average=averages[0].name if averages else None,
        compared_with=None if other is None else other.name,
        comparisons=comparisons,
        samples=min(numbers) if paired else None,
        verdict=_verdict(found[0], other, comparisons, aim),
        notes=tuple(dict.fromkeys([*plan.notes, *_doubts(singles, averages, numbers, aim)])),
    )


def _only(scores: Scores, metrics: Sequence[str], *, with_samples: bool) -> Scores:
    return Scores(
        {name: scores.metrics[name] for name in metrics if name in scores.metrics},
        {name: values for name, values in scores.samples.items() if name in metrics and with_samples},
    )


def _verdict(best: Evaluated, other: Evaluated | None, comparisons: Sequence[Comparison], aim: Aim) -> str:
    said = f"Best: {best.name} ({best.what})."
    if other is None:
        around = "" if best.low is None else f" (95 % interval {best.low:.4g} to {best.high:.4g})"
        return f"{best.name} ({best.what}): {aim.metric} is {best.metrics[aim.metric]:.6g}{around}."
    name = other.name
    if best.is_average != other.is_average:
        name = f"the best {'average' if other.is_average else 'single checkpoint'} ({name})"
    (found,) = [each for each in comparisons if each.metric == aim.metric]
    return f"{said} {in_words(found, lower_is_better=aim.lower, other=name)}"


def _doubts(
    singles: Sequence[Evaluated], averages: Sequence[Evaluated], numbers: Collection[int], aim: Aim
) -> Iterator[str]:
    count = len(singles) + len(averages)
    if len(numbers) > 1:
        yield (
            f"The values of samples are of {min(numbers)} to {max(numbers)} samples, so not of the same ones: no "
            "difference has an interval."
        )
    if averages and not singles:
        yield "No single checkpoint is among these. Give the folder of the run, too, to see what averaging changes."
    if count > 2:
        yield (
            f"The best of {count} is chosen by its {aim.metric} on these data, which flatters it: on other data it "
            "is a little worse."
        )


def _table(report: EvaluationReport) -> bytes:
    """Return the table as CSV: a row for each checkpoint, those without a score at the end without a rank."""
    metrics = [*dict.fromkeys(name for each in report.checkpoints for name in each.metrics)]
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        [
            *("rank", "path", "what", "averaged", "step"),
            *(f"metrics.{name}" for name in metrics),
            *("low", "high", "difference", "difference_low", "difference_high", "seconds", "error"),
        ]
    )
    for rank, each in enumerate(report.checkpoints, 1):
        against = each.against
        difference = (None,) * 3 if against is None else (against.difference, against.low, against.high)
        table.writerow(
            [
                *(rank if each.error is None else "", each.path, each.what, each.origin.averaged, each.step),
                *(each.metrics.get(name, "") for name in metrics),
                *(each.low, each.high, *difference, each.seconds, each.error),
            ]
        )
    return encoded(text.getvalue())
