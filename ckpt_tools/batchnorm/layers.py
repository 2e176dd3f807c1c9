"""Layers: which ones have statistics to measure, and which ones are left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, UsageError

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
        known: its class normalises by a function of torch, and measures what it normalises; others are tried.
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
                    layers[name] = layer_of(module, name)
        if reason:
            skipped.append((name, str(getattr(module, "original_name", type(module).__name__)), reason))
    return layers, tuple(skipped)


def layer_of(module: Any, name: str = "") -> Layer:
    """Return a module that has a running variance as a layer."""
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
    """Return why training does not update the statistics of a module; empty if it does.

    Args:
        still: train() leaves it in eval mode.
    """
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


def name_of(func: Any) -> str:
    """Return the bare name of a function, method or operator of torch."""
    return str(getattr(func, "__name__", "")).partition(".")[0]
