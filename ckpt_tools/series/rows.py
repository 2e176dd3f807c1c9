"""Recipes: from tensors that line up and coefficients to what is summed for each name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import LayoutError, UsageError
from ..formats import without_collector
from ..formats.file_plan import Files, OutTensor, SharedTerms, Terms
from ..tensors import Category, DType, TensorSpec

# Float buffers are told from parameters by name alone; these are BatchNorm's, the ones that an average harms.
_RUNNING = ("running_mean", "running_var")
_T = TypeVar("_T")


@without_collector()
def recipes(
    rows: Mapping[str, tuple[TensorSpec | None, ...]],
    coefficients: Sequence[float],
    *,
    dtype: DType | None,
    keep_running: bool,
    shared: Mapping[Path, Files] | None = None,
) -> dict[str, OutTensor]:
    """Say what becomes of each name.

    Args:
        rows: name to one tensor a checkpoint, None where it lacks it; with `shared`, to that of the last alone.
        coefficients: one a checkpoint.
        dtype: of what is averaged and floating-point; as in the inputs if None.
        keep_running: take BatchNorm's running statistics from the last checkpoint.
        shared: for checkpoints with identical headers, each file of the last to the files in its place in all of them.

    Returns:
        One OutTensor under all names that are tied in every checkpoint.

    Raises:
        LayoutError: packed codes.
        UsageError: the checkpoints that have a tensor weigh nothing together.
    """
    tensors: dict[str, OutTensor] = {}
    # Names that are the same bytes in every file are tied, and stay so; those of one file tell most of them apart.
    tied: dict[tuple[TensorSpec | None, ...], OutTensor] = {}
    begins = [-1 if (spec := row[-1]) is None else spec.begin for row in rows.values()]
    times = Counter(begins)
    counted = {
        path: tuple(file for file, _ in _weighing([*zip(files, coefficients, strict=True)]))
        for path, files in (shared or {}).items()
    }
    coefficients, weigh = tuple(coefficients), all(coefficients)
    weights = tuple(weight for _, weight in _weighing([(None, weight) for weight in coefficients]))
    for begin, (name, row) in zip(begins, rows.items(), strict=True):
        alone = times[begin] == 1
        tensor = None if alone else tied.get(row)
        if tensor is None:
            last = next(spec for spec in reversed(row) if spec is not None)
            if last.dtype.category is Category.PACKED:
                raise LayoutError(
                    f"{last.storage.path}: '{name}' is {last.dtype.name}, whose codes mean nothing apart from their "
                    "scales. Average the checkpoints before they are quantized."
                )
            from_last = keep_running and name.rsplit(".", 1)[-1] in _RUNNING
            if from_last or not last.dtype.averaged:
                terms: tuple[tuple[TensorSpec, float], ...] | SharedTerms | Terms = ((last, 1.0),)
            else:
                files = counted.get(last.storage.path)
                terms = SharedTerms(last, files, weights) if files else _scaled(name, row, coefficients, weigh=weigh)
            out_dtype = dtype if dtype is not None and last.dtype.category is Category.FLOAT else last.dtype
            tensor = OutTensor(out_dtype, last.shape, terms, name)
            if tensor.numel and not alone:
                tied[row] = tensor
        tensors[name] = tensor
    return tensors


def _scaled(
    name: str, row: Sequence[TensorSpec | None], coefficients: tuple[float, ...], *, weigh: bool
) -> tuple[tuple[TensorSpec, float], ...] | Terms:
    """Give a tensor that some checkpoints lack the total weight of the others."""
    if weigh and None not in row:
        return Terms(tuple(row), coefficients)  # type: ignore[arg-type]
    present = [(spec, c) for spec, c in zip(row, coefficients, strict=True) if spec is not None]
    weighing = tuple(present) if all(coefficients) else _weighing(present)
    if len(present) == len(coefficients):
        return weighing
    have, want = math.fsum(c for _, c in present), math.fsum(coefficients)
    # A sum that is 0 but for rounding would blow the rounding up.
    if abs(have) <= 1e-12 * math.fsum(abs(c) for _, c in present):
        raise UsageError(f"the checkpoints that have '{name}' weigh 0 together. Use `keys='intersection'`.")
    return tuple((spec, c * (want / have)) for spec, c in weighing)


def _weighing(terms: Sequence[tuple[_T, float]]) -> tuple[tuple[_T, float], ...]:
    """Leave out what weighs nothing, but for the last where nothing else is left."""
    return tuple(term for term in terms if term[1] != 0) or ((terms[-1][0], 0.0),)  # -0.0 would be another average
