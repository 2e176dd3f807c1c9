"""Scores: top-1, top-5 and loss of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ..batchnorm.batches import samples_in
from ..batchnorm.calls import LABEL_KEYS, Call, device_of
from ..batchnorm.recalibrate import in_eval_mode
from ..errors import DataError, ModelError


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy of a classifier.

    Attributes:
        top1, top5: percentage of images whose label has the highest score, or one of the five highest.
        loss: mean cross entropy, in nats.
        images: number of images.
    """

    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a classifier makes of each image, in the order of the data.

    Attributes:
        right, among: bool [N], the label has the highest score, or one of the five highest.
        loss: float64 [N], cross entropy in nats.
    """

    right: Tensor
    among: Tensor
    loss: Tensor


def evaluate(model: nn.Module, batches: Iterable[Any], call: Call | None = None) -> Accuracy:
    """Run a classifier over labelled images, in eval mode; the processes of a group add up their sums.

    Args:
        batches: of (images, labels), labels int64 [N]; see `_labels` for others.
        call: how the model is called; its output are the logits, [N, classes].

    Raises:
        DataError: a batch has no labels, or labels out of range.
        ModelError: the model gives no logits.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device_of(model))  # right, among five, loss, images
    for each in _judged(model, batches, call or Call()):
        sums += torch.stack([each.right.sum(), each.among.sum(), each.loss.sum(), sums.new_tensor(len(each.loss))])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    right, among, loss_sum, images = sums.tolist()
    if not images:
        raise DataError("`eval_data`: the data hold no labelled image.")
    return Accuracy(100 * right / images, 100 * among / images, loss_sum / images, int(images))


def outcomes(model: nn.Module, batches: Iterable[Any], call: Call | None = None) -> Outcomes:
    """Run a classifier over labelled images, in eval mode, in this process alone.

    Raises:
        DataError: see `evaluate`.
    """
    found = [(each.right.cpu(), each.among.cpu(), each.loss.cpu()) for each in _judged(model, batches, call or Call())]
    if not found:
        raise DataError("`eval_data`: the data hold no labelled image.")
    right, among, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Outcomes(right, among, loss)


@torch.no_grad()
def _judged(model: nn.Module, batches: Iterable[Any], call: Call) -> Iterator[Outcomes]:
    """Yield the outcomes of each batch."""
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
            yield Outcomes(right[:, 0], right.any(dim=1), F.cross_entropy(logits, labels, reduction="none"))


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
