"""Measuring: the inner products of the tensors of a series, in one pass over the files, with its progress."""

from __future__ import annotations

from collections.abc import Sequence

from ..compute.gram import gram
from ..compute.progress import Activity, Progress, counted
from ..series.member import Member
from ..series.rules.rule import Products
from ..tensors import TensorSpec


def inner_products(
    aligned: Sequence[Sequence[TensorSpec]],
    members: Sequence[Member],
    *,
    threads: int | None,
    on_progress: Progress | None,
) -> list[Products]:
    """Measure tensor by tensor; see `ckpt_tools.compute.gram.gram`.

    Args:
        aligned: tensors, each as it is in the checkpoints that have it.
        members: the checkpoints.
        on_progress: called with (what is done, bytes read, bytes in all).

    Raises:
        ReadError: a file cannot be read.
    """
    total = sum(spec.nbytes for specs in aligned for spec in specs)
    found = gram(
        aligned,
        stamps=[stamp for member in members for stamp in member.header.files],
        threads=threads,
        on_progress=counted(on_progress, Activity("measuring"), total),
    )
    return [matrix.tolist() for matrix in found]
