"""Geometry: how the checkpoints of a sweep lie to each other, measured once and kept in its scratch folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import CkptError
from ...series.member import Member
from ...series.usable import Skipped
from ...storage.staged import write_file
from ..look import LookReport, Position, look
from ..options import Matching
from .options import Order, Sweeping
from .results import digest, files_of

_KEPT = "look.json"


def geometry_of(
    folder: Path,
    members: Sequence[Member],
    paths: Sequence[str | Path],
    order: Order,
    matching: Matching,
    running: Sweeping,
) -> LookReport | str:
    """Return the geometry of a series, or why it cannot be measured.

    Args:
        folder: where it is kept for the next sweep of the same files.
        members: the checkpoints at `paths`.
    """
    options = {
        "order": order.order,
        "include_outputs": order.include_outputs,
        "exclude": order.exclude,
        "skip_broken": order.skip_broken,
        "state": matching.state,
        "match": matching.match,
        "keys": matching.keys,
    }
    key = digest([[files_of(member) for member in members], {name: repr(value) for name, value in options.items()}])
    kept = folder / _KEPT
    try:
        known = json.loads(kept.read_bytes())
        if known["key"] == key:
            return _read(known["report"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    try:
        found = look(paths, **options, threads=running.threads, on_progress=running.on_progress)
    except CkptError as error:  # a sweep without it is better than none
        return str(error)
    write_file(kept, json.dumps({"key": key, "report": found.to_dict()}).encode(), force=True, internal=True)
    return found


def _read(report: Mapping[str, Any]) -> LookReport:
    listed = {name: tuple(report[name]) for name in ("warnings", "notes")}
    positions = tuple(Position(**each) for each in report["checkpoints"])
    skipped = tuple(Skipped(**each) for each in report["skipped"])
    return LookReport(**{**report, **listed, "checkpoints": positions, "skipped": skipped})
