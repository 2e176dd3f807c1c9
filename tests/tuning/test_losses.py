"""The loss of a tuning, and its gradient, equal the formula in NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from ckpt_tools.tuning.losses import tuning_loss

N, C = 7, 5


def case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 6 * rng.standard_normal((N, C)), 6 * rng.standard_normal((N, C)), rng.integers(0, C, N)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 5.0), (1.0, 0.5), (0.9, 40.0)])
def test_loss_and_gradient_equal_an_independent_formula(alpha: float, temperature: float) -> None:
    student, teacher, labels = case(0)
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    cross = -log_softmax(student, axis=1)[np.arange(N), labels].mean()
    want = (1 - alpha) * cross + alpha * temperature**2 * rel_entr(p, q).sum(axis=1).mean()
    # d CE / d z = (softmax(z) - onehot) / N; d T^2 KL / d z = T (softmax(z / T) - p) / N
    onehot = np.eye(C)[labels]
    slope = ((1 - alpha) * (softmax(student, axis=1) - onehot) + alpha * temperature * (q - p)) / N

    logits = torch.tensor(student, requires_grad=True)
    loss = tuning_loss(logits, torch.tensor(labels), torch.tensor(teacher), alpha=alpha, temperature=temperature)
    loss.backward()
    assert loss.dtype == torch.float64
    np.testing.assert_allclose(loss.item(), want, rtol=1e-12, atol=1e-12)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), slope, rtol=1e-12, atol=1e-12)


def test_without_a_teacher_the_loss_is_the_cross_entropy() -> None:
    student, _, labels = case(1)
    want = -log_softmax(student, axis=1)[np.arange(N), labels].mean()
    found = tuning_loss(torch.tensor(student), torch.tensor(labels), None, alpha=0.7)
    np.testing.assert_allclose(found.item(), want, rtol=1e-12)


def test_a_teacher_that_is_the_student_leaves_the_gradient_of_the_labels() -> None:
    student, _, labels = case(2)
    logits = torch.tensor(student, requires_grad=True)
    tuning_loss(logits, torch.tensor(labels), torch.tensor(student), alpha=0.4, temperature=3).backward()
    want = 0.6 * (softmax(student, axis=1) - np.eye(C)[labels]) / N
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), want, rtol=1e-12, atol=1e-13)


def test_logits_of_16_bits_are_widened() -> None:
    student, teacher, labels = case(3)
    narrow = [torch.tensor(each).bfloat16() for each in (student, teacher)]
    found = tuning_loss(narrow[0], torch.tensor(labels), narrow[1])
    assert found.dtype == torch.float32
    assert found.equal(tuning_loss(narrow[0].float(), torch.tensor(labels), narrow[1].float()))
