"""The setting of a tuning: network, classifier, teacher and data, opened and tried on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...batchnorm.layers import find_layers
from ...batchnorm.processes import Group
from ...errors import DataError, ModelError, UsageError
from ...evaluation.data import Batches, is_factory
from ...evaluation.runner import Runner
from ...formats.header import Header
from ...tuning.examples import Forward, as_logits, called, check_labels, labelled, taught
from ...tuning.features import Row
from ...tuning.head import Head, Tap, find_head, last_block
from ...tuning.normalisation import last_layer
from ..image_data import fewer_classes, image_data, notes_of, same_data
from ..options import Network, Numerics
from ..outputs import named
from .options import LabelledImages, Teaching, Training
from .teacher import Teacher, open_teacher


@dataclass(frozen=True, slots=True)
class Data:
    """Images as they are prepared for this tuning.

    Attributes:
        measured: training images in the test transform.
        trained: training images as they are trained on.
        held_out: images for the accuracy; None if there are none.
        sizes: the same at other sizes.
        images, steps: number of training images, and of their batches.
        preprocessing: size, crop, interpolation, mean and std; empty where the user's code prepares the images.
        preprocessing_from: each of these with where it is from.
        notes: decisions, in words.
    """

    measured: Batches
    trained: Batches
    held_out: Batches | None
    sizes: Mapping[int, Batches]
    images: int
    steps: int
    preprocessing: Mapping[str, Any]
    preprocessing_from: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a tuning works with.

    Attributes:
        network: in eval mode, on the device.
        runner: of the network.
        device: of all tensors that are computed with.
        data: images.
        train: ``head``, ``last-block`` or ``all``.
        head: the classifier; None where the whole network is trained.
        trained: modules that are trained; empty for the whole network.
        parameters: those that are trained.
        layers: BatchNorm layers that are measured: name to layer.
        teacher: None without one.
        classes: outputs of the network.
        rows: what is stored of each image: the input of the classifier, and logits of the teacher; empty if nothing is.
        notes: decisions, in words.
    """

    network: nn.Module
    runner: Runner
    device: torch.device
    data: Data
    train: str
    head: Head | None
    trained: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    layers: Mapping[str, nn.Module]
    teacher: Teacher | None
    classes: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The class of the network, for messages."""
        return type(self.network).__name__

    def placed(self, images: Tensor) -> Tensor:
        """Return images on the device, in the memory order of the network."""
        return self.runner.ordered(images.to(self.device, non_blocking=True))


def open_setting(
    network: nn.Module,
    header: Header,
    device: torch.device,
    which: Network,
    images: LabelledImages,
    training: Training,
    teaching: Teaching,
    numerics: Numerics,
) -> Setting:
    """Open the data and the teacher, find the classifier, and run one batch.

    Args:
        network, header: with the weights of the checkpoint with this header; put on the device and into eval mode.
        device: of all tensors that are computed with.
        which: how the network was made, for a teacher that does not record its own.

    Raises:
        CkptError: one of them is missing, or they do not fit together.
    """
    network.to(device).eval()
    head = None if training.train == "all" else find_head(network, training.head)
    if training.train == "head" and head is not None:
        _check_apart(network, head)
    data = open_images(network, header, images, training, pin_memory=device.type == "cuda")
    teacher, notes = None, data.notes
    if teaching.teacher is not None:
        teacher, more = open_teacher(teaching.teacher, which, network, data.preprocessing, device)
        notes += more
    runner = Runner(network, device, amp=numerics.amp, channels_last=numerics.channels_last)
    batch = next(labelled(data.measured), None)
    if batch is None:
        raise DataError("`data`: there are no images.")
    first, labels = runner.ordered(batch[0].to(device)), batch[1]

    # One batch tells what no header does: the classifier, the classes, what the network takes, and the layers that run.
    name = type(network).__name__
    forward = partial(called, name, network)
    rows: list[Row] = []
    modules: tuple[str, ...] = ()
    with torch.no_grad(), runner.autocast:
        if head is None:
            found = forward(first)
        else:
            with Tap(network, head).open() as tap:
                features, found = called(name, tap, first)
            rows.append(_row(features))
            modules = (head.name,) if training.train == "head" else last_block(network, head.name, first)
        classes = as_logits(name, found, len(first)).shape[1]
        check_labels(labels, classes)
        notes += (*fewer_classes("`data`", data.measured, classes),)
        if data.held_out is not None:
            notes += (*fewer_classes("`eval_data`", data.held_out, classes),)
        if teacher is not None:
            rows.append(_row(taught(teacher.name, teacher, first, classes)))
        layers, more = _layers(network, first, forward, training)
        notes += more
    return Setting(
        network=network,
        runner=runner,
        device=device,
        data=data,
        train=training.train,
        head=head,
        trained=modules,
        parameters=_parameters(network, modules),
        layers=layers,
        teacher=teacher,
        classes=classes,
        rows=tuple(rows) if training.train == "head" and not training.augment else (),
        notes=notes,
    )


def _layers(
    network: nn.Module, images: Tensor, forward: Forward, training: Training
) -> tuple[Mapping[str, nn.Module], tuple[str, ...]]:
    """Return the BatchNorm layers that `recalibrate` asks for, and a note if there are none.

    Args:
        images: a batch, to see which layer runs last.
        forward: calls the network.
    """
    which = training.recalibrate or ("all" if training.train == "all" else "last")
    if which == "none":
        return {}, ()
    found, skipped = find_layers(network)
    names = [*found]
    if which == "last":
        last = last_layer(network, images, forward)
        names = [] if last is None else [last]
    if not names:
        left = "".join(f" Left as it is: {each} ({of}), {reason}." for each, of, reason in skipped[:3])
        return {}, (f"The model has no BatchNorm statistics to measure.{left}",)
    return {name: found[name].module for name in names}, ()


def _row(batch: Tensor) -> Row:
    return Row(tuple(batch.shape[1:]), batch.dtype)


def _parameters(network: nn.Module, modules: tuple[str, ...]) -> tuple[nn.Parameter, ...]:
    """Return the parameters of some modules, each once; of the whole network those that are not frozen."""
    if modules:
        found = [p for name in modules for p in network.get_submodule(name).parameters()]
    else:
        found = [p for p in network.parameters() if p.requires_grad]
    if not found:
        raise ModelError(f"{type(network).__name__} has no parameters to train: all are frozen.")
    return tuple({id(each): each for each in found}.values())


def _check_apart(network: nn.Module, head: Head) -> None:
    """Refuse a classifier whose weights are used elsewhere: the features would change with it."""
    own = {id(each) for each in head.module.parameters()}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not name.startswith(f"{head.name}."):
            raise ModelError(
                f"the weights of '{head.name}' are those of '{name}', too, so they cannot be trained on stored "
                "features. Use `train='all'`."
            )


def open_images(
    network: nn.Module, header: Header, images: LabelledImages, training: Training, *, pin_memory: bool
) -> Data:
    """Open the images, preprocessed as in the training unless options change it.

    Raises:
        DataError, UsageError: see `image_data` and `open_data`; or options that do not go with a factory.
    """
    data, eval_data = images.data, images.eval_data
    sources = {"data": data} | ({} if eval_data is None else {"eval_data": eval_data})
    open_at = partial(
        image_data, network, header, sources=sources, labelled=[*sources.values()],
        seed=training.seed, group=Group(), pin_memory=pin_memory,
    )  # fmt: skip
    how = open_at(images)
    if is_factory(data) and training.augment:
        raise UsageError("`augment`: the factory of `data` prepares its images itself; let it augment them.")
    measured = how.trained(data)
    trained = how.trained(data, augment=True) if training.augment else measured
    notes = [*notes_of(data, measured, images, labelled=True)]
    held_out, sizes = None, {}
    if eval_data is None:
        notes.append("Without `eval_data` nothing shows whether the training helps.")
    else:
        with named("eval_data", "data"):
            held_out = how.evaluated(eval_data)
        notes += [note for note in notes_of(eval_data, held_out, images, labelled=True) if note not in notes]
        if images.sizes is not None and is_factory(eval_data):
            raise UsageError("`sizes`: the factory of `eval_data` prepares its images itself, at one size.")
        for size in map(int, images.sizes or ()):
            sizes[size] = open_at(LabelledImages(**{**vars(images), "img_size": size})).evaluated(eval_data)
        if same_data(data, eval_data):
            notes.append("`eval_data` is the same as `data`: it does not show what the training does on other images.")
    if any(each is not None and each.once for each in (measured, held_out)):
        raise UsageError("the data are read many times, and a factory here gives an iterator, not a list.")
    total, steps = measured.images, measured.steps
    if total is None or steps is None:
        counts = [len(labels) for _, labels in labelled(measured)]
        total, steps = sum(counts), len(counts)
    return Data(measured, trained, held_out, sizes, total, steps, how.config, how.config_from, tuple(notes))
