"""`ckpt strip`: parse, strip, show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..jobs.options import KeptState, Running, StrippedOutput
from . import arguments, console
from .arguments import spelled

if TYPE_CHECKING:
    from ..jobs.strip import StripReport


@arguments.takes(KeptState, StrippedOutput, Running)
def strip(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A file, or a folder of DCP; it is not changed.")],
    *,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Drop the optimizer and the rest of the training state.

    Example: ckpt strip checkpoint-300.pth.tar
    """
    arguments.check_folder()
    from ..jobs.strip import strip as without_training_state

    with console.progress("stripping") as on_progress:
        report = without_training_state(arguments.path(checkpoint), **options, on_plan=_show, on_progress=on_progress)
    if report.anything:
        console.wrote(f"{'Wrote' if report.written else 'Would write'} {report.out}: {_sizes(report)}.")
    if json:
        console.print_json(arguments.plain(report))


def _show(report: StripReport) -> None:
    if not report.anything:
        console.say(f"{report.path}: nothing to strip. Nothing was written.", *map(spelled, report.notes))
        return
    rows = [(entry.place, entry.nbytes) for entry in report.entries]
    if report.compacted > 0:
        rows.append(("unused parts of storages", report.compacted))
    names = max(len(place) for place, _ in rows)
    width = console.bar_width(names + 14)
    largest = max(nbytes for _, nbytes in rows)
    for place, nbytes in rows:
        console.say(f"  {place:<{names}} {console.size(nbytes):>9}  {console.bar(nbytes, largest, width)}".rstrip())
    console.say(f"Kept: {', '.join((*report.kept, *report.beside)) or 'the rest'}.")
    if report.dropped:
        console.say(f"Not carried over, because it is not plain data: {', '.join(report.dropped)}.")
    console.say(*map(spelled, report.notes))


def _sizes(report: StripReport) -> str:
    gained = report.nbytes - report.bytes_written
    return (
        f"{console.size(report.bytes_written)} of {console.size(report.nbytes)}, "
        f"{console.size(abs(gained))} ({abs(gained) / report.nbytes:.0%}) {'less' if gained >= 0 else 'more'}"
    )
