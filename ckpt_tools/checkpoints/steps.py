"""Training steps of checkpoints, by the training counters that they store or the numbers in their names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import LayoutError
from ..formats import FORMATS
from ..formats.header import Header
from ..formats.json_file import parse_json, read_small
from ..formats.tree import follow
from ..storage.source import store_of
from ..tensors import TensorSpec
from .scalars import as_number

# Finer counters first: a file that stores both a step and an epoch is ordered by its step.
_STEP_KEYS = (
    "global_step", "global_steps", "step", "num_steps", "iteration", "iter", "iter_num", "num_updates",
    "batch_idx_train", "epoch",
)  # fmt: skip
# Where mmengine, Lightning, torchtitan, ESPnet and fairseq keep their training counters.
_NESTED = (("meta",), ("trainer_state",), ("train_state",), ("reporter",), ("extra_state", "train_iterator"))
_HISTORY = ("optimizer_history",)  # of fairseq; the last entry is of now
# Coarse to fine. A decimal is a metric (acc0.91), not a counter, unless it counts thousands or millions.
_WORDS = ("epoch", "iter", "step")
_NUMBER = re.compile(
    r"(?:(?i:(epoch|iter|step)[a-z]*)[-_=. ]*)?(?<!\d)(?<!\d\.)(?:(\d+(?:\.\d+)?)([kKM])(?![A-Za-z])|(\d+)(?!\.?\d))"
)


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions of checkpoints in a training run.

    Attributes:
        keys: to sort by; empty where nothing tells.
        steps: as in Member.
        counter: as in Member.
        by: what tells the position, in words.
        remarks: notes, if the series is ordered by it.
    """

    keys: Sequence[tuple[float, ...]]
    steps: Sequence[int | None]
    counter: str
    by: str
    remarks: Sequence[str] = ()


def stored_counters(header: Header) -> dict[str, int]:
    """Return the training counters that a checkpoint stores as whole numbers, or tensors of one, by name."""
    return {key: value for key, value in _stored_numbers(header).items() if isinstance(value, int)}


