"""Scores: top-1, top-5 and loss of a classifier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batchnorm.batches import samples_in
from ..batchnorm.calls import LABEL_KEYS, Call, device_of
from ..batchnorm.processes import gathered, gathered_objects
from ..batchnorm.recalibrate import in_eval_mode
from ..errors import DataError, ModelError


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy of a classifier.

    Attributes:
        top1, top5: percentage of images whose label has the highest score, or one of the five highest.
        loss: mean cross entropy, in nats.
        images: number of images.
        outputs: number of classes that the network tells apart.
    """

    top1: float
    top5: float
    loss: float
    images: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a classifier makes of each image, in the order of the data.

    Attributes:
        right, among: bool [N], the label has the highest score, or one of the five highest.
        loss: float64 [N], cross entropy in nats.
        outputs: number of classes that the network tells apart.
    """

    right: Tensor
    among: Tensor
    loss: Tensor
    outputs: int

    @property
    def samples(self) -> dict[str, Tensor]:
        """The metrics of each image, float64 [N]: ``top1`` and ``top5``, 0 or 100 percent, and ``loss``."""
        return {"top1": 100 * self.right.double(), "top5": 100 * self.among.double(), "loss": self.loss}


def evaluate(model: nn.Module, batches: Iterable[Any], call: Call | None = None) -> Accuracy:
    """Run a classifier over labelled images, in eval mode; the processes of a group add up their sums.

    Args:
        batches: of (images, labels), labels int64 [N]; see `_labels` for others.
        call: how the model is called; its output are the logits, [N, classes].

    Raises:
        DataError: a batch has no labels, or labels out of range.
        ModelError: the model gives no logits.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=device_of(model))  # right, among five, loss, images, outputs
    for each in _judged(model, batches, call or Call()):
        images = sums.new_tensor(len(each.loss))
        found = torch.stack([each.right.sum(), each.among.sum(), each.loss.sum(), images, images * each.outputs])
        sums += found
    right, among, loss_sum, images, outputs = torch.stack(gathered(sums)).sum(0).tolist()
    if not images:
        raise DataError("`eval_data`: the data hold no labelled image.")
    return Accuracy(100 * right / images, 100 * among / images, loss_sum / images, int(images), round(outputs / images))


