"""`ckpt sweep`: parse, sweep, show."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..compute.progress import LOADING_TORCH
from ..errors import DataError
from ..jobs.sweep.options import GROUPS
from . import arguments, common, console, progress
from .tables import Table, encodes

if TYPE_CHECKING:
    from rich.text import Text

    from ..jobs.sweep.report import Ranked, SweepReport
    from ..jobs.sweep.results import Result

_SHADES = " ░▒▓█"
_LIVE = 10  # rows while it runs
_NARROWEST = 60  # columns


@arguments.with_options(*GROUPS, images=arguments.number_of_images)
def sweep(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, quoted globs, folders (of checkpoints, or sharded).")
    ],
    *,
    all_: common.All = False,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Average a series in many ways, score each average, and find the best.

    What counts, and which checkpoints, takes lists such as 3,5,8, and ranges such as 0.05:0.25:0.05.

    Example: ckpt sweep runs/ --last 3,5,8 --mode uniform,ema --eval-command 'python eval.py {ckpt}'
    """
    arguments.check_folder()
    arguments.note_command()
    plans: list[SweepReport] = []

    def show_plan(plan: SweepReport) -> None:
        plans.append(plan)
        tell = console.shown_by(asked=options["dry_run"], json=json)
        _show_plan(plan, tell, matrix=options["dry_run"])

    try:
        with progress.shown(LOADING_TORCH) as line, _results(line) as on_result:
            from ..jobs.sweep.job import sweep as carry_out
            from ..jobs.sweep.page import Wording

            line.idle(progress.PLANNING)
            callbacks = {"on_plan": line.planned(show_plan), "on_result": on_result, "on_progress": line.tell}
            with console.printing_to_stderr():  # the user's own code
                report = carry_out(paths, **options, on_words=Wording(command, arguments.spelled), **callbacks)
    except console.Stopped as stopped:
        if plans and not options["dry_run"]:
            stopped.left = f"the scores so far are in {plans[0].results}, and the same command goes on"
        raise
    if not options["dry_run"]:
        files = [options[name] for name in ("plot", "report", "csv") if options[name] is not None]
        tell = console.shown_by(asked=True, json=json)
        _show(report, tell, [note for note in report.notes if note not in plans[0].notes], files)
    if json:
        console.print_json(arguments.plain(report))
    if report.failure:
        raise DataError(arguments.spelled(report.failure))


def _show_plan(report: SweepReport, tell: console.Tell, *, matrix: bool) -> None:
    if matrix:
        tell(_matrix(report), "")
    first, last = report.checkpoints[0], report.checkpoints[-1]
    tell(
        f"{console.plural(len(report.checkpoints), 'checkpoint')}: {first} to {last}, in the order of "
        f"{report.ordered_by}.",
        f"{console.plural(report.evaluations, 'evaluation')}; reads {console.size(report.bytes_read)} and writes "
        f"{console.size(report.bytes_written)} for the candidates.",
        *[f"Cannot be made: {label}: {arguments.spelled(why)}" for label, why in report.refused.items()],
    )
    arguments.say_notes(report.notes, tell)


def _matrix(report: SweepReport) -> Table:
    """Draw the coefficients: a row for each candidate, a column for each checkpoint."""
    shades = _SHADES if encodes(_SHADES, sys.stdout) else " .:*#"
    table = Table("candidate", ("of",), drawn="coefficients, oldest first")
    for each in report.candidates:
        by_name = dict(zip(each.checkpoints, each.coefficients, strict=True))
        largest = max(map(abs, each.coefficients)) or 1.0
        levels = []
        for name in report.checkpoints:
            value = by_name.get(name, 0.0)
            levels.append(0 if value == 0 else 1 + min(int(abs(value) / largest * 4), 3))
        same = f" (also {', '.join(each.same)})" if each.same else ""
        colour = "red" if min(each.coefficients) < 0 else "green"
        drawn = "".join(shades[level] * 2 for level in levels)
        table.add(each.label + same, str(len(each.checkpoints)), drawn=drawn, colour=colour)
    return table


