"""Normalisation: the last BatchNorm layer, and how to measure it alone, behind layers that keep their statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batchnorm.layers import find_layers
from ..batchnorm.recalibrate import in_eval_mode
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
        layer.module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, layer in layers.items()
    ]
    try:
        with in_eval_mode(network):
            forward(images)
    finally:
        for hook in hooks:
            hook.remove()
    return called[-1] if called else None


@contextmanager
def only(network: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Freeze all other BatchNorm layers meanwhile, so that `recalibrate_bn` measures these behind them.

    In eval mode the input of a layer does not depend on its own statistics: one pass is exact for a single layer.

    Args:
        names: of the layers that are measured.
    """
    layers, _ = find_layers(network)
    others: list[Any] = [layer.module for name, layer in layers.items() if name not in names]
    momenta = [other.momentum for other in others]
    try:
        for other in others:
            other.momentum = 0.0
        yield
    finally:
        for other, momentum in zip(others, momenta, strict=True):
            other.momentum = momentum
