"""`ckpt look`: parse, measure, show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..jobs.options import Alignment, Drawing, Reading, Selection
from . import arguments, common, console
from .tables import Table

if TYPE_CHECKING:
    from ..jobs.look import LookReport


@arguments.with_options(Selection, Alignment, Drawing, Reading)
def look(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, quoted globs, folders (of checkpoints, or sharded).")
    ],
    *,
    top: Annotated[int, typer.Option(help="Show the N tensors that move most.", metavar="N")] = 5,
    all_: common.All = False,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Show where the checkpoints of a series lie to each other, before they are averaged.

    Example: ckpt look runs/
    """
    if top < 0:
        raise UsageError(f"`top={top}`: must be 0 or more.")
    from ..jobs.look import look as measure

    report, _ = arguments.carried_out(measure, paths, **options)
    _show(report, top, console.shown_by(asked=True, json=json))
    if options["plot"] is not None:
        console.wrote(f"Wrote {options['plot']}.")
    if json:
        console.print_json(arguments.plain(report))


def _show(report: LookReport, top: int, tell: console.Tell) -> None:
    rates = any(each.learning_rate is not None for each in report.checkpoints)
    ages = any(each.start_left is not None for each in report.checkpoints)
    columns = ("step", "to mean", "to next", "cosine", *(["lr"] if rates else []), *(["start left"] if ages else []))
    table = Table("checkpoint", columns)
    for each in report.checkpoints:
        table.add(
            each.name,
            _cell(each.step, "d"),
            _cell(each.to_mean, ".4g"),
            _cell(each.to_next, ".4g"),
            _cell(each.cosine, "+.2f"),
            *([_cell(each.learning_rate, ".3g")] if rates else []),
            *([_cell(each.start_left, ".1%")] if ages else []),
            bar=each.to_mean,
            colour="red" if each.name == report.outlier else "green",
        )
    norm = sum(each.norm for each in report.checkpoints) / len(report.checkpoints)
    tell(
        table,
        "",
        f"Ordered by {report.ordered_by}; weights: {report.state}. Read {console.size(report.bytes_read)}.",
        f"The norm of the checkpoints is {norm:.4g} on average, and that of their mean {report.mean_norm:.4f} of it.",
    )
    moving = [*report.movement.items()][:top]
    if moving:
        shown = ", ".join(f"{console.visible(name)} ({share:.2%})" for name, share in moving)
        tell(f"These tensors move most, relative to their norm: {shown}.")
    arguments.say_notes(report.notes, tell)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
