"""Pictures: figures of one style, for reports and papers, written as every other output is.

Colours are those of Okabe and Ito, which the colour-blind tell apart; lines differ in their dashes or markers, too, so
that a grey print shows them. The same figures give the same bytes: no date, no random names. Matplotlib is imported
only when a picture is asked for.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..storage.staged import write_file
from .outputs import check_target, named, on_this_machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
INSTALL = "pip install 'ckpt-tools[plot]'"

BLACK, BLUE, ORANGE, GREEN, SKY, PURPLE = "#222222", "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#AA4499"
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"), (SKY, (0, (5, 1))), (BLACK, (0, (1, 1))))
"""Colour and dashes of each line in a panel."""

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that it is the same everywhere
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": BLACK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "text.color": BLACK,
    "text.parse_math": False,  # names may have dollars in them
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "svg.hashsalt": "ckpt-tools",
    "savefig.dpi": 200,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is asked for beside the result of a job.

    Attributes:
        path: with a suffix of `SUFFIXES`.
        force: replace an existing file.
    """

    path: Path
    force: bool

    @classmethod
    def of(cls, plot: str | Path | None, *, force: bool) -> Picture | None:
        """Refuse, before any work, a picture that cannot be made; return None if none is asked for.

        Raises:
            UsageError: it is an address, the name has no suffix of a picture, or matplotlib is not installed.
        """
        if plot is None:
            return None
        path = on_this_machine(plot, "plot")
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"`plot={os.fspath(plot)!r}`: a picture is {' or '.join(SUFFIXES)}. Give it such a suffix."
            )
        lacking = no_matplotlib()
        if lacking is not None:
            raise UsageError(f"`plot` needs {lacking}")
        return cls(path, force)

    def check(self, inputs: Iterable[Path], out: Path | None = None) -> None:
        """Refuse to write it over another file, into an input, or where the output goes; see `check_target`."""
        if out is not None and self.path.absolute() == out.absolute():
            raise UsageError(f"`plot` and `out` are both {self.path}: give them different names.")
        with named("plot"):
            check_target(self.path, inputs, nbytes=0, force=self.force, names=None)

    def write(self, draw: Callable[[Figure], None], size: tuple[float, float]) -> None:
        """Draw it and write it, whole or not at all.

        Args:
            draw: fills an empty figure.
            size: width and height in inches.

        Raises:
            WriteError: the system refuses.
        """
        data = rendered(draw, size=size, suffix=self.path.suffix.lower())
        with named("plot"):
            write_file(self.path, data, force=self.force)


def no_matplotlib() -> str | None:
    """Return what is to be done to draw pictures, in words; None if matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f"matplotlib, which cannot be imported ({error}). Install it: {INSTALL}"
    return None


def rendered(draw: Callable[[Figure], None], *, size: tuple[float, float], suffix: str) -> bytes:
    """Return a figure as the bytes of a file; see `Picture.write`."""
    from matplotlib import style
    from matplotlib.figure import Figure

    data = io.BytesIO()
    nameless: dict[str, Any] = {"Date": None, "Creator": None} if suffix == ".svg" else {"Software": None}
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # of a name, drawn as a box
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(data, format=suffix.removeprefix("."), metadata=nameless)
    return data.getvalue()


def shortened(name: str, most: int) -> str:
    """Return a name in so many characters, without its middle: its ends tell names apart."""
    shown = "".join(each if each.isprintable() else "?" for each in name)
    if len(shown) <= most:
        return shown
    head = (most - 1) // 2
    return f"{shown[:head]}\u2026{shown[head + 1 - most :]}"


_NAMES = 12
"""So many checkpoints have room for their names below the axis."""


def positions(steps: Sequence[int | None]) -> tuple[list[float], str | None]:
    """Return where each checkpoint of a series stands on the axis, and its label; None if names are to stand there."""
    known = [float(step) for step in steps if step is not None]
    if len(known) == len(steps) and all(a < b for a, b in zip(known, known[1:], strict=False)):
        return known, "training step or epoch"
    numbers = [float(i + 1) for i in range(len(steps))]
    return numbers, None if len(numbers) <= _NAMES else "checkpoint, oldest first"


def place(axes: Axes, at: Sequence[float], label: str | None, names: Sequence[str]) -> None:
    """Write what stands where below the horizontal axis: numbers of the unit `label`, or else the names."""
    margin = (at[-1] - at[0]) * 0.03 or 0.5
    axes.set_xlim(at[0] - margin, at[-1] + margin)
    if label is None:
        axes.set_xticks(at, [shortened(name, 18) for name in names], rotation=30, ha="right", rotation_mode="anchor")
    else:
        count_steps(axes)
        axes.set_xlabel(label)


def bars(axes: Axes, rows: Sequence[tuple[str, float, str]], *, title: str, label: str) -> None:
    """Draw a bar below each name.

    Args:
        rows: name, length of the bar, and the length in words; from the top down.
        title: of the panel.
        label: of the lengths.
    """
    places = range(len(rows))
    axes.barh(places, [length for _, length, _ in rows], height=0.32, color=BLUE, align="edge")
    for place_, (name, _, words) in zip(places, rows, strict=True):
        axes.annotate(
            f"{shortened(name, 40)}  {words}",
            (0, place_),
            xytext=(1, 2),
            textcoords="offset points",
            va="bottom",
            fontsize=8,
        )
    axes.set_ylim(len(rows) - 0.4 if len(rows) > 4 else 4.6, -0.8)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title(title)
    axes.set_xlabel(label)


def count_steps(axes: Axes) -> None:
    """Write the numbers of the horizontal axis as people do: 20k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def scale(axes: Axes, values: Sequence[float], wide: float = 30) -> None:
    """Let the vertical axis begin at 0, or be logarithmic where the largest value is so many times the smallest."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = min(values), max(values)
    if 0 < low <= high / wide:
        margin = high**0.15 / low**0.15  # their ratio may be too large for a number
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(min(0.0, low), 1.15 * high if high > 0 else 1.0)


def markers(count: int) -> dict[str, Any]:
    """Return how a line of so many points shows each of them."""
    return {"marker": "o", "markersize": 4.5 if count <= 24 else 2.5}


def missing(values: Sequence[float | None]) -> list[float]:
    """Return values with gaps where there are none."""
    return [float("nan") if value is None else value for value in values]
