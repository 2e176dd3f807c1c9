"""`ckpt clean`: parse, remove what dead jobs have left, show."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import shortened
from ..jobs.options import Clearing
from . import arguments, console

if TYPE_CHECKING:
    from ..jobs.clean import CleanReport, Left

WHAT = {"output": "unfinished output", "replaced": "replaced folder", "parts": "job in parts"}


@arguments.with_options(Clearing)
def clean(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The folder that has the outputs of the jobs.")],
    *,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Remove what killed jobs have left in a folder.

    Example: ckpt clean runs/ --dry-run
    """
    from ..jobs.clean import clean as remove

    arguments.check_folder()
    report = remove(arguments.path(folder), **options)
    tell = console.shown_by(asked=options["dry_run"], json=json)
    for left in report.left:
        _show(left, tell)
    arguments.say_notes(report.notes, tell)
    tell(_verdict(report, dry_run=options["dry_run"]))
    if json:
        console.print_json(arguments.plain(report))
    if report.failed:
        raise typer.Exit(1)


def _show(left: Left, tell: console.Tell) -> None:
    doubted = "by its name " * (left.result == "kept" and bool(left.detail))
    facts = [f"{doubted}{WHAT[left.what]} of {left.target}", console.size(left.nbytes), f"{console.span(left.age)} old"]
    if left.done is not None:
        facts.append(f"{left.done:.0%} done")
    why = f" ({left.detail})" if left.detail else ""
    tell(f"{left.path}", f"  {left.result}{why}: {', '.join(facts)}")
    if left.begun:
        tell(f"  begun: part {console.some(left.begun)}")
    if left.command and left.result == "kept":
        where = f", in {left.folder}" if left.folder else ""
        more = "--part I/N, then --finish" if left.command[1:2] == ("diff",) else "--resume"
        tell(f"  to go on{where}: {shortened(shlex.join(left.command))} {more}")


def _verdict(report: CleanReport, *, dry_run: bool) -> str:
    if not report.left:
        return f"{report.folder}: no job has left anything here."
    gone = sum("removed" in left.result for left in report.left)
    verb = "Would remove" if dry_run else "Removed"
    return f"{verb} {gone} of {len(report.left)}, {console.size(report.freed)}."
