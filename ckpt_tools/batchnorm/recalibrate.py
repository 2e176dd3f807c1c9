"""Recalibration: the statistics of the inputs of BatchNorm layers, measured in passes over data.

The model is in eval mode, so dropout and drop-path are off and no layer changes its buffers. In pass 1 each layer
normalises by the mean and the biased variance of the batch, as in train mode. Pass p does so behind the first p - 1
layers alone, in the order of their first calls; these have the statistics that the passes before have found. So the
input of layer p does not depend on the batches any more, and after P passes the statistics of the first P layers are
those of the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..compute.progress import Activity, Progress
from ..errors import DataError, ModelError, NumericsError, UsageError, unknown_word
from .batches import joined, samples_in
from .calls import Call, device_of
from .kept import Kept
from .layers import Layer, find_layers, kept_modes
from .processes import gathered
from .report import BatchNormReport, compare
from .statistics import LayerMoments, Moments, merge
from .trial import Trials
from .watch import Watch

Estimator = Literal["population", "batch-mean"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


@torch.no_grad()
def recalibrate_bn(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    inputs: int = 1,
    mask: str | int | None = None,
    passes: int = 1,
    estimator: Estimator = "population",
    include_frozen: bool = False,
    allow_unmeasured: bool = False,
    on_progress: Progress | None = None,
) -> BatchNormReport:
    """Give the BatchNorm layers of a model the statistics of these data.

    What a layer normalises is measured where it is normalised, whoever calls it. The result does not depend on how the
    data are split into batches as far as the inputs of a layer do not: those of the first P layers with P passes.
    Behind these, each batch is normalised by its own statistics, as in training. One pass over batches of the size of
    training is what a network is trained with. More passes are exact for more layers; the network as a whole is nearer
    to the fixed point for certain only when there are as many passes as layers. Larger batches help more.

    In a process group (torch.distributed), each process feeds its own part of the data, the statistics are
    merged exactly, and every process ends with the same ones.

    Args:
        model: on the device where it is to run; put into eval mode meanwhile. Wrap the call in
            `torch.autocast` for mixed precision.
        batches: iterable, read once a pass: of tensors [N, ...]; of tuples or lists, whose leading entries go to the
            model; or of dicts, whose entries go to it by keyword where its forward has their names (labels only if it
            needs them), else the one under a usual name (image, pixel_values, ...). They are moved to its device.
            Batches of one sample are joined to a neighbour if a layer would see a single value a channel.
        forward: called with (model, batch) in place of all this.
        inputs: how many leading entries of a tuple or list go to the model.
        mask: key or index of the entry of a batch that says which positions of inputs [N, C, T] are real: bool [N, T],
            or lengths, integers [N]. The others are left out.
        passes: 1 normalises by the statistics of each batch, as training does; pass p has the statistics of the
            first p - 1 layers in use, in the order of their first calls.
        estimator: ``population``: mean and unbiased variance of all values as one set;
            ``batch-mean``: mean over batches of their means and unbiased variances, as torch's `update_bn`.
        include_frozen: measure layers, too, that training does not update: of momentum 0, kept in eval mode by
            train(), or of a class without updates.
        allow_unmeasured: leave layers as they are that run without being measured; otherwise an error.
        on_progress: called after each batch with (what is done, samples done, samples in all); of the first pass the
            last call alone knows all of them.

    Returns:
        What changed. Buffers of the model are changed in place: ``running_mean``, ``running_var``,
        and ``num_batches_tracked``, which becomes the number of batches. All others are as before.

    Raises:
        UsageError: an option out of range, or an iterator (which ends) for several passes.
        DataError: no batch, one that holds no input, or one in which a layer sees a single value a channel.
        ModelError: the model runs without reaching any of its layers, a layer runs unmeasured in front of others, a
            class of its own updates its statistics otherwise, or the forward pass moves the model to another device or
            puts it into train mode.
        NumericsError: a layer's input is not finite, or its statistics overflow its dtype; names the layer.
        The model is as before after any error, including those that it raises itself.
    """
    check_options(passes, estimator)
    call = Call(forward, inputs, mask)
    if passes > 1 and isinstance(batches, Iterator):
        raise UsageError("several passes need data that can be read again: a list or a DataLoader, not an iterator.")
    started = time.perf_counter()
    layers, skipped = find_layers(model, include_frozen=include_frozen)
    trials = Trials(include_frozen)

    def new_watch(exact: Collection[str]) -> Watch:
        return Watch(layers, exact, trials, allow_unmeasured=allow_unmeasured)

    watch = new_watch(())
    found: dict[str, tuple[Tensor, Tensor]] = {}
    moments: dict[str, LayerMoments] = {}
    before = {name: layer.stored() for name, layer in layers.items()}
    order: list[str] = []
    suffices: bool | None = None
    samples: int | None = None
    with _borrowed(model, watch) as kept:
        folded = watch.used_outside()
        for number in range(1, passes + 1 if layers else 1):
            exact = frozenset(order[: number - 1])
            if number > 1 and exact.issuperset(found):
                break
            watch = new_watch(exact)
            name = "measuring" if passes == 1 else f"measuring, pass {number} of {passes}"
            what = Activity(name, "images", step="measuring")
            suffices = _feed(model, batches, call, watch, kept, suffices, samples, partial(on_progress or _quiet, what))
            samples = watch.images
            order = _join_processes(watch, order, device_of(model))
            if not watch.batches:
                raise DataError("the data yield no batch. Nothing was recalibrated.")
            for name, seen in watch.moments.items():
                if seen.population.count:
                    moments[name], found[name] = seen, seen.estimate(estimator)
                    layers[name].store(*found[name])
                    if not torch.isfinite(layers[name].variance).all():
                        raise NumericsError(f"the new statistics of '{name}' overflow {layers[name].variance.dtype}.")
        _check_reached(layers, found, () if allow_unmeasured else folded)
        kept.check()
    for name, new in found.items():
        layers[name].store(*new)
        if isinstance(counter := getattr(layers[name].module, "num_batches_tracked", None), Tensor):
            counter.fill_(watch.batches)
    measured = [name for name in layers if name in found]
    left = [(name, layer.class_name, _why(name, watch, trials)) for name, layer in layers.items() if name not in found]
    return BatchNormReport(
        layers=tuple(
            compare(name, layers[name].class_name, before[name], found[name], moments[name]) for name in measured
        ),
        skipped=(*skipped, *left),
        images=watch.images,
        batches=watch.batches,
        passes=passes,
        estimator=estimator,
        seconds=time.perf_counter() - started,
        statistics={
            name: (found[name][0].cpu() if layers[name].mean is not None else None, found[name][1].cpu())
            for name in measured
        },
    )


def _quiet(what: str, done: int, total: int | None) -> None:
    pass


def check_options(passes: int, estimator: str) -> None:
    """Refuse impossible options before any data are read.

    Raises:
        UsageError: a number of passes below 1, or an unknown estimator.
    """
    if type(passes) is not int or passes < 1:
        raise UsageError(f"`passes={passes!r}`: must be a whole number from 1 on.")
    if estimator not in ESTIMATORS:
        raise unknown_word("estimator", estimator, ESTIMATORS)


def _check_reached(layers: Mapping[str, Layer], found: Collection[str], folded: Collection[str]) -> None:
    """Refuse statistics of no layer, or those behind a layer that is used where it cannot be measured.

    Args:
        found: layers that were measured.
        folded: layers whose statistics eval() used.

    Raises:
        ModelError: no layer was measured, or one of the folded ones was not.
    """
    if layers and not found:
        raise ModelError(f"the data reach none of the BatchNorm layers, such as '{next(iter(layers))}'.")
    lost = next((name for name in folded if name not in found), None)
    if lost is not None:
        raise ModelError(
            f"eval() folds '{lost}' into other weights, so that it runs unmeasured, and what lies behind it would "
            "get wrong statistics. Give a model that does not fold, or leave it with `allow_unmeasured=True`."
        )


def _why(name: str, watch: Watch, trials: Trials) -> str:
    """Return why a layer has no new statistics."""
    if trials.ways.get(name) == "frozen":
        return "frozen: its class never updates them"
    if name in watch.unmeasured:
        return f"ran unmeasured: {watch.unmeasured[name]}"
    return "never reached"


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; restore its modes afterwards."""
    with kept_modes(model):
        model.eval()
        yield


