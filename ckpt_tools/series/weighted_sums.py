"""Weighted sums: from aligned tensors and coefficients to the weighted sum of each name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from ..errors import LayoutError, UsageError
from ..formats import without_collector
from ..formats.file_plan import Files, OutTensor, Terms
from ..tensors import Category, DType, SummedSpec, TensorSpec
from .align import is_copied

# Only names tell float buffers from parameters; averaging harms these, which are BatchNorm's.
_RUNNING = ("running_mean", "running_var")
_T = TypeVar("_T")


@without_collector()
def weighted_sums(
    aligned: Mapping[str, tuple[TensorSpec | None, ...]],
    coefficients: Sequence[float],
    *,
    dtype: DType | None,
    keep_running: bool,
    shared: Mapping[Path, Files] | None = None,
    by_name: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> dict[str, OutTensor]:
    """Return the output tensor of each name.

    Args:
        aligned: name to one tensor per checkpoint, None if missing; with `shared`, to the tensor of the last only.
        coefficients: one per checkpoint.
        dtype: of floating-point outputs; as in the inputs if None.
        keep_running: copy BatchNorm's running statistics from the last checkpoint.
        shared: for checkpoints with identical headers: file of the last to the corresponding files of all.
        by_name: coefficients of tensors that have their own; without `shared`.

    Returns:
        Name to OutTensor; names that are tied in every checkpoint have the same one.

    Raises:
        LayoutError: a packed dtype.
        UsageError: the weights of the checkpoints that have a tensor sum to 0.
    """
    tensors: dict[str, OutTensor] = {}
    # Names with the same bytes in every file stay tied; offsets in the last file rule most names out.
    tied: dict[tuple[TensorSpec | None, ...], OutTensor] = {}
    begins = [-1 if (spec := inputs[-1]) is None else spec.begin for inputs in aligned.values()]
    times = Counter(begins)
    counted = {
        path: tuple(file for file, _ in _weighing([*zip(files, coefficients, strict=True)]))
        for path, files in (shared or {}).items()
    }
    coefficients, weigh = tuple(coefficients), all(coefficients)
    weights = tuple(weight for _, weight in _weighing([(None, weight) for weight in coefficients]))
    for begin, (name, inputs) in zip(begins, aligned.items(), strict=True):
        alone = times[begin] == 1
        tensor = None if alone else tied.get(inputs)
        if tensor is None:
            last = next(spec for spec in reversed(inputs) if spec is not None)
            if last.dtype.category is Category.PACKED:
                raise LayoutError(
                    f"{last.storage.path}: '{name}' is {last.dtype.name}, whose codes mean nothing apart from their "
                    "scales. Average the checkpoints before they are quantized."
                )
            from_last = keep_running and is_running(name)
            narrowed = dtype is not None and last.dtype.category is Category.FLOAT
            if from_last or is_copied(name, last):
                terms, narrowed = Terms.copy(last), narrowed and from_last
            elif type(last) is not TensorSpec and shared:
                terms = Terms.of(_weighing(_in_each(last, coefficients, shared)))
            elif name in by_name:
                terms = _scaled(name, inputs, by_name[name], weigh=False)
            else:
                files = counted.get(last.storage.path)
                terms = Terms((last,), (weights,), files) if files else _scaled(name, inputs, coefficients, weigh=weigh)
            tensor = OutTensor(dtype if dtype and narrowed else last.written, last.shape, terms, name)
            if tensor.numel and not alone:
                tied[inputs] = tensor
        tensors[name] = tensor
    return tensors


def is_running(name: str) -> bool:
    """Return True for BatchNorm's running statistics."""
    return name.rsplit(".", 1)[-1] in _RUNNING


def _scaled(name: str, inputs: Sequence[TensorSpec | None], coefficients: tuple[float, ...], *, weigh: bool) -> Terms:
    """Return the terms of a tensor; if some checkpoints lack it, scale the others to the total weight."""
    if weigh and None not in inputs and SummedSpec not in map(type, inputs):
        return Terms(tuple(inputs), (coefficients,))  # type: ignore[arg-type]
    present = [(spec, c) for spec, c in zip(inputs, coefficients, strict=True) if spec is not None]
    weighing = tuple(present) if all(coefficients) else _weighing(present)
    if len(present) == len(coefficients):
        return Terms.of(weighing)
    have, want = math.fsum(c for _, c in present), math.fsum(coefficients)
    # Dividing by a sum that is 0 up to rounding would amplify the rounding.
    if abs(have) <= 1e-12 * math.fsum(abs(c) for _, c in present):
        raise UsageError(f"the checkpoints that have '{name}' weigh 0 together. Use `keys='intersection'`.")
    return Terms.of((spec, c * (want / have)) for spec, c in weighing)


def _in_each(
    last: TensorSpec, coefficients: Sequence[float], shared: Mapping[Path, Files]
) -> list[tuple[TensorSpec, float]]:
    """Find what is made of several tensors of the last checkpoint in each of those with its header."""
    return [(last.placed(lambda path, i=i: shared[path][i]), c) for i, c in enumerate(coefficients)]  # type: ignore[misc]


def _weighing(terms: Sequence[tuple[_T, float]]) -> tuple[tuple[_T, float], ...]:
    """Drop terms of weight 0; keep the last if all are 0."""
    return tuple(term for term in terms if term[1] != 0) or ((terms[-1][0], 0.0),)  # -0.0 would change the result
