"""Metrics: how good a checkpoint is, from the places where programs put it, and which direction is better."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..checkpoints.scalars import as_number
from ..checkpoints.script_arguments import script_arguments
from ..checkpoints.steps import stored_counters, trainer_state
from ..errors import SeriesError, UsageError
from ..formats.header import Header
from ..formats.tree import follow
from ..storage.source import read_file, store_of
from ..tensors import TensorSpec
from .member import Member

METRIC = "metric"
"""The key under which timm stores what its checkpoints are ranked by."""

_NUMBER = r"([-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)"
_LOWER = re.compile(
    r"(?<![a-z])(loss|losses|err|error|errors|perplexity|ppl|wer|cer|ter|eer|fid|kid|fvd|fad|nll|mse|mae|rmse|mape|lpips|bpb|"
    r"bpc|brier|ece|distance|divergence|kl)(?![a-z])"
)
_LOWER_PART = re.compile(r"loss|error|perplexity|(?<![a-z])per$|bits_per_")  # acc_per_class is no phoneme error rate
_YAML_LINE = re.compile(rf"^[ \t]*['\"]?([^\s'\":#]+)['\"]?[ \t]*:[ \t]*{_NUMBER}[ \t]*(?:#.*)?$", re.MULTILINE)
_MODE = re.compile(r"'mode': '(min|max)'")
_FEW = 32
_LARGEST = 64 << 20  # bytes of a table of metrics


@dataclass(frozen=True, slots=True)
class Measured:
    """A number that tells how good a checkpoint is.

    Attributes:
        value: the number.
        where: it was found, in words.
        lower_is_better: as the program says that stored it; None if it does not.
    """

    value: float
    where: str
    lower_is_better: bool | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """The checkpoints of a series with their metric, best first.

    Attributes:
        members: best first; the earlier one at a tie.
        measured: of each of them.
        lower_is_better: the direction.
        why: where the direction comes from, in words.
    """

    members: Sequence[Member]
    measured: Mapping[Member, Measured]
    lower_is_better: bool
    why: str


def rank(members: Sequence[Member], key: str, *, lower_is_better: bool | None, table: Path | None) -> Ranking:
    """Sort checkpoints by a metric.

    Args:
        key: name of the metric; dotted where it is nested.
        lower_is_better: the direction; if None, as the program says that stored it, or as the name of the metric does.
        table: a file of metrics, CSV or JSON lines, with a step or a file name in each row.

    Raises:
        SeriesError: a checkpoint has no such number.
        UsageError: the table cannot be read.
    """
    rows = None if table is None else _table(table)
    measured = {member: _measure(member, key, rows, table, members) for member in members}
    said = {each.lower_is_better for each in measured.values()} - {None}
    if lower_is_better is not None:
        lower, why = lower_is_better, "as you say"
    elif len(said) == 1:
        (lower,), why = said, "as the checkpoints say"  # type: ignore[assignment]
    else:
        lower, why = lower_by_name(_full_name(members, key)), "by its name"
    order = sorted(members, key=lambda member: measured[member].value, reverse=not lower)
    return Ranking(order, measured, lower, why)


def lower_by_name(key: str) -> bool:
    """Return True if the name of a metric says that lower is better, as for a loss or an error rate."""
    name = key.rpartition(".")[2].lower()
    return _LOWER.search(name) is not None or _LOWER_PART.search(name) is not None


def _full_name(members: Sequence[Member], key: str) -> str:
    """Return what timm's `metric` stands for."""
    names = {_name_of_metric(member.header) for member in members} if key == METRIC else set()
    (name,) = names if len(names) == 1 else (None,)
    return name if isinstance(name, str) else key


def _name_of_metric(header: Header) -> Any:
    """Return the name of the number under `metric`: an argument of timm's script, or a text of its own."""
    name = _dict(header.content).get("metric_name")
    return script_arguments(header).get("eval_metric") if name is None else name


def _measure(
    member: Member, key: str, rows: Sequence[Mapping[str, Any]] | None, table: Path | None, members: Sequence[Member]
) -> Measured:
    if rows is not None:
        found = _in_rows(rows, member, key)
        if found is None:
            columns = ", ".join(dict.fromkeys(str(name) for row in rows for name in row))
            raise SeriesError(
                f"{table}: has no number under '{key}' for {member.path}, by its name or its step"
                f"{'' if member.step is None else f' ({member.step})'}. It has the columns {columns}."
            )
        return Measured(found, f"{table}")
    stored = _stored_under(member.header, key)
    value = _finite(stored)
    if value is not None:
        return Measured(value, "the files")
    for search, where in _PLACES.items():
        other = search(member, key)
        if other is not None:
            return Measured(other[0], where, other[1])
    for other_member in members:  # of Lightning, the last file knows the scores of the others
        scored = _best_k(other_member.header, member.path, key)
        if scored is not None:
            return Measured(scored[0], f"the ModelCheckpoint state of {other_member.path.name}", scored[1])
    raise SeriesError(_unmeasured(member.header, key, stored))


