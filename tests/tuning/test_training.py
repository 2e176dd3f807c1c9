"""The loop is SGD with momentum along a cosine, and equals NumPy in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

from ckpt_tools.errors import NumericsError
from ckpt_tools.tuning.examples import Example
from ckpt_tools.tuning.training import Recipe, fit, seeded

rng = np.random.default_rng(0)
INPUTS, LABELS = rng.standard_normal((3, 8, 5)), rng.integers(0, 4, (3, 8))
TEACHER = 3 * rng.standard_normal((3, 8, 4))


def batches(number: int) -> Iterator[Example]:
    for i in range(3):
        yield torch.tensor(INPUTS[i]), torch.tensor(LABELS[i]), torch.tensor(TEACHER[i])


def network() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(5, 4).double()


def by_numpy(epochs: int, lr: float, alpha: float, heat: float, decay: float | None) -> np.ndarray:
    """SGD on the gradient of the formula, with momentum 0.9, weight decay 1e-4 and half a cosine."""
    layer = network()
    w = np.concatenate([layer.weight.detach().numpy(), layer.bias.detach().numpy()[:, None]], axis=1)
    velocity, average, step = np.zeros_like(w), w.copy(), 0
    for _ in range(epochs):
        for x, labels, teacher in zip(INPUTS, LABELS, TEACHER, strict=True):
            wide = np.concatenate([x, np.ones((len(x), 1))], axis=1)
            logits = wide @ w.T
            slope = (1 - alpha) * (softmax(logits, axis=1) - np.eye(4)[labels]) / len(x)
            slope += alpha * heat * (softmax(logits / heat, axis=1) - softmax(teacher / heat, axis=1)) / len(x)
            velocity = 0.9 * velocity + slope.T @ wide + 1e-4 * w
            w = w - lr * (1 + math.cos(math.pi * step / (3 * epochs))) / 2 * velocity
            step += 1
            if decay is not None:
                average = decay * average + (1 - decay) * w
    return w if decay is None else average


@pytest.mark.parametrize("decay", [None, 0.8])
def test_training_equals_the_formulas_in_numpy(decay: float | None) -> None:
    layer = network()
    recipe = Recipe(epochs=3, lr=0.3, alpha=0.4, temperature=2.0, ema_decay=decay)
    seen: list[tuple[int, int]] = []
    losses = fit([*layer.parameters()], layer, batches, 3, recipe, on_batch=lambda *each: seen.append(each))
    found = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().numpy()
    np.testing.assert_allclose(found, by_numpy(3, 0.3, 0.4, 2.0, decay), rtol=1e-12, atol=1e-12)
    assert losses[-1] < losses[0]
    assert seen == [(epoch, images) for epoch in range(3) for images in (8, 16, 24)]


def test_a_training_that_diverges_is_an_error() -> None:
    layer = network()
    with pytest.raises(NumericsError, match=r"the loss of epoch \d+ is (nan|inf)\. Lower `lr`"):
        fit([*layer.parameters()], layer, batches, 3, Recipe(epochs=200, lr=1e200))


def test_seeded_gives_the_generators_back_as_they_were() -> None:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    drawn = []
    for _ in range(2):
        with seeded(3, torch.device("cpu")):
            drawn.append((torch.rand(1).item(), random.random()))
    assert drawn[0] == drawn[1]
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]


def test_a_loss_that_ends_far_above_guessing_is_an_error() -> None:
    with pytest.raises(NumericsError, match="the training diverged: the loss of epoch 2 is .*Lower `lr`"):
        fit([*(layer := network()).parameters()], layer, batches, 3, Recipe(epochs=2, lr=1e6, alpha=0.0))


def test_a_loss_that_is_nan_before_any_step_is_not_blamed_on_the_learning_rate() -> None:
    def taught_nan(number: int) -> Iterator[Example]:
        for inputs, labels, teacher in batches(number):
            yield inputs, labels, None if teacher is None else teacher * math.nan

    with pytest.raises(NumericsError, match="loss of the first batch is nan, before any step: .* outputs of the teach"):
        fit([*(layer := network()).parameters()], layer, taught_nan, 3, Recipe(epochs=1, lr=0.1))
