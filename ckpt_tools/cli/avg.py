"""`ckpt avg`: parse, average, show."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..jobs.options import AveragedOutput, Earlier, Fetched, Matching, Recalibration, Selection, Sharing, Summing
from ..series.schedules import Schedule
from . import arguments, console
from .recal_bn import show_images, show_statistics

if TYPE_CHECKING:
    from ..jobs.average import AverageReport


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
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Average a series of checkpoints into one set of weights.

    Example: ckpt avg runs/*.pth --mode ema --decay 0.99
    """
    from ..jobs.average import average

    if not paths and options["replay"] is None:
        raise UsageError("Missing argument 'PATH', the checkpoints to average. Try 'ckpt avg --help'.")
    plans: list[AverageReport] = []

    def show(plan: AverageReport) -> None:
        plans.append(plan)
        (_show_table if options["dry_run"] else _show_summary)(plan)

    with nullcontext() if options["recal_bn"] is None else console.printing_to_stderr():  # the user's own code
        report, seconds = arguments.carried_out(average, "averaging", paths or [], **options, on_plan=show)
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
        console.wrote(f"Wrote {report.out}: {console.size(report.bytes_written)}{took}.")
        if options["plot"] is not None:
            console.wrote(f"Wrote {options['plot']}.")
        if report.compared:
            console.say(report.compared)
    if json and arguments.reports(report, **options):
        console.print_json(arguments.plain(report))
    if report.same is False:
        raise typer.Exit(1)


def _rate(report: AverageReport, seconds: float) -> str:
    read, written = (console.size(nbytes / seconds) for nbytes in (report.bytes_read, report.bytes_written))
    return f" ({read}/s read, {written}/s written)"


def _show_summary(report: AverageReport) -> None:
    first, last = report.inputs[0], report.inputs[-1]
    n = len(report.inputs)
    span = f"{first.name} to {last.name}, in the order of {report.ordered_by}" if n > 1 else first.name
    console.say(
        f"{console.plural(n, 'checkpoint')}: {span}. Weights: {last.state}. Mode: {report.mode}.", *_prefixes(report)
    )
    _show_dropped(report)
    _show_recalibration(report)
    arguments.say_notes(report.notes)


def _show_recalibration(report: AverageReport) -> None:
    if (plan := report.recalibration) is not None:
        layers = console.plural(plan.layers, "layer")
        console.say(
            f"BatchNorm: {layers} of {plan.model}, measured before the output is written. "
            f"Meanwhile the sums take {console.size(report.scratch)} beside it."
        )
        show_images(plan)


def _show_dropped(report: AverageReport) -> None:
    if report.left_out:
        console.say(f"Left out, because some checkpoints do not have them: {console.some(report.left_out)}.")
    if report.dropped:
        console.say(f"Not carried over from the last checkpoint: {console.some(report.dropped)}.")
    if report.companions:
        console.say(f"Copied beside the weights: {console.some(report.companions)}.")


def _show_table(report: AverageReport) -> None:
    from rich.text import Text

    width = console.bar_width(40)
    table = console.table("checkpoint", ("step", "coefficient"), bars=width, cut=False)
    largest = max(abs(i.coefficient) for i in report.inputs)
    for i in report.inputs:
        step = "" if i.step is None else str(i.step)
        drawn = Text(console.bar(i.coefficient, largest, width), style="red" if i.coefficient < 0 else "green")
        table.add_row(Text(console.visible(i.name)), step, f"{i.coefficient:.6f}", drawn)
    console.stderr().print(table)
    where = "" if report.device == "cpu" else f"; sums on {report.device}"
    console.say(
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
        f"takes {console.size(report.peak_memory)} of memory, {console.size(report.memory)} of it buffers{where}.",
    )
    _show_dropped(report)
    _show_recalibration(report)
    arguments.say_notes(report.notes)


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
