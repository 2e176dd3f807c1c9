"""`ckpt avg`: parse, average, show."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..jobs.asked import COMMAND
from ..jobs.options import AveragedOutput, Earlier, Fetched, Matching, Recalibration, Selection, Sharing, Summing
from ..series.schedules import Schedule
from . import arguments, common, console
from .recal_bn import show_images, show_statistics
from .tables import Table

if TYPE_CHECKING:
    from ..jobs.average import AverageReport


_FEW = 4
"""Checkpoints that are named each; of more, the first and the last."""


@arguments.with_options(
    Schedule,
    Selection,
    Matching,
    Earlier,
    AveragedOutput,
    Recalibration,
    Sharing,
    Fetched,
    Summing,
    images=arguments.number_of_images,
)
def avg(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Files, quoted globs, folders (of checkpoints, or sharded), addresses."),
    ] = None,
    *,
    all_: common.All = False,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Average a series of checkpoints into one set of weights.

    Example: ckpt avg runs/*.pth --mode ema --decay 0.8
    """
    from ..jobs.average import average

    proposed = None
    if not paths and options["update"] is not None:
        raise UsageError("PATH is missing: the checkpoints to add. Try 'ckpt avg --help'.")
    if not paths and options["replay"] is None:
        proposed = _only_run()
        paths, options["dry_run"] = [proposed], True
    plans: list[AverageReport] = []

    def show(plan: AverageReport) -> None:
        plans.append(plan)
        tell = console.shown_by(asked=options["dry_run"], json=json)
        (_show_table if options["dry_run"] or console.manner.verbose else _show_summary)(plan, tell)

    with nullcontext() if options["recal_bn"] is None else console.printing_to_stderr():  # the user's own code
        report, seconds = arguments.carried_out(average, paths or [], **options, on_plan=show)
    arguments.say_part(report.part)
    if report.written:
        # Small jobs take as long as the start of the program.
        rate = "" if report.bytes_read < 1e8 else _rate(report, seconds)
        if report.recalibration is not None:
            rate = ""
            show_statistics(report.recalibration)
            arguments.say_notes(report.notes[len(plans[0].notes) :])
        where = "" if report.device == "cpu" else f" on {report.device}"
        took = f" in {seconds:.2f} s{where}{rate}" if not report.compared else ""  # which takes as long again
        written = console.size(report.bytes_written)
        console.wrote(f"Wrote {console.output(report.out, report.files, report.companions)}: {written}{took}.")
        if options["plot"] is not None:
            console.wrote(f"Wrote {options['plot']}.")
        if report.compared:
            console.say(report.compared)
    if json and arguments.reports(report, **options):
        console.print_json(arguments.plain(report))
    if proposed is not None:
        command = shlex.join([*(word for word in COMMAND if word != "--dry-run"), proposed])
        console.say("", f"Nothing was written, for no PATH was given. The only run here is {proposed}:", f"  {command}")
    if report.same is False:
        raise typer.Exit(1)


def _only_run() -> str:
    """Return the only run in the current folder, or below it.

    Raises:
        UsageError: there is none, or there are several.
    """
    from ..series.paths import runs_below

    arguments.check_folder()
    runs = [*map(str, runs_below(Path()))]
    if not runs:
        raise UsageError(
            "PATH is missing, and no series of checkpoints was found here. Example: ckpt avg runs/*.pth. "
            "Try 'ckpt avg --help'."
        )
    if len(runs) > 1:
        raise UsageError(
            f"PATH is missing, and there are {len(runs)} runs here: {console.some(runs)}. "
            f"Example: ckpt avg {shlex.quote(runs[0])}"
        )
    return runs[0]


def _rate(report: AverageReport, seconds: float) -> str:
    read, written = (console.size(nbytes / seconds) for nbytes in (report.bytes_read, report.bytes_written))
    return f" ({read}/s read, {written}/s written)"


def _show_summary(report: AverageReport, tell: console.Tell) -> None:
    first, last = report.inputs[0], report.inputs[-1]
    n = len(report.inputs)
    names = ", ".join(i.name for i in report.inputs) if n <= _FEW else f"{first.name} to {last.name}"
    order = f"in the order of {report.ordered_by}" if n > 1 else "so this is a copy of its weights"
    tell(
        f"{console.plural(n, 'checkpoint')}: {names}, {order}. Weights: {last.state}. Mode: {report.mode}.",
        *_prefixes(report),
    )
    _show_dropped(report, tell, companions=False)  # the last line has them
    _show_recalibration(report, tell)
    arguments.say_notes(report.notes, tell)


def _show_recalibration(report: AverageReport, tell: console.Tell) -> None:
    if (plan := report.recalibration) is not None:
        layers = console.plural(plan.layers, "layer")
        tell(
            f"BatchNorm: {layers} of {plan.model}, measured before the output is written. "
            f"Meanwhile the sums take {console.size(report.scratch)} beside it."
        )
        show_images(plan, tell)


def _show_dropped(report: AverageReport, tell: console.Tell, *, companions: bool) -> None:
    if report.left_out:
        tell(f"Left out (missing in some checkpoints): {console.some(report.left_out)}.")
    if report.dropped:
        tell(f"Not carried over from the last checkpoint: {console.some(report.dropped)}.")
    if report.companions and companions:
        tell(f"Carried along beside the weights: {console.some(report.companions)}.")


def _show_table(report: AverageReport, tell: console.Tell) -> None:
    table = Table("checkpoint", ("step", "coefficient"))
    for i in report.inputs:
        step = "" if i.step is None else str(i.step)
        colour = "red" if i.coefficient < 0 else "green"
        table.add(i.name, step, f"{i.coefficient:.6f}", bar=i.coefficient, colour=colour)
    where = "" if report.device == "cpu" else f"; sums on {report.device}"
    tell(
        table,
        "",
        f"Ordered by {report.ordered_by}; mode {report.mode}; "
        f"weights: {', '.join(dict.fromkeys(i.state for i in report.inputs))}.",
        *_prefixes(report),
        f"{console.plural(len(report.averaged), 'tensor')} averaged, "
        f"{len(report.copied)} copied from {_source(report)}"
        + (f", {len(report.tied)} tied" if report.tied else "")
        + (f", {len(report.left_out)} left out" if report.left_out else "")
        + ".",
        f"Reads {console.size(report.bytes_read)}, writes {console.size(report.bytes_written)} to {report.out}; "
        f"memory: about {console.size(report.peak_memory)}{where}.",
    )
    _show_dropped(report, tell, companions=True)
    _show_recalibration(report, tell)
    arguments.say_notes(report.notes, tell)


def _source(report: AverageReport) -> str:
    """Describe where tensors come from that are not summed: the one checkpoint that counts, if there is only one."""
    counting = [i.name for i in report.inputs if i.coefficient]
    return (
        "the last checkpoint" if len(counting) > 1 else " and ".join(dict.fromkeys((*counting, report.inputs[-1].name)))
    )


def _prefixes(report: AverageReport) -> list[str]:
    """Describe which names lose wrapper prefixes."""
    wrapped: dict[str, list[str]] = {}
    for i in report.inputs:
        if i.prefixes:
            wrapped.setdefault(" and ".join(f"'{p}'" for p in i.prefixes), []).append(i.name)
    return [f"Names lose {prefix} in {console.some(tuple(names))}." for prefix, names in wrapped.items()]
