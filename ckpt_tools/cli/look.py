"""`ckpt look`: parse, measure, show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..jobs.options import Alignment, Drawing, Reading, Selection
from . import arguments, console

if TYPE_CHECKING:
    from ..jobs.look import LookReport


@arguments.with_options(Selection, Alignment, Drawing, Reading)
def look(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, quoted globs, folders (of checkpoints, or sharded).")
    ],
    *,
    top: Annotated[int, typer.Option(help="Show the N tensors that move most.", metavar="N")] = 5,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Show where the checkpoints of a series lie to each other, before they are averaged.

    Example: ckpt look runs/
    """
    if top < 0:
        raise UsageError(f"`top={top}`: must be 0 or more.")
    from ..jobs.look import look as measure

    report, _ = arguments.carried_out(measure, "measuring", paths, **options)
    _show(report, top)
    if options["plot"] is not None:
        console.wrote(f"Wrote {options['plot']}.")
    if json:
        console.print_json(arguments.plain(report))


def _show(report: LookReport, top: int) -> None:
    from rich.text import Text

    width = console.bar_width(50)
    rates = any(each.learning_rate is not None for each in report.checkpoints)
    columns = ("step", "to mean", "to next", "cosine", *(["lr"] if rates else []))
    table = console.table("checkpoint", columns, bars=width, cut=False)
    farthest = max(each.to_mean for each in report.checkpoints)
    for each in report.checkpoints:
        table.add_row(
            Text(console.visible(each.name)),
            "" if each.step is None else str(each.step),
            f"{each.to_mean:.4g}",
            "" if each.to_next is None else f"{each.to_next:.4g}",
            "" if each.cosine is None else f"{each.cosine:+.2f}",
            *([("" if each.learning_rate is None else f"{each.learning_rate:.3g}")] if rates else []),
            Text(console.bar(each.to_mean, farthest, width), style="green"),
        )
    console.stderr().print(table)
    norm = sum(each.norm for each in report.checkpoints) / len(report.checkpoints)
    console.say(
        "",
        f"Ordered by {report.ordered_by}; weights: {report.state}. Read {console.size(report.bytes_read)}.",
        f"The checkpoints have a norm of {norm:.4g}, and their mean {report.mean_norm:.4f} of it.",
    )
    moving = [*report.movement.items()][:top]
    if moving:
        shown = ", ".join(f"{console.visible(name)} ({share:.2%})" for name, share in moving)
        console.say(f"These tensors move most, relative to their norm: {shown}.")
    arguments.say_notes(report.notes)
