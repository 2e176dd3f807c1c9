"""The work of a tuning: evaluate, recalibrate, train; the network changes in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...batchnorm.batches import images_of
from ...compute.progress import Activity, Progress
from ...errors import ModelError
from ...evaluation.data import Batches
from ...evaluation.evaluators import Scores
from ...evaluation.runner import large_blocks_kept
from ...evaluation.scores import Accuracy, Outcomes
from ...tuning.examples import Example, as_logits, called, labelled, taught
from ...tuning.features import mapped, stored
from ...tuning.head import Head, Tap
from ...tuning.normalisation import only
from ...tuning.training import Recipe, fit, seeded
from ..sweep.verdict import compared, in_words
from .report import Change, SizeScore, TuneReport
from .setting import Setting

_WHOLE = ("after", "before")


def worked(
    report: TuneReport,
    setting: Setting,
    recipe: Recipe,
    scratch: Path,
    progress: Progress,
    on_sizes: Callable[[tuple[SizeScore, ...]], None],
) -> TuneReport:
    """Evaluate, recalibrate, train and evaluate again; return the report with what came of it.

    Args:
        scratch: folder for features.
        on_sizes: called with the scores at other image sizes, if there are any, before the training.
    """
    sizes = tuple(_size_score(size, batches, setting, progress) for size, batches in setting.data.sizes.items())
    if sizes:
        on_sizes(sizes)
    stages: dict[str, Outcomes] = {}

    def score(stage: str) -> None:
        if setting.data.held_out is not None:
            stages[stage] = setting.runner.outcomes(f"evaluating {stage}", setting.data.held_out, progress)

    score("before")
    if setting.layers:
        recalibrate(setting, progress)
        score("recalibrated")
    started = time.perf_counter()
    losses = train(setting, recipe, scratch, progress)
    if report.train != "head" and setting.layers:
        recalibrate(setting, progress)
    seconds = time.perf_counter() - started
    score("after")
    opened = (setting.data.measured, setting.data.trained, setting.data.held_out)
    broken = {each: None for batches in opened if batches is not None for each in batches.broken}
    notes = list(report.notes)
    if broken:
        notes.append(f"Images that could not be read and were left out: {len(broken)}, such as {next(iter(broken))}.")
    changes = tuple(
        Change(stage, other, tuple(compared(_scores(stages[stage]), _scores(stages[other]), seed=recipe.seed)))
        for stage, other in (("recalibrated", "before"), ("after", "recalibrated"), _WHOLE)
        if stage in stages and other in stages
    )
    return replace(
        report,
        sizes=sizes,
        stages={stage: _accuracy(each) for stage, each in stages.items()} or None,
        changes=changes,
        verdict=_verdict(changes),
        losses=tuple(losses),
        seconds=seconds,
        broken=tuple(broken),
        notes=tuple(notes),
    )


def recalibrate(setting: Setting, progress: Progress) -> None:
    """Measure the statistics of the chosen BatchNorm layers on the training images, in the test transform.

    Raises:
        CkptError: of the network, the data and the values.
    """
    with only(setting.network, setting.layers):
        setting.runner.recalibrate(setting.data.measured, 1, "population", progress)


def train(setting: Setting, recipe: Recipe, scratch: Path, progress: Progress) -> list[float]:
    """Train what is to be trained; return the mean loss of each epoch.

    Raises:
        CkptError: of the network, the data, the disk and the values.
    """
    data = setting.data
    head = setting.head if setting.train == "head" else None
    module = setting.network if head is None else head.module

    def show(number: int, done: int) -> None:
        name = f"training, epoch {number + 1} of {recipe.epochs}"
        progress(Activity(name, "images", step="training"), done, data.images)

    def examples(batches: Iterable[Any]) -> Iterator[Example]:
        return _images(setting, batches) if head is None else _features(setting, head, batches)

    def anew(number: int) -> Iterator[Example]:
        show(number, 0)
        yield from examples(data.trained.reordered(recipe.seed + number) if number else data.trained)

    training = partial(fit, setting.parameters, partial(_through, setting, module), recipe=recipe, on_batch=show)
    with seeded(recipe.seed, setting.device), _blocks(setting), _trainable(setting):
        if not setting.rows:
            return training(anew, data.steps)
        with mapped(scratch, data.images, setting.rows) as (inputs, *logits):
            seen = _counted(data.measured, Activity("computing features", "images"), progress)
            features = stored(examples(seen), inputs, logits[0] if logits else None)

            def stored_again(number: int) -> Iterator[Example]:
                show(number, 0)
                yield from _on(setting.device, features.epoch(number, recipe.seed))

            return training(stored_again, len(features.sizes))


def _through(setting: Setting, module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Call what is trained, in mixed precision if that is asked for."""
    with setting.runner.autocast:
        return as_logits(setting.name, called(setting.name, module, inputs), len(inputs), setting.classes)


