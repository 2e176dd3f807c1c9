"""The job behind `ckpt recal-bn`: a checkpoint, a model and data to a checkpoint with new statistics."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm.calls import Call
from ..batchnorm.layers import find_layers
from ..batchnorm.processes import Group, gathered_objects, joined_group, local_device
from ..batchnorm.recalibrate import check_options
from ..batchnorm.report import BatchNormReport
from ..checkpoints.layouts import called
from ..checkpoints.layouts.schedule_free import refuse_computed
from ..checkpoints.open import Checkpoint
from ..compute.progress import LOADING_MODEL, OPENING_IMAGES, Progress, uncounted
from ..errors import DataError, NumericsError, UsageError
from ..evaluation.data import Batches, is_factory
from ..evaluation.models import Loaded, build_model, call_of, importable, load_weights, pick_device
from ..evaluation.preprocessing import Preprocessing
from ..evaluation.runner import Runner
from ..evaluation.scores import Accuracy, Fit
from ..formats import read_header
from ..formats.file_plan import OutTensor
from ..series.paths import one_checkpoint
from ..tensors import DTYPES, TensorSpec
from .assembly import Assembly, rewrite
from .checksums import with_place
from .computed import computed
from .image_data import check_images, fewer_classes, image_data, notes_of, same_data
from .option_groups import takes
from .options import Images, Inference, Measuring, Network, Numerics, RecalibratedOutput, State
from .outputs import Target, named, named_after
from .pictures import Picture
from .provenance import input_record, provenance
from .reports import Report
from .run import check_output, run, write
from .sign_off import SignOff


@dataclass(frozen=True, slots=True, repr=False)
class RecalibrationReport(Report):
    """What a recalibration does; the plan before the work, and the result after it.

    Attributes:
        path, out: the checkpoint, and the new one.
        state: which weights, such as ``ema (state_dict_ema)``, or ``weights`` where there is one set.
        model, device: class of the network, and its device.
        data: as given.
        images: number of images; None in a plan if the data have no length.
        preprocessing: size, crop, interpolation, mean and std; empty where the user's code prepares the images.
        preprocessing_from: each of these with where it is from.
        layers: number of BatchNorm layers to recalibrate.
        passes: over the images.
        statistics: the new statistics; None in a plan.
        broken: images that could not be read, each with the reason.
        before, after: accuracy on the data of `eval_data`; None if that is not asked for. Without BatchNorm there is
            `before` alone.
        notes: decisions and warnings, in words.
        dropped: entries of the checkpoint that cannot be written.
        written: True once the new checkpoint is there.
    """

    path: str
    out: str
    state: str
    model: str
    device: str
    data: str
    images: int | None
    preprocessing: Mapping[str, Any]
    preprocessing_from: Mapping[str, str]
    layers: int
    passes: int
    statistics: BatchNormReport | None = None
    broken: tuple[str, ...] = ()
    before: Accuracy | None = None
    after: Accuracy | None = None
    notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    written: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "statistics"}
        plain |= {key: asdict(value) for key in ("before", "after") if (value := plain[key]) is not None}
        return plain | {"statistics": None if self.statistics is None else self.statistics.to_dict()}


@takes(Network, State, Images, Measuring, RecalibratedOutput, Inference)
def recalibrate_checkpoint(
    path: str | Path,
    which: Network,
    weights: State,
    images: Images,
    measuring: Measuring,
    output: RecalibratedOutput,
    running: Inference,
) -> RecalibrationReport:
    """Give the weights in a checkpoint the BatchNorm statistics of some data, and write it anew.

    Everything but the buffers of the BatchNorm layers is kept byte for byte. See `build_model` in
    `ckpt_tools.evaluation.models` for models, `open_data` in `ckpt_tools.evaluation.data` for data, and
    `recalibrate_bn` for the statistics. The folders of factories are on `sys.path` meanwhile.

    Args:
        path: the checkpoint.
        {options}

    Returns:
        What was done. For a model without BatchNorm, the report has no layers, and nothing is written; the accuracy on
        `eval_data` is there all the same.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    check(images, measuring)
    picture = Picture.of(output.plot, force=output.force)
    source = one_checkpoint(path)
    checkpoint = Checkpoint(read_header(source), weights.state)
    refuse_computed(checkpoint.header, checkpoint.state)
    usual = named_after(checkpoint.header, "-bn")
    target = usual if output.out is None else Target.of(output.out, usual)
    device = local_device(pick_device(running.device))
    numerics = Numerics(**vars(running))
    with (
        joined_group(device) as group,
        opened(checkpoint, which, images, measuring, numerics, device, group, running.on_progress) as network,
    ):
        report = network.planned(target)
        if not group.first:  # it neither speaks nor writes
            running = Inference(**{**vars(running), "on_plan": None, "on_progress": None})
        if network.batches is None:
            nothing = "The model has no BatchNorm statistics; nothing to do."
            if network.held_out is not None:
                nothing = "The model has no BatchNorm statistics: nothing to recalibrate. It is evaluated as it is."
            return run(
                replace(report, notes=(*report.notes, nothing)),
                running,
                work=lambda plan: network.measured(plan, running.on_progress or (lambda *_: None)),
                completes=lambda: False,
            )
        header = checkpoint.header

        def lay_out(buffers: Mapping[str, OutTensor], done: RecalibrationReport) -> Assembly:
            record = provenance(
                "recal-bn",
                network.record(done),
                state=checkpoint.state.label,
                input=input_record(header),
            )
            assembly = rewrite(header, checkpoint.state, buffers, target=target, provenance=record)
            return with_place(assembly, output.write_checksums)

        plan = lay_out({}, report)

        def check_plan() -> None:
            inputs = [header.path, *(stamp.path for stamp in header.files)]
            check_output(plan, inputs, force=output.force, sign_off=output.sign_off)
            if picture is not None:
                picture.check(inputs, plan.target)

        def work(report: RecalibrationReport) -> RecalibrationReport:
            report = network.measured(report, running.on_progress or (lambda *_: None))
            if group.first and report.statistics is not None:
                buffers = new_buffers(network.network, report.statistics, network.loaded, checkpoint.specs)
                sign_off = None if output.sign_off is None else SignOff(Path(output.sign_off), header.files)
                final, tell = lay_out(buffers, report), running.on_progress
                write(final, header.files, force=output.force, sign_off=sign_off, on_progress=tell)
            return report

        dropped = replace(report, dropped=plan.dropped)
        done = run(dropped, running, check=check_plan if group.first else None, work=work)
        if picture is not None and done.written and group.first and done.statistics is not None:
            from .report_pictures import BATCHNORM_SIZE, draw_batchnorm

            found = done.statistics
            picture.write(lambda figure: draw_batchnorm(found, figure), BATCHNORM_SIZE)
        return done if group.first else replace(done, written=False)


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A network, and the images that its statistics are measured on.

    Attributes:
        checkpoint: whose network it is, and whose weights it has.
        network, device, group: the network, on its device, in one of the processes that share the images.
        call: how it is called.
        which, images, measuring, numerics: as asked for.
        loaded: names in the network to names in the checkpoint.
        layers: number of BatchNorm layers.
        batches: images for the statistics; None if there are no layers.
        held_out: images for the accuracy; None if that is not asked for.
        preprocessing: of the images; None if the user's code prepares them.
        notes: decisions, in words.
    """

    checkpoint: Checkpoint
    which: Network
    network: nn.Module
    call: Call
    device: torch.device
    group: Group
    images: Images
    measuring: Measuring
    numerics: Numerics
    loaded: Loaded
    layers: int
    batches: Batches | None
    held_out: Batches | None
    preprocessing: Preprocessing | None
    notes: tuple[str, ...]

    def planned(self, target: Target) -> RecalibrationReport:
        """Return the report of the plan."""
        shown = None if is_factory(self.images.data) else self.preprocessing
        return RecalibrationReport(
            path=str(self.checkpoint.path),
            out=str(target.path),
            state=called(self.checkpoint.header, self.checkpoint.state),
            model=type(self.network).__name__,
            device=str(self.device),
            data=self.images.data,
            images=None if self.batches is None else self.batches.images,
            preprocessing={} if shown is None else shown.config,
            preprocessing_from={} if shown is None else shown.sources,
            layers=self.layers,
            passes=self.measuring.passes,
            notes=self.notes,
        )

    def measured(self, report: RecalibrationReport, progress: Progress) -> RecalibrationReport:
        """Run the network over the images; return the report with statistics and accuracy.

        Raises:
            CkptError: the network or the images fail, or there is no gain and one is required.
        """
        numerics = self.numerics
        runner = Runner(
            self.network, self.device, amp=numerics.amp, channels_last=numerics.channels_last, call=self.call
        )
        if self.batches is None:
            if self.held_out is None:
                return report
            found = runner.evaluate("evaluating", self.held_out, progress)
            return replace(report, before=found, notes=(*report.notes, *_of_evaluation(self.held_out, found)))
        report = _measured(report, runner, self.batches, self.held_out, self.measuring, progress)
        if self.measuring.require_gain:
            _check_gain(report, self.measuring.eval_data)
        return report

    def record(self, report: RecalibrationReport) -> dict[str, Any]:
        """Return how the statistics are measured, for the provenance; the number of images once it is known."""
        return {
            "data": self.images.data,
            "images": (self.batches and self.batches.images) or report.images,
            "seed": self.measuring.seed,
            "passes": self.measuring.passes,
            "estimator": self.measuring.estimator,
            "include_frozen": self.measuring.include_frozen or None,
            "allow_unmeasured": self.measuring.allow_unmeasured or None,
            "forward": self.which.forward,
            "inputs": self.which.inputs if self.which.inputs != 1 else None,
            "mask": self.which.mask,
            "batch_size": self.images.batch_size,
            "amp": self.numerics.amp or None,
            "preprocessing": None if self.preprocessing is None else self.preprocessing.config,
        }


@contextmanager
def opened(
    checkpoint: Checkpoint,
    which: Network,
    images: Images,
    measuring: Measuring,
    numerics: Numerics,
    device: torch.device,
    group: Group,
    on_progress: Progress | None,
) -> Iterator[Opened]:
    """Build the network of a checkpoint, fill it, and open the images; the folders of factories are on `sys.path`.

    Args:
        on_progress: called with (what is done, how much of it so far, all of it).

    Raises:
        CkptError: the network or the images cannot be used.
    """
    sources = [data for data in (images.data, measuring.eval_data) if data and is_factory(data)]
    with importable(which.model, which.forward, *sources):
        with uncounted(on_progress, LOADING_MODEL):
            call = call_of(which.forward, which.inputs, which.mask)
            network = build_model(which.model, checkpoint.header, which.model_kwargs or {}, checkpoint.specs)
            found, skipped = find_layers(network, include_frozen=measuring.include_frozen)
            loaded = load_weights(network, checkpoint, measured=statistics_of(network, found))
            network.to(device)
        with uncounted(on_progress, OPENING_IMAGES):
            batches, held_out, preprocessing, notes = _opened(
                network, checkpoint, images, measuring, group, pin_memory=device.type == "cuda", wanted=bool(found)
            )
        notes = [*loaded.notes, *notes]
        if batches is not None and batches.once and measuring.passes > 1:
            raise UsageError(
                f"`passes={measuring.passes}` needs data that can be read again: the factory gives an iterator."
            )
        if batches is None:
            notes += [f"Left as it is: {name or 'the model'} ({of}), {reason}." for name, of, reason in skipped]
        yield Opened(
            checkpoint=checkpoint,
            which=which,
            network=network,
            call=call,
            device=device,
            group=group,
            images=images,
            measuring=measuring,
            numerics=numerics,
            loaded=loaded,
            layers=len(found),
            batches=batches,
            held_out=held_out,
            preprocessing=preprocessing,
            notes=tuple(notes),
        )


def statistics_of(network: nn.Module, layers: Collection[str]) -> frozenset[str]:
    """Return the names of the buffers of BatchNorm layers."""
    return frozenset(name for name in network.state_dict() if name.rpartition(".")[0] in layers)


def check(images: Images, measuring: Measuring) -> None:
    """Refuse impossible options before anything is read."""
    check_images(images)
    check_options(measuring.passes, measuring.estimator)
    if measuring.require_gain and measuring.eval_data is None:
        raise UsageError("`require_gain` goes with `eval_data`.")


def _opened(
    network: nn.Module,
    checkpoint: Checkpoint,
    images: Images,
    measuring: Measuring,
    group: Group,
    *,
    pin_memory: bool,
    wanted: bool,
) -> tuple[Batches | None, Batches | None, Preprocessing | None, list[str]]:
    """Open the data, preprocessed as in the training unless options change it.

    Returns:
        (images for the statistics, None if not `wanted`; images for the accuracy, None if not asked for; preprocessing,
        None if the user's code prepares the images; notes).
    """
    data, eval_data = images.data, measuring.eval_data
    labelled = [] if eval_data is None else [eval_data]
    given = {"data": data if wanted else None, "eval_data": eval_data}
    sources = {option: source for option, source in given.items() if source is not None}
    if not sources:
        return None, None, None, []
    how = image_data(
        network, checkpoint.header, images, sources, labelled, seed=measuring.seed, group=group, pin_memory=pin_memory
    )
    batches = how.statistics(data) if wanted else None
    notes = [] if batches is None else [*notes_of(data, batches, images, labelled=False)]
    held_out = None
    if eval_data is not None:
        with named("eval_data", "data"):
            held_out = how.evaluated(eval_data)
        said = notes_of(eval_data, held_out, images, labelled=True)
        notes += [note for note in said if note not in notes]
        if same_data(data, eval_data):
            notes.append(
                "`eval_data` is the same as `data`, so the accuracy afterwards is higher than on images that were not "
                "used for the statistics."
            )
    return batches, held_out, how.preprocessing, notes


_LOOKED_AT = 256
"""Images on which the loss before and after is compared if there are no others to evaluate."""


def _measured(
    report: RecalibrationReport,
    runner: Runner,
    batches: Batches,
    held_out: Batches | None,
    measuring: Measuring,
    progress: Progress,
) -> RecalibrationReport:
    """Run the network over the images; return the report with statistics and accuracy."""
    sample = batches.first(_LOOKED_AT) if held_out is None else None
    before = None if held_out is None else runner.evaluate("evaluating before", held_out, progress)
    fit_before = None if sample is None else runner.fit("checking the fit before", sample, progress)
    statistics = runner.recalibrate(
        batches,
        report.passes,
        measuring.estimator,
        progress,
        include_frozen=measuring.include_frozen,
        allow_unmeasured=measuring.allow_unmeasured,
    )
    after = None if held_out is None else runner.evaluate("evaluating after", held_out, progress)
    fit_after = None if sample is None or fit_before is None else runner.fit("checking the fit after", sample, progress)
    notes = list(report.notes)
    broken = [entry for part in gathered_objects(batches.broken) for entry in part]
    batches.check(broken)
    if broken:
        notes.append(f"Images that could not be read and were left out: {len(broken)}, such as {broken[0]}.")
    if before is not None and held_out is not None:
        notes += _of_evaluation(held_out, before)
    doubt = _doubt(before, after) or _doubt_of_fit(fit_before, fit_after)
    if doubt:
        notes.append(f"Warning: {doubt} Are size (`img_size`, `crop_pct`), `mean` and `std` those of the training?")
    return replace(
        report,
        images=statistics.images,
        statistics=statistics,
        broken=tuple(broken),
        before=before,
        after=after,
        notes=tuple(notes),
    )


def _of_evaluation(held_out: Batches, found: Accuracy) -> Iterator[str]:
    """Yield what is to be said of images that were evaluated; all processes of a group ask."""
    yield from fewer_classes("`eval_data`", held_out, found.outputs)
    unseen = [entry for part in gathered_objects(held_out.broken) for entry in part]
    if unseen:
        yield f"Images of `eval_data` that could not be read: {len(unseen)}, such as {unseen[0]}."


def _doubt(before: Accuracy | None, after: Accuracy | None) -> str:
    """Return in words how bad the loss on held-out images is; empty if it is not."""
    if before is None or after is None:
        return ""
    guessing = math.log(after.outputs)
    if math.isnan(after.loss):
        return "the network gives NaN or infinity for these images. Are all of its weights finite?"
    if before.loss < guessing and not after.loss <= 1.5 * before.loss + 0.1:
        return f"the network is far worse: its loss went from {before.loss:.4g} to {after.loss:.4g}."
    if not after.loss < 0.9 * guessing:
        return (
            f"the network does not know these images: its loss is {after.loss:.4g}, and guessing has {guessing:.4g}. "
            "Are the classes numbered as in the training (`class_map`)?"
        )
    return ""


def _doubt_of_fit(before: Fit | None, after: Fit | None) -> str:
    """Return in words how badly the network fits the images that were measured; empty if it does not."""
    if before is None or after is None:
        return ""
    seen = f"{after.images} of the images that were measured"
    if after.far_worse(before):
        if after.by_loss(before):
            return f"the network is far worse: its loss on {seen} went from {before.loss:.4g} to {after.loss:.4g}."
        known = f"{after.information:.2g} nats, {before.information:.2g} before"
        return f"the network is far worse: its predictions tell {seen} apart less than before ({known})."
    if after.says_little:
        return f"the network predicts nearly the same for {seen}, which is right only if they are all of one class."
    return ""


def _check_gain(report: RecalibrationReport, eval_data: str | None) -> None:
    before, after = report.before, report.after
    if before and after and (after.loss > before.loss or math.isnan(after.loss)):
        raise NumericsError(
            f"the loss on {eval_data} went from {before.loss:.4f} to {after.loss:.4f}; nothing was written "
            "(`require_gain`). Are these the images, size and mean that the network was trained with?"
        )


def new_buffers(
    network: nn.Module, found: BatchNormReport, loaded: Loaded, specs: Mapping[str, Any]
) -> dict[str, OutTensor]:
    """Return the tensors that change or are added, with their names and dtypes in the checkpoint.

    Args:
        loaded: how the names of the network stand in the checkpoint.
        specs: the tensors of the checkpoint by name.

    Raises:
        DataError: the checkpoint lacks the statistics of a layer that was not measured.
        NumericsError: a statistic overflows its dtype in the checkpoint.
    """
    measured = {network.get_submodule(layer): layer for layer in found.statistics}
    buffers: dict[str, Tensor] = {}
    counter = torch.tensor(found.batches)
    for name, module in network.named_modules(remove_duplicate=False):  # a layer in two places has two names
        if module not in measured:
            continue
        mean, variance = found.statistics[measured[module]]
        lead = f"{name}." if name else ""
        if mean is not None:
            buffers[f"{lead}running_mean"] = mean
        buffers[f"{lead}running_var"] = variance
        buffers[f"{lead}num_batches_tracked"] = counter
    lacking = sorted(loaded.added.keys() - buffers)
    if lacking:
        raise DataError(
            f"the checkpoint has no '{loaded.added[lacking[0]]}', and the data do not reach that layer, so it cannot "
            "be measured. Take images that reach all layers."
        )
    changed = {}
    made: dict[Any, OutTensor] = {}  # so that what was tied stays so
    for name, values in buffers.items():
        own = loaded.names.get(name)
        spec = specs[own] if own is not None else None
        if own is None and name in loaded.added:
            own, spec = loaded.added[name], network.get_buffer(name)
        if own is None or not isinstance(spec, (TensorSpec, Tensor)):
            continue  # files from before torch 0.4.1 lack the counter
        dtype = spec.dtype if isinstance(spec, TensorSpec) else DTYPES["float32"]
        key = (id(values), spec if isinstance(spec, TensorSpec) else name)
        if key not in made:
            made[key] = computed(values, dtype, tuple(spec.shape), own)
        changed[own] = made[key]
    return changed
