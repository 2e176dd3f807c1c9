"""`ckpt strip`: parse, strip one checkpoint or several, show."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SeriesError
from ..jobs.options import KeptState, Moving, Sharing, StrippedOutput
from . import arguments, console
from .tables import Table

if TYPE_CHECKING:
    from ..jobs.strip import StripReport


@arguments.with_options(KeptState, StrippedOutput, Sharing, Moving)
def strip(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CKPT", help="Files, quoted globs, folders of DCP, folders of these; not changed."),
    ],
    *,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Drop the optimizer and the rest of the training state.

    Example: ckpt strip checkpoint-300.pth.tar
    """
    from ..jobs.strip import check_together
    from ..jobs.strip import strip as without_training_state

    sources = _sources([arguments.path(each) for each in checkpoints])
    if len(sources) > 1:
        options["out"] = check_together(sources, **options)
    tell = console.shown_by(asked=options["dry_run"], json=json)
    show = partial(_show, tell, several=len(sources) > 1)
    reports = []
    for source in sources:
        report, _ = arguments.carried_out(without_training_state, source, **options, on_plan=show)
        arguments.say_part(report.part)
        if report.written or (report.anything and not report.part):
            last = source == sources[-1]  # until then signals still end the run
            (tell if not report.written else console.wrote if last else console.say)(_result(report))
        if arguments.reports(report, **options):
            reports.append(arguments.plain(report))
    if json and reports:
        console.print_json({"checkpoints": reports})


def _sources(given: Sequence[str]) -> Sequence[Path]:
    """Find the checkpoints that paths lead to.

    Raises:
        SeriesError: a path leads to none.
    """
    from ..series.paths import expand, find, one_checkpoint

    alone = expand(given)
    if len(given) == len(alone) == 1:
        return [one_checkpoint(given[0]) if Path(given[0]).exists() else alone[0]]
    notes: list[str] = []
    found = find(given, notes)
    if found.empty:
        raise SeriesError(f"{found.empty[0]}: a folder without weights, beside others. Leave it out.")
    arguments.say_notes(notes)
    return found.paths


def _show(tell: console.Tell, report: StripReport, *, several: bool) -> None:
    if not report.anything:
        tell(f"{report.path}: nothing to strip, so no file is written.")
    else:
        _show_entries(console.say_more if several else tell, report)
    head = f"{report.path}: " if several else ""
    arguments.say_notes((head + note for note in report.notes), tell)


def _show_entries(tell: console.Tell, report: StripReport) -> None:
    rows = [(entry.place, entry.nbytes) for entry in report.entries]
    if report.compacted > 0:
        rows.append(("unused parts of storages", report.compacted))
    table = Table("", ("",), indent=2)
    for place, nbytes in rows:
        table.add(place, console.size(nbytes), bar=nbytes)
    tell(table)
    tell(f"Kept: {', '.join((*report.kept, *report.beside)) or 'the rest'}.")
    if report.dropped:
        tell(f"Not carried over, because it is not plain data: {', '.join(report.dropped)}.")


def _result(report: StripReport) -> str:
    return f"{'Wrote' if report.written else 'Would write'} {report.out}: {_sizes(report)}."


def _sizes(report: StripReport) -> str:
    gained = report.nbytes - report.bytes_written
    return (
        f"{console.size(report.bytes_written)} of {console.size(report.nbytes)}, "
        f"{console.size(abs(gained))} ({abs(gained) / report.nbytes:.0%}) {'less' if gained >= 0 else 'more'}"
    )
