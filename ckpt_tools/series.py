"""Series: from checkpoints found to an ordered, selected, de-duplicated list of checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from .errors import SeriesError, UsageError
from .formats import SUFFIXES, read_header
from .formats.header import Header
from .formats.sharded import SINGLE
from .paths import find, keep_one, natural_key

ORDERS = ("auto", "given", "natural", "mtime")
# Finer counters first: a file that stores both a step and an epoch is placed by its step.
_STEP_KEYS = ("global_step", "step", "num_steps", "iteration", "iter", "num_updates", "batch_idx_train", "epoch")
_NESTED = ("meta", "trainer_state")  # mmengine keeps its counters one level down


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
        given: every checkpoint that was looked at, chosen or not, but for outputs of our own that were left out.
        ordered_by: in words.
        notes: decisions worth saying aloud: duplicates, own outputs left out, ties.
    """

    members: tuple[Member, ...]
    given: tuple[Path, ...]
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
    counts = {"--last": last, "--best": best, "--every": every}
    for name, value in (counts | {"--from-step": from_step, "--to-step": to_step}).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, SupportsIndex)):
            raise UsageError(f"{name} is a whole number, not {value!r}.")
        if value is not None and name in counts and value < 1:
            raise UsageError(f"{name} {value}: must be 1 or more.")
    if order not in ORDERS:
        raise UsageError(f"--order is one of {', '.join(ORDERS)}, not {order!r}.")
    if best is None and (lower_is_better or metric != "metric"):
        raise UsageError("--metric and --lower-is-better go with --best N.")
    notes: list[str] = []
    found = find(paths, notes)
    headers = [read_header(path) for path in found]
    ours = set() if include_outputs else _outputs(headers, notes)
    given = tuple(path for path in found if path not in ours)
    headers = _without_copies([header for header in headers if header.path not in ours], notes)
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
    return Series(tuple(members), given, ordered_by, tuple(notes))


def _without_copies(headers: Sequence[Header], notes: list[str]) -> list[Header]:
    """Count copies once where the header proves them equal: where links are not supported, timm copies."""
    groups: dict[object, dict[Path, Header]] = {}
    for header in headers:
        alone = object()
        groups.setdefault(header.fingerprint or alone, {})[header.path] = header
    return [group[keep_one(group, "again (all checksums agree)", notes)] for group in groups.values()]


def _outputs(headers: Sequence[Header], notes: list[str]) -> set[Path]:
    """Find outputs of our own to leave out; none if there is nothing else."""
    ours = {header.path for header in headers if header.provenance is not None}
    if len(ours) == len({header.path for header in headers}):
        return set()
    notes.extend(
        f"{path.name} was written by ckpt-tools itself: left out (--include-outputs takes it in)."
        for path in sorted(ours, key=natural_key)
    )
    return ours


def stored_counters(header: Header) -> dict[str, int]:
    """Return the training counters that a checkpoint stores, by name."""
    sources: list[Any] = [header.tree]
    if isinstance(header.tree, dict):
        sources += [header.tree.get(key) for key in _NESTED]
    if header.path.is_dir() or header.path.name in SINGLE:
        sources.append(_trainer_state(header.path if header.path.is_dir() else header.path.parent))
    counters: dict[str, int] = {}
    for source in sources:
        for key in _STEP_KEYS if isinstance(source, dict) else ():
            value = source.get(key)
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if whole and not isinstance(value, bool) and abs(value) < 1 << 63:
                counters.setdefault(key, int(value))
    return counters


def _trainer_state(folder: Path) -> Any:
    """Hugging Face's Trainer keeps the step beside the weights, in trainer_state.json."""
    try:
        return json.loads((folder / "trainer_state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
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
        if None in numbers and len(headers) > len({header.path.name for header in headers}) == 1:
            # checkpoint-500/model.safetensors, checkpoint-1000/model.safetensors: the folders tell.
            numbers = [number_in_name(header.path.parent) for header in headers]
        members = [Member(h.path, h, n, None if n is None else "name") for h, n in zip(headers, numbers, strict=True)]
    if order == "given":
        return members, "the arguments"
    if order == "mtime":
        return sorted(members, key=lambda m: (m.path.stat().st_mtime_ns, natural_key(m.path))), "modification time"
    if order == "natural":
        return sorted(members, key=lambda m: natural_key(m.path)), "the names"
    if telling:
        _note_ties(members, key, notes)
        return sorted(members, key=lambda m: (m.step, natural_key(m.path))), f"the {key} stored in the files"
    nameless = sorted((member.path for member in members if member.step is None), key=natural_key)
    if nameless and len(members) > 1:
        notes.append(
            f"{nameless[0]} tells no step, inside or in its name, so the names decide the order. "
            "Give the files in order, with --order given, if it should be another."
        )
        return sorted(members, key=lambda m: natural_key(m.path)), "the names"
    _note_ties(members, "number", notes)
    return sorted(members, key=lambda m: (m.step, natural_key(m.path))), "the numbers in the names"


def _note_ties(members: Sequence[Member], what: str, notes: list[str]) -> None:
    groups: dict[int | None, list[Path]] = {}
    for member in members:
        groups.setdefault(member.step, []).append(member.path)
    for step, paths in groups.items():
        if len(paths) > 1:
            first, second, *more = sorted(paths, key=natural_key)
            others = f" and {len(more)} more" if more else ""
            notes.append(f"{first}, {second}{others} have the same {what}, {step}; their names decide.")


def _between(members: list[Member], from_step: int | None, to_step: int | None) -> list[Member]:
    asked = [f"{o} {n}" for o, n in (("--from-step", from_step), ("--to-step", to_step)) if n is not None]
    if not asked:
        return members
    placed = [(member.step, member) for member in members if member.step is not None]
    if len(placed) < len(members):
        unknown = next(member for member in members if member.step is None)
        raise SeriesError(f"{unknown.path}: its step is unknown, so {' and '.join(asked)} cannot place it.")
    low, high = (-math.inf if from_step is None else from_step), (math.inf if to_step is None else to_step)
    kept = [member for step, member in placed if low <= step <= high]
    if not kept:
        steps = sorted(step for step, _ in placed)
        what = "number" if members[0].counter == "name" else members[0].counter
        raise SeriesError(f"{' '.join(asked)}: no checkpoint there; they go from {what} {steps[0]} to {steps[-1]}.")
    return kept


def _best(members: Sequence[Member], best: int, key: str, lower_is_better: bool, notes: list[str]) -> list[Member]:
    scored = [Member(m.path, m.header, m.step, m.counter, metric_of(m.header, key)) for m in members]
    without = next((member for member in scored if member.metric is None), None)
    if without is not None:
        tree = without.header.tree
        keys = [k for k in tree if isinstance(k, str)] if isinstance(tree, dict) else []
        known = [k for k in keys if metric_of(without.header, k) is not None]
        advice = f"Name another with --metric; it has {', '.join(known[:8])}." if known else "It has none at all."
        raise SeriesError(f"{without.path}: has no number under '{key}', so --best cannot rank it. {advice}")
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
    if isinstance(node, bool) or not isinstance(node, (int, float)):
        return None
    try:
        return None if math.isnan(node) else float(node)
    except OverflowError:  # an integer beyond all floats
        return None
