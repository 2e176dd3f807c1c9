"""The picture of a sweep: the metric over the option that was swept, or the candidates in their order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...series.candidates import number_of
from ...series.search import SCALES
from ..pictures import BLACK, BLUE, LINES, count_steps, markers, scale, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import Ranked, SweepReport

_MOST_LINES = len(LINES)
_MOST_BANDS = 3
"""So many lines have their intervals drawn; more of them would hide each other."""
_ROWS = 40
"""So many candidates have a row of their own."""
_TICKS = 14
_GREY, _YELLOW = "#666666", "#F0E442"
Point = tuple[float, "Ranked"]


@dataclass(frozen=True, slots=True)
class Curves:
    """Candidates over one option that has numbers.

    Attributes:
        option: its name.
        share: its values are parts of the run, in percent.
        lines: values of the other options, in words, to points (value of the option, candidate).
        levels: candidates that have no value of it, by what they are.
    """

    option: str
    share: bool
    lines: Mapping[str, Sequence[Point]]
    levels: Mapping[str, Ranked]


def size(report: SweepReport) -> tuple[float, float]:
    """Return width and height in inches."""
    if curves(report) is not None:
        return 8.0, 4.8
    return 8.0, 1.7 + 0.19 * (min(len(_scored(report)), _ROWS) + 2)


def draw(report: SweepReport, figure: Figure) -> None:
    """Draw a report with scores into an empty figure."""
    axes = figure.subplots()
    found = curves(report)
    if found is None:
        _draw_dots(report, axes)
    else:
        _draw_curves(report, found, axes)
    figure.suptitle("\n".join(_title(report, found)), x=0.01, ha="left", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2 if max(map(len, labels)) < 52 else 1)


def curves(report: SweepReport) -> Curves | None:
    """Return the option with the most values over which a few lines show all; None if none does."""
    points = [*_points(_scored(report))]
    values: dict[str, dict[str, None]] = {}
    for options, _ in points:
        for name, value in options.items():
            values.setdefault(name, {})[str(value)] = None
    varying = [name for name, each in values.items() if len(each) > 1]
    for name in sorted(varying, key=lambda name: -len(values[name])):
        found = _over(name, varying, points, report)
        if found is not None:
            return found
    return None


def _points(scored: Iterable[Ranked]) -> Iterator[tuple[Mapping[str, Any], Ranked]]:
    for each in scored:
        for options in (each.options, *each.same_options):
            if options:
                yield options, each


def _over(
    name: str, varying: Sequence[str], points: Sequence[tuple[Mapping[str, Any], Ranked]], report: SweepReport
) -> Curves | None:
    lines: dict[str, dict[float, Ranked]] = {}
    levels: dict[str, Ranked] = {}
    shares = set()
    for options, each in points:
        label = " ".join(f"{other}={options[other]}" for other in varying if other != name and other in options)
        if name not in options:
            levels[label] = each
            continue
        number = number_of(options[name])
        if number is None:
            return None
        value, share = number
        shares.add(share)
        lines.setdefault(label, {})[value] = each
    soups = [each for each in _scored(report) if each.kind == "soup"]
    if soups:
        levels["greedy soup"] = soups[0]
    if len(shares) != 1 or len(lines) + len(levels) > _MOST_LINES or max(map(len, lines.values())) < 2:
        return None
    return Curves(name, shares.pop(), {label: sorted(each.items()) for label, each in lines.items()}, levels)


def _scored(report: SweepReport) -> list[Ranked]:
    return [each for each in report.candidates if report.metric in each.metrics]


def _value(each: Ranked, report: SweepReport) -> float:
    return each.metrics[report.metric or ""]


def _named(report: SweepReport, label: str | None) -> Ranked | None:
    return next((each for each in _scored(report) if each.label == label), None)


def _title(report: SweepReport, found: Curves | None) -> list[str]:
    scored = _scored(report)
    intervals = ""
    if any(each.low is not None for each in scored):
        bands = found is None or len(found.lines) <= _MOST_BANDS
        which = "each mean, by itself" if bands else "the best one, by itself"
        intervals = f"; 95 % interval of {which}"
    return [
        f"{len(scored)} candidates from {len(report.checkpoints)} checkpoints, "
        f"{shortened(report.checkpoints[0], 30)} to {shortened(report.checkpoints[-1], 30)}",
        f"{shortened(report.metric or '', 30)}: {'lower' if report.lower_is_better else 'higher'} is better{intervals}",
    ]


def _draw_curves(report: SweepReport, found: Curves, axes: Axes) -> None:
    numbers = sorted({value for line in found.lines.values() for value, _ in line})
    place = _horizontal(axes, found, numbers)
    bands = len(found.lines) <= _MOST_BANDS
    styles = iter(LINES)
    for label, line in found.lines.items():
        color, dashes = next(styles)
        at, heights = [place(value) for value, _ in line], [_value(each, report) for _, each in line]
        many = sum(map(len, found.lines.values()))
        axes.plot(at, heights, color=color, linestyle=dashes, label=label or None, **markers(many))
        if bands and all(each.low is not None for _, each in line):
            lows, highs = zip(*[(each.low, each.high) for _, each in line], strict=True)
            axes.fill_between(at, lows, highs, color=color, alpha=0.14, linewidth=0)
    for label, each in found.levels.items():
        color, dashes = next(styles)
        axes.axhline(_value(each, report), color=color, linestyle=dashes, label=f"{label}, {_value(each, report):.6g}")
    _references(report, axes.axhline)
    best = _named(report, report.best)
    on = [place(value) for line in found.lines.values() for value, each in line if each is best]
    if best is not None and on:
        _star(report, best, axes, on, [_value(best, report)] * len(on))
        if best.low is not None and best.high is not None and not bands:
            axes.vlines(on, best.low, best.high, color=BLACK, linewidth=1)
    _vertical(report, axes, [each for line in found.lines.values() for _, each in line])
    axes.set_ylabel(shortened(report.metric or "", 40))


def _horizontal(axes: Axes, found: Curves, numbers: Sequence[float]) -> Any:
    """Lay out the horizontal axis; return where a value of the option stands on it."""
    name = found.option + (" (%)" if found.share else "")
    reach = found.option in SCALES and 0 <= numbers[0] <= numbers[-1] < 1

    def place(value: float) -> float:
        return 1 / (1 - value) if reach else value

    at = [place(value) for value in numbers]
    logarithmic = reach or _log_is_more_even(at)
    if logarithmic:
        axes.set_xscale("log")
    if logarithmic or len(at) <= _TICKS:
        from matplotlib.ticker import NullLocator

        shown = _apart([math.log(each) for each in at] if logarithmic else at)
        axes.set_xticks([at[i] for i in shown], [_short(numbers[i]) for i in shown])
        axes.xaxis.set_minor_locator(NullLocator())
    elif at[-1] >= 10_000:
        count_steps(axes)
    axes.set_xlabel(f"{name}, spaced by 1 / (1 - {name})" if reach else name)
    return place


def _log_is_more_even(at: Sequence[float]) -> bool:
    """Return True if values span much, and their largest gap is smaller on a logarithmic axis."""
    if at[0] <= 0 or at[-1] < 8 * at[0]:
        return False
    logs = [math.log(each) for each in at]

    def largest(each: Sequence[float]) -> float:
        return max(b - a for a, b in zip(each, each[1:], strict=False)) / (each[-1] - each[0])

    return largest(logs) < largest(at)


def _apart(at: Sequence[float]) -> list[int]:
    """Return indices of values whose labels do not overlap, with the first and the last."""
    gap = (at[-1] - at[0]) / _TICKS
    shown = [0]
    for i in range(1, len(at) - 1):
        if at[i] - at[shown[-1]] >= gap and at[-1] - at[i] >= gap:
            shown.append(i)
    return [*shown, len(at) - 1]


def _short(value: float) -> str:
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= factor and value % (factor / 10) == 0:
            return f"{value / factor:g}{unit}"
    return f"{value:.6g}"


def _vertical(report: SweepReport, axes: Axes, drawn: Sequence[Ranked]) -> None:
    values = [_value(each, report) for each in drawn]
    if report.lower_is_better and 0 < min(values) < max(values) / 30:
        scale(axes, values)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


def _references(report: SweepReport, line: Any) -> None:
    """Draw the last checkpoint and the best single one, each as a line over the whole width or height."""
    last, single = _named(report, report.last), _named(report, report.best_single)
    both = ", which is the best one alone" if last is single else ""
    if last is not None:
        line(
            _value(last, report),
            color=_GREY,
            linestyle=(0, (6, 3)),
            linewidth=1.2,
            label=_said(report, f"last checkpoint{both}", last),
        )
    if single is not None and single is not last:
        line(
            _value(single, report),
            color=_GREY,
            linestyle=(0, (1, 2)),
            linewidth=1.4,
            label=_said(report, "best checkpoint alone", single),
        )


def _said(report: SweepReport, what: str, each: Ranked) -> str:
    return f"{what}: {shortened(each.label, 40)}, {_value(each, report):.6g}"


def _star(report: SweepReport, best: Ranked, axes: Axes, at: Sequence[float], heights: Sequence[float]) -> None:
    axes.plot(
        at,
        heights,
        linestyle="",
        marker="*",
        markersize=13,
        markerfacecolor=_YELLOW,
        markeredgecolor=BLACK,
        markeredgewidth=0.8,
        zorder=5,
        clip_on=False,
        label=_said(report, "best", best),
    )


def _row_name(each: Ranked) -> str:
    # The end of a soup's label is the checkpoint that was added.
    soup = each.kind == "soup"
    return shortened(f"soup of {len(each.checkpoints)}: {each.label}" if soup else each.label, 46)


def _draw_dots(report: SweepReport, axes: Axes) -> None:
    """Draw the candidates below one another, best first; those beyond the first ones share a row."""
    scored = _scored(report)
    marked = [each for each in (_named(report, report.best_single), _named(report, report.last)) if each is not None]
    shown = {each.label for each in [*scored[:_ROWS], *marked]}
    own = [each for each in scored if each.label in shown]
    others = [each for each in scored if each.label not in shown]
    for alone, fill, label in ((False, BLUE, "average"), (True, "white", "checkpoint alone")):
        rows = [(i, each) for i, each in enumerate(own) if (each.kind == "checkpoint") is alone]
        if not rows:
            continue
        for i, each in rows:
            if each.low is not None and each.high is not None:
                axes.hlines(i, each.low, each.high, color=BLUE, linewidth=0.9, alpha=0.6)
        axes.plot(
            [_value(each, report) for _, each in rows],
            [i for i, _ in rows],
            "o",
            color=BLUE,
            markerfacecolor=fill,
            markersize=4.5,
            label=label,
        )
    names = [_row_name(each) for each in own]
    if others:
        axes.plot([_value(each, report) for each in others], [len(own)] * len(others), "|", color=_GREY, markersize=7)
        names.append(f"{len(others)} others")
    _references(report, axes.axvline)
    best = _named(report, report.best)
    if best is not None:
        _star(report, best, axes, [_value(best, report)], [own.index(best)])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.8)
    axes.grid(axis="y", visible=False)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_xlabel(shortened(report.metric or "", 40))
