"""Series: from paths and globs to an ordered, selected, de-duplicated list of checkpoints."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SeriesError, UsageError
from .formats import SUFFIXES, read_header
from .formats.header import Header
from .formats.sharded import checkpoint_inside

ORDERS = ("auto", "given", "natural", "mtime")
# Finer counters first: a file that stores both a step and an epoch is placed by its step.
_STEP_KEYS = ("global_step", "step", "num_steps", "iteration", "iter", "num_updates", "batch_idx_train", "epoch")
_NESTED = ("meta", "trainer_state")  # mmengine keeps its counters one level down
_NOT_WEIGHTS = re.compile(r"optimizer|scheduler|scaler|rng_state|training_args")


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One checkpoint of a series.

    Attributes:
        path: as found.
        header: what it says about itself.
        step: where in training it stands, None if nothing tells.
        counter: what `step` counts: a key of the file (``global_step``, ``epoch``) or ``name``.
        metric: value used by `best`, if asked for.
    """

    path: Path
    header: Header
    step: int | None = None
    counter: str | None = None
    metric: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Checkpoints in order, oldest first, and what was decided on the way there.

    Attributes:
        members: what is to be averaged.
        ordered_by: in words.
        notes: decisions worth saying aloud: duplicates, own outputs left out, ties.
    """

    members: tuple[Member, ...]
    ordered_by: str
    notes: tuple[str, ...]


def find_series(
    paths: Iterable[str | Path],
    *,
    order: str = "auto",
    last: int | None = None,
    best: int | None = None,
    metric: str = "metric",
    lower_is_better: bool = False,
    every: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    include_outputs: bool = False,
) -> Series:
    """Find, read, order and select checkpoints; no payload is read.

    Selection goes in this order: from_step and to_step, best, every, last.

    Args:
        paths: files, globs, folders.
        order: ``auto`` (step or epoch stored in all files, else the numbers in the names),
            ``given``, ``natural`` (names), ``mtime``.
        last: keep the last so many.
        best: keep the best so many by `metric`; they stay in order.
        metric: key in the files, dotted if nested.
        lower_is_better: for a metric such as a loss.
        every: keep each so-manieth, counted back from the last.
        from_step, to_step: inclusive bounds of the step.
        include_outputs: average files that ckpt-tools wrote together with others.

    Raises:
        UsageError, SeriesError: an impossible selection; nothing found or left.
        ReadError: a file is no checkpoint.
    """
    for name, count in (("--last", last), ("--best", best), ("--every", every)):
        if count is not None and count < 1:
            raise UsageError(f"{name} {count}: must be 1 or more.")
    if order not in ORDERS:
        raise UsageError(f"--order is one of {', '.join(ORDERS)}, not {order!r}.")
    notes: list[str] = []
    found = expand(paths)
    headers = [read_header(path) for path in _without_duplicates(found, notes)]
    headers = _without_copies(headers, notes)
    if not include_outputs:
        headers = _without_outputs(headers, notes)
    members, ordered_by = _ordered(headers, order, notes)
    members = _between(members, from_step, to_step)
    if best is not None:
        members = _best(members, best, metric, lower_is_better, notes)
    if every is not None:
        members = members[::-1][::every][::-1]
    if last is not None:
        if last > len(members):
            notes.append(f"--last {last}: there are only {len(members)}; all are used.")
        members = members[-last:]
    return Series(tuple(members), ordered_by, tuple(notes))


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Turn files, globs and folders into checkpoints, each a file or a folder.

    Raises:
        SeriesError: a path that does not exist, a glob that matches nothing, a folder without checkpoints.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found += _in_folder(path)
        elif path.exists():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 - takes absolute patterns
            if not matches:
                raise SeriesError(f"no file matches '{given}'. Look at the folder: ls {_parent_of_glob(path)}")
            for match in matches:
                found += _in_folder(match) if match.is_dir() else [match]
        else:
            raise SeriesError(f"{given}: no such file or folder.{_did_you_mean(path)}")
    if not found:
        raise SeriesError("no checkpoint given.")
    return found


def _in_folder(folder: Path) -> list[Path]:
    if checkpoint_inside(folder) is not None:
        return [folder]
    found = [
        child
        for child in sorted(folder.iterdir())
        if (child.is_file() and child.name.endswith(SUFFIXES) and not child.name.startswith(".") and not _NOT_WEIGHTS.search(child.name))
        or (child.is_dir() and checkpoint_inside(child) is not None)
    ]
    if not found:
        raise SeriesError(f"{folder}: no checkpoints in this folder (looked for {' '.join('*' + s for s in SUFFIXES)}).")
    return found


def _parent_of_glob(path: Path) -> Path:
    parent = path.parent
    while glob.has_magic(str(parent)):
        parent = parent.parent
    return parent


def _did_you_mean(path: Path) -> str:
    try:
        names = [child.name for child in path.parent.iterdir()]
    except OSError:
        return f" The folder {path.parent} does not exist." if not path.parent.exists() else ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _without_duplicates(paths: Sequence[Path], notes: list[str]) -> list[Path]:
    """Count hard links, symlinks and repeated arguments once, under the name that has a number in it."""
    kept: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise SeriesError(f"{path}: {error.strerror}. A dangling link?") from error
        identity = (stat.st_dev, stat.st_ino)
        if identity not in kept:
            kept[identity] = path
        elif kept[identity] != path:
            keep, drop = sorted((kept[identity], path), key=lambda p: (not re.search(r"\d", p.name), natural_key(p)))
            kept[identity] = keep
            notes.append(f"{drop.name} is {keep.name} under another name (a link): counted once.")
    return list(kept.values())


def _without_copies(headers: Sequence[Header], notes: list[str]) -> list[Header]:
    """Count copies once where the header proves them equal: where links are not supported, timm copies."""
    kept: list[Header] = []
    seen: dict[object, int] = {}
    for header in headers:
        at = seen.get(header.fingerprint) if header.fingerprint is not None else None
        if at is None:
            seen[header.fingerprint] = len(kept)
            kept.append(header)
            continue
        keep, drop = sorted((kept[at], header), key=lambda h: (not re.search(r"\d", h.path.name), natural_key(h.path)))
        kept[at] = keep
        notes.append(f"{drop.path.name} is a copy of {keep.path.name} (all checksums agree): counted once.")
    return kept


def _without_outputs(headers: Sequence[Header], notes: list[str]) -> list[Header]:
    """Leave our own outputs out, unless there is nothing else."""
    others = [header for header in headers if header.provenance is None]
    if not others or len(others) == len(headers):
        return list(headers)
    notes.extend(
        f"{header.path.name} was written by ckpt-tools itself: left out (--include-outputs takes it in)."
        for header in headers
        if header.provenance is not None
    )
    return others


def natural_key(path: Path) -> tuple[object, ...]:
    """Sort key under which checkpoint-2 comes before checkpoint-10."""
    parts = re.split(r"(\d+)", str(path))
    return tuple((1, int(part), part) if i % 2 else (0, 0, part) for i, part in enumerate(parts))


def stored_counters(header: Header) -> dict[str, int]:
    """Return the training counters that a checkpoint stores, by name."""
    sources: list[Any] = [header.tree]
    if isinstance(header.tree, dict):
        sources += [header.tree.get(key) for key in _NESTED]
    if header.path.is_dir():
        sources.append(_trainer_state(header.path))
    counters: dict[str, int] = {}
    for source in sources:
        for key in _STEP_KEYS if isinstance(source, dict) else ():
            value = source.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
                counters.setdefault(key, int(value))
    return counters


def _trainer_state(folder: Path) -> Any:
    """Hugging Face's Trainer keeps the step beside the weights, in trainer_state.json."""
    try:
        return json.loads((folder / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return None


def number_in_name(path: Path) -> int | None:
    """Return the step that a name tells: the number behind 'step' or 'epoch', else the last whole number."""
    name = path.name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    for word in ("step", "iter", "epoch"):
        match = re.search(rf"{word}[a-z]*[-_=. ]*(\d+)", name, re.IGNORECASE)
        if match:
            return int(match[1])
    # A decimal is a metric (acc0.91), not a counter.
    numbers: list[str] = re.findall(r"(?<![\d.])\d+(?!\.?\d)", name)
    return int(numbers[-1]) if numbers else None


def _ordered(headers: Sequence[Header], order: str, notes: list[str]) -> tuple[list[Member], str]:
    counters = [stored_counters(header) for header in headers]
    shared = [key for key in _STEP_KEYS if all(key in c for c in counters)]
    # A counter that never moves (a default of 0, say) orders nothing.
    telling = [key for key in shared if len({c[key] for c in counters}) > 1] or shared[:1]
    if telling:
        key = telling[0]
        members = [Member(h.path, h, c[key], key) for h, c in zip(headers, counters, strict=True)]
    else:
        numbers = [number_in_name(header.path) for header in headers]
        members = [Member(h.path, h, n, None if n is None else "name") for h, n in zip(headers, numbers, strict=True)]
    if order == "given":
        return members, "the order of the arguments"
    if order == "mtime":
        return sorted(members, key=lambda m: (m.path.stat().st_mtime_ns, natural_key(m.path))), "modification time"
    if order == "natural":
        return sorted(members, key=lambda m: natural_key(m.path)), "the names"
    if telling:
        _note_ties(members, key, notes)
        return sorted(members, key=lambda m: (m.step, natural_key(m.path))), f"the {key} stored in the files"
    nameless = [member.path.name for member in members if member.step is None]
    if nameless and len(members) > 1:
        notes.append(f"{nameless[0]} tells neither a step nor a number: the order is that of the names. Set it with --order given.")
        return sorted(members, key=lambda m: natural_key(m.path)), "the names"
    _note_ties(members, "number", notes)
    return sorted(members, key=lambda m: (m.step, natural_key(m.path))), "the numbers in the names"


def _note_ties(members: Sequence[Member], what: str, notes: list[str]) -> None:
    seen: dict[int | None, Member] = {}
    for member in members:
        other = seen.setdefault(member.step, member)
        if other is not member:
            notes.append(f"{other.path.name} and {member.path.name} have the same {what}, {member.step}; their names decide.")


def _between(members: list[Member], from_step: int | None, to_step: int | None) -> list[Member]:
    if from_step is None and to_step is None:
        return members
    unknown = next((member for member in members if member.step is None), None)
    if unknown is not None:
        raise SeriesError(f"{unknown.path}: its step is unknown, so --from-step and --to-step cannot place it.")
    kept = [
        member
        for member in members
        if member.step is not None
        and (from_step is None or member.step >= from_step)
        and (to_step is None or member.step <= to_step)
    ]
    if not kept:
        steps = sorted(member.step for member in members if member.step is not None)
        raise SeriesError(f"no checkpoint between these steps; there are {steps[0]} to {steps[-1]}.")
    return kept


def _best(members: Sequence[Member], best: int, key: str, lower_is_better: bool, notes: list[str]) -> list[Member]:
    scored = [
        Member(m.path, m.header, m.step, m.counter, metric_of(m.header, key)) for m in members
    ]
    without = next((member for member in scored if member.metric is None), None)
    if without is not None:
        raise SeriesError(f"{without.path}: has no number under '{key}', so --best cannot rank it. Name another with --metric KEY.")
    if best > len(scored):
        notes.append(f"--best {best}: there are only {len(scored)}; all are used.")
    if not lower_is_better and re.search(r"loss|error|perplexity|ppl", key, re.IGNORECASE):
        notes.append(f"--best takes the highest '{key}'; if lower is better, say --lower-is-better.")
    sign = 1.0 if lower_is_better else -1.0
    value: Callable[[Member], float] = lambda m: sign * (m.metric or 0.0)  # noqa: E731
    chosen = {id(member) for member in sorted(scored, key=value)[:best]}
    return [member for member in scored if id(member) in chosen]


def metric_of(header: Header, key: str) -> float | None:
    """Return a number stored in a checkpoint under a key, dotted if nested; None if there is none."""
    node: Any = header.tree
    for part in [key] if isinstance(node, dict) and key in node else key.split("."):
        if not isinstance(node, dict):
            return None
        node = node.get(part)
    if isinstance(node, bool) or not isinstance(node, (int, float)) or node != node:
        return None
    return float(node)


