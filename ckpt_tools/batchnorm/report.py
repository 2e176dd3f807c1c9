"""Report: new statistics, and the change of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .statistics import LayerMoments, Moments

FAR_MEAN, FAR_VARIANCE = 0.5, 4.0
"""A mean that moves by more standard deviations, or a variance by a larger factor, has moved far."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer, before and after.

    Attributes:
        name, class_name: in the model, and of its class.
        channels: C.
        count: measured values per channel: images times positions, over all calls.
        mean_before, mean_after: largest magnitude over channels.
        variance_before, variance_after: largest over channels.
        mean_moved: largest change of a mean, in standard deviations.
        variance_moved: largest factor between old and new variance, 1 or more.
        mean_error: largest standard error of a new mean, in standard deviations, estimated from the variation
            between batches; None for a single batch.
        variance_error: the same for a new variance, relative to it.
        Non-finite values of the old buffers count as moved by infinity.
    """

    name: str
    class_name: str
    channels: int
    count: int
    mean_before: float
    mean_after: float
    variance_before: float
    variance_after: float
    mean_moved: float
    variance_moved: float
    mean_error: float | None
    variance_error: float | None

    @property
    def moved_far(self) -> bool:
        """True if it moved far."""
        return self.mean_moved > FAR_MEAN or self.variance_moved > FAR_VARIANCE


@dataclass(frozen=True, slots=True, repr=False)
class BatchNormReport:
    """What a recalibration did.

    Attributes:
        layers: those with new statistics, in the order of the model.
        skipped: (name, class, reason) of layers that were left out.
        images, batches: measured in a pass, over all processes.
        passes, estimator: as asked for.
        seconds: of all passes, in this process.
        statistics: name to (mean, variance), float64 [C] on the CPU; the mean is None for a layer without one.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[tuple[str, str, str], ...]
    images: int
    batches: int
    passes: int
    estimator: str
    seconds: float
    statistics: Mapping[str, tuple[Tensor | None, Tensor]] = field(repr=False)

    @property
    def moved_far(self) -> tuple[LayerReport, ...]:
        """The layers that moved far."""
        return tuple(layer for layer in self.layers if layer.moved_far)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON, without the statistics themselves."""
        plain = asdict(replace(self, statistics={}))
        del plain["statistics"]
        return plain

    def __repr__(self) -> str:
        """Return one line; lists are there by their lengths."""
        from ..compute.shown import one_line

        return one_line(self)

    def _repr_html_(self) -> str:
        """Return the report as a notebook shows it."""
        from ..compute.shown import as_html

        return as_html(self)


def compare(
    name: str, class_name: str, before: tuple[Tensor | None, Tensor], found: tuple[Tensor, Tensor], state: LayerMoments
) -> LayerReport:
    old_mean, old_variance = before
    mean, variance = found
    if old_mean is None:  # a layer without means
        old_mean = mean = torch.zeros_like(variance)
    sigma = variance.sqrt()
    live = variance > 0
    ratio = torch.where(live & ~(old_variance <= 0), variance / old_variance, 1.0)
    factor = torch.maximum(ratio, 1 / ratio)

    def error(of: Moments, unit: Tensor) -> float | None:
        if of.count < 2:
            return None
        return _largest(torch.where(live, (of.variance(correction=1) / of.count).sqrt() / unit, 0.0))

    return LayerReport(
        name=name,
        class_name=class_name,
        channels=len(variance),
        count=state.population.count,
        mean_before=_largest(old_mean),
        mean_after=_largest(mean),
        variance_before=_largest(old_variance),
        variance_after=_largest(variance),
        mean_moved=_largest(torch.where(live, (mean - old_mean).abs() / sigma, 0.0)),
        variance_moved=_largest(factor),
        mean_error=error(state.means, sigma),
        variance_error=error(state.variances, variance),
    )


def _largest(values: Tensor) -> float:
    """Return the largest magnitude; infinity if there is a NaN."""
    return values.abs().nan_to_num(nan=float("inf")).max().item() if values.numel() else 0.0
