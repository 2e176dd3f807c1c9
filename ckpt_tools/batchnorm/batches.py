"""Batches: tensors in tuples, lists and dicts of any depth, counted in samples, moved, and joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "x", "data")
"""Usual names of the input in a batch that is a dict."""


def images_of(batch: Any) -> Tensor:
    """Return the input of a batch, where it is one tensor.

    Args:
        batch: a tensor, a tuple or list that starts with one, or a dict with one under a usual name.

    Raises:
        DataError: there is no such tensor in it.
    """
    images = input_of(batch)
    if not isinstance(images, Tensor) or images.dim() == 0:
        raise DataError(f"a batch is a {type(batch).__name__} that starts with no tensor of images.")
    return images


def input_of(batch: Any) -> Any:
    """Return the entry of a batch that a model takes by default; the batch itself if it has no entries.

    Raises:
        DataError: a dict without an entry of a usual name.
    """
    if isinstance(batch, Mapping):
        name = next((key for key in INPUT_KEYS if key in batch), None)
        if name is None:
            raise DataError(
                f"a batch is a dict of {', '.join(map(str, batch))}; expected one of {', '.join(INPUT_KEYS)}, or names "
                "that the forward of the model has. `forward` can say how the model is called."
            )
        return batch[name]
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, at any depth."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for entry in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(entry)


def samples_in(batch: Any) -> int:
    """Return the number of samples of a batch: the length of its first tensor; 1 if there is none.

    A list that starts with a list, as detection has it, holds as many samples as that list.
    """
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(first, (tuple, list)):
        return len(first)
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.dim()), 1)


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with each of its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)([mapped(value, change) for value in batch])
    return batch


def moved(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device, without waiting for the copies."""
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def joined(batches: Iterable[Any], suffices: Callable[[Any], bool]) -> Iterator[Any]:
    """Join a batch of one sample to a neighbour of its shape: a single value a channel cannot be normalised.

    One that is left over after larger ones is added to its neighbour. Where all batches are of one sample, they are
    joined to pairs, or not at all if one `suffices`. No batch takes more than one other, but for the last.

    Args:
        batches: of any structure; those without samples are passed over.
        suffices: called at most once, with a batch of one sample: does each layer see more than one value a channel?
    """
    whole: list[Any] = []  # complete, and the last of them may take a neighbour
    single: Any = None
    alone: bool | None = None
    for batch in batches:
        if not (samples := samples_in(batch)):
            continue
        if single is not None:
            if samples == 1 and alone is None:
                alone = suffices(single)
            both = None if samples == 1 and alone else _join(single, batch)
            yield from whole
            whole, single = [single if both is None else both], None
            if both is not None:
                continue
        if samples > 1:
            yield from whole
            whole = [batch]
        elif whole and samples_in(whole[0]) > 2 and (both := _join(whole[0], batch)) is not None:
            yield both
            whole = []
        else:
            single = batch
    if single is not None and whole and not alone and (both := _join(whole[0], single)) is not None:
        whole, single = [both], None
    yield from whole
    if single is not None:
        yield single


def _join(one: Any, other: Any) -> Any:
    """Return two batches as one, tensors along their first dimension; None if they differ in anything else."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        fit = one.dim() and one.shape[1:] == other.shape[1:] and one.dtype == other.dtype
        return torch.cat([one, other]) if fit else None
    if isinstance(one, Mapping) and isinstance(other, Mapping) and list(one) == list(other):
        values = [_join(one[key], other[key]) for key in one]
        return None if any(value is None for value in values) else dict(zip(one, values, strict=True))
    if isinstance(one, (tuple, list)) and type(one) is type(other) and len(one) == len(other) and one:
        entries = [_join(*each) for each in zip(one, other, strict=True)]
        if any(entry is None for entry in entries):
            return None
        return type(one)(*entries) if hasattr(one, "_fields") else type(one)(entries)
    return one if type(one) is type(other) and isinstance(one, (int, float, str)) and one == other else None
