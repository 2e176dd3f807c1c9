"""Watch: what the layers of a model normalise, measured where they normalise it.

Each batch goes through the model in eval mode. A layer is measured in one of two places:

1. Somebody calls a function of torch that normalises by the buffers of a layer: the layer itself, a subclass that
   transposes, or the network. A mode of torch sees all functions (`_Functions`; with TorchScript all operators,
   `_Operators`) and hands them to `Watch.intercept`, which measures the input and calls the function with the mean and
   biased variance of that input in place of the buffers, as in train mode.
2. A layer is called whose class normalises by arithmetic of its own, as a trial has shown (`trial.py`). A hook before
   the call (`Watch._before_own`) measures its input and stores mean and biased variance in its buffers.

Layers in `exact` normalise by their buffers as they are, and are not measured. A layer ran unmeasured if its forward
ended and neither place saw it (`Watch._after_call`), or if any other function took its buffers outside of a call
(`Watch.intercept`). `Watch.end_batch` refuses that if another layer normalised behind it.
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
from .layers import NORMALISING, Layer, name_of
from .statistics import LayerMoments, Moments, measure
from .trial import Trials

_READERS = frozenset(["item", "tolist", "numpy", "__array__", "__float__", "__bool__", "__format__"])
"""Functions by which the values of a tensor leave torch."""


@dataclass(slots=True)
class _Batch:
    """What the layers have done in one batch so far; layers by name.

    Attributes:
        mask: which positions are real; None if all are.
        measured: (layer, moments) of each measured call, in the order of the calls.
        calls: layer to the number of its calls that were seen to normalise as they should.
        unmeasured: layer to the reason why it ran unmeasured.
        behind: unmeasured layer to the first other one that normalised after it.
        running: layers whose forward is at work, each with its number in `calls` when that began.
    """

    mask: RealPositions | None = None
    measured: list[tuple[str, Moments]] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    unmeasured: dict[str, str] = field(default_factory=dict)
    behind: dict[str, str] = field(default_factory=dict)
    running: list[tuple[str, int]] = field(default_factory=list)

    def add_call(self, name: str) -> None:
        """Count a call in which a layer normalises as it should; it stands behind the layers unmeasured so far."""
        self.calls[name] = self.calls.get(name, 0) + 1
        for other in self.unmeasured:
            if other != name:
                self.behind.setdefault(other, name)

    def begin(self, name: str) -> None:
        """Note that the forward of a layer begins."""
        self.running.append((name, self.calls.get(name, 0)))

    def end(self, name: str) -> bool:
        """Note that the forward of a layer ends; return False if no call was counted since it began."""
        for place in reversed(range(len(self.running))):
            if self.running[place][0] == name:
                _, before = self.running.pop(place)
                return self.calls.get(name, 0) > before
        return True


class Watch:
    """What the layers of a model see in one pass over the data.

    Args:
        layers: name to layer.
        exact: names of layers that normalise by their stored statistics and are not measured.
        trials: of layers of classes that are not known; filled in.
        allow_unmeasured: accept layers that run unmeasured in front of others.

    Attributes:
        moments: name to the measurements of all batches.
        order: names by their first call.
        unmeasured: name to reason, of layers that ran unmeasured.
        images, batches: number of them so far.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        exact: Collection[str],
        trials: Trials,
        *,
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
        self._allow_unmeasured = allow_unmeasured
        self._owners = {
            id(buffer): layer
            for layer in layers.values()
            for buffer in (layer.mean, layer.variance)
            if buffer is not None
        }
        self._batch = _Batch()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Put hooks before and behind the layers; the mode alone does not see where a call begins and ends."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                if layer.scripted:
                    continue
                module = layer.module
                # The first and the last of all: what hooks of the user do belongs to the call.
                stack.enter_context(module.register_forward_pre_hook(partial(self._before_call, layer), prepend=True))
                if not layer.known:
                    # Behind the hooks of the user, to see what they make of the input.
                    hook = partial(self._before_own, layer)
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(partial(self._after_call, layer)))
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the functions that are called meanwhile."""
        scripted = any(layer.scripted for layer in self.layers.values())
        # The optimiser of TorchScript may fuse a layer with others.
        unfused = torch.jit.optimized_execution(False) if scripted else nullcontext()  # type: ignore[attr-defined]
        with _uncompiled(), unfused, _Operators(self) if scripted else _Functions(self):
            yield

    def _before_call(self, layer: Layer, module: Any, args: tuple[Any, ...]) -> None:
        self._batch.begin(layer.name)

    def _before_own(self, layer: Layer, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure the input of a layer whose class normalises by arithmetic of its own, and store the result in it."""
        way = self._trials.way(layer, args, kwargs)
        values = next(tensors_of([*args, *kwargs.values()]), None)
        if way == "frozen" or (way == "own" and layer.name in self.exact):
            self._batch.add_call(layer.name)
        elif way in ("own", "few") and values is not None:
            found = self._measure(layer, values)
            if found is not None:
                layer.store(*found)

    def _after_call(self, layer: Layer, module: Any, args: Any, output: Any) -> None:
        if not self._batch.end(layer.name):
            self._ran_unmeasured(layer, "its forward normalises by no function that torch lets us see")

    def intercept(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call a function of torch for the model, and see what it does with the buffers of layers.

        Returns:
            Its result; where it normalises by the buffers of a layer that is measured, by the statistics of its input.
        """
        used = self._owners_of(args, kwargs)
        if not used:
            return func(*args, **kwargs)
        if name_of(func) in NORMALISING and len(used) == 1 and _both(used[0], args, kwargs):
            return self._normalise(used[0], func, args, kwargs)
        result = func(*args, **kwargs)
        if name_of(func) in _READERS or any(True for _ in tensors_of(result)):  # else it looked at shape or dtype
            running = {name for name, _ in self._batch.running}
            for layer in used:
                if layer.name not in running:
                    self._ran_unmeasured(layer, f"'{name_of(func)}' takes its statistics outside of it")
        return result

    def _owners_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Layer]:
        """Return the layers whose buffers are among the arguments of a function, or in lists among them."""
        owners, used = self._owners, {}
        for value in args if not kwargs else (*args, *kwargs.values()):
            if (layer := owners.get(id(value))) is not None:
                used[layer.name] = layer
            elif type(value) in (list, tuple):
                for each in value:
                    if (layer := owners.get(id(each))) is not None:
                        used[layer.name] = layer
        return [*used.values()]

    def _normalise(
        self, layer: Layer, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Call a function that normalises by the buffers of a layer, with the statistics of its input in their place.

        A layer that is exact, or measured by its input, keeps its stored ones.
        """
        found = None
        if layer.name in self.exact:
            self._batch.add_call(layer.name)
        elif self._trials.ways.get(layer.name, "function") == "function":
            found = self._measure(layer, args[0] if args else kwargs["input"])
        mean, variance = layer.stored() if found is None else found
        # Always copies: in train mode, into which a forward pass may put the layer, the function changes them.
        new = {id(layer.variance): variance.to(layer.variance.dtype, copy=True).view_as(layer.variance)}
        if layer.mean is not None and mean is not None:
            new[id(layer.mean)] = mean.to(layer.mean.dtype, copy=True).view_as(layer.mean)
        return func(
            *(new.get(id(value), value) for value in args),
            **{key: new.get(id(value), value) for key, value in kwargs.items()},
        )

    def _measure(self, layer: Layer, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Measure what a layer is about to normalise.

        Args:
            values: [N, C] or [N, C, ...].

        Returns:
            Mean and biased variance, float64 [C]; None if there is nothing to measure.

        Raises:
            DataError: the mask does not fit the values.
        """
        if values.dim() < 2 or values.shape[1] != layer.channels:
            return None  # the layer itself raises the better error
        self._batch.add_call(layer.name)
        mask = self._batch.mask
        found = measure(values if mask is None else _real(layer, values, mask))
        if found.count == 0:
            return None
        self._batch.measured.append((layer.name, found))
        return found.mean, found.variance(correction=0)

    def _ran_unmeasured(self, layer: Layer, reason: str) -> None:
        """Keep the first reason, or what the trial has said."""
        self._batch.unmeasured.setdefault(layer.name, self._trials.doubts.get(layer.name, reason))

    def used_outside(self) -> list[str]:
        """Return the layers whose statistics were used outside of them since the last batch."""
        return [*self._batch.unmeasured]

    def begin_batch(self, mask: RealPositions | None) -> None:
        """Begin a batch, and forget one that was not ended; without a mask, all of its positions are real."""
        self._batch = _Batch(mask)

    def saw_single_values(self) -> bool:
        """Return True if a layer has seen one value a channel in this batch."""
        return any(moments.count < 2 for _, moments in self._batch.measured)

    def end_batch(self, images: int) -> None:
        """End a batch, and add what was measured in it.

        Args:
            images: number of them in the batch.

        Raises:
            NumericsError: a layer saw something that is not finite.
            DataError: a layer saw a single value a channel.
            ModelError: a layer ran unmeasured in front of another one, or a trial refused it.
        """
        self.batches += 1
        self._check_finite()
        for name, moments in self._batch.measured:
            if moments.count < 2:
                raise DataError(
                    f"batch {self.batches}: '{name}' sees a single value a channel, which has no variance: a batch of "
                    "a single image, with no neighbour of its shape. Give more data, or larger batches."
                )
            self.moments[name].add(moments)
        self.order += [name for name in self._batch.calls if name not in self.order]
        self._check_unmeasured()
        self.images += images

    def _check_finite(self) -> None:
        measured = self._batch.measured
        if not measured:
            return
        device = measured[0][1].mean.device
        found = [torch.isfinite(moments.mean + moments.m2).all().to(device) for _, moments in measured]
        # One look for all layers, because each look waits for the device.
        finite = torch.stack(found).tolist()
        if not all(finite):
            name, _ = measured[finite.index(False)]
            raise NumericsError(
                f"batch {self.batches}: the input of '{name}' holds NaN or infinity. "
                "Look at the images of this batch, and at the weights in front of that layer."
            )

    def _check_unmeasured(self) -> None:
        for name, reason in self._batch.unmeasured.items():
            self.unmeasured.setdefault(name, reason)
            behind = self._batch.behind.get(name)
            if not self._allow_unmeasured and (behind is not None or name in self._trials.doubts):
                where = "" if behind is None else f", in front of '{behind}'"
                raise ModelError(
                    f"'{name}' ({self.layers[name].class_name}) runs unmeasured{where}: {reason}. What lies behind it "
                    "would get wrong statistics. Normalise by torch's own function in that layer, or leave it as it "
                    "is with `allow_unmeasured=True`."
                )


def _real(layer: Layer, values: Tensor, mask: RealPositions) -> Tensor:
    """Return the real positions of an input of a layer, [positions, C].

    Raises:
        DataError: the mask does not fit the input.
    """
    real = mask.of(values)
    if real is None:
        what = "lengths" if mask.given.dim() == 1 else "positions"
        raise DataError(
            f"the input of '{layer.name}' has the shape {list(values.shape)}, and `mask` gives {what} of the shape "
            f"{list(mask.given.shape)}: it goes with inputs [N, C, T] of the same T alone, and with [N, C]."
        )
    return real


def _uncompiled() -> Any:
    """Let what torch.compile has compiled run as written: it calls no hooks that were added later."""
    # Without this module nothing is compiled yet, and to import it takes seconds.
    loaded = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _both(layer: Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return True if both statistics of a layer are among the arguments of a function."""
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
        return self._watch.intercept(func, args, kwargs or {})


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators that are carried out, whoever calls them: TorchScript, too. It takes longer a call."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._watch.intercept(func, args, kwargs or {})
