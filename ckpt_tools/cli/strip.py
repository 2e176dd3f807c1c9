"""`ckpt strip`: parse, strip, show."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..jobs.options import KeptState, Moving, Sharing, StrippedOutput
from . import arguments, console
from .tables import Table

if TYPE_CHECKING:
    from ..jobs.strip import StripReport


@arguments.with_options(KeptState, StrippedOutput, Sharing, Moving)
def strip(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A file, or a folder of DCP; it is not changed.")],
    *,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Drop the optimizer and the rest of the training state.

    Example: ckpt strip checkpoint-300.pth.tar
    """
    from ..jobs.strip import strip as without_training_state

    source = arguments.path(checkpoint)
    tell = console.shown_by(asked=options["dry_run"], json=json)
    report, _ = arguments.carried_out(
        without_training_state, "stripping", source, **options, on_plan=partial(_show, tell)
    )
    arguments.say_part(report.part)
    if report.anything and (report.written or not report.part):
        text = f"{report.out}: {_sizes(report)}."
        console.wrote(f"Wrote {text}") if report.written else tell(f"Would write {text}")
    if json and arguments.reports(report, **options):
        console.print_json(arguments.plain(report))


def _show(tell: console.Tell, report: StripReport) -> None:
    if not report.anything:
        tell(f"{report.path}: nothing to strip. Nothing was written.")
        arguments.say_notes(report.notes, tell)
        return
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
    arguments.say_notes(report.notes, tell)


def _sizes(report: StripReport) -> str:
    gained = report.nbytes - report.bytes_written
    return (
        f"{console.size(report.bytes_written)} of {console.size(report.nbytes)}, "
        f"{console.size(abs(gained))} ({abs(gained) / report.nbytes:.0%}) {'less' if gained >= 0 else 'more'}"
    )
