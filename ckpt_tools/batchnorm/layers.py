"""Layers: which ones have statistics to measure, and whether a class of its own updates them as they are measured."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelError, UsageError
from .batches import tensors_of
from .statistics import Moments, measure, merge

NORMALISING = frozenset(
    {
        "batch_norm",
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_impl_index",
        "_batch_norm_no_update",
        "_batch_norm_with_update",
    }
)
"""Functions of torch that normalise their first argument by statistics."""
_KNOWN = ("torch.nn.modules.batchnorm", "timm.layers.norm_act", "timm.layers.split_batchnorm")
"""Modules whose layers are known to normalise by these functions, and to measure what they normalise."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer with statistics.

    Attributes:
        name: in the model; empty for the model itself.
        module: the layer.
        mean, variance: its buffers; the mean is None for a layer without one.
        known: its class normalises by a function of torch, and measures what it normalises.
        scripted: compiled by TorchScript.
    """

    name: str
    module: Any
    mean: Tensor | None
    variance: Tensor
    known: bool
    scripted: bool

    @property
    def class_name(self) -> str:
        """The name of its class."""
        return str(getattr(self.module, "original_name", type(self.module).__name__))

    @property
    def channels(self) -> int:
        """C."""
        return self.variance.numel()

    def store(self, mean: Tensor, variance: Tensor) -> None:
        """Put statistics, float64 [C], into its buffers."""
        if self.mean is not None:
            self.mean.copy_(mean.view_as(self.mean))
        self.variance.copy_(variance.view_as(self.variance))

    def stored(self) -> tuple[Tensor | None, Tensor]:
        """Return its statistics, float64 [C], as copies."""
        mean = None if self.mean is None else self.mean.detach().to(torch.float64, copy=True).flatten()
        return mean, self.variance.detach().to(torch.float64, copy=True).flatten()


def find_layers(
    model: nn.Module, *, include_frozen: bool = False
) -> tuple[dict[str, Layer], tuple[tuple[str, str, str], ...]]:
    """Find the layers whose statistics can be measured, and similar layers that are left out.

    Args:
        include_frozen: find those, too, that are not updated in training.

    Returns:
        (name to layer, in the order of the model; (name, class, reason) of the others).

    Raises:
        UsageError: a layer has not seen its first input.
        ModelError: the model was exported, and has no modes.
    """
    layers: dict[str, Layer] = {}
    skipped = []
    still = _not_trained(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise UsageError(
                f"'{name}' is a {type(module).__name__} that has not seen its first input. Run the model once before."
            )
        variance = getattr(module, "running_var", None)
        reason = ""
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            reason = "" if variance is None else "normalises each image by itself"
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and variance is None:
            reason = "keeps no running statistics"
        elif isinstance(variance, Tensor):
            if variance.dim() == 0 or variance.numel() != max(variance.shape):
                reason = "keeps no statistics for each channel"
            else:
                reason = "" if include_frozen else _frozen(module, still=module in still)
                if not reason:
                    layers[name] = _layer(module, name)
        if reason:
            skipped.append((name, str(getattr(module, "original_name", type(module).__name__)), reason))
    return layers, tuple(skipped)


def _layer(module: Any, name: str = "") -> Layer:
    mean = getattr(module, "running_mean", None)
    return Layer(
        name,
        module,
        mean if isinstance(mean, Tensor) else None,
        module.running_var,
        known="forward" not in vars(module) and type(module).forward.__module__ in _KNOWN,
        scripted=isinstance(module, torch.jit.ScriptModule),
    )


def _frozen(module: Any, *, still: bool) -> str:
    if not hasattr(module, "momentum"):
        return "frozen: its class never updates them"
    if module.momentum == 0:
        return "frozen: its momentum is 0"
    if getattr(module, "track_running_stats", True) is False:
        return "frozen: its track_running_stats is False"
    return "frozen: train() leaves it in eval mode" if still else ""


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give a model its modes back: by its own train(), which may fuse or freeze, and module by module."""
    mode = model.training
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        if any(module.training != training for module, training in modes.items()):
            model.train(mode)
        for module, training in modes.items():
            module.training = training


def _not_trained(model: nn.Module) -> set[nn.Module]:
    """Return the modules that stay in eval mode when the model is put into train mode."""
    if not any(_own_train(module) for module in model.modules()):
        return set()
    with kept_modes(model):
        try:
            model.train(True)
        except NotImplementedError as error:  # of torch.export
            raise ModelError(
                f"the model cannot be put into train and eval mode ({error}). Give the one that it was exported from."
            ) from error
        return {module for module in model.modules() if not module.training}


def _own_train(module: nn.Module) -> bool:
    known = (nn.Module.train, torch.jit.ScriptModule.train)
    return not isinstance(module, torch.jit.ScriptModule) and (
        "train" in vars(module) or type(module).train not in known
    )


