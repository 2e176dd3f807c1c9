"""The head: which layer of a network is its classifier, what goes into it, and what stands in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericsError, UsageError

USUAL = ("fc", "classifier", "head", "heads")
"""Names of the classifier in the models of torchvision."""


@dataclass(frozen=True, slots=True)
class Head:
    """The classifier of a network.

    Attributes:
        name: in the network.
        module: a linear layer, or what else the network has.
    """

    name: str
    module: nn.Module


def find_head(network: nn.Module, name: str | None = None) -> Head:
    """Find the classifier: as named, by timm's ``get_classifier``, by torchvision's names, or the last linear layer.

    Whether the output of the network is that of the classifier shows when the network runs; see `Tap`.

    Args:
        network: with its weights.
        name: of the module, dotted.

    Raises:
        UsageError: the network has no module of this name, or it has no weights.
        ModelError: the network has no classifier, or several.
    """
    if name is not None:
        return _named(network, name)
    get = getattr(network, "get_classifier", None)
    if callable(get):
        found = None
        with suppress(Exception):  # one of the user's may be another thing, with arguments
            found = get()
        if isinstance(found, (tuple, list, nn.ModuleList, nn.ModuleDict)):
            raise ModelError(
                f"{type(network).__name__} has several classifiers ({_linear(network)}). Name the one that gives its "
                "output with `head`, or use `train='all'`."
            )
        names = [each for each, module in network.named_modules() if module is found]
        if isinstance(found, nn.Module) and names and any(True for _ in found.parameters()):
            return Head(names[0], found)
    else:
        for usual in USUAL:
            if isinstance(module := getattr(network, usual, None), nn.Module) and (last := _last_linear(module)):
                inner = last[0]
                return Head(f"{usual}.{inner}" if inner else usual, last[1])
        if last := _last_linear(network):
            return Head(*last)
    raise ModelError(
        f"no classifier was found in {type(network).__name__}: it has {_linear(network)}. Name its last layer with "
        "`head`, or use `train='all'`."
    )


def _named(network: nn.Module, name: str) -> Head:
    module = None
    with suppress(AttributeError):
        module = network.get_submodule(name)
    if module is None or not name:
        raise UsageError(f"`head={name!r}`: {type(network).__name__} has no such module; it has {_linear(network)}.")
    if not any(True for _ in module.parameters()):
        raise UsageError(f"`head={name!r}`: is a {type(module).__name__} without weights, so it cannot be trained.")
    return Head(name, module)


def _last_linear(module: nn.Module) -> tuple[str, nn.Module] | None:
    found = [(name, each) for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    return found[-1] if found else None


def _linear(network: nn.Module) -> str:
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return f"the linear layers {', '.join(names[-4:])}" if names else "no linear layer"


def last_block(network: nn.Module, head: str, images: Tensor) -> tuple[str, ...]:
    """Return the modules with weights from the last block in front of the classifier to the classifier.

    The block is the last child, in the order in which the network lists its children, that runs and holds a weight
    matrix or a convolution; of a sequence of blocks it is the last one. Norms behind it belong to it.

    Args:
        head: name of the classifier.
        images: a batch that the network runs on, to see what runs.

    Raises:
        ModelError: nothing stands in front of the classifier.
    """
    running = _running(network, images)
    path = head.split(".")
    behind = [head]
    for depth in reversed(range(len(path))):
        lead = path[:depth]
        children = [*network.get_submodule(".".join(lead)).named_children()]
        position = [name for name, _ in children].index(path[depth])
        found = _last(children[:position], lead, running)
        behind[:0] = found
        if found and _has_matrix(network.get_submodule(found[0])):
            return tuple(behind)
    raise ModelError(f"{type(network).__name__}: no block stands in front of '{head}'. Use `train='head'` or 'all'.")


def _running(network: nn.Module, images: Tensor) -> set[nn.Module]:
    """Return the modules that run on a batch, and those that hold one."""
    called: set[nn.Module] = set()
    hooks = [each.register_forward_pre_hook(lambda module, _: called.add(module)) for each in network.modules()]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {each for each in network.modules() if called.intersection(each.modules())}


def _last(children: list[tuple[str, nn.Module]], lead: list[str], running: set[nn.Module]) -> list[str]:
    """Return the last child with a matrix and those with weights behind it; all with weights if none has one."""
    found: list[str] = []
    for name, child in reversed(children):
        if child not in running or not any(True for _ in child.parameters()):
            continue
        if _has_matrix(child) and isinstance(child, (nn.Sequential, nn.ModuleList)):
            return [*_last([*child.named_children()], [*lead, name], running), *found]
        found.insert(0, ".".join([*lead, name]))
        if _has_matrix(child):
            break
    return found


def _has_matrix(module: nn.Module) -> bool:
    return any(sum(size > 1 for size in parameter.shape) >= 2 for parameter in module.parameters())


@dataclass(slots=True)
class Tap:
    """Runs a network and takes what goes into its classifier.

    Attributes:
        network: in eval mode.
        head: its classifier.
    """

    network: nn.Module
    head: Head
    _seen: list[tuple[Any, Any]] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[Tap]:
        """Put a hook on the classifier meanwhile."""
        hook = self.head.module.register_forward_hook(self._see, with_kwargs=True)
        try:
            yield self
        finally:
            hook.remove()

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._seen.append((args[0] if len(args) == 1 and not kwargs else None, output))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network.

        Args:
            images: a batch of N, on the device of the network.

        Returns:
            (input of the classifier [N, ...]; output of the network [N, C]).

        Raises:
            ModelError: the output of the network is not that of the classifier.
            NumericsError: the input of the classifier is not finite.
        """
        self._seen.clear()
        logits = self.network(images)
        found = self._seen[0] if len(self._seen) == 1 else (None, None)
        features, output = found
        if not isinstance(features, Tensor) or len(features) != len(images) or not self._is_output(output, logits):
            name = type(self.network).__name__
            if not isinstance(logits, Tensor):
                raise ModelError(
                    f"{name} gives {type(logits).__name__} in place of logits, [N, classes]. Give a `model` that "
                    "returns them alone."
                )
            how = "" if len(self._seen) == 1 else f" (which is called {len(self._seen)} times for a batch)"
            raise ModelError(
                f"the output of {name} is not that of '{self.head.name}'{how}, so this layer cannot be trained by "
                "itself. Name the classifier with `head`, or use `train='all'`."
            )
        if features.device != images.device:
            raise ModelError(
                f"the forward pass of {type(self.network).__name__} moves its data from {images.device} to "
                f"{features.device}. Choose the device with `device`, and let the network stay there."
            )
        if not torch.isfinite(features).all():
            raise NumericsError(
                f"the input of '{self.head.name}' holds NaN or infinity. Look at the images, and at the weights and "
                "statistics in front of it."
            )
        return features, logits

    @staticmethod
    def _is_output(output: Any, logits: Any) -> bool:
        if output is logits:
            return isinstance(logits, Tensor)
        both = isinstance(output, Tensor) and isinstance(logits, Tensor)
        return both and output.dtype == logits.dtype and torch.equal(output, logits)
