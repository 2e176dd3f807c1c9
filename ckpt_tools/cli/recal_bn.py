"""`ckpt recal-bn`: parse, recalibrate, show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..compute.progress import LOADING_TORCH
from ..errors import UsageError
from ..jobs.options import Images, Inference, Measuring, Network, RecalibratedOutput, State
from . import arguments, common, console, progress
from .tables import Table

if TYPE_CHECKING:
    from ..batchnorm.report import BatchNormReport
    from ..jobs.recalibrate import RecalibrationReport


@arguments.with_options(
    Network, State, Images, Measuring, RecalibratedOutput, Inference, images=arguments.number_of_images
)
def recal_bn(
    checkpoint: arguments.Averaged = None, *, all_: common.All = False, json: arguments.Json = False, **options: Any
) -> None:
    """Recalibrate the BatchNorm statistics of averaged weights.

    Example: ckpt recal-bn averaged.pth --data imagenet/train
    """
    if options["data"] is None:
        raise UsageError("--data is missing: the images to take the statistics from, such as --data imagenet/train.")
    arguments.check_folder()
    plans: list[RecalibrationReport] = []

    def show_plan(plan: RecalibrationReport) -> None:
        plans.append(plan)
        _show_plan(plan, console.shown_by(asked=options["dry_run"], json=json))

    with progress.shown(LOADING_TORCH) as line, console.printing_to_stderr():  # the user's own code
        from ..jobs.recalibrate import recalibrate_checkpoint

        line.idle(progress.PLANNING)
        callbacks = {"on_plan": line.planned(show_plan), "on_progress": line.tell}
        report = recalibrate_checkpoint(arguments.averaged(checkpoint), **options, **callbacks)
    if plans and (report.before is not None or report.written):  # of several processes only the first has a plan
        show_statistics(report)
        arguments.say_notes(report.notes[len(plans[0].notes) :])
    if report.statistics is not None and report.written:
        console.wrote(f"Wrote {report.out}: {console.plural(len(report.statistics.layers), 'layer')} recalibrated.")
        if options["plot"] is not None:
            console.wrote(f"Wrote {options['plot']}.")
    if json and plans:  # of several processes only the first has one
        console.print_json(arguments.plain(report))


def _show_plan(report: RecalibrationReport, tell: console.Tell) -> None:
    layers = console.plural(report.layers, "BatchNorm layer")
    tell(f"{report.path}: {report.state}, {report.model}, {layers}.")
    if report.layers:
        show_images(report, tell)
    if report.dropped:
        tell(f"Not carried over: {', '.join(report.dropped[:6])}.")
    arguments.say_notes(report.notes, tell)


def show_images(report: RecalibrationReport, tell: console.Tell) -> None:
    """Show which images the statistics are measured on, and how."""
    known = "" if report.images is None else f"{report.images} "
    passes = console.plural(report.passes, "pass", "passes")
    tell(f"Statistics of {known}images of {report.data}, in {passes} on {report.device}.")
    if report.preprocessing:
        from ..evaluation.preprocessing import described

        tell(*described(report.preprocessing, report.preprocessing_from))


def show_statistics(report: RecalibrationReport) -> None:
    """Show what was measured, and the accuracy before and after."""
    if report.statistics is not None:
        _show_statistics(report.statistics)
    _show_accuracy(report)


def _show_statistics(found: BatchNormReport) -> None:
    # A bar is full at one standard deviation.
    table = Table("layer", ("max |mean|", "max variance", "mean shift", "variance ratio"), full=1.0)
    for layer in found.layers:
        table.add(
            layer.name or layer.class_name,
            f"{layer.mean_before:.3g} → {layer.mean_after:.3g}",
            f"{layer.variance_before:.3g} → {layer.variance_after:.3g}",
            f"{layer.mean_moved:.2g} σ",
            f"x{layer.variance_moved:.3g}",
            bar=layer.mean_moved,
            colour="yellow" if layer.moved_far else "green",
        )
    console.say(table)
    for name, class_name, reason in found.skipped:
        console.say(f"Left as it is: {name} ({class_name}), {reason}.")
    rate = found.images * found.passes / found.seconds if found.seconds else 0
    batches = console.plural(found.batches, "batch", "batches")
    console.say("", f"{found.images} images in {batches}, {found.seconds:.1f} s ({rate:.0f} images/s).")
    means = [layer.mean_error for layer in found.layers if layer.mean_error is not None]
    variances = [layer.variance_error for layer in found.layers if layer.variance_error is not None]
    if means:
        console.say(
            f"Standard error with {found.images} images, in the worst channel: mean {max(means):.2g} σ, variance "
            f"{max(variances):.1%}. More images make it smaller."
        )

    if far := found.moved_far:
        from ..batchnorm.report import FAR_MEAN, FAR_VARIANCE

        worst = max(far, key=lambda layer: layer.mean_moved)
        console.say(
            f"Warning: the statistics of {console.plural(len(far), 'layer')} moved far (by more than {FAR_MEAN:g} σ or "
            f"x{FAR_VARIANCE:g}), most in {worst.name or worst.class_name}. A wrong size, mean or std of the images "
            "does that, and so do checkpoints that are far apart."
        )


def _show_accuracy(report: RecalibrationReport) -> None:
    if report.before is None:
        return
    table = Table(f"on {report.before.images} images", ("top-1 %", "top-5 %", "loss"))
    rows = (
        (("as it is", report.before),) if report.after is None else (("before", report.before), ("after", report.after))
    )
    for name, a in rows:
        table.add(name, f"{a.top1:.2f}", f"{a.top5:.2f}", f"{a.loss:.4f}")
    console.say("", table)
