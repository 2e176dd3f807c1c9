"""Series: the checkpoints that paths lead to, without copies and averages, in order, and those that are selected."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.steps import named_positions, stored_positions, telling_names
from ..compute.progress import Progress
from ..errors import SeriesError, unknown_word
from ..formats.header import Header
from ..storage.source import LOCAL, store_of
from .copies import without_copies
from .member import Member
from .numbered import natural_key
from .paths import Found, as_path, find, listed
from .selection import Choice
from .usable import EXCLUDED, Skipped, usable

_AVERAGE = re.compile(r"(?<![a-z])(ave|avg|averaged?|swa|ema|soup|merged)(?![a-z])", re.IGNORECASE)
"""Words of file names; for keys inside a checkpoint see `ckpt_tools.checkpoints.layouts.counterparts`."""
ORDERS = ("auto", "given", "natural", "mtime")


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """The selected checkpoints, oldest first.

    Attributes:
        members: the checkpoints to average.
        given: all checkpoints found, selected or not, except ckpt-tools outputs that were left out.
        ordered_by: in words.
        notes: decisions to report: duplicates, outputs and averages left out, ties.
        skipped: what was excluded, or could not be used.
    """

    members: tuple[Member, ...]
    given: tuple[Path, ...]
    ordered_by: str
    notes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()


def find_series(
    paths: Iterable[str | Path],
    *,
    order: str = "auto",
    include_outputs: bool = False,
    exclude: str | Sequence[str] = (),
    skip_broken: bool = False,
    state: str | Sequence[str] = "auto",
    start: Path | None = None,
    dry_run: bool = False,
    on_progress: Progress | None = None,
    **selection: Any,
) -> Series:
    """Find, read, order and select checkpoints; the payload is read only of suspected copies.

    Args:
        paths: files, globs, folders.
        order: ``auto`` (step or epoch stored in all files, else the numbers in the names),
            ``given``, ``natural`` (names), ``mtime``.
        include_outputs: include files that ckpt-tools wrote, and averages by other tools, known by their names.
        exclude: globs of checkpoints to leave out.
        skip_broken: leave out what cannot be read or holds no weights. Otherwise one error names all of it.
        state: the set of weights that will be asked for.
        start: a checkpoint from before the series, which is not in it, unless it is alone.
        dry_run: read a few bytes of suspected copies, and say that they look like copies.
        on_progress: called with (what is done, how much of it so far, all of it): headers that are read, and bytes of
            suspected copies.
        selection: see `ckpt_tools.series.selection.Choice`.

    Raises:
        UsageError, SeriesError: an invalid selection; no checkpoint found or left; one left beside averages; an export
            among checkpoints.
        ReadError, LayoutError: a file is not a checkpoint, or holds no weights; of several, a SeriesError names all.
    """
    choice = Choice(**selection)
    if order not in ORDERS:
        raise unknown_word("order", order, ORDERS)
    notes: list[str] = []
    paths = listed(paths)
    there = find(paths, notes, exclude)
    found = there.paths
    if start is not None:
        found = [path for path in found if path.resolve() != start.resolve()] or found
    headers, broken = usable(found, there.empty, state, skip_broken=skip_broken, on_progress=on_progress)
    skipped = [*excluded(there), *broken]
    notes.extend(notes_of(skipped))
    ours = set() if include_outputs else _outputs(headers, notes)
    given = tuple(path for path in found if path not in ours)
    headers = [header for header in headers if header.path not in ours]
    headers = without_copies(headers, notes, compare=not dry_run, on_progress=on_progress)
    _refuse_exports_among_others(headers)
    if not include_outputs:
        headers = _without_averages(headers, {as_path(each) for each in paths}, notes)
    members, ordered_by = _ordered(headers, order, notes)
    return Series(tuple(choice.of(members, notes)), given, ordered_by, tuple(notes), tuple(skipped))


def excluded(found: Found) -> list[Skipped]:
    """Describe what a glob leaves out."""
    return [Skipped(str(path), EXCLUDED, f"matches {glob!r}") for path, glob in found.excluded.items()]


def notes_of(skipped: Sequence[Skipped]) -> Iterator[str]:
    """Say what is left out, and why."""
    matched = [Path(each.path) for each in skipped if each.kind == EXCLUDED]
    if matched:
        yield f"Left out by `exclude`: {_some(matched)}."
    broken = [str(each) for each in skipped if each.kind != EXCLUDED]
    if broken:
        yield f"Left out by `skip_broken`: {'; '.join(broken)}."


def average_words(name: str) -> set[str]:
    """Return the words of a file name that say that it is an average, in small letters."""
    return {word.lower() for word in _AVERAGE.findall(name)}


def _is_average(made: Any) -> bool:
    """True for an output of `avg` or `recal-bn`, converted or not; not for a converted training checkpoint."""
    while isinstance(made, dict) and made.get("command") in ("convert", "strip"):
        source = made.get("input")
        made = source.get("made") if isinstance(source, dict) else None
    return made is not None


def _outputs(headers: Sequence[Header], notes: list[str]) -> set[Path]:
    """Return the ckpt-tools outputs to leave out; none if there are no other checkpoints."""
    ours = {header.path for header in headers if _is_average(header.provenance)}
    if len(ours) == len({header.path for header in headers}):
        return set()
    notes.extend(
        f"{path.name} was written by ckpt-tools: left out (add it with `include_outputs`)."
        for path in sorted(ours, key=natural_key)
    )
    return ours


def _without_averages(headers: Sequence[Header], given: Collection[Path], notes: list[str]) -> list[Header]:
    """Leave out averages that other tools made of the series, as their names say.

    A word for an average that all names have tells nothing, and neither does one in several EMAs, which may be a series
    of their own. Paths of `given` stay.

    Raises:
        SeriesError: it would leave one checkpoint only.
    """
    paths = [header.path for header in headers]
    words = [average_words(name) for name in telling_names(paths)]
    shared = set.intersection(*words)
    marked = {path: own for path, each in zip(paths, words, strict=True) if (own := each - shared)}
    if len(marked) == len(paths):
        return [*headers]
    asked = [path for path in marked if path in given]
    if asked:
        notes.append(f"By their names these are averages, and count because their paths are given: {_some(asked)}.")
    emas = [path for path, own in marked.items() if own == {"ema"}]
    left_out = [path for path in marked if path not in given and (path not in emas or len(emas) == 1)]
    if left_out and len(paths) - len(left_out) == 1:
        (other,) = (path for path in paths if path not in left_out)
        raise SeriesError(
            f"{_some(left_out)}: averages by their names, beside {other} alone. Give the paths of the checkpoints to "
            "average, or add `include_outputs` to take all of them."
        )
    notes.extend(
        f"{path.name} is an average by its name: left out (add it with `include_outputs`)." for path in left_out
    )
    return [header for header in headers if header.path not in left_out]


def _refuse_exports_among_others(headers: Sequence[Header]) -> None:
    """Refuse an export, which is made after training from any of the checkpoints, as one more of them."""
    exports = [header for header in headers if header.format.export]
    others = [header for header in headers if not header.format.export]
    if exports and others:
        raise SeriesError(
            f"{exports[0].path} is an export ({exports[0].format.name}), and {others[0].path} is none. An export "
            "has the weights of a checkpoint that is there already, or of an average. Leave it out, or give exports "
            "alone."
        )


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _ordered(headers: Sequence[Header], order: str, notes: list[str]) -> tuple[list[Member], str]:
    places = stored_positions(headers) or named_positions([header.path for header in headers])
    members = [
        Member(header.path, header, step, None if step is None else places.counter)
        for header, step in zip(headers, places.steps, strict=True)
    ]
    if order == "given":
        return members, "the arguments"
    if order == "mtime":
        for member in members:
            if store_of(member.path) is not LOCAL:
                raise SeriesError(f"{member.path}: is not a local file, so `order='mtime'` cannot place it.")
        return sorted(members, key=lambda m: (m.path.stat().st_mtime_ns, natural_key(m.path))), "modification time"
    by_name = sorted(members, key=lambda m: natural_key(m.path))
    if order == "natural":
        return by_name, "the names"
    key_of = {member.path: key for member, key in zip(members, places.keys, strict=True)}
    nameless = [member.path for member in by_name if not key_of[member.path]]
    if nameless and len(members) > 1:
        notes.append(
            f"No step found for {nameless[0]}; sorted by name. Wrong? List the files in order and add `order='given'`."
        )
        return by_name, "the names"
    notes.extend(places.remarks)
    ties: dict[tuple[float, ...], list[Path]] = {}
    for member in by_name:
        ties.setdefault(key_of[member.path], []).append(member.path)
    what = places.counter.replace("name", "number")
    tied = {key: paths for key, paths in ties.items() if len(paths) > 1}
    for key, (first, other, *more) in list(tied.items())[: 1 if len(tied) > 3 else None]:
        value = ", ".join(map(str, key))
        others = f" and {len(more)} more" if more else ""
        like = f", and so do files at {len(tied) - 1} others" if len(tied) > 3 else ""
        notes.append(f"{first}, {other}{others} have the same {what}, {value}{like}; they are ordered by name.")
    return sorted(by_name, key=lambda m: key_of[m.path]), places.by
