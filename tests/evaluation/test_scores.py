"""Scores: how well a network fits images, by the loss, or without labels by what its predictions tell."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from ckpt_tools.errors import DataError
from ckpt_tools.evaluation.scores import Fit, evaluate, fit


def logits(seed: int = 0, images: int = 20, classes: int = 6) -> torch.Tensor:
    return torch.randn(images, classes, generator=torch.Generator().manual_seed(seed)).double() * 2


def in_batches(*tensors: torch.Tensor) -> list[Any]:
    parts = [tensor.split([7, 9, 4]) for tensor in tensors]
    return [batch if len(batch) > 1 else batch[0] for batch in zip(*parts, strict=True)]


def test_fit_is_the_cross_entropy_and_the_information_in_the_predictions() -> None:
    """The mutual information is the mean divergence of the predictions from their mean."""
    outputs, labels = logits(), torch.arange(20) % 6
    found = fit(nn.Identity(), in_batches(outputs, labels))
    p = softmax(outputs.numpy(), axis=1)
    assert found is not None
    assert (found.images, found.outputs) == (20, 6)
    assert found.loss == pytest.approx(-np.log(p[np.arange(20), labels]).mean(), rel=1e-12)
    assert found.information == pytest.approx(np.mean([entropy(row, p.mean(axis=0)) for row in p]), rel=1e-12)
    assert fit(nn.Identity(), in_batches(outputs)) == Fit(20, 6, None, found.information)


@pytest.mark.parametrize(
    "labels", [torch.full((20,), -1), torch.arange(20), torch.zeros(20), torch.zeros(20, 2).long()]
)
def test_fit_takes_no_labels_that_are_not_of_the_network(labels: torch.Tensor) -> None:
    found = fit(nn.Identity(), in_batches(logits(), labels))
    assert found is not None
    assert found.loss is None


def test_fit_is_of_classifiers_alone() -> None:
    assert fit(nn.Conv2d(3, 2, 1), [torch.zeros(4, 3, 5, 5)]) is None
    assert fit(nn.Linear(3, 1), [torch.zeros(4, 3)]) is None
    assert fit(nn.Linear(3, 2), []) is None


def test_far_worse_is_by_the_loss_unless_it_was_that_of_guessing() -> None:
    good, bad = 2.0, 0.1
    known, unknown = Fit(99, 10, 0.3, good), Fit(99, 10, 5.0, good)
    assert not Fit(99, 10, 0.5, bad).far_worse(known)
    assert Fit(99, 10, 0.6, good).far_worse(known)
    assert Fit(99, 10, math.nan, good).far_worse(known)
    assert not Fit(99, 10, 50.0, good).far_worse(unknown)  # the labels are of other classes
    assert Fit(99, 10, 5.0, bad).far_worse(unknown)
    assert Fit(99, 10, None, bad).far_worse(Fit(99, 10, None, good))
    assert Fit(99, 10, None, math.nan).far_worse(Fit(99, 10, None, good))
    assert not Fit(99, 10, None, good).far_worse(Fit(99, 10, None, bad))


@pytest.mark.parametrize("labels", [torch.arange(20), torch.full((20,), -1)])
def test_evaluate_refuses_labels_out_of_range(labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"`eval_data`.*(labels from 0 to 6 do not fit|needs images with labels)"):
        evaluate(nn.Identity(), in_batches(logits(), labels))
