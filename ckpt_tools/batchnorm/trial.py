"""Trials: does a layer whose class is not known update its statistics to those of what it normalises?

A copy of the layer is tried twice on its first input. In eval mode, the inputs that it hands to normalising functions
of torch are measured, or, if there are none, its own input. In train mode it starts from known statistics: the measured
mean plus a standard deviation, and a higher variance. Its update is compared with that of torch,
new = (1 - m) old + m measured, which must hold with one m > 0 for all channels, of mean and variance (biased or not).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .batches import tensors_of
from .layers import NORMALISING, Layer, layer_of, name_of
from .statistics import Moments, measure, merge

Way = Literal["function", "own", "frozen", "few", "refused"]
"""How a layer normalises: by a function of torch that takes its buffers (function); its input, by arithmetic of its own
(own); by statistics that never move (frozen). Or why that is unknown: its input has a single value a channel (few), or
its statistics move to others than those of what it normalises (refused).
"""


@dataclass(frozen=True, slots=True)
class Trials:
    """What trials have shown, each made once; kept between passes.

    Attributes:
        include_frozen: a layer whose statistics do not move is measured, too.
        ways: name of a layer to how it normalises.
        doubts: name to the reason why it is refused.
    """

    include_frozen: bool
    ways: dict[str, Way] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)

    def way(self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Way:
        """Return how a layer normalises; the first input with two values a channel tells.

        Args:
            args, kwargs: it is about to be called with.
        """
        if layer.name not in self.ways:
            try:
                way = _tried(layer, args, kwargs, include_frozen=self.include_frozen)
            except _Doubtful as doubt:
                way, self.doubts[layer.name] = "refused", str(doubt)
            if way == "few":
                return way
            self.ways[layer.name] = way
        return self.ways[layer.name]


class _Doubtful(Exception):
    """A layer does not update its statistics as they are measured, or cannot be tried; says why."""


def _tried(layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, include_frozen: bool) -> Way:
    """Try a copy of a layer on an input; see the head of this module.

    Raises:
        _Doubtful: its statistics move elsewhere; or this cannot be tried.
    """
    module = _copied(layer.module)
    for each in module.modules():
        if hasattr(each, "momentum"):
            each.momentum = 0.5  # type: ignore[assignment]
    tried = layer_of(module)
    with torch.random.fork_rng(devices=[]):
        values = _handed_on(tried, args, kwargs)
        way: Way = "function" if values else "own"
        values = values or list(tensors_of([*args, *kwargs.values()]))[:1]
        if not all(each.dim() > 1 and each.shape[1] == layer.channels for each in values):
            shapes = ", ".join(str(list(each.shape)) for each in values)
            raise _Doubtful(f"its input of shape {shapes} has its channels elsewhere")
        moments = merge([measure(each) for each in values])
        if moments.count < 2:
            return "few"
        biased = moments.variance(correction=0)
        unit = torch.where(biased > 0, biased, 1.0)  # of variances
        sigma = unit.sqrt()  # of means
        tried.store(moments.mean + sigma, biased + unit)
        old_mean, old_variance = tried.stored()  # as rounded
        _set_mode(module, training=True)
        try:
            module(*args, **kwargs)
        except Exception as error:  # a class of the user's
            raise _Doubtful(f"it cannot be tried in train mode ({type(error).__name__}: {error})") from error
    tried = layer_of(module)  # a class may put new tensors in place of its buffers
    mean, variance = tried.stored()
    if variance.equal(old_variance) and (mean is None or old_mean is None or mean.equal(old_mean)):
        if include_frozen and way == "own":
            _check_whitens(tried, moments, args, kwargs)
        return way if include_frozen else "frozen"
    eps = max(torch.finfo(each.dtype).eps for each in (tried.variance, *values) if each.is_floating_point())
    tolerance = 1e-3 + 16 * eps * (1 + (moments.mean.abs() / sigma).max().item())
    for measured in (moments.variance(correction=1), biased):
        gone, whole = [(old_variance - variance) / unit], [(old_variance - measured) / unit]
        if mean is not None and old_mean is not None:
            gone.append((old_mean - mean) / sigma)
            whole.append((old_mean - moments.mean) / sigma)
        if _one_momentum(torch.cat(gone), torch.cat(whole), tolerance):
            return way
    raise _Doubtful("in train mode its statistics do not move to those of what it normalises")


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy without hooks, which may hold a whole network."""
    hooks = {each: (each._forward_hooks, each._forward_pre_hooks) for each in module.modules()}
    try:
        for each in hooks:
            each._forward_hooks, each._forward_pre_hooks = OrderedDict(), OrderedDict()
        return copy.deepcopy(module)
    finally:
        for each, (behind, before) in hooks.items():
            each._forward_hooks, each._forward_pre_hooks = behind, before


def _handed_on(layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Run a layer in eval mode; return what it lets functions of torch normalise by its buffers."""
    _set_mode(layer.module, training=False)
    inputs = _Inputs([each for each in (layer.mean, layer.variance) if each is not None])
    with inputs:
        layer.module(*args, **kwargs)
    return inputs.values


def _set_mode(module: nn.Module, *, training: bool) -> None:
    """Set the mode of a module and of all in it, whatever its own train() does."""
    module.train(training)
    for each in module.modules():
        each.training = training


def _one_momentum(gone: Tensor, whole: Tensor, tolerance: float) -> bool:
    """Return True if statistics have gone the same part of the way to what was measured.

    Args:
        gone, whole: float64 [K], how far each has gone, and the whole way, in standard deviations of the data or
            multiples of their variance.
    """
    momentum = (gone * whole).sum() / whole.square().sum()
    return bool(momentum > tolerance and ((gone - momentum * whole).abs() <= tolerance).all())


def _check_whitens(layer: Layer, moments: Moments, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a layer that, with the statistics of its input, does not give outputs of mean 0 and variance 1.

    Raises:
        _Doubtful: it does not.
    """
    biased = moments.variance(correction=0)
    layer.store(moments.mean, biased)
    for name, value in (("weight", 1.0), ("bias", 0.0)):
        if isinstance(getattr(layer.module, name, None), Tensor):
            getattr(layer.module, name).fill_(value)
    output = layer.module(*args, **kwargs)
    found = measure(output) if isinstance(output, Tensor) and output.dim() > 1 else None
    wanted = biased / (biased + getattr(layer.module, "eps", 1e-5))
    if (
        found is None
        or len(found.mean) != len(wanted)
        or (found.mean.abs() > 0.01).any()
        or ((found.variance(correction=0) - wanted).abs() > 0.01).any()
    ):
        raise _Doubtful("it never updates its statistics, and its output has not mean 0 and variance 1 by its input's")


class _Inputs(TorchFunctionMode):
    """Keeps the inputs that functions of torch normalise by some buffers."""

    def __init__(self, buffers: list[Tensor]) -> None:
        super().__init__()
        self.buffers = buffers
        self.values: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if name_of(func) in NORMALISING and any(each is buffer for each in given for buffer in self.buffers):
            self.values.append(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)
