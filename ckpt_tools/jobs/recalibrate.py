"""The job behind `ckpt recal-bn`: a checkpoint, a model and data to a checkpoint with new statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm.processes import Group, joined_group, local_device
from ..batchnorm.recalibrate import check_options, find_layers
from ..batchnorm.report import BatchNormReport
from ..checkpoints.open import Checkpoint
from ..compute.payload import torch_dtype
from ..compute.threads import default_threads
from ..errors import NumericsError, UsageError
from ..evaluation.data import Batches, Loading, is_factory, open_data, resolve_preprocessing
from ..evaluation.models import build_model, input_channels, load_weights, pick_device
from ..evaluation.runner import Progress, Runner
from ..evaluation.scores import Accuracy
from ..formats import read_header
from ..formats.file_plan import OutTensor
from ..series.paths import default_input
from ..tensors import DTYPES, TensorSpec
from .assembly import Assembly, rewrite
from .outputs import check_replaceable, check_target, named_after
from .provenance import provenance
from .run import only_noted, write


@dataclass(frozen=True, slots=True)
class RecalibrationReport:
    """What a recalibration is, or was; the same before the work (the plan) and after it.

    Attributes:
        path, out: the checkpoint, and where the new one goes.
        state: which weights, such as ``raw (state_dict)``.
        model, device: class of the network, and where it runs.
        data: as given.
        images: how many, None where the data do not say before they end.
        preprocessing: size, crop, interpolation, mean and std; empty where the user's code prepares the images.
        layers: BatchNorm layers to recalibrate.
        statistics: what was found; None in a plan.
        broken: images that could not be read.
        before, after: accuracy on the data of `--eval`.
        notes: decisions worth knowing; warnings among them.
        dropped: what of the checkpoint could not be written again.
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


