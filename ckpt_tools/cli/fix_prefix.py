"""`ckpt fix-prefix`: parse, rename, show."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import arguments, console

if TYPE_CHECKING:
    from ..jobs.rename import PrefixReport


def fix_prefix(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CKPT", help="The checkpoint.", show_default="averaged.pth, or averaged.safetensors"),
    ] = None,
    strip: Annotated[
        list[str] | None,
        typer.Option(help="Take this off instead; repeatable.", metavar="P", show_default="what wrappers put on"),
    ] = None,
    add: Annotated[list[str] | None, typer.Option(help="Put this before all names; repeatable.", metavar="P")] = None,
    out: Annotated[str | None, arguments.out("The target.", default="CKPT itself, in one rename")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing target of -o.", rich_help_panel=arguments.OUTPUT)
    ] = False,
    dry_run: arguments.DryRun = False,
    json: arguments.Json = False,
) -> None:
    """Take wrapper prefixes off the names; nothing else changes.

    Example: ckpt fix-prefix averaged.pth
    """
    arguments.check_folder()
    from ..jobs import rename as prefixes

    started = time.perf_counter()
    with console.progress("copying") as on_progress:
        report = prefixes.fix_prefix(
            None if checkpoint is None else arguments.path(checkpoint),
            strip=strip or (), add=add or (), out=arguments.target(out), force=force, dry_run=dry_run,
            on_plan=_show, on_progress=on_progress,
        )  # fmt: skip
    if report.written:
        seconds = time.perf_counter() - started
        console.wrote(f"Wrote {report.out}: {console.size(report.nbytes)} in {seconds:.2f} s.")
    if json:
        console.print_json(report.to_dict())


def _show(report: PrefixReport) -> None:
    console.say(f"{report.path}: {report.format}, {console.plural(len(report.states), 'state dict')}.")
    for state in report.states:
        place = state.place or "the whole file"
        parts = [f"{number} of {state.names} names lose '{prefix}'" for prefix, number in state.removed.items()]
        parts += [f"{number} of {state.names} names get '{prefix}'" for prefix, number in state.added.items()]
        example = "" if state.example is None else " ({} becomes {})".format(*state.example)
        done = f"{', '.join(parts)}{example}" if parts else f"{console.plural(state.names, 'name')}, none to change"
        console.say(f"  {place}: {done}.")
    if not report.changed:
        console.say(f"Nothing to fix; it {'stays' if report.in_place else 'is copied'} as it is.")
    console.say(*report.notes)
