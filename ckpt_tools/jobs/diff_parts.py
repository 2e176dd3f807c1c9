"""Comparing in parts: each process compares some slices, and what they found is joined: counts, maxima and exact sums.

They leave it in a stage without files (`storage/kept_stage.py`), in the current folder, for a comparison has no target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CkptError
from ..storage.hidden import remove
from ..storage.kept_stage import Stage
from ..tensors import TensorSpec
from .asked import Asked
from .share import incomplete, not_begun, refuse_step, told

if TYPE_CHECKING:
    from ..compute.compare import Distance

Work = Callable[[Asked], Sequence["Distance"]]
NAME = Path("ckpt-diff")
"""What a comparison is called in place of a target."""
_LAST = " When all parts are, run the same command with `finish` in place of `part`."
_LAST_OF_STEP = " The process that ends last shows the result."


def distances(
    asked: Asked, pairs: Sequence[tuple[TensorSpec, TensorSpec]], job: Mapping[str, Any], work: Work
) -> tuple[Sequence[Distance] | None, str]:
    """Do what is asked of a comparison.

    Args:
        pairs: that are compared.
        job: see `share.job_of`.
        work: compares a part; returns a distance for each pair of tensors, over the slices of the part.

    Returns:
        (the distances over all slices; None if parts may be missing), and what became of this part, in words.

    Raises:
        CkptError: parts are missing, or this process or another one has failed.
    """
    stage = Stage.of(NAME, job["digest"])
    if not asked.finish:
        words = _compared(stage, asked, job, work)
        if not asked.step:
            return None, words
        last, missing = stage.ended(asked.step, asked.index, asked.count)
        if not last:
            return None, words + not_begun(missing)
    return _finished(stage, asked, pairs), ""


def _compared(stage: Stage, asked: Asked, job: Mapping[str, Any], work: Work) -> str:
    with stage.opened([], [], told(job)), stage.journal(asked.index, asked.count).opened() as own:
        if asked.step:
            stage.began(asked.step, asked.index, asked.count)
            refuse_step(stage, job, asked.step)
        before = _found(own.journal.lines()) is not None
        if not before:
            found = [[i, *astuple(each)] for i, each in enumerate(work(asked)) if each.values]
            own.append({"total": asked.count, "nbytes": 1, "distances": found})
    done = f"Part {asked.index} of {asked.count} of the comparison {'was done before' if before else 'is done'}."
    return done + (_LAST_OF_STEP if asked.step else _LAST)


def _finished(stage: Stage, asked: Asked, pairs: Sequence[tuple[TensorSpec, TensorSpec]]) -> Sequence[Distance]:
    """Join what the parts have found, and remove their stage.

    Raises:
        CkptError: parts are missing.
    """
    if stage.job() is None:
        raise CkptError(
            "no part of this comparison is in the current folder. First run all parts there, such as `part='1/2'` and "
            "`part='2/2'`, with the same files and options."
        )
    counts = {asked.count} if asked.step else {each.count for each in stage.journals()}
    found: dict[int, Any] = {}
    for count in sorted(counts):  # of several divisions, one that is complete, or else the finest
        found = {index: _found(stage.journal(index, count).lines()) for index in range(1, count + 1)}
        if None not in found.values():
            break
    missing = [index for index, each in found.items() if each is None]
    if missing or not found:
        raise incomplete(NAME, missing or [1], max(counts, default=1))
    from ..compute.compare import Distance, over_nothing  # imports torch

    whole = over_nothing(pairs)
    for i, *values in (each for part in found.values() for each in part):
        whole[i] = whole[i].joined(Distance(*values))
    with stage.abandoned() as free:
        if free is not False:
            remove(stage.path)
    return whole


def _found(lines: Iterable[Mapping[str, Any]]) -> Any:
    """Return what a part has found; None if it has not ended."""
    return next((line["distances"] for line in lines if "distances" in line), None)
