"""The sweep: its options checked, its candidates scored, and what was found written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoints.open import Checkpoint
from ...compute.threads import check_threads
from ...errors import AlignmentError, CkptError, SeriesError, UsageError
from ...formats.file_plan import OutTensor
from ...series.find import find_series
from ...series.paths import shown
from ...storage.journal import alone_in
from ...storage.staged import scratch_file
from ...tensors import parse_dtype
from ..asked import started_together
from ..option_groups import takes
from ..options import Matching, Network, Recalibration
from ..outputs import Target, grows_at
from ..provenance import provided, short_names
from ..run import check_output, manners, write
from .evaluation import Evaluators, opened
from .files import Files
from .geometry import geometry_of
from .grid import Grid
from .judging import file_of, judged, planned
from .making import Maker
from .options import (
    GROUPS,
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
    given_of,
)
from .page import Background
from .report import SweepReport
from .results import Results
from .scoring import Scoring
from .scratch import Scratch

if TYPE_CHECKING:
    from ...batchnorm.report import BatchNormReport
    from ..look import LookReport


@takes(*GROUPS)
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
        CkptError: one of the errors of `ckpt_tools.errors`. A candidate that fails does not stop the sweep; the report
            gives the reason. So it does if the best cannot be compared with the last checkpoint.
    """
    check(evaluation, honesty, output, searching, which, images, running)
    _refuse_several()
    if matching.lora == "product":
        raise UsageError("`lora='product'` does not go with a sweep. Merge each adapter into its model first.")
    check_threads(running.threads)
    manners(running)
    dtype = parse_dtype(output.dtype)
    given = [paths] if isinstance(paths, (str, Path)) else [*paths]
    series = find_series(
        given,
        order=order.order,
        include_outputs=order.include_outputs,
        exclude=order.exclude,
        skip_broken=order.skip_broken,
        state=matching.state,
        on_progress=running.on_progress,
    )
    if len(series.members) < 2:
        raise SeriesError(f"{series.members[0].path} is one checkpoint alone. Give a series of two or more.")
    target = None if output.out is None else Target.of(output.out)
    files = Files.of(output, series.given)
    maker = Maker.of(series.members, short_names([each.path for each in series.members]), matching, dtype, running)
    _refuse_other_names(maker)
    grid = Grid(series, rules, selections, searching, order, matching, evaluation)
    combinations = grid.candidates()
    found = combinations.candidates
    if target is not None and found:
        (assembly,) = maker.planned(found[:1], [target.path])
        check_output(assembly, series.given, force=output.force)
    paths_of = [shown(path) for path in given]
    plan = planned(series, combinations, maker, grid, output, paths_of, files.notes)
    if running.on_plan is not None:
        running.on_plan(plan)
    if running.dry_run:
        return plan
    folder = Path(output.scratch)
    show = running.on_progress or (lambda *_: None)
    example = Checkpoint(series.members[-1].header, state_of(matching))
    made = {**given_of(matching), **({} if dtype is None else {"dtype": dtype.name})}
    with alone_in(folder), opened(evaluation, honesty, which, images, running, example, show) as evaluators:
        scoring = Scoring(
            make=partial(maker.make, on_progress=running.on_progress),
            nbytes=maker.bytes_moved(found[:1])[1],
            suffix=maker.suffix,
            made={name: repr(value) for name, value in made.items()},
            evaluator=evaluators.evaluator,
            usual=evaluators.usual,
            results=Results(folder),
            scratch=Scratch(folder),
            keep=output.keep,
            metric=evaluation.metric,
            lower_is_better=evaluation.lower_is_better,
            holdout=None if honesty.holdout is None else (honesty.holdout, images.seed),
            jobs=evaluation.jobs,
            planned=plan.evaluations,
            on_result=running.on_result,
            on_progress=running.on_progress if evaluation.eval_data is None else None,
        )
        geometry = geometry_of(folder, series.members, given, order, matching, running)
        scoring.clear(found)
        scoring.scores(found)
        notes = [*grid.search(scoring), *grid.soup(scoring, maker), *scoring.keep_best()]
        notes += () if isinstance(geometry, str) else geometry.warnings
        shared = {**made, **given_of(order), **({"allow_nonfinite": True} if running.allow_nonfinite else {})}
        shared.pop("metrics", None)  # of `best`, and among the options of its candidates
        recalibration = Recalibration(**{**vars(which), **vars(images), **vars(running)}, recal_bn=images.data)
        if evaluators.recalibrates:
            shared |= given_of(recalibration)
            shared |= {name: value for name, value in given_of(running).items() if name == "device"}
        report = judged(plan, scoring, evaluators, maker, honesty, images.seed, notes, shared)
        if target is not None and not report.failure:
            _write_best(report, scoring, maker, evaluators, target, recalibration, example, output, running)
            report = replace(report, written=True)
        files.write(report, lambda: _background(scoring, maker, evaluators, geometry), running.on_words)
    return report


