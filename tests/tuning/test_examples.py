"""Examples are labelled images, and what is not is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ckpt_tools.errors import DataError
from ckpt_tools.tuning.examples import labelled

IMAGES, LABELS = torch.zeros(2, 1, 8, 8), torch.tensor([3, 1])


@pytest.mark.parametrize(
    "batch",
    [(IMAGES, LABELS), [IMAGES, LABELS, "more"], {"label": LABELS, "image": IMAGES}, {"x": IMAGES, "targets": LABELS}],
)
def test_images_and_labels_are_found_in_tuples_and_dicts(batch: Any) -> None:
    [(images, labels)] = labelled([batch], classes=4)
    assert images is IMAGES
    assert labels.equal(LABELS)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"foo": IMAGES, "label": LABELS}, "gives a dict of foo, label without images. It needs folders named by"),
        ((["a", "b"], LABELS), "gives a tuple without images"),
        (IMAGES, r"gives a Tensor without labels of its images \(none in it\)"),
        ((IMAGES, torch.rand(2)), r"gives a tuple without labels of its images \(torch.float32 of shape \[2\]\)"),
        ((IMAGES, torch.eye(2).long()), r"\(torch.int64 of shape \[2, 2\]\). It needs .*integers \[N\]"),
        ((IMAGES, torch.tensor([0, 4])), "labels from 0 to 4 do not fit a network of 4 classes"),
    ],
)
def test_a_batch_without_images_or_labels_is_told_what_it_has(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        next(labelled([batch], classes=4))
