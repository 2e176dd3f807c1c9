"""The command line that makes the best average of a sweep again."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

from ..spelling import spelled

if TYPE_CHECKING:
    from .job import SweepReport


def command(report: SweepReport) -> str:
    """Return the command that makes the best candidate; a second one measures its BatchNorm statistics."""
    given = [spelled(f"`{name}={value!r}`") for name, value in report.options.items()]
    out = report.out or "best.pth"
    made = " ".join(["ckpt avg", *map(quote, report.paths), *given])
    if not report.recalibrated:
        return f"{made} -o {quote(out)}"
    recalibrated = [spelled(f"`{name}={value!r}`") for name, value in report.recalibration.items()]
    return f"{made} -o averaged.pth && ckpt recal-bn averaged.pth {' '.join(recalibrated)} -o {quote(out)}"