def _refuse_several() -> None:
    """Refuse processes that were started together; they would score the same averages in one another's way.

    Raises:
        UsageError: torchrun or srun started this process with others.
    """
    if (started := started_together()) is not None:
        raise UsageError(
            f"this sweep was started in {started.count} processes, and it runs in one: which averages it makes depends "
            "on the scores of others. Start it once. The average with the options that it finds can be made in parts."
        )


def _refuse_other_names(maker: Maker) -> None:
    """Refuse a series in which names differ: which names an average has would depend on the checkpoints in it."""
    aligned = maker.lined_up.aligned
    name = next(iter([*maker.lined_up.left_out, *(name for name, each in aligned.items() if None in each)]), None)
    if name is not None:
        raise AlignmentError(
            f"only some checkpoints of the series have '{name}', so its averages would have different tensors, and "
            f"`keys={maker.matching.keys!r}` does not go with a sweep. Give only checkpoints that have the same names."
        )


def state_of(matching: Matching) -> str:
    """Return the set of weights that is asked for, as one name; several are asked for by path alone."""
    return matching.state if isinstance(matching.state, str) else next(iter(matching.state), "auto")


def _background(scoring: Scoring, maker: Maker, evaluators: Evaluators, geometry: LookReport | str) -> Background:
    """Gather what the page shows beyond the report, and measure the statistics of the best."""
    drift: BatchNormReport | str | None = None
    if evaluators.measured is not None:
        try:
            with file_of(scoring.ranking()[0], scoring, maker) as path:
                drift = evaluators.measured(path)
        except CkptError as error:
            drift = str(error)
    test = None if evaluators.test is None else evaluators.test.identity
    return Background(evaluators.evaluator.identity, test, scoring.holdout, geometry, drift)


def _write_best(
    report: SweepReport,
    scoring: Scoring,
    maker: Maker,
    evaluators: Evaluators,
    target: Target,
    recalibration: Recalibration,
    example: Checkpoint,
    output: SweptOutput,
    running: Sweeping,
) -> None:
    """Write the best average with the evidence in its provenance, and with measured statistics if it was scored so."""
    best = scoring.ranking()[0]
    evidence: dict[str, Any] = {
        "sweep": {
            "candidates": len(scoring.found),
            "metric": report.metric,
            "metrics": dict(scoring.found[best].metrics),
            "evaluation": dict(evaluators.evaluator.identity),
            "other_data": report.other_data,
            "against_last": [
                {name: getattr(each, name) for name in each.__dataclass_fields__} for each in report.against_last
            ],
            "verdict": report.verdict,
        }
    }
    stamps = maker.stamps
    tensors: Mapping[str, OutTensor] = maker.tensors([best])
    options: dict[str, Any] = {
        "threads": running.threads,
        "allow_nonfinite": running.allow_nonfinite,
        **manners(running),
    }
    with ExitStack() as stack:
        if evaluators.recalibrates:
            from ..averaged_network import measured, opened_network

            header, state, device, tell = example.header, example.state, running.device, running.on_progress
            network = stack.enter_context(opened_network(header, state, recalibration, device, tell))
            scratch = stack.enter_context(scratch_file(grows_at(target.path)))
            plan = network.planned(target)
            found = measured(network, tensors, scratch, stamps, plan, on_progress=tell, **options)
            tensors, stamps = found.tensors, [*stamps, *found.stamps]
            evidence["recalibrated"] = provided(network.record(found.report))
        (assembly,) = maker.planned([best], [target.path], evidence, lambda _, name: tensors[name])
        write(assembly, stamps, force=output.force, on_progress=running.on_progress, **options)