def _features(setting: Setting, head: Head, batches: Iterable[Any]) -> Iterator[Example]:
    """Yield what goes into the classifier."""
    with Tap(setting.network, head).open() as tap:
        for images, labels in labelled(batches, setting.classes):
            placed = setting.placed(images)
            with setting.runner.autocast:
                features, _ = called(setting.name, tap, placed)
                logits = _taught(setting, placed)
            yield features, labels.to(setting.device), logits


def _images(setting: Setting, batches: Iterable[Any]) -> Iterator[Example]:
    """Yield the images themselves."""
    for images, labels in labelled(batches, setting.classes):
        placed = setting.placed(images)
        with setting.runner.autocast:
            logits = _taught(setting, placed)
        yield placed, labels.to(setting.device), logits


def _taught(setting: Setting, images: torch.Tensor) -> torch.Tensor | None:
    teacher = setting.teacher
    return None if teacher is None else taught(teacher.name, teacher, images, setting.classes)


def _on(device: torch.device, examples: Iterable[Example]) -> Iterator[Example]:
    for inputs, labels, logits in examples:
        yield inputs.to(device), labels.to(device), None if logits is None else logits.to(device)


@contextmanager
def _trainable(setting: Setting) -> Iterator[None]:
    """Let gradients flow to what is trained, and put it into train mode; buffers that move meanwhile are put back.

    A classifier alone stays in eval mode, as the network in front of it does. BatchNorm layers that are not measured
    afterwards normalise by their stored statistics, which stay as they are.
    """
    network = setting.network
    buffers = [(each, each.clone()) for each in network.buffers()]
    asked = [(each, each.requires_grad) for each in network.parameters()]
    network.eval().requires_grad_(False)
    try:
        for parameter in setting.parameters:
            parameter.requires_grad_(True)
        if setting.train != "head":
            measured = {*setting.layers.values()}
            for name in setting.trained or ("",):
                network.get_submodule(name).train()
            for layer in network.modules():
                if isinstance(getattr(layer, "running_var", None), torch.Tensor) and layer not in measured:
                    layer.eval()
        yield
    finally:
        network.eval()
        with torch.no_grad():
            for parameter, was in asked:
                parameter.requires_grad_(was)
                parameter.grad = None
            for buffer, copy in buffers:
                buffer.copy_(copy)


def _counted(batches: Batches, work: Activity, progress: Progress) -> Iterator[Any]:
    done = 0
    progress(work, 0, batches.images)
    for batch in batches:
        yield batch
        done += len(images_of(batch))
        progress(work, done, batches.images)


def _blocks(setting: Setting) -> Any:
    return large_blocks_kept() if setting.device.type == "cpu" else nullcontext()


def _scores(found: Outcomes) -> Scores:
    """Return the scores of a stage; a metric that is not finite on all images has no samples to compare."""
    metrics = {name: float(each.mean()) for name, each in found.samples.items()}
    return Scores(metrics, {name: each for name, each in found.samples.items() if each.isfinite().all()})


def _accuracy(found: Outcomes) -> Accuracy:
    return Accuracy(**_scores(found).metrics, images=len(found.loss), outputs=found.outputs)


def _size_score(size: int, batches: Batches, setting: Setting, progress: Progress) -> SizeScore:
    try:
        return SizeScore(size, _accuracy(setting.runner.outcomes(f"evaluating at size {size}", batches, progress)))
    except ModelError as error:
        return SizeScore(size, None, str(error))


def _verdict(changes: tuple[Change, ...]) -> tuple[str, ...]:
    found = [each for change in changes if (change.stage, change.other) == _WHOLE for each in change.comparisons]
    return tuple(
        in_words(each, lower_is_better=each.metric == "loss", other="the untuned checkpoint")
        for each in found
        if each.metric in ("top1", "loss")
    )
