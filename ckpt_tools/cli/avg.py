"""`ckpt avg`: parse, average, show."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from . import arguments, console

if TYPE_CHECKING:
    from ..jobs.average import AverageReport

_SCHEDULE, _SELECTION = "How much each counts", "Which checkpoints"


def avg(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Files, quoted globs, folders (of checkpoints, or sharded).")
    ],
    mode: Annotated[str, typer.Option(help="uniform, ema or weights.", rich_help_panel=_SCHEDULE)] = "uniform",
    decay: Annotated[
        float | None,
        typer.Option(
            help="ema: for a checkpoint; with --per-step, for a training step.",
            show_default="0.99",
            rich_help_panel=_SCHEDULE,
        ),
    ] = None,
    per_step: Annotated[
        bool, typer.Option("--per-step", help="ema: decay^(step gap).", rich_help_panel=_SCHEDULE)
    ] = False,
    warmup: Annotated[
        str | None, typer.Option(help="ema: litema or timm; the decay grows.", rich_help_panel=_SCHEDULE)
    ] = None,
    bias_correction: Annotated[
        bool,
        typer.Option("--bias-correction", help="ema: start from zero, divide by 1-d^N.", rich_help_panel=_SCHEDULE),
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="With --mode weights: 1,2,3, oldest first.", rich_help_panel=_SCHEDULE)
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Divide --weights by their sum.", rich_help_panel=_SCHEDULE)] = True,
    last: Annotated[int | None, typer.Option(help="The last N.", metavar="N", rich_help_panel=_SELECTION)] = None,
    best: Annotated[
        int | None, typer.Option(help="The best N by --metric.", metavar="N", rich_help_panel=_SELECTION)
    ] = None,
    metric: Annotated[
        str, typer.Option(help="Key in the files, dotted if nested.", metavar="KEY", rich_help_panel=_SELECTION)
    ] = "metric",
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="For a loss.", rich_help_panel=_SELECTION)
    ] = False,
    every: Annotated[
        int | None, typer.Option(help="Every K-th, counted from the last.", metavar="K", rich_help_panel=_SELECTION)
    ] = None,
    from_step: Annotated[
        int | None, typer.Option(help="From this step (or epoch) on.", rich_help_panel=_SELECTION)
    ] = None,
    to_step: Annotated[int | None, typer.Option(help="Up to this step (or epoch).", rich_help_panel=_SELECTION)] = None,
    order: Annotated[
        str,
        typer.Option(
            help="auto (stored step or epoch, else numbers in names), given, natural, mtime.",
            rich_help_panel=_SELECTION,
        ),
    ] = "auto",
    include_outputs: Annotated[
        bool,
        typer.Option("--include-outputs", help="Take files that ckpt wrote itself, too.", rich_help_panel=_SELECTION),
    ] = False,
    state: Annotated[
        str,
        typer.Option(
            help="auto (EMA where all have one), raw, ema, or a dotted path.", rich_help_panel=arguments.WEIGHTS
        ),
    ] = "auto",
    match: Annotated[str, typer.Option(help="name or order.", rich_help_panel=arguments.WEIGHTS)] = "name",
    keys: Annotated[
        str, typer.Option(help="strict, intersection or union.", rich_help_panel=arguments.WEIGHTS)
    ] = "strict",
    buffers: Annotated[
        str,
        typer.Option(
            help="average, or last: BatchNorm statistics of the last checkpoint.", rich_help_panel=arguments.WEIGHTS
        ),
    ] = "average",
    out: Annotated[
        str | None,
        arguments.out(
            "The suffix picks the format; none: a folder of shards.", default="averaged.pth, or as the inputs are"
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the output: same, float32, bfloat16, ...", rich_help_panel=arguments.OUTPUT)
    ] = "same",
    max_shard_size: arguments.MaxShardSize = None,
    untie: arguments.Untie = False,
    hash_: Annotated[
        bool, typer.Option("--hash", help="Record the SHA-256 of the inputs.", rich_help_panel=arguments.OUTPUT)
    ] = False,
    force: arguments.Force = False,
    threads: arguments.Threads = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda (all GPUs), cuda:1 (that one). Same bytes.", rich_help_panel=arguments.RUNNING
        ),
    ] = "auto",
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="To take on each GPU, such as 2GB.",
            metavar="SIZE",
            show_default="1GB",
            rich_help_panel=arguments.RUNNING,
        ),
    ] = None,
    dry_run: arguments.DryRun = False,
    json: arguments.Json = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Let NaN and infinity pass.", rich_help_panel=arguments.RUNNING)
    ] = False,
) -> None:
    """Average a series of checkpoints into one set of weights.

    Example: ckpt avg runs/*.pth --mode ema --decay 0.99
    """
    arguments.check_folder()
    from ..jobs.average import average

    started = time.perf_counter()
    with console.progress("averaging") as on_progress:
        report = average(
            paths, mode=mode, decay=decay, per_step=per_step, warmup=warmup, bias_correction=bias_correction,
            weights=arguments.numbers("--weights", weights), normalize=normalize, last=last, best=best, metric=metric,
            lower_is_better=lower_is_better, every=every, from_step=from_step, to_step=to_step, order=order,
            include_outputs=include_outputs, state=state, match=match, keys=keys, buffers=buffers,
            out=arguments.target(out), dtype=dtype, max_shard_size=max_shard_size, untie=untie,
            hash=hash_, force=force, threads=threads, device=device, gpu_memory=gpu_memory, dry_run=dry_run,
            allow_nonfinite=allow_nonfinite,
            on_plan=_show_table if dry_run else _show_summary, on_progress=on_progress,
        )  # fmt: skip
    if report.written:
        seconds = time.perf_counter() - started
        moved = report.bytes_read + report.bytes_written
        # Small jobs take as long as importing torch takes.
        rate = f" ({console.size(moved / seconds)}/s read and written)" if moved > 1e8 else ""
        where = "" if report.device == "cpu" else f" on {report.device}"
        console.wrote(f"Wrote {report.out}: {console.size(report.bytes_written)} in {seconds:.2f} s{where}{rate}.")
    if json:
        console.print_json(report.to_dict())


def _show_summary(report: AverageReport) -> None:
    first, last = report.inputs[0], report.inputs[-1]
    n = len(report.inputs)
    span = f"{first.name} to {last.name}, in the order of {report.ordered_by}" if n > 1 else first.name
    console.say(f"{console.plural(n, 'checkpoint')}: {span}. Weights: {last.state}. Mode: {report.mode}.")
    _show_dropped(report)
    console.say(*report.notes)


def _show_dropped(report: AverageReport) -> None:
    if report.left_out:
        console.say(f"Left out, for some checkpoints lack them: {_some(report.left_out)}.")
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
    console.say(*report.notes)


def _prefixes(report: AverageReport) -> list[str]:
    """Say which names lose their wrapper prefixes."""
    wrapped: dict[str, list[str]] = {}
    for i in report.inputs:
        if i.prefixes:
            wrapped.setdefault(" and ".join(f"'{p}'" for p in i.prefixes), []).append(i.name)
    return [f"Names lose {prefix} in {_some(tuple(names))}." for prefix, names in wrapped.items()]


def _some(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
