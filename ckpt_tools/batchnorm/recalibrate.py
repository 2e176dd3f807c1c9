"""Recalibration: the statistics of the inputs of BatchNorm layers, measured in passes over data.

The model is in eval mode, so dropout and drop-path are off and no layer changes its buffers. A hook before
each BatchNorm layer measures its input. In pass 1 it also hands the layer the
mean and the biased variance of that batch, which is what the layer would normalise by in train mode; in
later passes the layers use the statistics of the pass before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError, NumericsError, UsageError
from .batches import images_of, joined
from .processes import gathered
from .report import BatchNormReport, compare
from .statistics import LayerMoments, Moments, measure, merge

ESTIMATORS = ("population", "batch-mean")


@torch.no_grad()
def recalibrate_bn(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    passes: int = 1,
    estimator: str = "population",
    on_batch: Callable[[int, int], None] | None = None,
) -> BatchNormReport:
    """Give the BatchNorm layers of a model the statistics of these data.

    The result does not depend on how the data are split into batches, as far as the inputs of a layer do
    not: those of the first layer in pass 1, of the first P layers with P passes. For an estimate of
    what a finished network sees, 2 passes or more are better than 1.

    In a process group (torch.distributed), each process feeds its own part of the data, the statistics are
    merged exactly, and every process ends with the same ones.

    Args:
        model: on the device where it is to run; put into eval mode meanwhile. Wrap the call in
            `torch.autocast` for mixed precision.
        batches: iterable of tensors [N, ...], of tuples or lists that start with one, or of dicts with
            one under a usual name (image, pixel_values, ...). Read once a pass. Batches of one image are
            joined to a neighbour.
        passes: 1 normalises by the statistics of each batch, as training does; each further pass
            measures again with those just found in use.
        estimator: ``population``: mean and unbiased variance of all values as one set;
            ``batch-mean``: mean over batches of their means and unbiased variances, as torch's `update_bn`.
        on_batch: called after each batch with (pass, images so far in it), counted from 1.

    Returns:
        What changed. Buffers of the model are changed in place: ``running_mean``, ``running_var``,
        and ``num_batches_tracked``, which becomes the number of batches.

    Raises:
        UsageError: an option out of range, or an iterator (which ends) for several passes.
        DataError: no batch, or one that holds no tensor.
        ModelError: the model runs without reaching any of its layers.
        NumericsError: a layer's input is not finite, or its statistics overflow its dtype; names the layer.
        The model is as before after any error, including those that it raises itself.
    """
    check_options(passes, estimator)
    if passes > 1 and isinstance(batches, Iterator):
        raise UsageError("several passes need data that can be read again: a list or a DataLoader, not an iterator.")
    started = time.perf_counter()
    layers, skipped = find_layers(model)
    before = {name: _statistics_of(layer) for name, layer in layers.items()}
    run, found = _Pass(layers, 0), {}
    with _borrowed(model, layers):
        while layers and run.number < passes:
            run = _Pass(layers, run.number + 1)
            _feed(model, batches, run, on_batch)
            run.join_processes(device_of(model))
            if not run.batches:
                raise DataError("the data yield no batch. Nothing was recalibrated.")
            found = {name: state.estimate(estimator) for name, state in run.states.items() if state.population.count}
            for name, new in found.items():
                _set_statistics(layers[name], new, run.batches)
                if not torch.isfinite(layers[name].running_var).all():
                    raise NumericsError(f"the new statistics of '{name}' overflow {layers[name].running_var.dtype}.")
        if layers and not found:
            raise ModelError(f"the data reach none of the BatchNorm layers, such as '{next(iter(layers))}'.")
    unreached = ((name, type(layer).__name__, "never reached") for name, layer in layers.items() if name not in found)
    return BatchNormReport(
        layers=tuple(compare(name, layers[name], before[name], new, run.states[name]) for name, new in found.items()),
        skipped=(*skipped, *unreached),
        images=run.images,
        batches=run.batches,
        passes=passes,
        estimator=estimator,
        seconds=time.perf_counter() - started,
        statistics={
            name: (mean.cpu() if before[name][0] is not None else None, variance.cpu())
            for name, (mean, variance) in found.items()
        },
    )


def check_options(passes: int, estimator: str) -> None:
    """Refuse impossible options before any data are read.

    Raises:
        UsageError: a number of passes below 1, or an unknown estimator.
    """
    if type(passes) is not int or passes < 1:
        raise UsageError(f"`passes={passes!r}`: must be a whole number from 1 on.")
    if estimator not in ESTIMATORS:
        raise UsageError(f"`estimator` is one of {', '.join(ESTIMATORS)}, not {estimator!r}.")


def find_layers(model: nn.Module) -> tuple[dict[str, Any], tuple[tuple[str, str, str], ...]]:
    """Find the layers whose statistics can be measured, and similar layers that are left out.

    Returns:
        (name to layer, in the order of the model; (name, class, reason) of the others).
    """
    layers: dict[str, Any] = {}
    skipped = []
    for name, module in model.named_modules():
        class_ = type(module).__name__
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise UsageError(f"'{name}' is a {class_} that has not seen its first input. Run the model once before.")
        variance = getattr(module, "running_var", None)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            reason = "" if variance is None else "normalises each image by itself"
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and variance is None:
            reason = "keeps no running statistics"
        elif not isinstance(variance, Tensor):
            continue
        elif variance.dim() != 1:
            reason = "keeps no statistics for each channel"
        elif isinstance(module, torch.jit.ScriptModule):
            reason = "is compiled by TorchScript, which hides its inputs"
        elif not hasattr(module, "momentum"):
            reason = "frozen: its class never updates them"
        else:
            layers[name] = module
            continue
        if reason:
            skipped.append((name, class_, reason))
    return layers, tuple(skipped)


class _Reached(BaseException):  # not an Exception, which the forward of a model might catch
    """The last layer has been measured; the rest of the forward pass is not needed."""


class _Pass:
    """One pass over the data, as the hooks see it."""

    def __init__(self, layers: Mapping[str, Any], number: int) -> None:
        self.layers = layers
        self.number = number
        self.states = {
            name: LayerMoments(len(layer.running_var), layer.running_var.device) for name, layer in layers.items()
        }
        self.images = self.batches = 0
        self._order: list[str] = []  # of the calls in the first batch that reaches every layer
        self._calls: list[str] = []  # in this batch
        self._finite: list[Tensor] = []

    def see(self, name: str, values: Tensor) -> None:
        """Measure the input of a layer that is about to run."""
        layer = self.layers[name]
        if values.dim() < 2 or values.shape[1] != len(self.states[name].population.mean):
            return  # the layer itself raises the better error
        moments = measure(values)
        self.states[name].add(moments)
        self._calls.append(name)
        self._finite.append(torch.isfinite(moments.mean + moments.m2).all())
        if self.number == 1:
            _set_statistics(layer, (moments.mean, moments.variance(correction=0)), None)
        if self._calls == self._order:
            raise _Reached

    def end_batch(self, images: int) -> None:
        """Close a batch.

        Raises:
            NumericsError: a layer saw something that is not finite.
        """
        self.batches += 1
        # One look for all layers, because each look waits for the device.
        finite = torch.stack(self._finite).tolist() if self._finite else []
        if not all(finite):
            name = self._calls[finite.index(False)]
            raise NumericsError(
                f"batch {self.batches}: the input of '{name}' holds NaN or infinity. "
                "Look at the images of this batch, and at the weights in front of that layer."
            )
        self.images += images
        if not self._order and self.states.keys() == set(self._calls):  # else a later batch may reach the others
            self._order = self._calls
        self._calls, self._finite = [], []

    def join_processes(self, device: torch.device) -> None:
        """Merge the measurements of all processes of a group."""
        sets = [(state, which) for state in self.states.values() for which in ("population", "means", "variances")]
        parts = [torch.tensor([self.images, self.batches], dtype=torch.float64, device=device)]
        for moments in (getattr(*each) for each in sets):
            parts.append(torch.cat([moments.mean.new_full((1,), moments.count), moments.mean, moments.m2]))
        mine = torch.cat(parts)
        everyone = gathered(mine)
        if len(everyone) == 1:
            return
        totals, *others = zip(*(torch.split(each, [*map(len, parts)]) for each in everyone), strict=True)
        self.images, self.batches = (int(total) for total in sum(totals).tolist())
        for (state, which), found in zip(sets, others, strict=True):
            setattr(state, which, merge([Moments(int(each[0].item()), *each[1:].view(2, -1)) for each in found]))


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; restore its modes afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _borrowed(model: nn.Module, layers: Mapping[str, Any]) -> Iterator[None]:
    """Put a model into eval mode; restore its modes afterwards, and its buffers after an error."""
    buffers = [buffer for layer in layers.values() for buffer in layer.buffers(recurse=False)]
    copies = [buffer.clone() for buffer in buffers]
    # A model that torch.compile compiled before does not call hooks added later.
    # The module of torch.compile takes seconds to import; until something was compiled it is not there.
    compiler = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    uncompiled = torch.compiler.set_stance("force_eager") if compiler else nullcontext()
    try:
        with in_eval_mode(model), uncompiled:
            yield
    except BaseException:
        for buffer, copy in zip(buffers, copies, strict=True):
            buffer.copy_(copy)
        raise


def _feed(model: nn.Module, batches: Iterable[Any], run: _Pass, on_batch: Callable[[int, int], None] | None) -> None:
    device = device_of(model)

    def hook(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run.see(name, args[0] if args else next(iter(kwargs.values())))

    with ExitStack() as hooks:
        for name, layer in run.layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
        for images in joined(map(images_of, batches)):
            with suppress(_Reached):
                model(images.to(device, non_blocking=True))
            run.end_batch(len(images))
            if on_batch is not None:
                on_batch(run.number, run.images)


def device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _statistics_of(layer: Any) -> tuple[Tensor | None, Tensor]:
    mean, variance = getattr(layer, "running_mean", None), layer.running_var
    return (None if mean is None else mean.to(torch.float64, copy=True), variance.to(torch.float64, copy=True))


def _set_statistics(layer: Any, found: tuple[Tensor, Tensor], batches: int | None) -> None:
    mean, variance = found
    if getattr(layer, "running_mean", None) is not None:
        layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
    if batches is not None and isinstance(getattr(layer, "num_batches_tracked", None), Tensor):
        layer.num_batches_tracked.fill_(batches)
