"""Tables: names, figures and bars in columns, as wide as the terminal, and whole in a pipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from . import console

BAR = 20
"""Columns of the longest bar."""
_FIRST, _LAST = 20, 10
"""Rows that a terminal shows of a long table."""
_NARROW = 12
"""Columns that names keep on a narrow terminal."""


@dataclass(frozen=True)
class _Row:
    name: str
    figures: tuple[str, ...]
    bar: float
    colour: str
    drawn: str
    bold: bool


class Table:
    """A column of names, columns of figures, and bars for a value of each row.

    Args:
        first: title of the names; if this and all others are empty, there is no line of titles.
        figures: titles of the figures.
        full: the value whose bar is longest; if None, the largest.
        drawn: title of a last column that is drawn with letters, see `add`.
        indent: columns before each line.
        sampled: a terminal shows some rows of a long one, unless `--all` is given.
    """

    def __init__(
        self,
        first: str,
        figures: Sequence[str] = (),
        *,
        full: float | None = None,
        drawn: str = "",
        indent: int = 0,
        sampled: bool = True,
    ) -> None:
        self._titles = tuple(map(console.visible, (first, *figures)))
        self._full = full
        self._drawn = drawn
        self._indent = indent
        self._sampled = sampled
        self._rows: list[_Row] = []

    def add(
        self, name: str, *figures: str, bar: float = 0.0, colour: str = "green", drawn: str = "", bold: bool = False
    ) -> None:
        """Add a row.

        Args:
            bar: value that its bar stands for; none is drawn for 0.
            drawn: text of the last column.
        """
        name, drawn, *cells = map(console.visible, (name, drawn, *figures))
        self._rows.append(_Row(name, tuple(cells), bar, colour, drawn, bold))

    def lines(self, width: int | None, stream: TextIO) -> list[str]:
        """Return the lines.

        Args:
            width: of the terminal; None for a pipe, where nothing is cut or left out.
            stream: where they go, for its colours and letters.
        """
        rows, left_out = self._shown(short=width is not None)
        cells = [(row.name, *row.figures) for row in rows]
        widths = [max(map(width_of, column)) for column in zip(self._titles, *cells, strict=True)]
        rest = sum(widths[1:]) + 2 * len(widths[1:]) + self._indent
        bars = BAR if any(row.bar for row in rows) else 0
        if width is not None:
            bars = min(bars, width - rest - widths[0] - 2)
            bars = bars if bars >= 4 else 0
            if rest + min(widths[0], _NARROW) > width:
                return self._stacked(rows, width, left_out)
            names = (self._titles[0], *(row.name for row in rows))
            widths[0] = max(size for size in (0, *map(width_of, names)) if size <= width - rest)
        draw = self._bars(rows, bars, stream)
        colours = console.coloured(stream)
        found = []
        if any(self._titles):
            found = self._line(self._titles, self._drawn, widths, width, "bold" if colours else None)
        for index, row in enumerate(rows):
            if left_out and index == _FIRST:
                found.append(" " * self._indent + _hint(left_out))
            drawn = row.drawn or draw(row.bar)
            if colours and drawn:
                drawn = console.painted(drawn, row.colour)
            found += self._line(
                (row.name, *row.figures), drawn, widths, width, "bold" if colours and row.bold else None
            )
        return found

    def _shown(self, *, short: bool) -> tuple[list[_Row], int]:
        """Return the rows to show, and how many are left out of their middle."""
        left_out = len(self._rows) - _FIRST - _LAST
        if not short or not self._sampled or console.manner.all or left_out < 10:
            return self._rows, 0
        return [*self._rows[:_FIRST], *self._rows[-_LAST:]], left_out

    def _stacked(self, rows: Sequence[_Row], width: int, left_out: int) -> list[str]:
        """Lay the rows out for a terminal that has no room for the columns: each figure in a line of its own."""
        found = []
        for index, row in enumerate(rows):
            if left_out and index == _FIRST:
                found.append(_hint(left_out))
            found += _folded(row.name, width)
            for title, figure in zip(self._titles[1:], row.figures, strict=True):
                found += [f"  {part}" for part in _folded(f"{title}: {figure}", width - 2)]
            found += [f"  {part}" for part in _folded(row.drawn, width - 2) if part]
        return found

    def _bars(self, rows: Sequence[_Row], width: int, stream: TextIO) -> Callable[[float], str]:
        largest = self._full or max((abs(row.bar) for row in rows if math.isfinite(row.bar)), default=0.0)
        return lambda value: bar(value, largest, width, stream) if width else ""

    def _line(
        self, cells: Sequence[str], drawn: str, widths: Sequence[int], room: int | None, style: str | None
    ) -> list[str]:
        """Lay a row out; a name that is too long for its column has lines of its own."""
        (name, *figures), (most, *others) = cells, widths

        def paint(text: str) -> str:
            return text if style is None else console.painted(text, style)

        alone = _folded(name, (room or most) - self._indent) if width_of(name) > most else []
        line = " " * most if alone else paint(name) + " " * (most - width_of(name))
        for figure, column in zip(figures, others, strict=True):
            line += "  " + " " * (column - width_of(figure)) + paint(figure)
        line = f"{line}  {drawn}".rstrip() if drawn else line.rstrip()
        return [" " * self._indent + text for text in (*map(paint, alone), line)]


def _hint(left_out: int) -> str:
    return f"... {left_out} more; --all shows them"


def _folded(text: str, width: int) -> list[str]:
    """Cut a text into parts of at most so many columns, after a dot if there is one."""
    parts = []
    while width_of(text) > width:
        longest = max(1, min(len(text), width))  # a name in a file of unknown origin may have a million letters
        most = next(size for size in range(longest, 0, -1) if size == 1 or width_of(text[:size]) <= width)
        cut = text.rfind(".", 1, most) + 1 or most
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


def width_of(text: str) -> int:
    """Return the columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    return sum(0 if category(letter) in ("Mn", "Me") else 1 + (east_asian_width(letter) in "WF") for letter in text)


def bar(value: float, largest: float, width: int = BAR, stream: TextIO | None = None) -> str:
    """Draw a value as a bar; the largest fills the width, and any value is visible but zero, NaN and infinity."""
    if largest <= 0 or value == 0 or not math.isfinite(value):
        return ""
    eighths = max(1, round(min(abs(value) / largest, 1.0) * width * 8))
    drawn = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return drawn if stream is None or encodes(drawn, stream) else "#" * max(1, eighths // 8)


def encodes(text: str, stream: TextIO) -> bool:
    """Return True if a stream can show this text."""
    return console.encodable(text, stream) == text
