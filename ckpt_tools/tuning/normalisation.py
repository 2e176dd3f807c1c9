"""Normalisation: the statistics of the last BatchNorm layer alone, behind layers that keep theirs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm.recalibrate import find_layers, in_eval_mode
from ..batchnorm.statistics import Moments, measure, merge
from ..errors import NumericsError
from .examples import Forward


@torch.no_grad()
def last_layer(network: nn.Module, images: Tensor, forward: Forward) -> str | None:
    """Return the name of the BatchNorm layer that is called last for these images; None if none is.

    Args:
        forward: calls the network.
    """
    layers, _ = find_layers(network)
    called: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, layer in layers.items()
    ]
    try:
        with in_eval_mode(network):
            forward(images)
    finally:
        for hook in hooks:
            hook.remove()
    return called[-1] if called else None


@torch.no_grad()
def measure_layer(network: nn.Module, name: str, batches: Iterable[Tensor], forward: Forward) -> None:
    """Give one BatchNorm layer the mean and the unbiased variance of its input; all others keep their statistics.

    In eval mode the input of a layer does not depend on its own statistics, so one pass is exact.

    Args:
        name: of the layer.
        batches: of images, on the device of the network.
        forward: calls the network.

    Raises:
        NumericsError: the input is not finite, or the variance overflows the dtype of the layer.
    """
    layer: Any = network.get_submodule(name)
    found = Moments.none(len(layer.running_var), layer.running_var.device)
    count = 0

    def see(parts: list[Moments], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts.append(measure(args[0] if args else next(iter(kwargs.values()))))

    parts: list[Moments] = []
    hook = layer.register_forward_pre_hook(partial(see, parts), with_kwargs=True)
    try:
        with in_eval_mode(network):
            for images in batches:
                forward(images)
                found = merge([found, *parts])
                parts.clear()
                count += 1
    finally:
        hook.remove()
    mean, variance = found.mean, found.variance(correction=1)
    if not (torch.isfinite(mean).all() and torch.isfinite(variance.to(layer.running_var.dtype)).all()):
        raise NumericsError(f"the input of '{name}' holds NaN or infinity. Look at the weights in front of it.")
    if getattr(layer, "running_mean", None) is not None:
        layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
    if isinstance(getattr(layer, "num_batches_tracked", None), Tensor):
        layer.num_batches_tracked.fill_(count)