@contextmanager
def _borrowed(model: nn.Module, watch: Watch) -> Iterator[Kept]:
    """Put a model into eval mode, while its layers are watched; restore its modes and tensors afterwards."""
    kept = Kept(model)
    try:
        with kept_modes(model):
            with watch.watching():
                model.eval()
            yield kept
    finally:
        kept.put_back()


def _feed(
    model: nn.Module,
    batches: Iterable[Any],
    call: Call,
    watch: Watch,
    kept: Kept,
    suffices: bool | None,
    samples: int | None,
    on_progress: Callable[[int, int | None], None],
) -> bool | None:
    """Show all batches to the model.

    Args:
        suffices: a batch of one sample can be measured, as a pass before has seen; None if it is not known.
        samples: in all batches; None if it is not known.
        on_progress: called first, and after each batch, with (samples so far, samples in all).

    Returns:
        `suffices`, as it is known now.
    """
    device = device_of(model)

    # A layer with statistics of its own is measured, or keeps them, in either mode.
    resting = {
        module: name
        for name, module in model.named_modules()
        if not (module.training or hasattr(module, "running_var"))
    }

    def show(batch: Any) -> None:
        watch.begin_batch(call.real_positions(batch, device))
        with watch.watching():
            call(model, batch)
        roused = next((name for module, name in resting.items() if module.training), None)
        if roused is not None:
            raise ModelError(
                f"the forward pass puts {f'{roused!r}' if roused else 'the model'} into train mode, where dropout is "
                "on. Remove that call of train() from it."
            )

    def can_be_alone(batch: Any) -> bool:
        nonlocal suffices
        if suffices is None:
            show(batch)
            suffices = not watch.saw_single_values()
        return suffices

    on_progress(0, samples)
    with watch.hooked():
        for batch in joined(batches, can_be_alone):
            show(batch)
            watch.end_batch(samples_in(batch))
            kept.settle()
            on_progress(watch.images, samples)
    if watch.images != samples:
        on_progress(watch.images, watch.images)
    return suffices


