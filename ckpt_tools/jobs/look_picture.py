"""The picture of a series: distances, steps, directions and learning rates, and the tensors that move most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .pictures import BLUE, ORANGE, bars, markers, missing, place, positions, scale, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .look import LookReport

SIZE = (10.0, 6.2)
"""Inches."""
_TOP = 10


def draw(report: LookReport, figure: Figure) -> None:
    """Draw a report into an empty figure."""
    series = report.checkpoints
    rates = any(each.learning_rate is not None for each in series)
    panels = ["distance", "step", *(["cosine"] if len(series) > 2 else []), *(["rate"] if rates else [])]
    moving = any(report.movement.values())
    rows: list[Any] = [[name, "tensors"] if moving else [name] for name in panels]
    grid = figure.subplot_mosaic(rows, width_ratios=[1.7, 1] if moving else [1])
    at, label = positions([each.step for each in series])
    _distance(grid["distance"], report, at)
    _step(grid["step"], report, at)
    if "cosine" in grid:
        _cosine(grid["cosine"], report, at)
    if rates:
        _rate(grid["rate"], report, at)
    if moving:
        _tensors(grid["tensors"], report)
    lowest = grid[panels[-1]]
    for name in panels[:-1]:
        grid[name].sharex(lowest)
        grid[name].tick_params(labelbottom=False)
    place(lowest, at, label, [each.name for each in series])
    figure.align_ylabels([grid[name] for name in panels])
    figure.suptitle("\n".join(_title(report)), x=0.01, ha="left", fontsize=9)


def _title(report: LookReport) -> list[str]:
    first, last = (shortened(report.checkpoints[i].name, 40) for i in (0, -1))
    norm = sum(each.norm for each in report.checkpoints) / len(report.checkpoints)
    basin = "" if report.one_basin else ": in no common basin"
    return [
        f"{len(report.checkpoints)} checkpoints, {first} to {last}; weights: {shortened(report.state, 40)}",
        f"Euclidean lengths over all parameters; the mean has {report.mean_norm:.4f} of their norm ({norm:.4g}){basin}",
    ]


def _distance(axes: Axes, report: LookReport, at: Sequence[float]) -> None:
    series = report.checkpoints
    axes.plot(at, [each.to_mean for each in series], color=BLUE, **markers(len(series)))
    scale(axes, [each.to_mean for each in series])
    axes.set_ylabel("distance\nto the mean")
    which = next((i for i, each in enumerate(series) if each.name == report.outlier), None)
    if which is not None:
        right = at[which] > (at[0] + at[-1]) / 2
        axes.plot(at[which], series[which].to_mean, "D", markersize=10, color=ORANGE, fillstyle="none", mew=1.8)
        axes.annotate(
            f"outlier: {shortened(series[which].name, 32)}",
            (at[which], series[which].to_mean),
            xytext=(-10 if right else 10, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            color=ORANGE,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _step(axes: Axes, report: LookReport, at: Sequence[float]) -> None:
    lengths = [each.to_next for each in report.checkpoints if each.to_next is not None]
    axes.stairs(lengths, at, baseline=None, color=BLUE, linewidth=1.6)
    scale(axes, lengths)
    axes.set_ylabel("distance\nto the next")


def _cosine(axes: Axes, report: LookReport, at: Sequence[float]) -> None:
    axes.axhline(0, color="#888888", linewidth=0.8)
    values = missing([each.cosine for each in report.checkpoints])
    axes.plot(at, values, color=BLUE, **markers(len(at)))
    axes.set_ylim(-1.15, 1.15)
    axes.set_yticks([-1, 0, 1])
    axes.set_ylabel("cosine of\nsuccessive steps")


def _rate(axes: Axes, report: LookReport, at: Sequence[float]) -> None:
    known = [each.learning_rate for each in report.checkpoints if each.learning_rate is not None]
    axes.plot(at, missing([each.learning_rate for each in report.checkpoints]), color=BLUE, **markers(len(at)))
    scale(axes, known, wide=10)
    axes.set_ylabel("learning\nrate")


def _tensors(axes: Axes, report: LookReport) -> None:
    rows = [(name, 100 * share, f"{100 * share:.3g} %") for name, share in [*report.movement.items()][:_TOP]]
    bars(axes, rows, title="tensors that move most", label="spread / norm (%)")
