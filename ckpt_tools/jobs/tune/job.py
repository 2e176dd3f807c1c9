"""The job behind `ckpt tune`: a checkpoint, a model and labelled images to a checkpoint with a trained classifier."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ...batchnorm.processes import started_by_torchrun
from ...checkpoints.layouts import called
from ...checkpoints.layouts.schedule_free import refuse_computed
from ...checkpoints.open import Checkpoint
from ...compute.payload import torch_dtype
from ...compute.progress import LOADING_MODEL, OPENING_IMAGES, uncounted
from ...errors import ModelError, NumericsError, UsageError, unknown_word
from ...evaluation.data import is_factory
from ...evaluation.models import build_model, importable, load_weights, pick_device
from ...formats import read_header
from ...formats.file_plan import OutTensor
from ...series.paths import one_checkpoint
from ...tensors import TensorSpec
from ...tuning.features import check_space
from ...tuning.training import MOMENTUM, WEIGHT_DECAY, Recipe
from ..assembly import Assembly, rewrite
from ..computed import computed
from ..image_data import check_images
from ..option_groups import takes
from ..options import Inference, Network, Numerics, State
from ..outputs import Target, named_after
from ..provenance import input_record, provenance
from ..run import check_output, run, write
from .options import Classifier, LabelledImages, Teaching, Training, TunedOutput
from .report import TuneReport
from .setting import Setting, open_setting
from .work import worked

BATCH, RATE = 512, 1e-3
"""The learning rate of FixRes, and the batch size that it is for."""


@takes(Classifier, State, LabelledImages, Training, Teaching, TunedOutput, Inference)
def tune_checkpoint(
    path: str | Path,
    classifier: Classifier,
    weights: State,
    images: LabelledImages,
    training: Training,
    teaching: Teaching,
    output: TunedOutput,
    running: Inference,
) -> TuneReport:
    """Train the classifier of the weights in a checkpoint, or more of them, and write it anew.

    FixRes (Touvron et al. 2019, arXiv 1906.06423): at the size of the test, with the transform of the test, the last
    BatchNorm layer is measured and the classifier trained, by SGD with momentum 0.9 and weight decay 1e-4. What goes
    into the classifier is computed once. With a teacher, its outputs are learned, too; see `tuning_loss` in
    `ckpt_tools.tuning.losses`. Everything that is neither trained nor measured is kept byte for byte. See
    `build_model` in `ckpt_tools.evaluation.models` for models, and `open_data` in `ckpt_tools.evaluation.data` for
    data. The folders of factories are on `sys.path` meanwhile.

    Args:
        path: the checkpoint.
        {options}

    Returns:
        What was done, with top-1, top-5 and loss on `eval_data` before, after the recalibration, and after all.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    recipe = _recipe(images, training, teaching)
    which, numerics = Network(**vars(classifier)), Numerics(**vars(running))
    _check(images, training, teaching, output)
    source = one_checkpoint(path)
    checkpoint = Checkpoint(read_header(source), weights.state)
    header = checkpoint.header
    refuse_computed(header, checkpoint.state)
    usual = named_after(header, "-tuned")
    target = usual if output.out is None else Target.of(output.out, usual)
    device = pick_device(running.device)
    scratch = Path(tempfile.gettempdir() if training.scratch is None else training.scratch).expanduser()
    sources = [images.data, images.eval_data, teaching.teacher]
    with importable(which.model, *(each for each in sources if each is not None and is_factory(each))):
        with uncounted(running.on_progress, LOADING_MODEL):
            network = build_model(which.model, header, which.model_kwargs or {}, checkpoint.specs)
            loaded = load_weights(network, checkpoint)
        with uncounted(running.on_progress, OPENING_IMAGES):
            setting = open_setting(network, header, device, which, images, training, teaching, numerics)
        report = _planned(setting, checkpoint, source, target, images, training, teaching, recipe, loaded.notes)

        def lay_out(changed: Mapping[str, OutTensor], settings: Mapping[str, Any]) -> Assembly:
            record = provenance(
                "tune",
                {**settings, "amp": numerics.amp or None},
                state=checkpoint.state.label,
                input=input_record(header),
            )
            return rewrite(header, checkpoint.state, changed, target=target, provenance=record)

        plan = lay_out({}, report.settings)

        def check() -> None:
            check_output(plan, [header.path, *(stamp.path for stamp in header.files)], force=output.force)
            if report.feature_bytes:
                check_space(scratch, report.feature_bytes)

        def work(report: TuneReport) -> TuneReport:
            progress = running.on_progress or (lambda *_: None)
            done = worked(report, setting, recipe, scratch, progress, images.on_sizes or (lambda *_: None))
            if output.require_gain:
                _check_gain(done)
            changed = _changed(setting, loaded.names, checkpoint.specs)
            done = replace(done, notes=(*done.notes, *_rounded_away(setting, loaded.names, checkpoint)))
            final = lay_out(changed, report.settings)
            write(final, header.files, force=output.force, on_progress=running.on_progress)
            return done

        return run(replace(report, dropped=plan.dropped), running, check=check, work=work)


