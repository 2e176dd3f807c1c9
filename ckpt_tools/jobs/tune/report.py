"""The report of a tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...evaluation.scores import Accuracy
from ..reports import Report
from ..sweep.verdict import Comparison


@dataclass(frozen=True, slots=True)
class SizeScore:
    """What an image size gives without any training.

    Attributes:
        size: side of the images.
        accuracy: on `eval_data`; None if the network refuses the size.
        error: why it does.
    """

    size: int
    accuracy: Accuracy | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One stage of the tuning against an earlier one, on the same images.

    Attributes:
        stage, other: their names.
        comparisons: of top-1, top-5 and loss.
    """

    stage: str
    other: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True, repr=False)
class TuneReport(Report):
    """What a tuning does; the plan before the work, and the result after it.

    Attributes:
        path, out: the checkpoint, and the new one.
        state: which weights, such as ``ema (state_dict_ema)``, or ``weights`` where there is one set.
        model, device: class of the network, and its device.
        data, eval_data: as given.
        images: number of images to train on.
        classes: outputs of the network.
        preprocessing: size, crop, interpolation, mean and std; empty where the user's code prepares the images.
        preprocessing_from: each of these with where it is from.
        train: ``head``, ``last-block`` or ``all``.
        head: name of the classifier; None where it is not needed.
        trained: names of the modules that are trained; empty for the whole network.
        parameters: number of their parameters.
        recalibrated: BatchNorm layers whose statistics are measured.
        settings: of the training, as they are recorded.
        teacher: in words; None without one.
        feature_bytes: size of the features on the disk; 0 where none are stored.
        sizes: what other image sizes give.
        stages: name to accuracy on `eval_data`: ``before``, ``recalibrated``, ``after``.
        changes: stages against earlier ones.
        verdict: what the comparison of after and before shows, in words; for top-1 and for the loss.
        losses: mean loss of each epoch on the images that are trained on.
        seconds: of the training, features included.
        broken: images that could not be read.
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
    eval_data: str | None
    images: int
    classes: int
    preprocessing: Mapping[str, Any]
    preprocessing_from: Mapping[str, str]
    train: str
    head: str | None
    trained: tuple[str, ...]
    parameters: int
    recalibrated: tuple[str, ...]
    settings: Mapping[str, Any]
    teacher: str | None
    feature_bytes: int
    sizes: tuple[SizeScore, ...] = ()
    stages: Mapping[str, Accuracy] | None = None
    changes: tuple[Change, ...] = ()
    verdict: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    broken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    written: bool = False