def metric_at_hand(member: Member, key: str = METRIC) -> float | None:
    """Return the metric of one checkpoint, from the file or a place beside it; None if there is none."""
    value = metric_of(member.header, key)
    if value is None:
        others = (search(member, key) for search in _PLACES)
        value = next((other[0] for other in others if other is not None), None)
    return value


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return None if math.isnan(value) else float(value)
    except OverflowError:  # an integer too large for a float
        return None


def metric_of(header: Header, key: str) -> float | None:
    """Return a number stored in a checkpoint under a key, dotted if nested; None if there is none."""
    return _finite(_stored_under(header, key))


def _stored_under(header: Header, key: str) -> Any:
    """Return the value of a checkpoint at a key, dotted if nested, or the number in a tensor; None if there is none."""
    top = _entries(header)
    keys = (key,) if key in top else (*key.split("."),)
    node = follow(top, keys)
    if node is None and key == METRIC:  # a dict of metrics, and the name of the one that ranks
        node = follow(top, ("metrics", top.get("metric_name")))
    if node is None:
        node = follow(top, ("metrics", *((key,) if key in _dict(top.get("metrics")) else keys)))
    if node is None and key == _name_of_metric(header):
        node = top.get(METRIC)
    return as_number(header, node)


def _entries(header: Header) -> dict[Any, Any]:
    """Return the top-level entries of a checkpoint, and the values that Hugging Face's Trainer logged at its step."""
    state = trainer_state(header)
    log = state.get("log_history")
    entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    logged = {key: e[key] for e in entries if e.get("step") == state.get("global_step") for key in e}
    return logged | _dict(header.content)


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


Found = tuple[float, bool | None]


def _in_callback(member: Member, key: str) -> Found | None:
    """Look at what Lightning's ModelCheckpoint monitors, and its score at that time."""
    for name, state in _model_checkpoints(member.header, key):
        value = _finite(as_number(member.header, state.get("current_score")))
        if value is not None:
            return value, _direction(name)
    return None