def _planned(
    setting: Setting,
    checkpoint: Checkpoint,
    source: Path,
    target: Target,
    images: LabelledImages,
    training: Training,
    teaching: Teaching,
    recipe: Recipe,
    said: Sequence[str],
) -> TuneReport:
    data = setting.data
    taught = teaching.teacher is not None
    settings = {
        "data": images.data,
        "images": data.images,
        "eval_data": images.eval_data,
        "preprocessing": dict(data.preprocessing) or None,
        "train": training.train,
        "head": None if setting.head is None else setting.head.name,
        "trained": list(setting.trained) or None,
        "recalibrated": list(setting.layers) or None,
        "epochs": recipe.epochs,
        "lr": recipe.lr,
        "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY,
        "batch_size": images.batch_size,
        "augment": training.augment or None,
        "ema_decay": recipe.ema_decay,
        "teacher": teaching.teacher,
        "alpha": recipe.alpha if taught else None,
        "temperature": recipe.temperature if taught else None,
        "seed": recipe.seed,
    }
    return TuneReport(
        path=str(source),
        out=str(target.path),
        state=called(checkpoint.header, checkpoint.state),
        model=setting.name,
        device=str(setting.device),
        data=images.data,
        eval_data=images.eval_data,
        images=data.images,
        classes=setting.classes,
        preprocessing={} if is_factory(images.data) else data.preprocessing,
        preprocessing_from={} if is_factory(images.data) else data.preprocessing_from,
        train=training.train,
        head=None if setting.head is None else setting.head.name,
        trained=setting.trained,
        parameters=sum(each.numel() for each in setting.parameters),
        recalibrated=tuple(setting.layers),
        settings={name: value for name, value in settings.items() if value is not None},
        teacher=None if setting.teacher is None else setting.teacher.name,
        feature_bytes=data.images * sum(row.nbytes for row in setting.rows),
        notes=(*said, *setting.notes),
    )


def _recipe(images: LabelledImages, training: Training, teaching: Teaching) -> Recipe:
    """Fill in what the options leave open."""
    return Recipe(
        epochs=training.epochs,
        lr=RATE * images.batch_size / BATCH if training.lr is None else training.lr,
        alpha=0.5 if teaching.alpha is None else teaching.alpha,
        temperature=5.0 if teaching.temperature is None else teaching.temperature,
        ema_decay=training.ema_decay,
        seed=training.seed,
    )


