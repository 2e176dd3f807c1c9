"""Examples: labelled images that fit a classifier, with the logits of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..batchnorm.batches import INPUT_KEYS
from ..batchnorm.calls import LABEL_KEYS
from ..errors import CkptError, DataError, ModelError

Forward = Callable[[Tensor], Tensor]
"""Images [N, ...] to logits [N, C]."""
Example = tuple[Tensor, Tensor, "Tensor | None"]
"""A batch: what the trained part takes [N, ...], labels int64 [N], and logits of the teacher [N, C]."""


def labelled(batches: Iterable[Any], classes: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images [N, ...] and labels, int64 [N], of batches that are not empty.

    Args:
        batches: of (images, labels), or dicts with both under usual names.
        classes: of the network; None to leave the labels unchecked.

    Raises:
        DataError: no labels, labels out of range, or data that fail.
    """
    done = 0
    try:
        for batch in batches:
            images, labels = _pair(batch)
            if len(images) == 0:
                continue
            if classes is not None:
                check_labels(labels, classes)
            yield images, labels.long()
            done += len(images)
    except CkptError:
        raise
    except (Exception, SystemExit) as error:  # a dataset of the user's
        raise DataError(f"`data` failed after {done} images ({type(error).__name__}: {error}).") from error


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        images, labels = (next((batch[key] for key in keys if key in batch), None) for keys in (INPUT_KEYS, LABEL_KEYS))
        given = f"a dict of {', '.join(map(str, batch))}"
    else:
        images, labels = batch[:2] if isinstance(batch, (tuple, list)) and len(batch) > 1 else (batch, None)
        given = f"a {type(batch).__name__}"
    if not isinstance(images, Tensor) or images.dim() == 0:
        raise DataError(f"`data` gives {given} without images. {_WANTED}")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (len(images),):
        found = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, Tensor) else "none in it"
        raise DataError(f"`data` gives {given} without labels of its images ({found}). {_WANTED}")
    return images, labels


_WANTED = (
    "It needs folders named by class, or batches of (images, labels): a tensor [N, ...] and integers [N]; in a dict as "
    "'image' and 'label'."
)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no class.

    Raises:
        DataError: a label is below 0, or not below the number of classes.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"`data`: labels from {low} to {high} do not fit a network of {classes} classes. Each image needs a label, "
            "and the folders should be the classes of the model, in its order."
        )


def called(name: str, forward: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Call a network.

    Args:
        name: for messages.

    Raises:
        ModelError: it fails.
    """
    try:
        return forward(images)
    except CkptError:
        raise
    except (Exception, SystemExit) as error:  # the code of the user may raise anything
        raise ModelError(
            f"{name} failed on a batch of shape {list(images.shape)} ({type(error).__name__}: {error}). "
            "Do the images fit the model (`img_size`, `data`)?"
        ) from error


def as_logits(name: str, found: Any, images: int, classes: int | None = None) -> Tensor:
    """Return the output of a network as logits, [N, C].

    Args:
        name: for messages.
        images: N.
        classes: C; None if any will do.

    Raises:
        ModelError: it is something else.
    """
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != images:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelError(f"{name} gives {shape} for {images} images, not one row of logits for each.")
    if classes is not None and found.shape[1] != classes:
        raise ModelError(
            f"{name} has {found.shape[1]} classes, and the network that is trained has {classes}. A teacher needs the "
            "same classes in the same order."
        )
    return found


@torch.no_grad()
def taught(name: str, teacher: Forward, images: Tensor, classes: int) -> Tensor:
    """Return the logits of a teacher, [N, C].

    Raises:
        ModelError: it fails, or has other classes.
    """
    return as_logits(name, called(name, teacher, images), len(images), classes)