def _model_checkpoints(header: Header, key: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    callbacks = _dict(_dict(header.content).get("callbacks"))
    for name, state in callbacks.items():
        monitor = state.get("monitor") if isinstance(state, dict) else None
        if monitor is not None and key in (METRIC, monitor) and str(name).startswith("ModelCheckpoint"):
            yield name, state


def _direction(name: str) -> bool | None:
    mode = _MODE.search(name)
    return None if mode is None else mode[1] == "min"


def _best_k(header: Header, path: Path, key: str) -> Found | None:
    for name, state in _model_checkpoints(header, key):
        for other, score in _dict(state.get("best_k_models")).items():
            value = _finite(as_number(header, score))
            if isinstance(other, str) and Path(other).name == path.name and value is not None:
                return value, _direction(name)
    return None


def _in_name(member: Member, key: str) -> Found | None:
    """Look for ``val_loss=0.12``, ``acc_81.2`` or ``acc0.9``, in the name of the file, then of its folder.

    The key ``loss`` takes ``val_loss`` for it, but neither of ``train_loss`` and ``val_loss``.
    """
    pattern = re.compile(rf"(?<![A-Za-z]){re.escape(key)}[-_= ]?{_NUMBER}(?![0-9.]*[0-9])", re.IGNORECASE)
    for name in (member.path.stem if member.path.suffix else member.path.name, member.path.parent.name):
        found = [*pattern.finditer(name)]
        if len(found) > 1:
            found = [each for each in found if not re.search(r"[A-Za-z][-_]$", name[: each.start()])]
        # A number with a minus is one behind an equal sign alone: in acc-81.2, it is a dash.
        if len(found) == 1:
            text = found[0][1]
            return (float(text if found[0][0][len(key)] == "=" else text.lstrip("-")), None)
    return None


def _beside(member: Member) -> Path:
    return member.path if member.header.in_folder else member.path.parent


def _in_summary(member: Member, key: str) -> Found | None:
    """Look into the summary.csv that timm's script writes beside its checkpoints, a row an epoch."""
    epoch = stored_counters(member.header).get("epoch")
    path = _beside(member) / "summary.csv"
    if epoch is None or not store_of(path).is_file(path):
        return None
    for row in _csv_rows(path):
        if _finite(_number(row.get("epoch"))) == epoch:
            value = next((row[name] for name in (key, f"eval_{key}", f"train_{key}") if row.get(name)), None)
            number = _finite(_number(value))
            return None if number is None else (number, None)
    return None


def _in_yaml(member: Member, key: str) -> Found | None:
    """Look into a YAML file of the same name (wenet), or in the folder of the checkpoint (SpeechBrain)."""
    folder = _beside(member)
    for path in (member.path.with_suffix(".yaml"), member.path.with_suffix(".yml"), folder / "CKPT.yaml"):
        if store_of(path).is_file(path) and path != member.path:
            numbers = {name: text for name, text in _YAML_LINE.findall(_text(path))}
            value = _finite(_number(numbers.get(key, numbers.get(key.rpartition(".")[2]))))
            if value is not None:
                return value, None
    return None


_PLACES: dict[Callable[[Member, str], Found | None], str] = {
    _in_callback: "the ModelCheckpoint states in the files",
    _in_name: "the names",
    _in_summary: "summary.csv",
    _in_yaml: "the YAML files beside them",
}
"""Where a metric is looked for that is not in the file itself, in order, and what the place is called."""


def _unmeasured(header: Header, key: str, stored: Any) -> str:
    """Return the message for a checkpoint without a usable metric."""
    known = [*islice((name for name in _named(_entries(header)) if metric_of(header, name) is not None), 8)]
    what = f"has no number under '{key}'"
    looked = (
        "neither inside nor in its name, trainer_state.json, the state of a ModelCheckpoint, summary.csv or a YAML "
        "file beside it"
    )
    advice = f"It has {', '.join(known)}." if known else "It stores no numbers."
    if isinstance(stored, TensorSpec):
        what, looked, advice = f"its '{key}' is a tensor, and not of one number", "", "Store metric.item() instead."
    elif isinstance(stored, float):
        what, looked, advice = f"its '{key}' is NaN", "", "Leave this file out."
    elif stored is not None:
        what, looked = f"its '{key}' is no number that can be ranked", ""
    found = f"{what}, {looked}" if looked else what
    return (
        f"{header.path}: {found}, so `best` cannot rank it. {advice} Name another with `metric`, or give a table with "
        "`metrics`."
    )


def _named(top: Mapping[Any, Any]) -> Iterator[str]:
    """Yield the names of entries, and of those one level below, where few stand together, as metrics do."""
    for name, value in top.items():
        if isinstance(name, str):
            yield name
            if isinstance(value, dict) and len(value) <= _FEW:
                yield from (f"{name}.{inner}" for inner in value if isinstance(inner, str))


def _table(path: Path) -> list[dict[str, Any]]:
    """Read a table of metrics: CSV with a line of names, or JSON lines.

    Raises:
        UsageError: it is neither, or it has no row.
    """
    text = _text(path)
    if path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            raise UsageError(f"`metrics`: {path} is not a file of JSON lines, one object each ({error}).") from error
        if not all(isinstance(row, dict) for row in rows):
            raise UsageError(f"`metrics`: {path} has a line that is not a JSON object.")
    else:
        rows = list(_csv_rows(path))
    if not rows:
        raise UsageError(f"`metrics`: {path} has no row. Write a line of names, then one line a checkpoint.")
    return rows


def _csv_rows(path: Path) -> Iterable[dict[str, Any]]:
    for row in csv.DictReader(io.StringIO(_text(path))):
        yield {str(name).strip(): (value or "").strip() for name, value in row.items() if isinstance(value, str)}


def _text(path: Path) -> str:
    if store_of(path).is_file(path) and path.stat().st_size > _LARGEST:
        raise UsageError(f"{path}: too large for a table of metrics ({path.stat().st_size} bytes).")
    return read_file(path)[0].decode("utf-8-sig", errors="replace")


_STEPS = ("step", "global_step", "iteration", "iter", "epoch", "steps")
_NAMES = ("file", "name", "path", "checkpoint", "ckpt", "filename", "model")


def _in_rows(rows: Sequence[Mapping[str, Any]], member: Member, key: str) -> float | None:
    """Return the metric in the last row of a table that is about a checkpoint, by its name or its step."""
    names = {str(member.path), member.path.name, member.path.stem, str(member.path.absolute())}
    value = None
    for row in rows:
        named = next((row[name] for name in _NAMES if row.get(name)), None)
        if named is not None:
            about = str(named) in names or Path(str(named)).name in names
        else:
            at = next((_finite(_number(row[name])) for name in _STEPS if row.get(name) not in (None, "")), None)
            about = at is not None and member.step is not None and at == member.step
        if about:
            found = row.get(key) if key in row or key != METRIC else row.get("value")
            number = _finite(_number(found))
            value = value if number is None else number
    return value


def _number(value: Any) -> Any:
    """Read a number that may be text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value
