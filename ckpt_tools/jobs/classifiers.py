"""Classifiers: checkpoints of one network, scored on labelled images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..batchnorm.layers import find_layers
from ..batchnorm.processes import Group
from ..batchnorm.recalibrate import check_options
from ..checkpoints.open import Checkpoint
from ..compute.progress import LOADING_MODEL, Progress, uncounted
from ..errors import UsageError
from ..evaluation.data import Batches, is_factory
from ..evaluation.evaluators import Classifier
from ..evaluation.models import build_model, call_of, importable, load_weights, pick_device
from ..evaluation.preprocessing import described
from ..evaluation.runner import Runner
from .image_data import ImageData, check_images, fewer_classes, image_data, notes_of
from .options import Images, Network, Numerics, Statistics
from .outputs import named


@dataclass(frozen=True, slots=True, eq=False)
class Classifiers:
    """A network, and the images that its checkpoints are scored on.

    Attributes:
        network: with the weights of an example.
        has_layers: it has BatchNorm statistics to measure.
        statistics: images to measure them on, before every score; None if that is not done.
        notes: decisions, in words; `on` adds to them.
    """

    network: nn.Module
    has_layers: bool
    statistics: Batches | None
    notes: list[str]
    _how: ImageData
    _images: Images
    _measuring: Statistics
    _state: str
    _runner: Runner
    _identity: Mapping[str, Any]
    _on_progress: Progress

    def on(self, data: str, option: str, split: str) -> Classifier:
        """Return what scores a checkpoint on labelled images.

        Args:
            data, option: the images, and the option that gives them.
            split: of a named dataset.

        Raises:
            CkptError: the images cannot be used.
        """
        with named(option, "data"):
            held_out = self._how.evaluated(data, split)
        said = notes_of(data, held_out, self._images, labelled=True)
        self.notes.extend(note for note in said if note not in self.notes)
        self.notes.extend(fewer_classes(data, held_out, getattr(self.network, "num_classes", 0)))  # timm's have it
        if held_out.once or (self.statistics is not None and self.statistics.once):
            raise UsageError("the data are evaluated many times, and a factory here gives an iterator, not a list.")
        return Classifier(
            network=self.network,
            runner=self._runner,
            held_out=held_out,
            images=self.statistics,
            **vars(self._measuring),
            identity={"data": data, "split": split, "images": held_out.images, **self._identity},
            on_progress=self._on_progress,
            state=self._state,
        )


@contextmanager
def opened_classifiers(
    example: Checkpoint,
    which: Network,
    images: Images,
    measuring: Statistics,
    numerics: Numerics,
    labelled: Mapping[str, str],
    statistics: tuple[str, str | None],
    *,
    state: str,
    seed: int,
    device: str,
    on_progress: Progress,
) -> Iterator[Classifiers]:
    """Build a network, and find out how its images are prepared; factories' folders are on `sys.path` meanwhile.

    Args:
        example: a checkpoint of this network.
        labelled: options to the images to score on.
        statistics: an option, and the images for BatchNorm statistics; None for none.
        state: the set of weights of each checkpoint.
        device: several GPUs are one to a network.
        on_progress: called with (what is done, images done, images in all).

    Raises:
        CkptError: the network or the images cannot be used.
    """
    check_images(images)
    check_options(measuring.passes, measuring.estimator)
    on = pick_device("auto" if device == "cuda" else device)
    option, unlabelled = statistics
    sources = {**labelled, **({} if unlabelled is None else {option: unlabelled})}
    with importable(which.model, which.forward, *filter(is_factory, sources.values())):
        with uncounted(on_progress, LOADING_MODEL):
            call = call_of(which.forward, which.inputs, which.mask)
            network = build_model(which.model, example.header, which.model_kwargs or {}, example.specs)
            loaded = load_weights(network, example)  # so that what does not fit is told before any work
            layers, _ = find_layers(network, include_frozen=measuring.include_frozen)
            network.to(on)
        how = image_data(
            network, example.header, images, sources, [*labelled.values()],
            seed=seed, group=Group(), pin_memory=on.type == "cuda",
        )  # fmt: skip
        notes = [*loaded.notes]
        notes += [] if how.preprocessing is None else [" ".join(described(how.config, how.config_from))]
        measured = None
        if unlabelled is not None and layers:
            measured = how.statistics(unlabelled)
            notes += notes_of(unlabelled, measured, images, labelled=False)
        identity = {
            "preprocessing": {name: repr(value) for name, value in sorted(how.config.items())},
            "classes": [dict(reading) for reading in how.order.readings] or how.order.natural,
            "model": which.model or type(network).__name__,
            "model_kwargs": {name: repr(value) for name, value in sorted((which.model_kwargs or {}).items())},
            "data_root": images.data_root,
            "called": [which.forward, which.inputs, which.mask],
            "recalibrated": None
            if measured is None
            else [unlabelled, measured.images, images.batch_size, seed, images.split, vars(measuring)],
            "amp": numerics.amp,
        }
        runner = Runner(network, on, amp=numerics.amp, channels_last=numerics.channels_last, call=call)
        yield Classifiers(
            network=network,
            has_layers=bool(layers),
            statistics=measured,
            notes=notes,
            _how=how,
            _images=images,
            _measuring=measuring,
            _state=state,
            _runner=runner,
            _identity=identity,
            _on_progress=on_progress,
        )
