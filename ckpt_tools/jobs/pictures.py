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


def check_picture(plot: str | Path) -> Path:
    """Refuse, before any work, a picture that cannot be made.

    Returns:
        Its path.

    Raises:
        UsageError: it is an address, the name has no suffix of a picture, or matplotlib is not installed.
    """
    path = on_this_machine(plot, "plot")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"`plot={os.fspath(plot)!r}`: a picture is {' or '.join(SUFFIXES)}. Give it such a suffix.")
    lacking = no_matplotlib()
    if lacking is not None:
        raise UsageError(f"`plot` needs {lacking}")
    return path


def no_matplotlib() -> str | None:
    """Return what is to be done to draw pictures, in words; None if matplotlib is there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f"matplotlib, which cannot be imported ({error}). Install it: {INSTALL}"
    return None


def check_picture_target(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Refuse to write a picture over another file, or into an input; see `check_target`."""
    with named("plot"):
        check_target(path, inputs, nbytes=0, force=force, names=None)


def write_picture(path: Path, draw: Callable[[Figure], None], *, size: tuple[float, float], force: bool) -> None:
    """Draw a figure and write it, whole or not at all.

    Args:
        path: with a suffix of `SUFFIXES`.
        draw: fills an empty figure.
        size: width and height in inches.
        force: replace an existing file.

    Raises:
        WriteError: the system refuses.
    """
    data = rendered(draw, size=size, suffix=path.suffix.lower())
    with named("plot"):
        write_file(path, data, force=force)


def rendered(draw: Callable[[Figure], None], *, size: tuple[float, float], suffix: str) -> bytes:
    """Return a figure as the bytes of a file; see `write_picture`."""
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
