"""Pictures of reports: the coefficients of an average, the differences of two checkpoints, how far BatchNorm moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .pictures import BLUE, ORANGE, bars, markers, place, positions, scale, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..batchnorm.report import BatchNormReport, LayerReport
    from .average import AverageReport
    from .diff import DiffReport, TensorDiff

TOP = 20
"""So many tensors have a bar."""
AVERAGE_SIZE, DIFF_SIZE, BATCHNORM_SIZE = (8.0, 3.2), (8.0, 6.0), (8.0, 4.6)
"""Inches."""


def draw_average(report: AverageReport, figure: Figure) -> None:
    """Draw the coefficient of each checkpoint over its step; those below 0 in another colour and shape."""
    axes = figure.subplots()
    values = [each.coefficient for each in report.inputs]
    at, label = positions([each.step for each in report.inputs])
    axes.axhline(0, color="#888888", linewidth=0.8)
    for sign, color, marker in ((1, BLUE, "o"), (-1, ORANGE, "D")):
        own = [(x, value) for x, value in zip(at, values, strict=True) if (value < 0) == (sign < 0)]
        if own:
            axes.vlines([x for x, _ in own], 0, [value for _, value in own], color=color, linewidth=1.6)
            axes.plot(*zip(*own, strict=True), color=color, linestyle="", **markers(len(at)) | {"marker": marker})
    low, high = min(0.0, *values), max(0.0, *values)
    axes.set_ylim(low * 1.15, high * 1.15 or 1.0)
    axes.set_ylabel("coefficient")
    place(axes, at, label, [each.name for each in report.inputs])
    many = f"{len(values)} checkpoint{'s' if len(values) > 1 else ''}"
    figure.suptitle(f"{report.mode} average of {many}; sum of the coefficients {sum(values):.6g}", **_LEFT)


def draw_diff(report: DiffReport, figure: Figure) -> None:
    """Draw the largest differences of the tensors that differ most; NaN or infinity on one side comes first."""
    axes = figure.subplots()
    found = [each for each in report.tensors if each.weights and (each.max_abs or each.nonfinite)]
    found = sorted(found, key=lambda each: (not each.nonfinite, -(each.max_abs or 0.0)))[:TOP]
    rows = [(each.name, each.max_abs or 0.0, _difference(each)) for each in found]
    bars(axes, rows, title="tensors that differ most" if rows else "", label="largest absolute difference")
    a, b = shortened(report.a.name, 40), shortened(report.b.name, 40)
    figure.suptitle(
        f"{a} and {b}: {report.verdict}; {report.identical} of {report.compared} tensors identical", **_LEFT
    )


def _difference(tensor: TensorDiff) -> str:
    relative = "" if tensor.max_rel is None else f" (relative {tensor.max_rel:.3g})"
    return f"{tensor.max_abs or 0.0:.3g}{relative}" + (f", {tensor.nonfinite} not finite" if tensor.nonfinite else "")


def draw_batchnorm(report: BatchNormReport, figure: Figure) -> None:
    """Draw how far the statistics of each layer moved, in the order of the network.

    What has moved far is beyond a dashed line.
    """
    from ..batchnorm.report import FAR_MEAN, FAR_VARIANCE  # with torch, which no other picture needs

    layers = report.layers
    at, label = positions([None] * len(layers))
    names = [each.name or each.class_name for each in layers]
    means, variances = figure.subplots(2, 1, sharex=True)
    _drift(means, at, [each.mean_moved for each in layers], FAR_MEAN, layers)
    means.set_ylabel("mean\nmoved by (σ)")
    _drift(variances, at, [each.variance_moved for each in layers], FAR_VARIANCE, layers)
    variances.set_ylabel("variance\nmoved by (factor)")
    place(variances, at, label and "BatchNorm layer, in the order of the network", names)
    figure.align_ylabels([means, variances])
    figure.suptitle(f"BatchNorm statistics of {len(layers)} layers, measured on {report.images} images", **_LEFT)


def _drift(
    axes: Axes, at: Sequence[float], values: Sequence[float], limit: float, layers: Sequence[LayerReport]
) -> None:
    finite = [value for value in values if value < float("inf")] or [0.0]
    axes.plot(at, values, color=BLUE, **markers(len(at)))
    axes.axhline(limit, color=ORANGE, linestyle="--", linewidth=1)
    scale(axes, [*finite, limit])
    worst = max(range(len(values)), key=lambda i: values[i] if values[i] in finite else -1.0)
    if values[worst] > limit:
        right = at[worst] > (at[0] + at[-1]) / 2
        axes.annotate(
            f"{shortened(layers[worst].name or layers[worst].class_name, 32)}: {values[worst]:.3g}",
            (at[worst], values[worst]),
            xytext=(-8 if right else 8, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            color=ORANGE,
        )


_LEFT = {"x": 0.01, "ha": "left", "fontsize": 9}
