"""`ckpt convert`: parse, convert, show."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import arguments, console

if TYPE_CHECKING:
    from ..jobs.convert import ConvertReport

_NAMES = "What the checkpoint does not say"


def convert(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CKPT", help="A file, or a folder.", show_default=False)
    ] = None,
    to: Annotated[
        str,
        typer.Option(metavar="LAYOUT", help="plain, timm-ema, averaged-model, ...", rich_help_panel=arguments.OUTPUT),
    ] = "plain",
    out: Annotated[
        str | None, arguments.out("The suffix picks the format; none: a folder of shards.", default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the layouts.", rich_help_panel=arguments.OUTPUT)] = False,
    state: Annotated[
        str,
        typer.Option(
            help="auto (both where LAYOUT keeps both, else the EMA), raw, ema, or a dotted path.",
            rich_help_panel=arguments.WEIGHTS,
        ),
    ] = "auto",
    names_from: Annotated[
        str | None,
        typer.Option(metavar="CKPT", help="A checkpoint of the same model, for names.", rich_help_panel=_NAMES),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Instead: timm name, module:factory or file.py:factory.", rich_help_panel=_NAMES),
    ] = None,
    model_kwargs: Annotated[
        list[str] | None,
        typer.Option(help="Such as num_classes=10; repeatable.", metavar="K=V", rich_help_panel=_NAMES),
    ] = None,
    updates: Annotated[
        int | None, typer.Option(metavar="N", help="How often the average was updated.", rich_help_panel=_NAMES)
    ] = None,
    decay: Annotated[float | None, typer.Option(help="Of the EMA.", rich_help_panel=_NAMES)] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: same, float32, bfloat16, ...", rich_help_panel=arguments.OUTPUT)
    ] = "same",
    max_shard_size: arguments.MaxShardSize = None,
    untie: arguments.Untie = False,
    force: arguments.Force = False,
    threads: arguments.Threads = None,
    dry_run: arguments.DryRun = False,
    json: arguments.Json = False,
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite", help="With --dtype: let NaN and infinity pass.", rich_help_panel=arguments.RUNNING
        ),
    ] = False,
) -> None:
    """Write a checkpoint in another layout, file format or dtype.

    Example: ckpt convert checkpoint-9.pth --to averaged-model -o swa.pth
    """
    if list_:
        _list(as_json=json)
        return
    if checkpoint is None:
        raise UsageError("CKPT is missing: the checkpoint to convert. ckpt convert --list shows the layouts.")
    if out is None:
        raise UsageError("-o is missing: where to write, such as -o weights.safetensors.")
    arguments.check_folder()
    from ..jobs.convert import convert as run

    kwargs = None
    if model_kwargs:
        kwargs = arguments.parse_kwargs(model_kwargs)
    started = time.perf_counter()
    with console.progress("converting") as on_progress:
        report = run(
            arguments.path(checkpoint),
            to=to, out=arguments.target(out) or out, state=state, dtype=dtype, max_shard_size=max_shard_size,
            names_from=names_from, model=model, model_kwargs=kwargs, updates=updates, decay=decay, untie=untie,
            threads=threads, allow_nonfinite=allow_nonfinite, force=force, dry_run=dry_run,
            on_plan=_show, on_progress=on_progress,
        )  # fmt: skip
    if report.written:
        seconds = time.perf_counter() - started
        console.wrote(f"Wrote {report.out}: {console.size(report.bytes_written)} in {seconds:.2f} s.")
    if json:
        console.print_json(report.to_dict())


def _show(report: ConvertReport) -> None:
    console.say(
        f"{report.path}: {report.format}, layout {report.layout}.",
        f"To layout {report.to}, {console.plural(report.tensors, 'tensor')}: {', '.join(report.placed)}.",
    )
    if report.dropped:
        shown = ", ".join(report.dropped[:6])
        more = f" and {len(report.dropped) - 6} more" if len(report.dropped) > 6 else ""
        console.say(f"Not carried over: {shown}{more}.")
    console.say(*report.notes)


def _list(*, as_json: bool) -> None:
    from ..checkpoints.layouts import LAYOUTS

    if as_json:
        console.print_json([{"name": e.name, "about": e.about, "written": e.written} for e in LAYOUTS])
        return
    width = max(len(layout.name) for layout in LAYOUTS)
    for layout in LAYOUTS:
        read_only = "" if layout.written else " (is read, not written)"
        console.say(f"{layout.name:<{width}}  {layout.about}{read_only}")
