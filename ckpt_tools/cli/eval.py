"""`ckpt eval`: parse, evaluate, show."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..compute.progress import LOADING_TORCH
from ..jobs.evaluate.options import GROUPS
from . import arguments, common, console, progress
from .tables import Table

if TYPE_CHECKING:
    from ..jobs.evaluate.report import Evaluated, EvaluationReport

_OTHERS = 4  # metrics beside the one that decides


@arguments.with_options(*GROUPS, images=arguments.number_of_images)
def eval(  # noqa: A001 - the name of the command
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CKPT...", help="Files, quoted globs, folders (of checkpoints, or sharded).")
    ],
    *,
    all_: common.All = False,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Score checkpoints on the same data, and compare averages with the best single one.

    Example: ckpt eval runs/ averaged.pth --data imagenet/val
    """
    arguments.check_folder()
    plans: list[EvaluationReport] = []

    def show_plan(plan: EvaluationReport) -> None:
        plans.append(plan)
        tell = console.shown_by(asked=options["dry_run"], json=json)
        averages = sum(each.is_average for each in plan.checkpoints)
        known = f"; ckpt averaged {averages} of them" if averages else ""
        tell(f"{console.plural(len(plan.checkpoints), 'checkpoint')}{known}.")
        arguments.say_notes(plan.notes, tell)

    def say_result(found: Evaluated, done: int, total: int) -> None:
        if options["data"] is None or not sys.stderr.isatty():  # where no bar is shown
            metrics = ", ".join(f"{name} {value:.6g}" for name, value in found.metrics.items())
            console.say(
                f"{done} of {total}: {found.name}: {metrics if found.error is None else arguments.spelled(found.error)}"
            )

    with progress.shown(LOADING_TORCH) as line, console.printing_to_stderr():  # the user's own code
        from ..jobs.evaluate.job import evaluate

        line.idle(progress.PLANNING)
        callbacks = {"on_plan": line.planned(show_plan), "on_result": say_result, "on_progress": line.tell}
        report = evaluate(checkpoints, **options, **callbacks)
    if not options["dry_run"]:
        _show(report, console.shown_by(asked=True, json=json))
        arguments.say_notes(report.notes[len(plans[0].notes) :])
        if options["csv"] is not None:
            console.wrote(f"Wrote {options['csv']}.")
    if json:
        console.print_json(arguments.plain(report))
    if report.failed:
        raise typer.Exit(1)


def _show(report: EvaluationReport, tell: console.Tell) -> None:
    tell(_table(report), "", arguments.spelled(report.verdict))
    for each in report.comparisons:
        if each.metric != report.metric:
            around = "" if each.low is None else f" (difference {each.low:+.4g} to {each.high:+.4g})"
            tell(f"  {each.metric}: {each.best:.6g} against {each.other:.6g}{around}.")
    for row in report.failed:
        tell(f"Not scored: {row.name}: {arguments.spelled(row.error or '')}")
    if report.logs is not None:
        console.say(f"What the commands printed is in {report.logs}.")


def _table(report: EvaluationReport) -> Table:
    """Lay out a row for each checkpoint that has a score."""
    metric = report.metric or ""
    rows = [each for each in report.checkpoints if each.error is None]
    others = [*dict.fromkeys(name for each in rows for name in each.metrics if name != metric)][:_OTHERS]
    intervals = any(each.low is not None for each in rows)
    compared = any(each.against is not None for each in rows)
    titles = ["what", metric, *["95 % interval"] * intervals, *others]
    table = Table("checkpoint", [*titles, *["vs best single"] * compared])
    for each in rows:
        row = [_what(each), f"{each.metrics[metric]:.6g}"]
        row += ["" if each.low is None else f"{each.low:.3g} to {each.high:.3g}"] * intervals
        row += [f"{each.metrics[name]:.4g}" if name in each.metrics else "" for name in others]
        row += [_difference(each)] * compared
        table.add(each.name, *row, bold=each.name == report.best)
    return table


def _what(each: Evaluated) -> str:
    return each.what if each.step is None else f"{each.what}, step {each.step}".removeprefix("checkpoint, ")


def _difference(each: Evaluated) -> str:
    found = each.against
    if found is None:
        return ""
    if found.low is None:
        return f"{found.difference:+.4g}"
    return f"{found.difference:+.3g} ({found.low:+.3g} to {found.high:+.3g})"
