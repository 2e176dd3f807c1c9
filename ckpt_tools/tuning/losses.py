"""Losses: cross entropy on labels, and the divergence from a teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def tuning_loss(
    logits: Tensor, labels: Tensor, teacher: Tensor | None = None, *, alpha: float = 0.5, temperature: float = 5.0
) -> Tensor:
    """Return the loss of a student, (1 - a) CE + a T^2 KL(softmax(teacher / T) || softmax(logits / T)).

    Both terms are means over the images. The factor T^2 keeps the gradients of the second in proportion when T changes
    (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2).

    Args:
        logits: floating point [N, C], of the student; 16-bit floats are widened to float32.
        labels: int64 [N].
        teacher: logits of the teacher, [N, C]; None for the cross entropy alone.
        alpha: a, from 0 to 1.
        temperature: T, above 0.

    Returns:
        A scalar, float32 or float64.
    """
    logits = _wide(logits)
    if teacher is None:
        return F.cross_entropy(logits, labels)
    student = F.log_softmax(logits / temperature, dim=1)
    target = F.log_softmax(_wide(teacher) / temperature, dim=1)
    divergence = F.kl_div(student, target, reduction="batchmean", log_target=True)
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * temperature**2 * divergence


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