def recalibrate_checkpoint(
    path: str | Path | None = None,
    *,
    data: str,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    images: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    split: str = "validation",
    data_root: str | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    state: str = "auto",
    device: str = "auto",
    amp: bool = False,
    channels_last: bool = True,
    passes: int = 1,
    estimator: str = "population",
    seed: int = 0,
    eval_data: str | None = None,
    require_gain: bool = False,
    out: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[RecalibrationReport], None] | None = None,
    on_progress: Progress | None = None,
) -> RecalibrationReport:
    """Give the weights in a checkpoint the BatchNorm statistics of some data, and write it anew.

    Everything but the buffers of the BatchNorm layers stays as it is, byte for byte.

    Args:
        path: the checkpoint; ``averaged.pth`` or ``averaged.safetensors`` if not given.
        data: see `ckpt_tools.evaluation.data.open_data`.
        model, model_kwargs: see `ckpt_tools.evaluation.models.build_model`.
        images: how many; 8192, or all where there are fewer, if not given; -1 for all.
        batch_size: images a batch (and a process).
        workers: processes that decode images; as many as cores, 8 at most, if not given.
        split, data_root: of a named dataset.
        img_size, crop_pct, interpolation, mean, std: of the images; as the model says if not given.
        state: which weights, as for `average`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        amp: run the network in bfloat16 where torch's autocast holds that safe.
        channels_last: keep images in channels-last order, which is the quicker one.
        passes, estimator: see `recalibrate_bn`.
        seed: of the random subset.
        eval_data: labelled data to evaluate on, before and after; all of them.
        require_gain: write nothing if the loss on them gets worse.
        out: target; the checkpoint's name with ``-bn`` if not given.
        force: replace it if it exists.
        dry_run: build the model and look at the data, run nothing, write nothing.
        on_plan: called with the plan before the work.
        on_progress: called with (what, images done, images in all).

    Returns:
        What was done. A model without BatchNorm gives a report without layers, and nothing is written.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    if type(batch_size) is not int or batch_size < 2:
        raise UsageError(f"--batch-size {batch_size}: must be 2 or more; one image cannot be normalised.")
    if images is not None and (type(images) is not int or images < -1 or images in (0, 1)):
        raise UsageError(f"--images {images}: must be 2 or more, or all.")
    check_options(passes, estimator)
    if require_gain and eval_data is None:
        raise UsageError("--require-gain goes with --eval.")
    source = Path(path) if path is not None else default_input()
    checkpoint = Checkpoint(read_header(source), state)
    target = Path(out) if out is not None else named_after(source, "-bn")
    where = local_device(pick_device(device))
    with joined_group(where) as group:
        network = build_model(model, checkpoint.header, model_kwargs or {}, checkpoint.specs)
        stored = load_weights(network, checkpoint)
        found, skipped = find_layers(network)
        network.to(where)
        if channels_last:
            network.to(memory_format=torch.channels_last)
        loading = Loading(
            images, batch_size, _workers(workers), seed, group.rank, group.world, pin_memory=where.type == "cuda"
        )
        options = {"img_size": img_size, "crop_pct": crop_pct, "interpolation": interpolation, "mean": mean, "std": std}
        notes: list[str] = []
        opened = _opened(
            network, data, eval_data, loading, options, notes, split=split, root=data_root, wanted=bool(found)
        )
        batches, preprocessing = opened.batches, opened.preprocessing
        if batches is not None and batches.once and passes > 1:
            raise UsageError(f"--passes {passes} needs data that can be read again: the factory gives an iterator.")
        report = RecalibrationReport(
            path=str(source),
            out=str(target),
            state=checkpoint.state.label,
            model=type(network).__name__,
            device=str(where),
            data=data,
            images=None if batches is None else batches.images,
            preprocessing={} if is_factory(data) else preprocessing,
            layers=len(found),
            passes=passes,
            notes=tuple(notes),
        )
        if batches is None:
            notes += [f"Left as it is: {name or 'the model'} ({kind}), {reason}." for name, kind, reason in skipped]
            report = replace(report, notes=(*notes, "The model has no BatchNorm statistics; nothing to do."))
            if on_plan is not None and group.first:
                on_plan(report)
            return report
        arguments = {
            "data": data,
            "images": batches.images,
            "seed": seed,
            "passes": passes,
            "estimator": estimator,
            "batch_size": batch_size,
            "amp": amp or None,
            **({"preprocessing": preprocessing} if preprocessing else {}),
        }
        plan = _laid_out(checkpoint, target, arguments, {})
        if group.first:
            with only_noted(notes, dry_run):
                _check(plan, checkpoint, force=force)
        report = replace(report, dropped=plan.dropped, notes=tuple(notes))
        if on_plan is not None and group.first:
            on_plan(report)
        if dry_run:
            return report
        runner = Runner(network, where, amp=amp, channels_last=channels_last)
        progress = on_progress if on_progress is not None and group.first else _unseen
        report = _measured(report, runner, batches, opened.held_out, estimator, group, progress)
        if require_gain:
            _check_gain(report, eval_data)
        if group.first and report.statistics is not None:
            buffers = _new_buffers(network, report.statistics, stored, checkpoint.specs)
            seen = {} if batches.images else {"images": report.statistics.images}
            write(_laid_out(checkpoint, target, arguments | seen, buffers), checkpoint.header.files, force=force)
        return replace(report, written=group.first)


@dataclass(frozen=True, slots=True, eq=False)
class _Images:
    """The images that a job looks at.

    Attributes:
        batches: which the statistics come from; None where there are no statistics.
        held_out: which the accuracy is measured on.
        preprocessing: empty where the user's code prepares the images.
    """

    batches: Batches | None
    held_out: Batches | None
    preprocessing: Mapping[str, Any]


def _opened(
    network: nn.Module,
    data: str,
    eval_data: str | None,
    loading: Loading,
    options: Mapping[str, Any],
    notes: list[str],
    *,
    split: str,
    root: str | None,
    wanted: bool,
) -> _Images:
    """Open the data, as the model wants its images unless the options say otherwise."""
    own = is_factory(data) and (eval_data is None or is_factory(eval_data))
    preprocessing = {} if own else resolve_preprocessing(network, input_channels(network), options)
    if is_factory(data) and any(value is not None for value in options.values()):
        notes.append("--data is a factory, which prepares its images itself: size, crop, mean and std are its own.")
    batches = open_data(data, loading, preprocessing=preprocessing, split=split, root=root) if wanted else None
    held_out = None
    if eval_data is not None:
        everything = replace(loading, images=-1)
        held_out = open_data(eval_data, everything, preprocessing=preprocessing, split=split, root=root)
        if _same(data, eval_data):
            notes.append(
                "--eval is the data that the statistics come from, so the accuracy after it is "
                "higher than on images that the network has not seen."
            )
    return _Images(batches, held_out, preprocessing)


def _laid_out(
    checkpoint: Checkpoint, target: Path, arguments: dict[str, Any], buffers: Mapping[str, OutTensor]
) -> Assembly:
    return rewrite(
        checkpoint.header,
        checkpoint.state,
        buffers,
        target=target,
        provenance=provenance(
            "recal-bn",
            arguments,
            state=checkpoint.state.label,
            input={"name": checkpoint.path.name, "made": checkpoint.provenance},
        ),
    )


def _measured(
    report: RecalibrationReport,
    runner: Runner,
    batches: Batches,
    held_out: Batches | None,
    estimator: str,
    group: Group,
    progress: Progress,
) -> RecalibrationReport:
    """Run the network over the images; return the report with what was found."""
    before = None if held_out is None else runner.evaluate("evaluating before", held_out, progress)
    statistics = runner.recalibrate(batches, report.passes, estimator, progress)
    after = None if held_out is None else runner.evaluate("evaluating after", held_out, progress)
    notes = list(report.notes)
    broken = _everyones(batches.broken, group)
    batches.check(broken)
    if broken:
        notes.append(f"{len(broken)} images could not be read and were left out, such as {broken[0]}.")
    unseen = [] if held_out is None else _everyones(held_out.broken, group)
    if unseen:
        notes.append(f"{len(unseen)} images of --eval could not be read, such as {unseen[0]}.")
    return replace(
        report,
        images=statistics.images,
        statistics=statistics,
        broken=tuple(broken),
        before=before,
        after=after,
        notes=tuple(notes),
    )


def _check_gain(report: RecalibrationReport, eval_data: str | None) -> None:
    before, after = report.before, report.after
    if before and after and (after.loss > before.loss or math.isnan(after.loss)):
        raise NumericsError(
            f"the loss on {eval_data} went from {before.loss:.4f} to {after.loss:.4f}; nothing was written "
            "(--require-gain). Are these the images, size and mean that the network was trained with?"
        )


def _unseen(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def _workers(asked: int | None) -> int:
    if asked is not None and (type(asked) is not int or asked < 0):
        raise UsageError(f"--workers {asked}: must be 0 or more.")
    return min(8, default_threads()) if asked is None else asked


def _same(data: str, other: str) -> bool:
    with suppress(OSError, RuntimeError):
        return data == other or Path(data).resolve() == Path(other).resolve()
    return False


def _new_buffers(
    network: nn.Module, found: BatchNormReport, stored: Mapping[str, str], specs: Mapping[str, Any]
) -> dict[str, OutTensor]:
    """Make the tensors that change, under their names in the checkpoint and in its dtypes."""
    measured = {network.get_submodule(layer): layer for layer in found.statistics}
    buffers: dict[str, Tensor] = {}
    counter = torch.tensor(found.batches)
    for name, module in network.named_modules(remove_duplicate=False):  # a layer in two places stands under two names
        if module not in measured:
            continue
        mean, variance = found.statistics[measured[module]]
        lead = f"{name}." if name else ""
        if mean is not None:
            buffers[f"{lead}running_mean"] = mean
        buffers[f"{lead}running_var"] = variance
        buffers[f"{lead}num_batches_tracked"] = counter
    changed = {}
    made: dict[tuple[int, TensorSpec], OutTensor] = {}  # so that what was tied stays so
    for name, values in buffers.items():
        spec = specs[stored[name]] if name in stored else None  # files from before torch 0.4.1 lack the counter
        if not isinstance(spec, TensorSpec):
            continue
        dtype = spec.dtype if values.is_floating_point() else DTYPES["int64"]  # other tools average the counter, too
        narrow = values.to(torch_dtype(dtype))
        if narrow.is_floating_point() and not torch.isfinite(narrow).all():
            raise NumericsError(f"the new '{name}' overflows {dtype.name}, its dtype in the checkpoint.")
        new = OutTensor(dtype, spec.shape, (), stored[name], data=_bytes(narrow))
        changed[stored[name]] = made.setdefault((id(values), spec), new)
    return changed


def _bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor, without NumPy, which the base installation lacks."""
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def _check(plan: Assembly, checkpoint: Checkpoint, *, force: bool) -> None:
    header = checkpoint.header
    inputs = [header.path, *(stamp.path for stamp in header.files)]
    check_target(plan.target, inputs, nbytes=plan.nbytes, force=force, folder=plan.folder)
    if plan.folder:
        check_replaceable(plan.target, plan.names)


def _everyones(broken: list[str], group: Group) -> list[str]:
    if group.world == 1:
        return broken
    lists: list[list[str]] = [[] for _ in range(group.world)]
    torch.distributed.all_gather_object(lists, broken)
    return [entry for part in lists for entry in part]
