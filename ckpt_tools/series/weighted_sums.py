"""Weighted sums: from aligned tensors and coefficients to the weighted sum of each name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ..errors import LayoutError, UsageError
from ..formats import without_collector
from ..formats.file_plan import Files, OutTensor, Terms, used
from ..tensors import Category, DType, SummedSpec, TensorSpec
from .align import is_copied

# Only names tell float buffers from parameters; averaging harms these, which are BatchNorm's.
_RUNNING = ("running_mean", "running_var")


@without_collector()
def weighted_sums(
    aligned: Mapping[str, tuple[TensorSpec | None, ...]],
    *rows: Sequence[float],
    dtype: DType | None,
    keep_running: bool,
    shared: Mapping[Path, Files] | None = None,
    by_name: Mapping[str, Sequence[Sequence[float]]] = MappingProxyType({}),
    lasts: Sequence[int] = (),
) -> dict[str, OutTensor]:
    """Return the output tensor of each name.

    Args:
        aligned: name to one tensor per checkpoint, None if missing; with `shared`, to the tensor of the last only.
        rows: of coefficients, one per checkpoint; for each output.
        dtype: of floating-point outputs; as in the inputs if None.
        keep_running: copy BatchNorm's running statistics from the last checkpoint.
        shared: for checkpoints with identical headers: file of the last to the corresponding files of all.
        by_name: rows of tensors that have their own; without `shared`.
        lasts: number of the last checkpoint of each row, from which tensors are copied; that of all if not given.

    Returns:
        Name to OutTensor; names that are tied in every checkpoint have the same one. Tensors that all rows copy from
        one checkpoint have a single row, which is the same in all outputs.

    Raises:
        LayoutError: a packed dtype.
        UsageError: the weights of the checkpoints that have a tensor sum to 0.
    """
    tensors: dict[str, OutTensor] = {}
    # Names with the same bytes in every file stay tied; offsets in the last file rule most names out.
    tied: dict[tuple[TensorSpec | None, ...], OutTensor] = {}
    begins = [-1 if (spec := inputs[-1]) is None else spec.begin for inputs in aligned.values()]
    times = Counter(begins)
    weighing = _Weighing.of(rows)
    counted = {path: tuple([files[at] for at in weighing.kept]) for path, files in (shared or {}).items()}
    # From the last of all unless a row ends before it.
    earlier_lasts = lasts if {*lasts} - {len(rows[0]) - 1} else ()
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
                if earlier_lasts:
                    own = _in_each(last, len(rows[0]), shared) if shared else inputs
                    terms = _copies(own, earlier_lasts)
            elif type(last) is not TensorSpec and shared:
                terms = Terms.of_rows(_in_each(last, len(weighing.rows[0]), shared), weighing.rows)
            elif name in by_name:
                terms = _Weighing.of(by_name[name]).terms(name, inputs)
            else:
                files = counted.get(last.storage.path)
                terms = Terms((last,), weighing.weights, files) if files else weighing.terms(name, inputs)
            tensor = OutTensor(dtype if dtype and narrowed else last.written, last.shape, terms, name)
            if tensor.numel and not alone:
                tied[inputs] = tensor
        tensors[name] = tensor
    return tensors


def is_running(name: str) -> bool:
    """Return True for BatchNorm's running statistics."""
    return name.rsplit(".", 1)[-1] in _RUNNING


class _Weighing(NamedTuple):
    """Which checkpoints count, and how much.

    Attributes:
        rows: coefficients of all checkpoints.
        kept: the checkpoints that a row uses.
        weights: the coefficients of these.
    """

    rows: tuple[tuple[float, ...], ...]
    kept: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]]) -> _Weighing:
        every = tuple([tuple([c or 0.0 for c in row]) for row in rows])  # -0.0 would change the result
        kept = tuple(sorted({at for row in every for at in used(row)}))
        return cls(every, kept, tuple([tuple([row[at] for at in kept]) for row in every]))

    def terms(self, name: str, inputs: Sequence[TensorSpec | None]) -> Terms:
        """Return the terms of a tensor; if some checkpoints lack it, scale the others to the total weight."""
        if None not in inputs and SummedSpec not in map(type, inputs):
            return Terms(tuple([inputs[at] for at in self.kept]), self.weights)  # type: ignore[misc]
        present = [at for at, spec in enumerate(inputs) if spec is not None]
        rows = [[row[at] for at in present] for row in self.rows]
        if len(present) < len(inputs):
            rows = [_scaled(name, own, row) for own, row in zip(rows, self.rows, strict=True)]
        return Terms.of_rows([inputs[at] for at in present], rows)  # type: ignore[misc]


def _scaled(name: str, present: Sequence[float], row: Sequence[float]) -> list[float]:
    have, want = math.fsum(present), math.fsum(row)
    # Dividing by a sum that is 0 up to rounding would amplify the rounding.
    if abs(have) <= 1e-12 * math.fsum(map(abs, present)):
        raise UsageError(f"the checkpoints that have '{name}' weigh 0 together. Use `keys='intersection'`.")
    return [c * (want / have) for c in present]


def _copies(inputs: Sequence[TensorSpec | None], lasts: Sequence[int]) -> Terms:
    """Return rows that each copy one tensor: of its last checkpoint, or of the latest before it that has one."""
    present = [at for at, spec in enumerate(inputs) if spec is not None]
    chosen = [max([at for at in present if at <= last], default=present[-1]) for last in lasts]
    rows = [[float(at == one) for at in present] for one in chosen]
    return Terms.of_rows([inputs[at] for at in present], rows)  # type: ignore[misc]


def _in_each(last: TensorSpec, count: int, shared: Mapping[Path, Files]) -> list[TensorSpec]:
    """Find what is made of several tensors of the last checkpoint in each of those with its header."""
    return [last.placed(lambda path, i=i: shared[path][i]) for i in range(count)]  # type: ignore[misc]
