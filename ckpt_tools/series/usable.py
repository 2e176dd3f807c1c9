"""Usable checkpoints: the headers of a series, and which paths have none, or no weights, and why."""

from __future__ import annotations

import glob
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..checkpoints.layouts import states
from ..checkpoints.parts import of_ranks, select_parts, unwrapped
from ..compute.progress import HEADERS, Progress, counted
from ..compute.threads import HandedOut, in_threads
from ..errors import CkptError, CorruptError, LayoutError, NotACheckpointError, SeriesError, UnsupportedError
from ..formats import read_header
from ..formats.header import Header
from .numbered import glob_of

EXCLUDED = "excluded"
_KINDS = (
    (CorruptError, "damaged"),
    (NotACheckpointError, "not a checkpoint"),
    (UnsupportedError, "unsupported"),
    (LayoutError, "no weights"),
    (SeriesError, "no weights"),
)
_MOST = 4
"""Names that a message offers to exclude one by one."""
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that is left out.

    Attributes:
        path: as found.
        kind: why, in a word or two: ``excluded``, ``damaged``, ``not a checkpoint``, ``unsupported``, ``no weights`` or
            ``unreadable``.
        reason: the same in more words.
    """

    path: str
    kind: str
    reason: str

    @classmethod
    def of(cls, path: Path, error: CkptError) -> Skipped:
        """Describe a path by the error that it gave."""
        kind = next((kind for type_, kind in _KINDS if isinstance(error, type_)), "unreadable")
        reason, *_what_to_do = str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/").split(". ")
        return cls(str(path), kind, reason.rstrip("."))

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


def read_headers(paths: Sequence[Path], on_progress: Progress | None = None) -> list[Header | CkptError]:
    """Read the headers of checkpoints in threads; for one that cannot be read, the error."""
    found: dict[int, Header | CkptError] = {}
    tell = counted(on_progress, HEADERS, len(paths))

    def read(i: int) -> None:
        try:
            found[i] = read_header(paths[i])
        except CkptError as error:
            found[i] = error

    # The first is the template of those that are like it.
    for i in range(min(1, len(paths))):
        read(i)
    if len(paths) > 1:
        stop = threading.Event()
        rest = HandedOut(range(1, len(paths)), stop)

        def work() -> None:
            for i in rest:
                read(i)

        in_threads(work, None, stop, on_tick=None if tell is None else lambda: tell(len(found)))
    elif tell is not None:
        tell(len(paths))
    return [found[i] for i in range(len(paths))]


def usable(
    paths: Sequence[Path],
    empty: Sequence[Path],
    state: str | Sequence[str],
    *,
    skip_broken: bool,
    on_progress: Progress | None = None,
) -> tuple[list[Header], list[Skipped]]:
    """Read the headers of a series.

    Args:
        paths: of the checkpoints.
        empty: folders that should be checkpoints, as the others are, and hold no weights.
        state: the set of weights that is asked for, or several for the parts of a model.
        skip_broken: leave out what is not usable.
        on_progress: called with (what is done, files read, files in all).

    Returns:
        (the headers; what is left out)

    Raises:
        CkptError: something is not usable, or nothing is left.
    """
    headers, errors = sorted_out(paths, empty, [state] if isinstance(state, str) else state, on_progress)
    if not errors:
        return headers, []
    if not (skip_broken and headers):
        _refuse(errors, headers, len(paths) + len(empty))
    return headers, [Skipped.of(path, error) for path, error in errors.items()]


def sorted_out(
    paths: Sequence[Path],
    empty: Sequence[Path],
    state: Sequence[str] = ("auto",),
    on_progress: Progress | None = None,
) -> tuple[list[Header], dict[Path, CkptError]]:
    """Return the headers of what is usable, and the error of what is not; see `usable`."""
    read = read_headers(paths, on_progress)
    headers = [each for each in read if isinstance(each, Header)]
    errors = {path: each for path, each in zip(paths, read, strict=True) if isinstance(each, CkptError)}
    errors |= _without_weights(headers, state)
    errors |= {path: SeriesError(f"{path}: a folder without weights. Is it still being written?") for path in empty}
    return [header for header in headers if header.path not in errors], errors


def _refuse(errors: dict[Path, CkptError], whole: Sequence[Header], n: int) -> NoReturn:
    """Raise one error for all that cannot be used.

    Args:
        whole: the others.
        n: number of all.
    """
    (path, error), *more = errors.items()
    if not whole:  # they have one fault, which is better told in full
        raise error
    others = _of_other_models(whole)
    good = [header.path for header in whole if header.path not in others]
    bad = [*errors, *others]
    way = _way_on(bad, good, skip_broken=not others)
    if not more and not others:
        said = str(error)
        raise type(error)(f"{said}{'' if said.endswith(('.', '?')) else '.'} {way}") from error
    reasons = [str(Skipped.of(path, error)) for path, error in errors.items()]
    reasons += [f"{path} ({reason})" for path, reason in others.items()]
    shown = "; ".join(reasons[:_SHOWN]) + (f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else "")
    raise SeriesError(f"{len(bad)} of {n} checkpoints cannot be averaged: {shown}. {way}") from error


def _way_on(bad: Sequence[Path], good: Sequence[Path], *, skip_broken: bool) -> str:
    """Say how to leave some checkpoints out.

    Args:
        good: the others.
        skip_broken: they are left out by that.
    """
    names = [path.name for path in bad]
    if {path.name for path in good} & {*names}:
        names = [*map(str, bad)]
    ways = [f"`exclude={[*map(glob.escape, names)]!r}`"] if len(names) <= _MOST else []
    if skip_broken and good:
        ways.append("`skip_broken=True`")
    patterns = {glob_of(path) for path in good}
    pattern = patterns.pop() if len(patterns) == 1 else None
    if len(good) > 1 and pattern is not None and not any(path.match(str(pattern)) for path in bad):
        ways.append(f"name '{pattern}'")
    them = "it" if len(bad) == 1 else "them"
    return f"Leave {them} out{': ' if ways else ''}{' or '.join(ways)}."


def _without_weights(headers: Iterable[Header], asked: Sequence[str]) -> dict[Path, CkptError]:
    """Return the checkpoints without weights in a known layout, and what they hold; none if that is so for all."""
    found: dict[Path, CkptError] = {}
    with_weights: set[tuple[str, ...]] = set()
    for header in headers:
        entries = tuple(map(str, header.content)) if isinstance(header.content, dict) else ()
        if entries in with_weights:  # one of a series stands for those that are like it
            continue
        try:
            of_ranks(header, lambda each: select_parts(each, asked))
        except CkptError as error:
            if not header.ranks and not states(header):
                found[header.path] = error
                continue
        with_weights.add(entries)
    return found if with_weights else {}


def _of_other_models(headers: Sequence[Header]) -> dict[Path, str]:
    names: list[Collection[str]] = []
    for header in headers:
        try:
            names.append({*unwrapped(of_ranks(header, lambda each: select_parts(each, ["auto"]))).values()})
        except CkptError:
            return {}
    return {headers[i].path: reason for i, reason in of_other_models(names).items()}


def of_other_models(names: Sequence[Collection[str]]) -> dict[int, str]:
    """Find the checkpoints that share less than half of their tensor names with most of the others.

    Args:
        names: of the tensors in each.

    Returns:
        index to the reason, in words; empty if there is no majority.
    """
    usual, times = Counter(map(frozenset, names)).most_common(1)[0] if names else (frozenset(), 0)
    if times < 2 or 2 * times <= len(names):
        return {}
    shared = [len(usual & {*own}) for own in names]
    return {
        i: f"another model: it shares {shared[i]} of {len(own)} tensor names with the others"
        for i, own in enumerate(names)
        if 2 * shared[i] < max(len(own), len(usual))
    }