class Doubtful(Exception):
    """A layer does not update its statistics as they are measured; says why."""


def tried(layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, include_frozen: bool) -> str:
    """Try a layer of a class of its own on an input: do its statistics move to those of what it normalises?

    A copy runs in eval mode, where what it hands to a function of torch is measured, or else its input. Then it runs
    in train mode, from statistics that are known: mean + sigma and twice the variance. The update of torch,
    new = (1 - m) old + m measured, must hold with one m > 0 for all channels of both. A layer whose statistics do not
    move is frozen; one that is wanted all the same must give outputs of mean 0 and variance 1 from its input's.

    Returns:
        ``function`` if it normalises by a function of torch, ``own`` for arithmetic of its own, ``frozen`` if its
        statistics do not move, and ``few`` if a single value a channel cannot tell.

    Raises:
        Doubtful: they move elsewhere; or this cannot be tried.
    """
    copied, heard = _copied(layer.module), _Heard()
    for module in copied.modules():
        if hasattr(module, "momentum"):
            module.momentum = 0.5  # type: ignore[assignment]
    twin = _layer(copied)
    heard.buffers = [twin.mean, twin.variance]
    with torch.random.fork_rng(devices=[]):
        _set_mode(copied, training=False)
        with heard:
            copied(*args, **kwargs)
        values = heard.values or list(tensors_of([*args, *kwargs.values()]))[:1]
        if not all(each.dim() > 1 and each.shape[1] == layer.channels for each in values):
            shapes = ", ".join(str(list(each.shape)) for each in values)
            raise Doubtful(f"its input of shape {shapes} has its channels elsewhere")
        moments = merge([measure(each) for each in values])
        if moments.count < 2:
            return "few"
        biased = moments.variance(correction=0)
        unit = torch.where(biased > 0, biased, 1.0)
        sigma = unit.sqrt()
        old_mean, old_variance = moments.mean + sigma, biased + unit
        twin.store(old_mean, old_variance)
        start_mean, start_variance = twin.stored()
        _set_mode(copied, training=True)
        try:
            copied(*args, **kwargs)
        except Exception as error:  # a class of the user's
            raise Doubtful(f"it cannot be tried in train mode ({type(error).__name__}: {error})") from error
    way = "function" if heard.values else "own"
    twin = _layer(copied)  # a class may put new tensors in place of its buffers
    mean, variance = twin.stored()
    if variance.equal(start_variance) and (mean is None or start_mean is None or mean.equal(start_mean)):
        if include_frozen and way == "own":
            _check_whitens(twin, moments, args, kwargs)
        return way if include_frozen else "frozen"
    eps = max(torch.finfo(each.dtype).eps for each in (twin.variance, *values) if each.is_floating_point())
    tolerance = 1e-3 + 16 * eps * (1 + (moments.mean.abs() / sigma).max().item())
    if not any(
        _one_momentum(mean, start_mean, moments.mean, sigma, variance, start_variance, target, unit, tolerance)
        for target in (moments.variance(correction=1), biased)
    ):
        raise Doubtful("in train mode its statistics do not move to those of what it normalises")
    return way


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


def _check_whitens(layer: Layer, moments: Moments, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
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
        raise Doubtful("it never updates its statistics, and its output has not mean 0 and variance 1 by its input's")


def _one_momentum(
    mean: Tensor | None,
    start_mean: Tensor | None,
    to_mean: Tensor,
    sigma: Tensor,
    variance: Tensor,
    start_variance: Tensor,
    to_variance: Tensor,
    unit: Tensor,
    tolerance: float,
) -> bool:
    """Tell if mean and variance have gone the same part of the way to what was measured, in each channel."""
    ways = [((start_variance - variance) / unit, (start_variance - to_variance) / unit)]
    if mean is not None and start_mean is not None:
        ways.append(((start_mean - mean) / sigma, (start_mean - to_mean) / sigma))
    gone, whole = (torch.cat(each) for each in zip(*ways, strict=True))
    momentum = (gone * whole).sum() / whole.square().sum()
    return bool(momentum > tolerance and ((gone - momentum * whole).abs() <= tolerance).all())


def _set_mode(module: nn.Module, *, training: bool) -> None:
    module.train(training)
    for each in module.modules():
        each.training = training


class _Heard(TorchFunctionMode):
    """Keeps what is normalised by some buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor | None] = []
        self.values: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in NORMALISING and any(
            each is buffer for each in (*args, *kwargs.values()) for buffer in self.buffers if buffer is not None
        ):
            self.values.append(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


def name_of(func: Any) -> str:
    """Return the bare name of a function, method or operator of torch."""
    return str(getattr(func, "__name__", "")).partition(".")[0]
