"""`ckpt avg`: parse, average, show."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..jobs.options import AveragedOutput, Matching, Selection, Summing
from ..series.schedules import Schedule
from . import arguments, console
from .arguments import spelled

if TYPE_CHECKING:
    from ..jobs.average import AverageReport


@arguments.takes(Schedule, Selection, Matching, AveragedOutput, Summing)
def avg(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, quoted globs, folders (of checkpoints, or sharded).")
    ],
    *,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Average a series of checkpoints into one set of weights.

    Example: ckpt avg runs/*.pth --mode ema --decay 0.99
    """
    arguments.check_folder()
    from ..jobs.average import average

    show = _show_table if options["dry_run"] else _show_summary
    started = time.perf_counter()
    with console.progress("averaging") as on_progress:
        report = average(paths, **options, on_plan=show, on_progress=on_progress)
    if report.written:
        seconds = time.perf_counter() - started
        moved = report.bytes_read + report.bytes_written
        # Small jobs take as long as importing torch takes.
        rate = f" ({console.size(moved / seconds)}/s read and written)" if moved > 1e8 else ""
        where = "" if report.device == "cpu" else f" on {report.device}"
        console.wrote(f"Wrote {report.out}: {console.size(report.bytes_written)} in {seconds:.2f} s{where}{rate}.")
    if json:
        console.print_json(arguments.plain(report))


def _show_summary(report: AverageReport) -> None:
    first, last = report.inputs[0], report.inputs[-1]
    n = len(report.inputs)
    span = f"{first.name} to {last.name}, in the order of {report.ordered_by}" if n > 1 else first.name
    console.say(f"{console.plural(n, 'checkpoint')}: {span}. Weights: {last.state}. Mode: {report.mode}.")
    _show_dropped(report)
    console.say(*map(spelled, report.notes))


def _show_dropped(report: AverageReport) -> None:
    if report.left_out:
        console.say(f"Left out, because some checkpoints do not have them: {_some(report.left_out)}.")
    if report.dropped:
        console.say(f"Not carried over from the last checkpoint: {_some(report.dropped)}.")


def _show_table(report: AverageReport) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console.stderr()
    table = Table(box=None, pad_edge=False)
    table.add_column("checkpoint", overflow="fold")
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("coefficient", justify="right", no_wrap=True)
    width = console.bar_width(40)
    table.add_column("", no_wrap=True, width=width)
    largest = max(abs(i.coefficient) for i in report.inputs)
    for i in report.inputs:
        step = "" if i.step is None else str(i.step)
        drawn = Text(console.bar(i.coefficient, largest, width), style="red" if i.coefficient < 0 else "green")
        table.add_row(Text(console.visible(i.name)), step, f"{i.coefficient:.6f}", drawn)
    screen.print(table)
    where = "" if report.device == "cpu" else f"; sums on {report.device}"
    console.say(
        "",
        f"Ordered by {report.ordered_by}; mode {report.mode}; "
        f"weights: {', '.join(dict.fromkeys(i.state for i in report.inputs))}.",
        *_prefixes(report),
        f"{console.plural(len(report.averaged), 'tensor')} averaged, "
        f"{len(report.copied)} copied from the last checkpoint"
        + (f", {len(report.tied)} tied" if report.tied else "")
        + (f", {len(report.left_out)} left out" if report.left_out else "")
        + ".",
        f"Reads {console.size(report.bytes_read)}, writes {console.size(report.bytes_written)} to {report.out}; "
        f"at most {console.size(report.memory)} of buffers{where}.",
    )
    _show_dropped(report)
    console.say(*map(spelled, report.notes))


def _prefixes(report: AverageReport) -> list[str]:
    """Describe which names lose wrapper prefixes."""
    wrapped: dict[str, list[str]] = {}
    for i in report.inputs:
        if i.prefixes:
            wrapped.setdefault(" and ".join(f"'{p}'" for p in i.prefixes), []).append(i.name)
    return [f"Names lose {prefix} in {_some(tuple(names))}." for prefix, names in wrapped.items()]


def _some(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