@contextmanager
def _results(line: progress.Shown) -> Iterator[Callable[[Result, int, int], None]]:
    """Show results as they come: on a terminal a table that takes the place of the line, elsewhere a line each.

    Yields:
        The `on_result` of the sweep.
    """
    first: tuple[float, int] | None = None  # when the first of this run began, and how many are known from before

    def left(result: Result, done: int, total: int) -> str:
        nonlocal first
        now = time.monotonic()
        began, known = first = first or (now - result.seconds, done - 1)
        if done >= total:
            return ""
        seconds = (now - began) / (done - known) * (total - done)
        return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"

    def say(result: Result, done: int, total: int) -> None:
        metrics = ", ".join(f"{name} {value:.6g}" for name, value in result.metrics.items())
        said = metrics if result.error is None else result.error.rstrip(".")
        console.say(f"{done} of {total}: {result.label}: {said}{left(result, done, total)}")

    if console.manner.quiet or not console.redraws(sys.stderr) or console.columns() < _NARROWEST:
        yield say
        return
    found: list[Result] = []
    scored = ""

    def table() -> Text:
        from rich.text import Text

        lines = _results_table(found).lines(console.columns(), sys.stderr)
        more = [] if line.meter.unit == "candidates" else [line.meter.text(console.columns() - 1)]
        return Text.from_ansi("\n".join([*lines, scored, *more]))  # `scored` counts the candidates

    with ExitStack() as stack:

        def draw(result: Result, done: int, total: int) -> None:
            nonlocal scored
            scored = f"{done} of {total} scored{left(result, done, total)}"
            found.append(result)
            if len(found) == 1:
                from rich.live import Live

                line.hide()
                live = Live(get_renderable=table, console=console.stderr(), refresh_per_second=4, transient=True)
                stack.enter_context(live).refresh()

        yield draw


def _results_table(found: Sequence[Result]) -> Table:
    names = [*dict.fromkeys(name for result in found for name in result.metrics)][:4]
    table = Table("the last candidates", names)
    for result in found[-_LIVE:]:
        figures = [f"{result.metrics[name]:.6g}" if name in result.metrics else "" for name in names]
        table.add(result.label if result.error is None else f"{result.label}: failed", *figures)
    return table


def _show(report: SweepReport, tell: console.Tell, notes: Sequence[str], files: Sequence[str]) -> None:
    metric = report.metric or ""
    reused = f", {report.reused} known from before" if report.reused else ""
    direction = "lower" if report.lower_is_better else "higher"
    tell(
        _ranking(report, metric),
        "",
        f"{console.plural(report.evaluations, 'evaluation')}{reused}; {metric} decides, {direction} is better.",
    )
    arguments.say_notes(notes, tell)
    if not report.failure:
        tell(arguments.spelled(report.verdict))
    for each in report.against_last:
        if each.low is not None and each.metric != metric:
            tell(f"  {each.metric}: {each.best:.6g} against {each.other:.6g} ({each.low:+.4g} to {each.high:+.4g}).")
    if report.written:
        console.wrote(f"Wrote {report.out}.")
    for path in files:
        console.wrote(f"Wrote {path}.")
    tell("Reproduce the best:", f"  {command(report)}")


def _ranking(report: SweepReport, metric: str) -> Table:
    others = [*dict.fromkeys(name for each in report.candidates for name in each.metrics if name != metric)][:3]
    table = Table("candidate", (metric, *others))
    values = [each.metrics[metric] for each in report.candidates if metric in each.metrics]
    worst, best = (max(values), min(values)) if report.lower_is_better else (min(values), max(values))
    for each in report.candidates:
        value = each.metrics.get(metric)
        figures = [f"{each.metrics[name]:.6g}" if name in each.metrics else "" for name in (metric, *others)]
        # From the worst to the best, for the differences are small beside the values.
        length = 0.0 if value is None else abs(value - worst) + 0.05 * abs(best - worst)
        first = each.label == report.best
        table.add(_name(report, each), *figures, bar=length, colour="green" if first else "blue", bold=first)
    return table


def _name(report: SweepReport, each: Ranked) -> str:
    marks = [mark for mark, label in (("best", report.best), ("last", report.last)) if each.label == label]
    marks += ["best single"] if each.label == report.best_single and each.label != report.best else []
    failed = [] if each.error is None else ["not scored"]
    return each.label + (f" ({', '.join([*marks, *failed])})" if marks or failed else "")


def command(report: SweepReport) -> str:
    """Return the command that makes the best candidate."""
    given = [arguments.spelled(f"`{name}={value!r}`") for name, value in report.options.items()]
    out = report.out or "best.pth"
    paths = [quote(f"./{path}" if path.startswith("-") else path) for path in report.paths]
    return " ".join(["ckpt avg", *paths, *given, f"-o {quote(out)}"])