def outcomes(model: nn.Module, batches: Iterable[Any], call: Call | None = None) -> Outcomes:
    """Run a classifier over labelled images, in eval mode, in this process alone.

    Raises:
        DataError: see `evaluate`.
    """
    found = list(_judged(model, batches, call or Call()))
    if not found:
        raise DataError("`eval_data`: the data hold no labelled image.")
    right, among, loss = (
        torch.cat([getattr(each, name).cpu() for each in found]) for name in ("right", "among", "loss")
    )
    return Outcomes(right, among, loss, found[0].outputs)


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a network fits some images.

    Attributes:
        images: number of images.
        outputs: number of classes that the network tells apart.
        loss: mean cross entropy, in nats; None without labels for all images.
        information: what a prediction tells of its image, in nats: the entropy of the mean prediction minus the mean
            entropy of the predictions (the mutual information of image and class). 0 for a network that answers all
            images alike, however certain, or is certain of none; at most log(outputs).
    """

    images: int
    outputs: int
    loss: float | None
    information: float

    def far_worse(self, before: Fit) -> bool:
        """Return True if a network fits its images far worse than it did before.

        See `by_loss`; else by the information.
        """
        if before.loss is not None and self.loss is not None and self.by_loss(before):
            return not self.loss <= 1.5 * before.loss + 0.1
        return not self.information >= before.information / 1.5 - 0.1

    @property
    def says_little(self) -> bool:
        """True if the predictions depend on the image by less than a tenth of what they could, and labels agree."""
        most = math.log(self.outputs)
        return not self.information >= 0.1 * most and not (self.loss is not None and self.loss < 0.5 * most)

    def by_loss(self, before: Fit) -> bool:
        """Return True if the loss tells: where it was not below that of guessing, the labels may be others."""
        return self.loss is not None and before.loss is not None and before.loss < math.log(before.outputs)


@torch.no_grad()
def fit(model: nn.Module, batches: Iterable[Any], call: Call | None = None) -> Fit | None:
    """Run a network over images, in eval mode; the processes of a group add up their sums.

    Args:
        batches: of images, with labels or without.
        call: how the model is called.

    Returns:
        None if it is no classifier: its output is not of the shape [N, classes], with two classes or more.
    """
    call = call or Call()
    classifies, classes = True, 0
    sums = torch.zeros(0, dtype=torch.float64)  # of predictions, by class; then entropy, loss, labelled images, images
    with in_eval_mode(model):
        for batch in batches:
            if samples_in(batch) == 0:
                continue
            logits = call(model, batch)
            with suppress(ModelError):
                logits = _logits(logits)
            if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
                classifies = False
                break
            log_p = logits.double().log_softmax(dim=1)
            p = log_p.exp()
            labels = _labels_or_none(batch, call, *logits.shape)
            loss = 0.0 if labels is None else F.nll_loss(log_p, labels.to(logits.device), reduction="sum").item()
            entropy = torch.special.entr(p).sum().item()
            tail = p.new_tensor([entropy, loss, 0 if labels is None else len(p), len(p)])
            found = torch.cat([p.sum(0), tail]).cpu()
            sums, classes = (sums + found if len(sums) else found), logits.shape[1]
    everyone = gathered_objects((classifies, classes, sums))
    known = {classes for _, classes, _ in everyone if classes}
    if not all(classifies for classifies, _, _ in everyone) or len(known) != 1:
        return None
    total = torch.stack([sums for _, _, sums in everyone if len(sums)]).sum(0)
    entropy, loss, labelled, images = total[-4:].tolist()
    mean = total[:-4] / images
    information = torch.special.entr(mean).sum().item() - entropy / images
    return Fit(int(images), len(mean), loss / images if labelled == images else None, information)


def _labels_or_none(batch: Any, call: Call, count: int, outputs: int) -> Tensor | None:
    """Return labels that fit an output; None if there are none."""
    try:
        labels = _labels(batch, call)
    except DataError:
        return None
    return labels if len(labels) == count and int(labels.max()) < outputs else None


@torch.no_grad()
def _judged(model: nn.Module, batches: Iterable[Any], call: Call) -> Iterator[Outcomes]:
    """Yield the outcomes of each batch, on the device of the model.

    Raises:
        DataError: the labels do not fit the output.
    """
    with in_eval_mode(model):
        for batch in batches:
            if samples_in(batch) == 0:
                continue
            labels = _labels(batch, call)
            logits = _logits(call(model, batch)).double()
            if (
                logits.dim() != 2
                or len(labels) != len(logits)
                or not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]
            ):
                raise DataError(
                    f"`eval_data`: labels from {int(labels.min())} to {int(labels.max())} do not fit an output of "
                    f"shape {list(logits.shape)}. The folders should be the classes of the model, in its order."
                )
            labels = labels.to(logits.device)
            right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="none")
            yield Outcomes(right[:, 0], right.any(dim=1), loss, logits.shape[1])


def _labels(batch: Any, call: Call) -> Tensor:
    """Return the labels of a batch: of a tuple, what is behind the inputs, or its end if a function takes it whole."""
    labels = None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > call.inputs:
        labels = batch[call.inputs if call.forward is None else -1]
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or (labels < 0).any():
        raise DataError("`eval_data` needs images with labels: folders named by class, or batches of (images, labels).")
    return labels


def _logits(output: Any) -> Tensor:
    """Return the logits in an output: itself, its ``logits``, or the first of a tuple."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    found = found[0] if isinstance(found, (tuple, list)) and found else found
    if not isinstance(found, Tensor):
        raise ModelError(
            f"the model gives a {type(output).__name__} in place of logits, [N, classes]. Let `forward` return them."
        )
    return found
