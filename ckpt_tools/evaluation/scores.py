"""Scores: top-1, top-5 and loss of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ..batchnorm.batches import images_of
from ..batchnorm.recalibrate import device_of, in_eval_mode
from ..errors import DataError


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


def evaluate(model: nn.Module, batches: Iterable[Any]) -> Accuracy:
    """Run a classifier over labelled images, in eval mode; the processes of a group add up their sums.

    Args:
        batches: of (images, labels), labels int64 [N].

    Raises:
        DataError: a batch has no labels, or labels out of range.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device_of(model))  # right, among five, loss, images
    for each in _judged(model, batches):
        sums += torch.stack([each.right.sum(), each.among.sum(), each.loss.sum(), sums.new_tensor(len(each.loss))])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    right, among, loss_sum, images = sums.tolist()
    if not images:
        raise DataError("`eval_data`: the data hold no labelled image.")
    return Accuracy(100 * right / images, 100 * among / images, loss_sum / images, int(images))


def outcomes(model: nn.Module, batches: Iterable[Any]) -> Outcomes:
    """Run a classifier over labelled images, in eval mode, in this process alone.

    Raises:
        DataError: see `evaluate`.
    """
    found = [(each.right.cpu(), each.among.cpu(), each.loss.cpu()) for each in _judged(model, batches)]
    if not found:
        raise DataError("`eval_data`: the data hold no labelled image.")
    right, among, loss = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Outcomes(right, among, loss)


@torch.no_grad()
def _judged(model: nn.Module, batches: Iterable[Any]) -> Iterator[Outcomes]:
    """Yield the outcomes of each batch."""
    device = device_of(model)
    with in_eval_mode(model):
        for batch in batches:
            if len(images := images_of(batch)) == 0:
                continue
            labels = _labels(batch)
            logits = model(images.to(device, non_blocking=True)).double()
            if (
                logits.dim() != 2
                or len(labels) != len(logits)
                or not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]
            ):
                raise DataError(
                    f"`eval_data`: labels from {int(labels.min())} to {int(labels.max())} do not fit an output of "
                    f"shape {list(logits.shape)}. The folders should be the classes of the model, in its order."
                )
            labels = labels.to(device)
            right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            yield Outcomes(right[:, 0], right.any(dim=1), F.cross_entropy(logits, labels, reduction="none"))


def _labels(batch: Any) -> Tensor:
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or (labels < 0).any():
        raise DataError("`eval_data` needs images with labels: folders named by class, or batches of (images, labels).")
    return labels
