"""Files that show a sweep: picture, page and table; checked before the work, and written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...storage.staged import write_file
from ..outputs import check_target, named, on_this_machine
from ..pictures import Picture, no_matplotlib
from .options import SweptOutput
from .page import Background, Wording, page

if TYPE_CHECKING:
    from .report import SweepReport

_SUFFIXES = {"report": (".html", ".htm"), "csv": (".csv",)}


@dataclass(frozen=True, slots=True)
class Files:
    """Where they go; None for each that is not asked for.

    Attributes:
        plot: the picture.
        report, csv: paths of the page and the table.
        force: replace what is there.
        notes: decisions, in words.
    """

    plot: Picture | None
    report: Path | None
    csv: Path | None
    force: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, output: SweptOutput, inputs: Sequence[Path]) -> Files:
        """Refuse files that cannot be written.

        Args:
            inputs: checkpoints, which stay as they are.

        Raises:
            UsageError: an address, another suffix, the same name as that of the output, or matplotlib is lacking for
                the picture.
            WriteError: see `check_target`.
        """
        out = None if output.out is None else Path(output.out)
        plot = Picture.of(output.plot, force=output.force)
        if plot is not None:
            plot.check(inputs, out)
        report, table = (
            checked_file(name, getattr(output, name), inputs, force=output.force) for name in ("report", "csv")
        )
        for name, path in (("report", report), ("csv", table)):
            if path is not None and out is not None and path.absolute() == out.absolute():
                raise UsageError(f"`{name}` and `out` are both {path}: give them different names.")
        notes = []
        if report is not None:
            lacking = no_matplotlib()
            if lacking is not None:
                notes.append(f"The page has no pictures: they need {lacking}")
        return cls(plot, report, table, output.force, tuple(notes))

    def write(self, report: SweepReport, background: Callable[[], Background], words: Wording | None) -> None:
        """Write them.

        Args:
            background: called if there is a page.
            words: of the page; None for those of Python.

        Raises:
            WriteError: the system refuses.
        """
        if self.csv is not None:
            with named("csv"):
                write_file(self.csv, ranking(report), force=self.force)
        if self.plot is not None:
            from .picture import draw, size

            self.plot.write(lambda figure: draw(report, figure), size(report))
        if self.report is not None:
            with named("report"):
                write_file(self.report, page(report, background(), words or Wording()), force=self.force)


def checked_file(name: str, given: str | Path | None, inputs: Iterable[Path], *, force: bool) -> Path | None:
    """Return where a page or a table goes; None if it is not asked for.

    Args:
        name: of the option.
        inputs: checkpoints, which stay as they are.
        force: replace what is there.

    Raises:
        UsageError: an address, or another suffix.
        WriteError: see `check_target`.
    """
    if given is None:
        return None
    path, known = on_this_machine(given, name), _SUFFIXES[name]
    if path.suffix.lower() not in known:
        raise UsageError(f"`{name}={os.fspath(given)!r}`: give it the suffix {known[0]}.")
    with named(name):
        check_target(path, inputs, nbytes=0, force=force, names=None)
    return path


def ranking(report: SweepReport) -> bytes:
    """Return the ranking as CSV in UTF-8: a row for each candidate, lists as JSON; those without a score have no rank.

    Names of options begin with ``options.``, those of metrics with ``metrics.``, so that they differ from the others.
    """
    options = [*dict.fromkeys(name for each in report.candidates for name in each.options)]
    metrics = [*dict.fromkeys(name for each in report.candidates for name in each.metrics)]
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        [
            *("rank", "label", "same"),
            *(f"options.{name}" for name in options),
            *("checkpoints", "coefficients"),
            *(f"metrics.{name}" for name in metrics),
            *("low", "high", "seconds", "error"),
        ]
    )
    for rank, each in enumerate(report.candidates, 1):
        table.writerow(
            [
                *(rank if each.error is None else "", each.label, json.dumps(each.same)),
                *(each.options.get(name, "") for name in options),
                *(json.dumps(each.checkpoints), json.dumps(each.coefficients)),
                *(each.metrics.get(name, "") for name in metrics),
                *(each.low, each.high, each.seconds, each.error),
            ]
        )
    return encoded(text.getvalue())


def encoded(text: str) -> bytes:
    """Return a text in UTF-8; names of files are bytes, and those that are no UTF-8 come back as they are."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")
