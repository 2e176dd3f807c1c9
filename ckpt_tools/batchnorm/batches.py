"""Batches: the images of a batch, at least two of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x", "data")
"""Keys of the images in a batch that is a dict."""


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch.

    Args:
        batch: a tensor, a tuple or list that starts with one, or a dict with one under a usual name.

    Raises:
        DataError: there are no images in it.
    """
    images = batch
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in INPUT_KEYS if key in batch), None)
        if images is None:
            raise DataError(
                f"a batch is a dict of {', '.join(map(str, batch))}; expected one of {', '.join(INPUT_KEYS)}."
            )
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor) or images.dim() == 0:
        raise DataError(f"a batch is a {type(batch).__name__} that starts with no tensor of images.")
    return images


def joined(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Join a batch of one image to its neighbour: a single value per channel cannot be normalised."""
    waiting: Tensor | None = None
    for images in chain((images for images in batches if len(images)), [None]):
        if waiting is not None and images is not None and _to_join(waiting, images):
            waiting = torch.cat([waiting, images])
            continue
        if waiting is not None and len(waiting) == 1:
            raise DataError("a batch of a single image, with no neighbour of its shape. Give more data.")
        if waiting is not None:
            yield waiting
        waiting = images


def _to_join(one: Tensor, other: Tensor) -> bool:
    return 1 in (len(one), len(other)) and one.shape[1:] == other.shape[1:]
