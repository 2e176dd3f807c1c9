"""Watching: what each layer normalises, measured where it is normalised.

A mode of torch sees every function that takes the buffers of a layer. One that normalises is handed the mean and biased
variance of what it normalises, as in train mode, in place of the buffers. So it does not matter who calls it: the
forward of the layer, of a subclass that transposes, or of the network itself. Layers that do without such a function
are measured by a hook before them, once a trial has shown that their class measures the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import DataError, ModelError, NumericsError
from .batches import tensors_of
from .calls import RealPositions
from .layers import NORMALISING, Doubtful, Layer, name_of, tried
from .statistics import LayerMoments, Moments, measure

_READERS = frozenset(["item", "tolist", "numpy", "__array__", "__float__", "__bool__", "__format__"])
"""Functions by which the values of a tensor leave torch."""


@dataclass(frozen=True, slots=True)
class Trials:
    """What trials of layers have shown: name to how it normalises, and to why that cannot be relied on."""

    ways: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)


class Watch:
    """What the layers of a model see in one pass over the data.

    Args:
        layers: name to layer.
        exact: names of layers that normalise by their stored statistics and are not measured.
        trials: of layers of a class of their own; filled in, and kept between passes.
        include_frozen: measure those, too, that trials show to be frozen.
        allow_unmeasured: a layer that runs unmeasured is no error.

    Attributes:
        moments: name to the measurements.
        order: names by their first call.
        unmeasured: name to reason, of layers that ran unmeasured.
        images, batches: so far.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        exact: Collection[str],
        trials: Trials,
        *,
        include_frozen: bool,
        allow_unmeasured: bool,
    ) -> None:
        self.layers = layers
        self.exact = exact
        self.moments = {
            name: LayerMoments(layer.channels, layer.variance.device)
            for name, layer in layers.items()
            if name not in exact
        }
        self.order: list[str] = []
        self.unmeasured: dict[str, str] = {}
        self.images = self.batches = 0
        self._trials = trials
        self._include_frozen = include_frozen
        self._allowed = allow_unmeasured
        self._owner = {
            id(buffer): layer
            for layer in layers.values()
            for buffer in (layer.mean, layer.variance)
            if buffer is not None
        }
        self._open: list[tuple[Layer, int]] = []  # layers at work, and how often each was seen before
        self._mask: RealPositions | None = None
        self._start()

    def _start(self) -> None:
        self._batch: list[tuple[str, Moments]] = []
        self._seen: dict[str, int] = {}
        self._blind: dict[str, str] = {}  # ran unmeasured in this batch: name to reason
        self._behind: dict[str, str] = {}  # name to a layer that was measured behind it
        self._open.clear()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Put hooks before and behind the layers; the mode alone does not see where a call begins and ends."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                if layer.scripted:
                    continue
                module = layer.module
                # First, so that hooks of the user run within the call; and last, to see what they make of the input.
                stack.enter_context(module.register_forward_pre_hook(partial(self._open_call, layer), prepend=True))
                if not layer.known:
                    stack.enter_context(module.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True))
                stack.enter_context(module.register_forward_hook(partial(self._leave, layer)))
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the functions that are called meanwhile."""
        scripted = any(layer.scripted for layer in self.layers.values())
        # The optimiser of TorchScript may fuse a layer with others.
        unfused = torch.jit.optimized_execution(False) if scripted else nullcontext()  # type: ignore[attr-defined]
        with _uncompiled(), unfused, _Operators(self) if scripted else _Functions(self):
            yield

    def _open_call(self, layer: Layer, module: Any, args: tuple[Any, ...]) -> None:
        self._open.append((layer, self._seen.get(layer.name, 0)))

    def _enter(self, layer: Layer, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        way = self._way(layer, args, kwargs)
        values = next(tensors_of([*args, *kwargs.values()]), None)
        if way == "frozen" or (way == "own" and layer.name in self.exact):
            self._note(layer)
        elif way in ("own", "few") and values is not None:
            found = self._see(layer, values)
            if found is not None:
                layer.store(*found)

    def _way(self, layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return how a class of its own normalises; it is tried on its first input."""
        if layer.name not in self._trials.ways:
            try:
                way = tried(layer, args, kwargs, include_frozen=self._include_frozen)
            except Doubtful as doubt:
                way, self._trials.doubts[layer.name] = "refused", str(doubt)
            if way == "few":
                return way
            self._trials.ways[layer.name] = way
        return self._trials.ways[layer.name]

    def _leave(self, layer: Layer, module: Any, args: Any, output: Any) -> None:
        for place in reversed(range(len(self._open))):
            if self._open[place][0] is layer:
                before = self._open.pop(place)[1]
                if self._seen.get(layer.name, 0) == before:
                    self._miss(layer, "its forward normalises by no function that torch lets us see")
                return

    def called(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], used: list[Layer]
    ) -> Any:
        """Call a function that takes buffers of layers; measure what it normalises."""
        if name_of(func) in NORMALISING and len(used) == 1 and _both(used[0], args, kwargs):
            layer = used[0]
            found = None
            if layer.name in self.exact:
                self._note(layer)
            elif self._trials.ways.get(layer.name, "function") == "function":
                found = self._see(layer, args[0] if args else kwargs["input"])
            mean, variance = layer.stored() if found is None else found
            new = {id(layer.variance): variance.to(layer.variance.dtype).view_as(layer.variance)}
            if layer.mean is not None and mean is not None:
                new[id(layer.mean)] = mean.to(layer.mean.dtype).view_as(layer.mean)
            args = tuple(new.get(id(value), value) for value in args)
            return func(*args, **{key: new.get(id(value), value) for key, value in kwargs.items()})
        result = func(*args, **kwargs)
        if name_of(func) in _READERS or any(True for _ in tensors_of(result)):
            at_work = {layer.name for layer, _ in self._open}
            for layer in used:
                if layer.name not in at_work:
                    self._miss(layer, f"'{name_of(func)}' takes its statistics outside of it")
        return result

    def _see(self, layer: Layer, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Measure what a layer is about to normalise; return its mean and biased variance, float64 [C]."""
        if values.dim() < 2 or values.shape[1] != layer.channels:
            return None  # the layer itself raises the better error
        self._note(layer)
        found = measure(values if self._mask is None else self._real(layer, values, self._mask))
        if found.count == 0:
            return None
        self._batch.append((layer.name, found))
        return found.mean, found.variance(correction=0)

    def _note(self, layer: Layer) -> None:
        self._seen[layer.name] = self._seen.get(layer.name, 0) + 1
        for name in self._blind:
            if name != layer.name:
                self._behind.setdefault(name, layer.name)

    def _miss(self, layer: Layer, reason: str) -> None:
        self._blind.setdefault(layer.name, self._trials.doubts.get(layer.name, reason))

    def _real(self, layer: Layer, values: Tensor, mask: RealPositions) -> Tensor:
        real = mask.of(values)
        if real is None:
            what = "lengths" if mask.given.dim() == 1 else "positions"
            raise DataError(
                f"the input of '{layer.name}' has the shape {list(values.shape)}, and `mask` gives {what} of the shape "
                f"{list(mask.given.shape)}: it goes with inputs [N, C, T] of the same T alone, and with [N, C]."
            )
        return real

    def used_outside(self) -> list[str]:
        """Return the layers whose statistics were used outside of them since the last batch."""
        return [*self._blind]

    def begin_batch(self, mask: RealPositions | None) -> None:
        """Open a batch; without a mask, all of its positions are real."""
        self._start()
        self._mask = mask

    def sees_single_values(self) -> bool:
        """Tell if a layer has seen one value a channel in this batch, which is then forgotten."""
        few = any(moments.count < 2 for _, moments in self._batch)
        self._start()
        return few

    def end_batch(self, images: int) -> None:
        """Close a batch.

        Raises:
            NumericsError: a layer saw something that is not finite.
            DataError: a layer saw a single value a channel.
            ModelError: a layer ran unmeasured.
        """
        self.batches += 1
        if self._batch:
            device = self._batch[0][1].mean.device
            sums = [torch.isfinite(moments.mean + moments.m2).all().to(device) for _, moments in self._batch]
            # One look for all layers, because each look waits for the device.
            finite = torch.stack(sums).tolist()
            if not all(finite):
                name = self._batch[finite.index(False)][0]
                raise NumericsError(
                    f"batch {self.batches}: the input of '{name}' holds NaN or infinity. "
                    "Look at the images of this batch, and at the weights in front of that layer."
                )
        for name, moments in self._batch:
            if moments.count < 2:
                raise DataError(
                    f"batch {self.batches}: '{name}' sees a single value a channel, which has no variance: a batch of "
                    "a single image, with no neighbour of its shape. Give more data, or larger batches."
                )
            self.moments[name].add(moments)
        self.order += [name for name in self._seen if name not in self.order]
        self._check_unmeasured()
        self.images += images

    def _check_unmeasured(self) -> None:
        for name, reason in self._blind.items():
            self.unmeasured.setdefault(name, reason)
            layer = self.layers[name]
            if not self._allowed and (name in self._behind or name in self._trials.doubts):
                behind = f", in front of '{self._behind[name]}'" if name in self._behind else ""
                raise ModelError(
                    f"'{name}' ({layer.class_name}) runs unmeasured{behind}: {reason}. What lies behind it would get "
                    "wrong statistics. Normalise by torch's own function in that layer, or leave it as it is with "
                    "`allow_unmeasured=True`."
                )

    def used_by(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> list[Layer]:
        """Return the layers whose buffers are among the arguments of a function, or in lists among them."""
        owner, used = self._owner, {}
        for value in args if not kwargs else (*args, *kwargs.values()):
            if (layer := owner.get(id(value))) is not None:
                used[layer.name] = layer
            elif type(value) in (list, tuple):
                for each in value:
                    if (layer := owner.get(id(each))) is not None:
                        used[layer.name] = layer
        return [*used.values()]


def _uncompiled() -> Any:
    """Let what torch.compile has compiled run as written: it calls no hooks that were added later."""
    # Without this module nothing is compiled yet, and to import it takes seconds.
    loaded = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _both(layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell if both statistics of a layer are among some arguments."""
    given = [*args, *kwargs.values()]
    return all(any(each is own for each in given) for own in (layer.mean, layer.variance))


class _Functions(TorchFunctionMode):
    """Sees the functions that Python code calls."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if used := self._watch.used_by(args, kwargs):
            return self._watch.called(func, args, kwargs or {}, used)
        return func(*args, **kwargs) if kwargs else func(*args)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators that are carried out, whoever calls them: TorchScript, too. It takes longer a call."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if used := self._watch.used_by(args, kwargs):
            return self._watch.called(func, args, kwargs or {}, used)
        return func(*args, **kwargs) if kwargs else func(*args)
