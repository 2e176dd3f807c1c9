"""Calls: how a model is called with a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError, UsageError
from .batches import input_of, moved, tensors_of

LABEL_KEYS = ("label", "labels", "target", "targets", "y")
"""Usual names of labels in a batch that is a dict."""


@dataclass(frozen=True, slots=True, eq=False)
class RealPositions:
    """Which positions of a batch are real, and not padding.

    Attributes:
        given: bool [N, T], or lengths, integers [N].
        times: of lengths, the T that they may stand for: the longest, and the sizes of the tensors of the batch.
    """

    given: Tensor
    times: frozenset[int] = frozenset()

    def of(self, values: Tensor) -> Tensor | None:
        """Return the real positions of [N, C, T], as [positions, C]; [N, C] as it is; None if it does not fit."""
        if len(values) != len(self.given) or values.dim() not in (2, 3):
            return None
        if values.dim() == 2:  # pooled: a row is a sample
            return values
        length = values.shape[2]
        if self.given.dim() == 2:
            return values.movedim(1, -1)[self.given] if self.given.shape[1] == length else None
        positions = torch.arange(length, device=self.given.device)
        return values.movedim(1, -1)[positions < self.given[:, None]] if length in self.times else None


@dataclass(frozen=True, slots=True)
class Call:
    """How a model is called with a batch.

    Attributes:
        forward: called with (model, batch on the device of the model); its result is the output. None to call the
            model: with a tensor, with the leading entries of a tuple or list, or with a dict by keyword, see
            `_arguments`.
        inputs: how many leading entries of a tuple or list go to the model.
        mask: key or index of the entry of a batch that says which positions are real: bool [N, T], True for real
            ones, or lengths, integers [N].
    """

    forward: Callable[[nn.Module, Any], Any] | None = None
    inputs: int = 1
    mask: str | int | None = None

    def __post_init__(self) -> None:
        if type(self.inputs) is not int or self.inputs < 1:
            raise UsageError(f"`inputs={self.inputs!r}`: must be a whole number from 1 on.")
        if self.forward is not None and not callable(self.forward):
            raise UsageError(f"`forward` is a {type(self.forward).__name__}, not a function of (model, batch).")
        if self.forward is not None and self.inputs != 1:
            raise UsageError("`inputs` has no effect beside `forward`, which takes the whole batch. Give one of them.")

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Call the model with a batch, which is moved to its device.

        Raises:
            DataError: the batch holds no input for the model.
            ModelError: the model is on another device afterwards.
        """
        device = device_of(model)
        if self.forward is not None:
            output = self.forward(model, moved(batch, device))
        else:
            positional, named = self._arguments(model, batch)
            output = model(*moved(positional, device), **moved(named, device))
        if (now := device_of(model)) != device:
            raise ModelError(f"the forward pass moves the model from {device} to {now}. Move it before, with `device`.")
        return output

    def _arguments(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments of the model.

        Of a dict: the entries that the signature of the model has, by keyword, if these are all that it needs; of
        labels only those that have no default there. Otherwise the entry of a usual name.
        """
        if isinstance(batch, (tuple, list)) and self.inputs > 1:
            if len(batch) < self.inputs:
                raise DataError(f"`inputs={self.inputs}`: a batch has {len(batch)} entries.")
            return tuple(batch[: self.inputs]), {}
        if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping):
            batch = batch[0]
        if isinstance(batch, Mapping):
            parameters = _parameters(model)
            needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
            named = {
                name: batch[name] for name in parameters if name in batch and (name in needed or name not in LABEL_KEYS)
            }
            if named and needed <= named.keys():
                return (), named
        given = input_of(batch)
        if not any(tensor.dim() for tensor in tensors_of(given)):
            raise DataError(
                f"a batch is a {type(batch).__name__} that starts with no tensor of images or other inputs. "
                "`forward` can say how the model is called."
            )
        return (given,), {}

    def real_positions(self, batch: Any, device: torch.device) -> RealPositions | None:
        """Return which positions of a batch are real; None without `mask`.

        Raises:
            DataError: the batch has no such entry, or it is no mask.
        """
        if self.mask is None:
            return None
        try:
            mask = batch[self.mask] if isinstance(batch, Mapping) else batch[int(self.mask)]
        except (KeyError, IndexError, TypeError, ValueError):
            keys = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"{type(batch).__name__}"
            raise DataError(f"`mask={self.mask!r}`: a batch ({keys}) has no such entry.") from None
        if not isinstance(mask, Tensor) or mask.dim() not in (1, 2):
            raise DataError(f"`mask={self.mask!r}`: give a tensor, bool [N, T] or lengths [N].")
        if mask.dim() == 1 and (mask.is_floating_point() or mask.dtype == torch.bool):
            raise DataError(f"`mask={self.mask!r}`: lengths are integers, not {mask.dtype}.")
        if mask.dim() == 2:
            return RealPositions(mask.to(device) != 0)
        sizes = {size for tensor in tensors_of(batch) for size in tensor.shape[1:]} | {int(mask.max())}
        return RealPositions(mask.to(device), frozenset(size for size in sizes if size >= int(mask.max())))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; the CPU if it has no tensors."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the named parameters of the forward of a model, or of the one that it wraps."""
    try:
        found = dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        found = {}
    named = {name: each for name, each in found.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    wrapped = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    return named if named or not isinstance(wrapped, nn.Module) else _parameters(wrapped)
