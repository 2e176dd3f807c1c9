"""`ckpt recal-bn`: parse, recalibrate, show."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import arguments, console

if TYPE_CHECKING:
    from ..batchnorm.report import BatchNormReport
    from ..jobs.recalibrate import RecalibrationReport

_MODEL, _DATA, _STATISTICS = "The network", "The data", "The statistics"


def recal_bn(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CKPT", help="The checkpoint.", show_default="averaged.pth, or averaged.safetensors"),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Folder of images, tar, timm dataset (hfds/...), or file.py:factory.",
            metavar="DATA",
            rich_help_panel=_DATA,
        ),
    ] = "",
    model: Annotated[
        str | None,
        typer.Option(
            help="timm name, module:factory or file.py:factory.",
            show_default="arch in the checkpoint",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    model_kwargs: Annotated[
        list[str] | None,
        typer.Option(help="Such as num_classes=10; repeatable.", metavar="K=V", rich_help_panel=_MODEL),
    ] = None,
    state: arguments.State = "auto",
    images: Annotated[
        str | None,
        typer.Option(
            help="How many, at random: a number, or all.",
            metavar="N",
            show_default="8192, or all if fewer",
            rich_help_panel=_DATA,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images a batch.", rich_help_panel=_DATA)] = 64,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            help="Processes that decode images.",
            show_default="the cores, 8 at most",
            rich_help_panel=_DATA,
        ),
    ] = None,
    img_size: Annotated[
        int | None, typer.Option(help="Side of the images.", show_default="the model's", rich_help_panel=_DATA)
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(help="Part of the image that the crop keeps.", show_default="the model's", rich_help_panel=_DATA),
    ] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="bilinear, bicubic, ...", show_default="the model's", rich_help_panel=_DATA)
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="0.5 or 0.485,0.456,0.406.", show_default="the model's", rich_help_panel=_DATA),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="As --mean.", show_default="the model's", rich_help_panel=_DATA)
    ] = None,
    split: Annotated[str, typer.Option(help="Of a named dataset.", rich_help_panel=_DATA)] = "validation",
    data_root: Annotated[
        str | None, typer.Option(help="Where a named dataset is.", metavar="DIR", rich_help_panel=_DATA)
    ] = None,
    passes: Annotated[
        int,
        typer.Option(
            help="1: by batch statistics; more: again, with those just found in use.", rich_help_panel=_STATISTICS
        ),
    ] = 1,
    estimator: Annotated[
        str, typer.Option(help="population or batch-mean.", rich_help_panel=_STATISTICS)
    ] = "population",
    seed: Annotated[int, typer.Option(help="Of the random subset.", rich_help_panel=_STATISTICS)] = 0,
    eval_: Annotated[
        str | None,
        typer.Option("--eval", help="Accuracy on these before and after.", metavar="DATA", rich_help_panel=_STATISTICS),
    ] = None,
    require_gain: Annotated[
        bool,
        typer.Option("--require-gain", help="Write nothing if that loss gets worse.", rich_help_panel=_STATISTICS),
    ] = False,
    out: Annotated[str | None, arguments.out("The target.", default="CKPT with -bn")] = None,
    force: arguments.Force = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=arguments.RUNNING)] = "auto",
    amp: Annotated[
        bool, typer.Option("--amp", help="Mixed precision, bfloat16.", rich_help_panel=arguments.RUNNING)
    ] = False,
    channels_last: Annotated[
        bool, typer.Option(help="Memory order of the images.", rich_help_panel=arguments.RUNNING)
    ] = True,
    dry_run: arguments.DryRun = False,
    json: arguments.Json = False,
) -> None:
    """Recalibrate the BatchNorm statistics of averaged weights.

    Example: ckpt recal-bn averaged.pth --data imagenet/train
    """
    if not data:
        raise UsageError("--data is missing: the images to take the statistics from, such as --data imagenet/train.")
    arguments.check_folder()
    from ..jobs.recalibrate import recalibrate_checkpoint

    plans: list[RecalibrationReport] = []

    def show_plan(plan: RecalibrationReport) -> None:
        plans.append(plan)
        _show_plan(plan)

    with console.counting("images") as on_progress, redirect_stdout(sys.stderr):  # the user's own code may print
        report = recalibrate_checkpoint(
            None if checkpoint is None else arguments.path(checkpoint),
            data=data, model=model, model_kwargs=arguments.parse_kwargs(model_kwargs or []), images=_count(images),
            batch_size=batch_size, workers=workers, split=split, data_root=data_root, img_size=img_size,
            crop_pct=crop_pct, interpolation=interpolation, mean=arguments.numbers("--mean", mean),
            std=arguments.numbers("--std", std), state=state, device=device, amp=amp, channels_last=channels_last,
            passes=passes, estimator=estimator, seed=seed, eval_data=eval_, require_gain=require_gain,
            out=arguments.target(out), force=force, dry_run=dry_run, on_plan=show_plan, on_progress=on_progress,
        )  # fmt: skip
    if report.statistics is not None and report.written:
        _show_statistics(report.statistics)
        _show_accuracy(report)
        console.say(*report.notes[len(plans[0].notes) :])
        console.wrote(f"Wrote {report.out}: {console.plural(len(report.statistics.layers), 'layer')} recalibrated.")
    if json and plans:  # of several processes only the first has one
        console.print_json(report.to_dict())


def _count(text: str | None) -> int | None:
    if text is None or text == "all":
        return None if text is None else -1
    if not text.isdecimal() or int(text) < 2:
        raise UsageError(f"--images {text}: a number, 2 or more, or all.")
    return int(text)


def _show_plan(report: RecalibrationReport) -> None:
    layers = console.plural(report.layers, "BatchNorm layer")
    console.say(f"{report.path}: {report.state}, {report.model}, {layers}.")
    if report.layers:
        known = "" if report.images is None else f"{report.images} "
        passes = console.plural(report.passes, "pass", "passes")
        console.say(f"Statistics of {known}images of {report.data}, in {passes} on {report.device}.")
    if report.preprocessing:
        p = dict(report.preprocessing)
        console.say(
            f"Images: {'x'.join(map(str, p['input_size']))}, crop {p['crop_pct']:g} ({p['crop_mode']}), "
            f"{p['interpolation']}, mean {_numbers(p['mean'])}, std {_numbers(p['std'])}."
        )
    if report.dropped:
        console.say(f"Not carried over: {', '.join(report.dropped[:6])}.")
    console.say(*report.notes)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _show_statistics(found: BatchNormReport) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console.stderr()
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for title in ("largest mean", "largest variance", "mean by", "var by"):
        table.add_column(title, justify="right", overflow="fold")
    longest = max((len(layer.name) for layer in found.layers), default=0)
    width = console.bar_width(longest + 54)
    table.add_column("", no_wrap=True, width=width)
    largest = max((layer.mean_moved for layer in found.layers), default=0.0)
    for layer in found.layers:
        finite = layer.mean_moved != float("inf")
        drawn = console.bar(layer.mean_moved if finite else 1, largest if largest != float("inf") else 1, width)
        table.add_row(
            Text(console.visible(layer.name or layer.kind)),
            f"{layer.mean_before:.3g} → {layer.mean_after:.3g}",
            f"{layer.variance_before:.3g} → {layer.variance_after:.3g}",
            f"{layer.mean_moved:.2g} σ",
            f"x{layer.variance_moved:.3g}",
            Text(drawn, style="green"),
        )
    screen.print(table)
    for name, kind, reason in found.skipped:
        console.say(f"Left as it is: {name} ({kind}), {reason}.")
    rate = found.images * found.passes / found.seconds if found.seconds else 0
    batches = console.plural(found.batches, "batch", "batches")
    console.say("", f"{found.images} images in {batches}, {found.seconds:.1f} s ({rate:.0f} images/s).")
    means = [layer.mean_error for layer in found.layers if layer.mean_error is not None]
    variances = [layer.variance_error for layer in found.layers if layer.variance_error is not None]
    if means:
        console.say(f"Sampling error of the worst channel: mean {max(means):.2g} σ, variance {max(variances):.1%}.")


def _show_accuracy(report: RecalibrationReport) -> None:
    if report.before is None or report.after is None:
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(f"on {report.before.images} images", overflow="fold")
    for title in ("top-1 %", "top-5 %", "loss"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, a in (("before", report.before), ("after", report.after)):
        table.add_row(name, f"{a.top1:.2f}", f"{a.top5:.2f}", f"{a.loss:.4f}")
    console.say("")
    console.stderr().print(table)
