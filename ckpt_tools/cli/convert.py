"""`ckpt convert`: parse, convert, show."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..jobs.options import Computing, ConvertedOutput, ConvertedState, Missing, Sharing
from . import arguments, common, console

if TYPE_CHECKING:
    from ..jobs.convert import ConvertReport


@arguments.with_options(ConvertedOutput, ConvertedState, Missing, Sharing, Computing)
def convert(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="CKPT [OUT]", help="A file, or a folder. The target, or -o.", show_default=False),
    ] = None,
    *,
    list_: Annotated[
        bool, typer.Option("--list", help="List the layouts.", rich_help_panel=ConvertedOutput.title), common.ONE_RUN
    ] = False,
    json: arguments.Json = False,
    **options: Any,
) -> None:
    """Write a checkpoint in another layout, file format or dtype.

    Example: ckpt convert checkpoint-9.pth --to averaged-model -o swa.pth
    """
    if list_:
        _list(as_json=json)
        return
    if not paths:
        raise UsageError("CKPT is missing: the checkpoint to convert. ckpt convert --list shows the layouts.")
    source, *further = map(arguments.path, paths)
    if further:
        options["out"] = _target(further, options["out"])
    if options["out"] is None:
        raise UsageError("-o is missing: where to write, such as -o weights.safetensors.")
    from ..jobs.convert import convert as run

    tell = console.shown_by(asked=options["dry_run"], json=json)
    report, seconds = arguments.carried_out(run, source, **options, on_plan=partial(_show, tell))
    arguments.say_part(report.part)
    if report.written:
        out = console.output(report.out, report.files, report.companions)
        console.wrote(f"Wrote {out}: {console.size(report.bytes_written)} in {seconds:.2f} s.")
    if json and arguments.reports(report, **options):
        console.print_json(arguments.plain(report))


def _target(paths: Sequence[str], out: str | None) -> str:
    """Return the second path as the target.

    Raises:
        UsageError: it may be another checkpoint to convert.
    """
    path, *more = paths
    if more or out is not None:
        raise UsageError(f"{(more or paths)[0]}: convert takes one checkpoint at a time, and one target, by -o.")
    if os.path.lexists(path):
        raise UsageError(f"{path}: exists, so it is not clear that it is the target. If it is, give it with -o.")
    if not {".", "/"} & {*path}:
        raise UsageError(f"{path}: a folder to write, or a layout? Say -o {path}, or --to {path}.")
    return path


def _show(tell: console.Tell, report: ConvertReport) -> None:
    alone = all(label.startswith("raw") for label in report.state)  # which many layouts keep at one place
    tell(
        f"{report.path}: {report.format}{'' if alone else f', layout {report.layout}'}.",
        f"To layout {report.to}, {console.plural(report.tensors, 'tensor')}: {', '.join(report.placed)}.",
    )
    if report.dropped:
        tell(f"Not carried over: {console.some(report.dropped)}.")
    arguments.say_notes(report.notes, tell)


def _list(*, as_json: bool) -> None:
    from ..checkpoints.layouts import LAYOUTS

    if as_json:
        console.print_json([{"name": e.name, "about": e.about, "written": e.written} for e in LAYOUTS])
        return
    width = max(len(layout.name) for layout in LAYOUTS)
    for layout in LAYOUTS:
        read_only = "" if layout.written else " (is read, not written)"
        console.show(f"{layout.name:<{width}}  {layout.about}{read_only}")
