"""`ckpt tune`: parse, train, show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..compute.progress import LOADING_TORCH
from ..errors import UsageError
from ..jobs.options import Inference, State
from ..jobs.tune.options import Classifier, LabelledImages, Teaching, Training, TunedOutput
from . import arguments, console, progress
from .tables import Table

if TYPE_CHECKING:
    from ..evaluation.scores import Accuracy
    from ..jobs.tune.report import SizeScore, TuneReport


@arguments.with_options(
    Classifier, State, LabelledImages, Training, Teaching, TunedOutput, Inference, images=arguments.number_of_images
)
def tune(checkpoint: arguments.Averaged = None, *, json: arguments.Json = False, **options: Any) -> None:
    """Train the classifier of averaged weights at the size of the test, or more of the network, or from a teacher.

    Example: ckpt tune averaged.pth --data imagenet/train --eval imagenet/val --img-size 288
    """
    if options["data"] is None:
        raise UsageError("--data is missing: the images to train on, such as --data imagenet/train.")
    arguments.check_folder()
    plans: list[TuneReport] = []

    def show_plan(plan: TuneReport) -> None:
        plans.append(plan)
        _show_plan(plan, console.shown_by(asked=options["dry_run"], json=json))

    with progress.shown(LOADING_TORCH) as line, console.printing_to_stderr():  # the user's own code
        from ..jobs.tune.job import tune_checkpoint

        line.idle(progress.PLANNING)
        callbacks = {"on_plan": line.planned(show_plan), "on_sizes": _show_sizes, "on_progress": line.tell}
        report = tune_checkpoint(arguments.averaged(checkpoint), **options, **callbacks)
    if report.written:
        _show_result(report)
        arguments.say_notes(report.notes[len(plans[0].notes) :])
        console.wrote(f"Wrote {report.out}: {_what(report)}.")
    if json:
        console.print_json(arguments.plain(report))


def _what(report: TuneReport) -> str:
    trained = f"{console.count(report.parameters)} parameters trained"
    layers = console.plural(len(report.recalibrated), "BatchNorm layer")
    return f"{trained}, {layers} recalibrated" if report.recalibrated else trained


def _show_plan(report: TuneReport, tell: console.Tell) -> None:
    tell(f"{report.path}: {report.state}, {report.model}, {report.classes} classes.")
    if report.preprocessing:
        from ..evaluation.preprocessing import described

        tell(*described(report.preprocessing, report.preprocessing_from))
    if report.recalibrated:
        tell(f"BatchNorm layers to measure: {console.some(report.recalibrated)}.")
    trained = console.some(report.trained) if report.trained else "the whole network"
    s = report.settings
    tell(
        f"To train: {trained} ({console.count(report.parameters)} parameters), on {report.images} images of "
        f"{report.data}, {console.plural(s['epochs'], 'epoch')}, learning rate {s['lr']:g}, on {report.device}."
    )
    if report.teacher is not None:
        tell(f"With {report.teacher}: weight {s['alpha']:g}, temperature {s['temperature']:g}.")
    if report.feature_bytes:
        tell(f"Features on the disk: {console.size(report.feature_bytes)}, removed at the end.")
    if report.dropped:
        tell(f"Not carried over: {console.some(report.dropped)}.")
    arguments.say_notes(report.notes, tell)


def _show_sizes(sizes: Sequence[SizeScore]) -> None:
    table = Table("image size, without training", ("top-1 %", "top-5 %", "loss"))
    for each in sizes:
        table.add(str(each.size), *(("refused", "", "") if each.accuracy is None else _figures(each.accuracy)))
    console.say("", table)
    for each in sizes:
        if each.error is not None:
            console.say(f"Size {each.size}: {arguments.spelled(each.error)}")


def _show_result(report: TuneReport) -> None:
    if report.stages:
        images = next(iter(report.stages.values())).images
        table = Table(f"on {images} images", ("top-1 %", "top-5 %", "loss"))
        for stage, accuracy in report.stages.items():
            table.add(stage, *_figures(accuracy))
        console.say("", table)
        for change in report.changes:
            told = {each.metric: each for each in change.comparisons}
            parts = [
                f"{name} {c.difference:+.{digits}f}"
                + ("" if c.low is None or c.high is None else f" [{c.low:+.{digits}f}, {c.high:+.{digits}f}]")
                + ("" if c.p is None else f" (p = {c.p:.2g})")
                + ("" if c.shown else ", no difference shown")
                for name, c, digits in (("top-1", told["top1"], 2), ("loss", told["loss"], 4))
            ]
            console.say(f"{change.stage} against {change.other}: {'; '.join(parts)}.")
        console.say(*report.verdict)
    first, last = report.losses[0], report.losses[-1]
    console.say(
        "", f"Training loss {first:.4f} in the first epoch, {last:.4f} in the last; {report.seconds:.1f} s for all."
    )


def _figures(a: Accuracy) -> tuple[str, str, str]:
    return f"{a.top1:.2f}", f"{a.top5:.2f}", f"{a.loss:.4f}"
