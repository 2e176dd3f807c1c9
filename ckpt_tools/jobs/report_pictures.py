"""Pictures of reports: coefficients of an average, differences of two checkpoints, moves of BatchNorm, sizes."""

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
    from .inspect import InspectReport
    from .listing import Listing

TOP = 20
"""So many tensors have a bar."""
AVERAGE_SIZE, DIFF_SIZE, BATCHNORM_SIZE, SIZES_SIZE = (8.0, 3.2), (8.0, 6.0), (8.0, 4.6), (10.0, 6.0)
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
    means.set_ylabel("mean shift (σ)")
    _drift(variances, at, [each.variance_moved for each in layers], FAR_VARIANCE, layers)
    variances.set_ylabel("variance ratio")
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


def draw_sizes(report: InspectReport, figure: Figure) -> None:
    """Draw the bytes of each part of a checkpoint, and of its largest tensors."""
    parts = [(each.label, each.nbytes) for each in report.sets]
    parts += [(each.place, each.nbytes) for each in report.optimizers]
    rest = report.nbytes - sum(nbytes for _, nbytes in parts)  # below 0 where two sets share tensors
    if rest > 0:
        parts.append(("all else", rest))
    tensors = [(row.name, row.nbytes) for row in (report.sets[0].tensors if report.sets else ())]
    largest = sorted(tensors, key=lambda row: -row[1])[:TOP]
    panels = figure.subplots(1, 2) if largest else [figure.subplots()]
    unit, name = _unit(max((nbytes for _, nbytes in parts), default=0))
    bars(panels[0], [_sized(each, unit, name) for each in parts], title="parts", label=name)
    if largest:
        unit, name = _unit(largest[0][1])
        title = f"largest tensors of {shortened(report.sets[0].label, 30)}"
        bars(panels[1], [_sized(each, unit, name) for each in largest], title=title, label=name)
    figure.suptitle(f"{shortened(report.path, 60)}: {report.format}, {len(tensors)} tensors", **_LEFT)


def draw_listing(report: Listing, figure: Figure) -> None:
    """Draw the bytes of each checkpoint over its step."""
    axes = figure.subplots()
    rows = [each for each in report.checkpoints if each.nbytes is not None]
    unit, name = _unit(max((each.nbytes or 0 for each in rows), default=0))
    at, label = positions([each.step for each in rows])
    sizes = [(each.nbytes or 0) / unit for each in rows]
    axes.vlines(at, 0, sizes, color=BLUE, linewidth=1.6)
    axes.plot(at, sizes, color=BLUE, linestyle="", **markers(len(at)))
    axes.set_ylim(0, max(sizes, default=0) * 1.15 or 1.0)
    axes.set_ylabel(name)
    if rows:
        place(axes, at, label, [each.name for each in rows])
    figure.suptitle(f"{len(rows)} checkpoints, {sum(sizes):.4g} {name} in all", **_LEFT)


def _unit(most: int) -> tuple[float, str]:
    """Return the unit in which so many bytes are a short number, and its name."""
    return next(((size, name) for size, name in _UNITS if most >= size), _UNITS[-1])


def _sized(row: tuple[str, int], unit: float, name: str) -> tuple[str, float, str]:
    return row[0], row[1] / unit, f"{row[1] / unit:.3g} {name}"


_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_LEFT = {"x": 0.01, "ha": "left", "fontsize": 9}
