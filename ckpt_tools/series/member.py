"""Member: one checkpoint of a series."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..formats.header import Header


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One checkpoint of a series.

    Attributes:
        path: as found.
        header: of the checkpoint.
        step: training step or epoch; None if unknown.
        counter: source of `step`: a key of the file (``global_step``, ``epoch``) or ``name``.
    """

    path: Path
    header: Header
    step: int | None = None
    counter: str | None = None
