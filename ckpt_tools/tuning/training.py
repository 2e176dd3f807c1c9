"""Training: stochastic gradient descent with a cosine of learning rates, the same loop for a head and for a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import NumericsError
from .examples import Example, Forward
from .losses import tuning_loss

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
"""As in FixRes (Touvron et al. 2019, arXiv 1906.06423)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a training goes.

    Attributes:
        epochs: number of them.
        lr: learning rate of the first step; it falls to 0 along half a cosine.
        alpha, temperature: of the loss; see `tuning_loss`.
        ema_decay: of an average of the parameters, updated in each step; None for the last parameters.
        seed: of the order of the images, and of dropout.
    """

    epochs: int
    lr: float
    alpha: float = 0.5
    temperature: float = 5.0
    ema_decay: float | None = None
    seed: int = 0


def fit(
    parameters: Sequence[nn.Parameter],
    forward: Forward,
    epoch: Callable[[int], Iterable[Example]],
    steps: int,
    recipe: Recipe,
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train parameters in place by SGD with momentum.

    Args:
        parameters: that are trained.
        forward: from the inputs of an example to logits.
        epoch: gives the examples of an epoch, counted from 0, on the device of the parameters.
        steps: in each epoch.
        on_batch: called after each step with (epoch, images so far in it).

    Returns:
        The mean loss of each epoch, before each step.

    Raises:
        NumericsError: the loss is not finite, or ends far above that of the first batch and that of guessing.
    """
    total = max(1, steps * recipe.epochs)
    optimizer = torch.optim.SGD(parameters, recipe.lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
    )
    averages = None if recipe.ema_decay is None else [parameter.detach().clone() for parameter in parameters]
    update = get_ema_multi_avg_fn(recipe.ema_decay or 0.0)  # type: ignore[no-untyped-call]
    losses: list[float] = []
    bound = math.inf
    for number in range(recipe.epochs):
        loss_sum, images = 0.0, 0
        for inputs, labels, teacher in epoch(number):
            with torch.enable_grad():
                logits = forward(inputs)
                loss = tuning_loss(logits, labels, teacher, alpha=recipe.alpha, temperature=recipe.temperature)
                if not losses and not images:
                    bound = _DIVERGED * max(_first(loss.item()), math.log(logits.shape[1]))
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cosine.step()
            if averages is not None:
                update(averages, parameters, None)
            loss_sum += loss.item() * len(labels)
            images += len(labels)
            if on_batch is not None:
                on_batch(number, images)
        losses.append(loss_sum / max(1, images))
        if not math.isfinite(losses[-1]) or (number + 1 == recipe.epochs and losses[-1] > bound):
            raise NumericsError(
                f"the training diverged: the loss of epoch {number + 1} is {losses[-1]:.4g}. Lower `lr`."
            )
    if averages is not None:
        with torch.no_grad():
            for parameter, average in zip(parameters, averages, strict=True):
                parameter.copy_(average)
    return losses


_DIVERGED = 10
"""Times the loss of the first batch, or of guessing, at which a training has diverged."""


def _first(loss: float) -> float:
    if not math.isfinite(loss):
        raise NumericsError(
            f"the loss of the first batch is {loss}, before any step: the images, the weights of the network or the "
            "outputs of the teacher hold NaN or infinity, or values that overflow."
        )
    return loss


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let the generators of torch and Python start at a seed; give them back their states afterwards."""
    import random

    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