def _check(images: LabelledImages, training: Training, teaching: Teaching, output: TunedOutput) -> None:
    """Refuse impossible options before anything is read."""
    if started_by_torchrun():
        raise UsageError("a tuning runs in one process. Start it without torchrun.")
    check_images(images)
    if type(training.epochs) is not int or training.epochs < 1:
        raise UsageError(f"`epochs={training.epochs!r}`: must be a whole number from 1 on.")
    for size in images.sizes or ():
        if not math.isfinite(size) or size != int(size) or size < 1:
            raise UsageError(f"`sizes={list(images.sizes or ())}`: must be whole numbers from 1 on.")
    for name, found, known in (
        ("train", training.train, ("head", "last-block", "all")),
        ("recalibrate", training.recalibrate or "last", ("last", "all", "none")),
    ):
        if found not in known:
            raise unknown_word(name, found, known)
    lr, decay, alpha, heat = training.lr, training.ema_decay, teaching.alpha, teaching.temperature
    for name, number, fits, range_ in (
        ("lr", lr, lr is None or 0 < lr < math.inf, "above 0"),
        ("ema_decay", decay, decay is None or 0 <= decay < 1, "from 0 to below 1"),
        ("alpha", alpha, alpha is None or 0 <= alpha <= 1, "from 0 to 1"),
        ("temperature", heat, heat is None or 0 < heat < math.inf, "above 0"),
    ):
        if not fits:
            raise UsageError(f"`{name}={number!r}`: must be a number {range_}.")
    if teaching.teacher is None and (teaching.alpha is not None or teaching.temperature is not None):
        raise UsageError(f"`{'temperature' if teaching.alpha is None else 'alpha'}` goes with `teacher`.")
    if training.train == "all" and training.head is not None:
        raise UsageError("`head` has no effect with `train='all'`: the whole network is trained.")
    if images.eval_data is None and (output.require_gain or images.sizes is not None):
        raise UsageError(f"`{'require_gain' if output.require_gain else 'sizes'}` goes with `eval_data`.")


def _check_gain(report: TuneReport) -> None:
    stages = report.stages or {}
    before, after = stages["before"].loss, stages["after"].loss
    if not after <= before:
        raise NumericsError(
            f"the loss on {report.eval_data} went from {before:.4f} to {after:.4f}; nothing was written "
            "(`require_gain`)."
        )


_TOLD_FROM = 0.25
"""Part of a training, lost by rounding, from which on it is told."""


def _rounded_away(setting: Setting, stored: Mapping[str, str], checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a warning if the dtypes of the checkpoint are too coarse for what the training changed."""
    trained = {id(each) for each in setting.parameters}
    lost = moved = 0.0
    dtypes = set()
    for name, values in setting.network.named_parameters():
        spec = checkpoint.specs.get(stored.get(name, ""))
        if id(values) in trained and isinstance(spec, TensorSpec):
            new, old = (each.detach().cpu().double() for each in (values, checkpoint[stored[name]]))
            lost += (new.to(torch_dtype(spec.dtype)).double() - new).square().sum().item()
            moved += (new - old).square().sum().item()
            dtypes.add(spec.dtype.name)
    if moved and (part := math.sqrt(lost / moved)) > _TOLD_FROM:
        yield (
            f"The checkpoint is in {', '.join(sorted(dtypes))}, which is too coarse for what the training changed: "
            f"rounding moves the weights by {part:.0%} of that, so the file is not what was evaluated. Convert it to "
            "float32 before, or raise `lr`."
        )


def _changed(setting: Setting, stored: Mapping[str, str], specs: Mapping[str, Any]) -> dict[str, OutTensor]:
    """Return the tensors that change, with their names and dtypes in the checkpoint.

    Raises:
        ModelError: the checkpoint has no such tensor.
        NumericsError: a value overflows its dtype there.
    """
    network = setting.network
    trained = {id(each) for each in setting.parameters}
    measured = {id(each) for layer in setting.layers.values() for each in layer.buffers(recurse=False)}
    tensors: list[tuple[str, Tensor]] = [*network.named_parameters(remove_duplicate=False)]
    tensors += network.named_buffers(remove_duplicate=False)
    changed = {}
    made: dict[tuple[int, TensorSpec], OutTensor] = {}  # so that what was tied stays so
    for name, values in tensors:
        if id(values) not in trained | measured:
            continue
        spec = specs.get(stored.get(name, ""))
        if not isinstance(spec, TensorSpec):
            if id(values) in trained:
                raise ModelError(f"'{name}' was trained, and the checkpoint has no plain tensor for it.")
            continue  # files from before torch 0.4.1 lack the counter
        own, key = stored[name], (id(values), spec)
        if key not in made:
            made[key] = computed(values, spec.dtype, spec.shape, own, advice=" Lower `lr`.")
        changed[own] = made[key]
    return changed
