"""Cleaning: what dead jobs have left in a folder is found, told, and removed.

Three things stay behind a killed process: an output that was growing (where files need a name, or as a folder), a
folder that was about to be replaced, and the parts of a job that can go on. A lock tells if a process is at work there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import CkptError, ReadError, UsageError
from ..series.paths import refuse_empty
from ..storage.hidden import Hidden, allocated, held, hidden_in, remove
from ..storage.kept_stage import Stage
from .option_groups import takes
from .options import Clearing
from .reports import Report

_WHAT = {"partial": "output", "old": "replaced", "parts": "parts"}


@dataclass(frozen=True, slots=True)
class Left:
    """Something that a job has left.

    Attributes:
        path: where it is.
        target: the output that it belongs to; of a long name the beginning.
        what: ``output`` (of a killed job), ``replaced`` (an old folder), or ``parts`` (of a job that can go on).
        nbytes: on the disk.
        modified: when something in it changed last, ISO 8601, UTC.
        age: since then, in seconds; 0 if the clock of its disk is ahead.
        result: ``removed``, ``would be removed``, ``kept``, ``in use``, or ``failed``.
        detail: why it was kept, or what failed, in words.
        done: of a job in parts, how much is done, from 0 to 1; None if that is not known.
        begun: of a job in parts, the parts that were begun, such as ``2/4``.
        command: of a job in parts, the command line that goes on with it, if one began it.
        folder: where that was started.
    """

    path: str
    target: str
    what: str
    nbytes: int
    modified: str
    age: float
    result: str
    detail: str = ""
    done: float | None = None
    begun: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    folder: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class CleanReport(Report):
    """What dead jobs have left in a folder.

    Attributes:
        folder: that was searched, without the folders in it.
        left: what was found, by name.
        freed: bytes on the disk that were freed, or would be.
        notes: in words.
    """

    folder: str
    left: tuple[Left, ...]
    freed: int
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """True if something could not be removed."""
        return any(each.result == "failed" for each in self.left)


@takes(Clearing)
def clean(folder: str | Path, clearing: Clearing) -> CleanReport:
    """Remove what dead jobs have left in a folder: hidden files and folders beside their targets.

    Nothing is touched that a process has locked, where the system does not tell, or that has another name or kind.
    What is done of a job in parts stays unless it is asked for. Folders in the folder are not searched.

    Args:
        folder: with the targets of jobs.
        {options}

    Returns:
        What was found, and what became of it.

    Raises:
        CkptError: the path is empty, there is no such folder, or it cannot be read.
    """
    refuse_empty(folder)
    place = Path(folder)
    if not place.is_dir():
        raise UsageError(f"{folder}: is not a folder. Give the folder that has the outputs.")
    try:
        found = hidden_in(place)
    except OSError as error:
        raise ReadError(f"{folder}: cannot be read ({error.strerror}).") from error
    left = tuple(_cleared(each, clearing) for each in found)
    freed = sum(each.nbytes for each in left if "removed" in each.result)
    kept = [each for each in left if each.what == "parts" and each.result == "kept" and not each.detail]
    notes = ("What is done of jobs in parts is kept, because they can go on. Remove it with `parts`.",) if kept else ()
    return CleanReport(str(folder), left, freed, notes)


def _cleared(found: Hidden, clearing: Clearing) -> Left:
    """Remove one thing, if that is right; say what became of it."""
    left = _described(found)
    try:
        if found.suffix == "parts":
            return _cleared_stage(found, left, clearing)
        with held(found.path) as free:
            return _removed(left, found.path, free=free, why=found.doubt(), clearing=clearing)
    except (OSError, CkptError) as error:  # it belongs to another user, say; the others are looked at all the same
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        return replace(left, detail=f"it cannot be looked into ({reason})")


def _cleared_stage(found: Hidden, left: Left, clearing: Clearing) -> Left:
    stage = Stage(found.target or found.path.parent / found.start, found.path)
    why = stage.doubt()
    left = replace(left, **_progress(stage))
    with stage.abandoned() as free:
        # One without `job.json` is not trusted by any job, and cannot go on.
        if free and not why and not clearing.parts and stage.job() is not None:
            return left
        return _removed(left, found.path, free=free, why=why, clearing=clearing)


def _removed(left: Left, path: Path, *, free: bool | None, why: str, clearing: Clearing) -> Left:
    if free is None:
        return replace(left, detail="the system does not tell if a process is at work there")
    if not free:
        return replace(left, result="in use")
    if why:
        return replace(left, detail=why)
    if clearing.dry_run:
        return replace(left, result="would be removed")
    with suppress(OSError):
        remove(path)
    if path.is_symlink() or path.exists():
        return replace(left, result="failed", detail="the system refuses to remove it; it may belong to another user")
    return replace(left, result="removed")


def _described(found: Hidden) -> Left:
    times = []
    for each in [found.path, *(found.path.rglob("*") if found.path.is_dir() and not found.path.is_symlink() else ())]:
        with suppress(OSError):
            times.append(each.lstat().st_mtime)
    last = max(times, default=0.0)
    return Left(
        path=str(found.path),
        target=found.shown,
        what=_WHAT[found.suffix],
        nbytes=allocated(found.path),
        modified=datetime.fromtimestamp(last, timezone.utc).isoformat(timespec="seconds"),
        age=max(0.0, time.time() - last),
        result="kept",
    )


def _progress(stage: Stage) -> dict[str, Any]:
    """Tell how much of a job in parts is done, and what goes on with it."""
    job = stage.job() or {}
    journals = stage.journals()
    lines = [line for journal in journals for line in journal.lines()]
    total = max(_numbers(lines, "total"), default=0)
    done = sum(_numbers(lines, "nbytes"))
    command = job.get("command")
    return {
        "done": min(1.0, done / total) if total else None,
        "begun": tuple(f"{each.index}/{each.count}" for each in journals),
        "command": tuple(map(str, command)) if isinstance(command, list) else (),
        "folder": str(job.get("folder", "")),
    }


def _numbers(lines: Iterable[Mapping[str, Any]], key: str) -> list[int]:
    """Return the numbers of bytes that lines have; one of another program may have anything there."""
    return [n for line in lines if isinstance(n := line.get(key), int) and 0 <= n < 1 << 63]