def _join_processes(watch: Watch, order: Sequence[str], device: torch.device) -> list[str]:
    """Merge the measurements of all processes of a group.

    Returns:
        The layers that were measured, in the order of their first calls, with those of an earlier pass in front.
    """
    names = [*watch.moments]
    first = {name: float(number) for number, name in enumerate(watch.order)}
    places = [first.get(name, math.inf) for name in names]
    mine = [moments for layer in watch.moments.values() for moments in layer.sets]
    parts = [torch.tensor([watch.images, watch.batches, *places], dtype=torch.float64, device=device)]
    for moments in mine:
        parts.append(torch.cat([moments.mean.new_full((1,), moments.count), moments.mean, moments.m2]).to(device))
    everyone = gathered(torch.cat(parts))
    if len(everyone) > 1:
        totals, *others = zip(*(torch.split(each, [*map(len, parts)]) for each in everyone), strict=True)
        watch.images, watch.batches = (int(total) for total in sum(each[:2] for each in totals).tolist())
        first = dict(zip(names, torch.stack([each[2:] for each in totals]).amin(0).tolist(), strict=True))
        merged = (
            merge([Moments(int(each[0].item()), *each[1:].to(own.mean.device).view(2, -1)) for each in found])
            for own, found in zip(mine, others, strict=True)
        )
        for layer in watch.moments.values():
            layer.sets = (next(merged), next(merged), next(merged))
    measured = [name for name in names if watch.moments[name].population.count and name not in order]
    return [*order, *sorted(measured, key=lambda name: first.get(name, math.inf))]