def _stored_numbers(header: Header) -> dict[str, int | float]:
    """Counters, fractions too: Hugging Face counts parts of epochs."""
    if header.ranks:
        return _shared_numbers(header)
    counters: dict[str, int | float] = {}
    metadata = {key: _parsed(text) for key, text in header.metadata.items() if key in _STEP_KEYS}
    for source in (*_mappings(header), trainer_state(header), metadata):
        for key in _STEP_KEYS:
            value = as_number(header, source.get(key))
            if isinstance(value, float) and isinstance(source.get(key), TensorSpec):
                value = _unrounded(value, source[key].dtype.name, header.path.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1 << 63:
                continue
            counters.setdefault(key, int(value) if value == int(value) else value)
    return counters


_ROUNDED = {"float16": (2048, 2.0**-11), "bfloat16": (256, 2.0**-8)}
"""Dtype to the largest number up to which it has all whole numbers, and its rounding error beyond."""
_LARGEST_HALF = 65520  # from here on, float16 has infinity


def _unrounded(value: float, dtype: str, name: str) -> float | None:
    """Return the number in a name that a step was before it was stored in 16 bits, as by ema-pytorch's PostHocEMA.

    Returns:
        The step as stored if nothing was lost; None if no number in the name, or several, can have been it.
    """
    exact, error = _ROUNDED.get(dtype, (math.inf, 0.0))
    if value < exact:
        return value
    whole = {int(digits) for digits in re.findall(r"\d{1,18}", name)}
    low, high = (_LARGEST_HALF, math.inf) if value == math.inf else (value * (1 - error), value * (1 + error))
    fitting = [number for number in whole if low <= number <= high]
    return fitting[0] if len(fitting) == 1 else None


def _shared_numbers(header: Header) -> dict[str, int | float]:
    """Return the counters in the files of all ranks.

    Raises:
        LayoutError: two ranks are of different steps.
    """
    counters: dict[str, int | float] = {}
    first: dict[str, str] = {}
    for name, tree in header.content.items():
        rank = header.ranks.get(name) or replace(header, content=tree, ranks={})
        for key, value in _stored_numbers(rank).items():
            if counters.setdefault(key, value) != value:
                raise LayoutError(
                    f"{header.path}: its files are not of one step: {first[key]} has the {key} {counters[key]}, and "
                    f"{name} has {value}. Get a complete copy of one step."
                )
            first.setdefault(key, name)
    return counters


def _mappings(header: Header) -> list[dict[Any, Any]]:
    """Return the dicts of the saved object that may hold training counters."""
    history = follow(header.content, _HISTORY)
    found = [header.content, *(follow(header.content, path) for path in _NESTED)]
    found += history[-1:] if isinstance(history, list) else []
    return [mapping for mapping in found if isinstance(mapping, dict)]


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def trainer_state(header: Header) -> dict[str, Any]:
    """Return the state file of Hugging Face's Trainer, with its step; empty if there is none.

    Raises:
        ReadError: it is there and cannot be read.
    """
    if not (header.in_folder or any(header.path.name in each.singles for each in FORMATS)):
        return {}
    folder = header.path if header.in_folder else header.path.parent
    path = folder / "trainer_state.json"
    if not store_of(path).is_file(path):
        return {}
    try:
        state = parse_json(read_small(path)[0])
    except (ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _numbers_in(name: str) -> list[tuple[str, int]]:
    """Return the whole numbers of a name in sequence, each with the word before it, if that is one of `_WORDS`."""
    return [
        (word.lower(), int(whole) if whole else round(float(number) * (1e6 if unit == "M" else 1e3)))
        for word, number, unit, whole in _NUMBER.findall(name)
    ]


def number_in_name(path: Path) -> int | None:
    """Return the step that a name alone tells: the number behind 'step' or 'epoch', else the last whole number."""
    numbers = _numbers_in(path.name)
    named = [number for word in reversed(_WORDS) for found, number in numbers if found == word]
    return (named or [numbers[-1][1]])[0] if numbers else None


def stored_positions(headers: Sequence[Header]) -> Positions | None:
    """Order checkpoints by a training counter that all of them store."""
    counters = [_stored_numbers(header) for header in headers]
    shared = [key for key in _STEP_KEYS if all(key in c for c in counters)]
    # A counter that never moves (a default of 0, say) orders nothing.
    key = next((key for key in shared if len({c[key] for c in counters}) > 1), shared[0] if shared else None)
    if key is None:
        return None
    values = [c[key] for c in counters]
    steps = [value if isinstance(value, int) else None for value in values]
    return Positions([(value,) for value in values], steps, key, f"the {key} stored in the files")


def telling_names(paths: Sequence[Path]) -> Sequence[str]:
    """Return the names, or where all are the same (epoch_1/weights.pt), those of the nearest folders that differ."""
    levels = zip(*(reversed(path.absolute().parts) for path in paths), strict=False)
    return next((level for level in levels if len(set(level)) > 1), [path.name for path in paths])


def named_positions(paths: Sequence[Path]) -> Positions:
    """Order checkpoints by the numbers in their names.

    Where the numbers of all names line up, those that vary decide: the ones behind a word, the coarser first
    (iterations may start anew in each epoch), or else all of them from left to right.
    """
    names = telling_names(paths)
    rows = [_numbers_in(name) for name in names]
    # One name for each sequence of words before the numbers.
    forms = {tuple(word for word, _ in row): name for row, name in sorted(zip(rows, names, strict=True), reverse=True)}
    columns = list(zip(*rows, strict=True)) if len(forms) == 1 else []
    by_word = [(column[0][0], [number for _, number in column]) for column in columns]
    varying = [(word, numbers) for word, numbers in by_word if len(set(numbers)) > 1]
    named = [next(c for c in varying if c[0] == word) for word in _WORDS if any(word == found for found, _ in varying)]
    deciding = [numbers for _, numbers in named or varying]
    by = "the numbers in the names"
    if not deciding:
        steps = [number_in_name(Path(name)) for name in names]
        remarks = [
            f"The numbers of {first} and {other} do not line up, so those behind a word, or else the last ones, "
            "decide. Give the files in order, with `order='given'`, if it should be another."
            for first, other in pairwise(list(forms.values())[:2])
        ]
        return Positions([() if step is None else (step,) for step in steps], steps, "name", by, remarks)
    keys = list(zip(*deciding, strict=True))
    if len(deciding) > 1 and not named:
        return Positions(keys, [None] * len(keys), "name", f"{by}, from left to right")
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    agreeing = [numbers for numbers in deciding if all(numbers[a] <= numbers[b] for a, b in pairwise(order))]
    remarks = [
        f"The {word} in the names does not grow with the {named[0][0]}, which decides the order."
        for word, numbers in named
        if numbers not in agreeing
    ]
    return Positions(keys, agreeing[-1], "name", by, remarks)
