"""Model Stock over files: the start joins the series, and the inner products of each tensor are measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.layouts import StateDict
from ..checkpoints.layouts.schedule_free import refuse_computed
from ..errors import AlignmentError, LayoutError, NumericsError, SeriesError, UsageError
from ..formats import read_header
from ..series.align import is_copied
from ..series.find import Series
from ..series.member import Member
from ..series.rules.rule import Products
from ..series.schedules import Schedule
from ..series.shards import is_part, refuse_part
from ..series.weighted_sums import is_running
from ..tensors import TensorSpec
from .addends import ByTensor
from .lined_up import LinedUp, selected
from .options import Matching, Summing
from .provenance import short_names

Row = tuple[float, ...]
Aligned = tuple[TensorSpec | None, ...]


class Start(NamedTuple):
    """A series with the checkpoint that it was fine-tuned from.

    Attributes:
        members: that checkpoint, then the others.
        states: the set of weights in each.
    """

    members: tuple[Member, ...]
    states: tuple[StateDict, ...]


def with_start(series: Series, path: Path, matching: Matching) -> Start:
    """Put the start before a series; if it is the series, there is nothing to average.

    Raises:
        UsageError: fewer than two others, or `matching` asks for what is no tensor of a file.
        CkptError: the start cannot be read, has no such weights, or is a part of a checkpoint.
    """
    if matching.lora == "product":
        raise UsageError("`lora='product'` does not go with `mode='stock'`, which needs one start for all factors.")
    if not any(is_part(member.path) for member in series.members):
        refuse_part(path)
    header = read_header(path)
    others = tuple(member for member in series.members if member.path.resolve() != path.resolve())
    if len(others) < 2:
        raise UsageError(
            f"`mode='stock'` takes two or more checkpoints that were fine-tuned from {path}, and there "
            f"{'is one' if others else 'is none'}."
        )
    start = Member(path, header)
    return Start((start, *others), sets((start, *others), matching))


def sets(members: Sequence[Member], matching: Matching) -> tuple[StateDict, ...]:
    """Select the weights of a start, which may have another set than is asked for, and of the others.

    Raises:
        LayoutError: one has none, or they are not in the file but computed.
    """
    names = short_names([member.path for member in members])
    others = selected(members[1:], names[1:], matching)
    try:
        own = selected(members[:1], names[:1], matching)
    except LayoutError:  # a release has no optimizer and no EMA beside its weights
        own = selected(members[:1], names[:1], Matching(**vars(matching) | {"state": "auto"}))
    for member, state in zip(members, (*own, *others), strict=True):
        refuse_computed(member.header, state)
    return (*own, *others)


def measured(
    schedule: Schedule, members: Sequence[Member], matching: Matching, running: Summing, lined_up: LinedUp
) -> ByTensor:
    """Measure the angles between the models, in one pass over the files, and return the coefficients of each tensor.

    Args:
        lined_up: of the start, then the others.

    Raises:
        AlignmentError: there is nothing to average.
        NumericsError: a value is NaN or infinity.
        ReadError: a file cannot be read.
        SeriesError: a model is the start itself.
    """
    averaged = {name: specs for name, specs in lined_up.aligned.items() if _is_averaged(name, specs, matching)}
    if not averaged:
        raise AlignmentError(
            "the checkpoints share no tensor of floating-point numbers, so there is nothing to average."
        )
    started = [specs for specs in dict.fromkeys(averaged.values()) if specs[0] is not None]
    found = _products(started, members, running)
    by_name: dict[str, Row] = {}
    moved: set[int] = set()
    for name, specs in averaged.items():
        if specs[0] is None:
            present = [float(spec is not None) for spec in specs]
            by_name[name] = tuple(each / sum(present) for each in present)
            continue
        if not all(math.isfinite(each) for row in found[specs] for each in row):
            raise NumericsError(
                f"'{name}': a value is NaN or infinity, or too large to be squared, so the angle between the models is "
                "not known."
            )
        own = iter(schedule.coefficients(found[specs]))
        by_name[name] = tuple(0.0 if spec is None else next(own) for spec in specs)
        there = [i for i, spec in enumerate(specs) if spec is not None and i > 0]
        moved.update(i for row, i in enumerate(there) if found[specs][row][row] > 0)
    still = next((member for i, member in enumerate(members) if i > 0 and i not in moved), None)
    if started and still is not None:
        raise SeriesError(f"{still.path}: has the weights of the start, {members[0].path}. Leave it out.")
    return _by_tensor(averaged, by_name, members, bytes_read=_nbytes(started))


def recorded(ratios: Mapping[str, float], members: Sequence[Member], matching: Matching, lined_up: LinedUp) -> ByTensor:
    """Return the coefficients that a record has.

    Args:
        ratios: name to the coefficients of all but the start together.

    Raises:
        AlignmentError: the record has other tensors.
    """
    averaged = {name: specs for name, specs in lined_up.aligned.items() if _is_averaged(name, specs, matching)}
    if averaged.keys() != ratios.keys():
        name = next(iter(averaged.keys() ^ ratios.keys()))
        raise AlignmentError(f"'{name}' is in the record or in the checkpoints, not in both.")
    by_name: dict[str, Row] = {}
    for name, (_, *others) in averaged.items():
        t, n = ratios[name], sum(spec is not None for spec in others)
        by_name[name] = (1.0 - t, *(0.0 if spec is None else t / n for spec in others))
    return _by_tensor(averaged, by_name, members)


def _by_tensor(
    averaged: Mapping[str, Aligned], by_name: Mapping[str, Row], members: Sequence[Member], bytes_read: int = 0
) -> ByTensor:
    sizes = {name: next(spec.numel for spec in specs if spec is not None) for name, specs in averaged.items()}
    total = sum(sizes.values())
    mean = [math.fsum(row[i] * sizes[name] / total for name, row in by_name.items()) for i in range(len(members))]
    return ByTensor(
        coefficients=by_name,
        mean=tuple(mean),
        ratios={name: 1.0 - row[0] for name, row in by_name.items()},
        notes=tuple(_notes(by_name, mean[0], members)),
        bytes_read=bytes_read,
    )


def _notes(by_name: Mapping[str, Row], share: float, members: Sequence[Member]) -> Iterator[str]:
    ordered = sorted(by_name, key=lambda name: by_name[name][0])
    least, most = (f"{by_name[name][0]:.1%} in '{name}'" for name in (ordered[0], ordered[-1]))
    between = f", from {least} to {most}" if len(ordered) > 1 else ""
    yield (
        f"The start, {members[0].path.name}, counts {share:.1%} over all values{between}. The other "
        f"{len(members) - 1} share the rest."
    )
    if members[-1].header.ranks:
        yield (
            "Each file of a rank is measured by itself, so where a tensor is split over ranks, its parts may have "
            "other shares of the start than the whole would."
        )


def _is_averaged(name: str, specs: Aligned, matching: Matching) -> bool:
    last = next(spec for spec in reversed(specs) if spec is not None)
    running = matching.buffers == "last" and is_running(name)
    return last.dtype.averaged and last.numel > 0 and not is_copied(name, last) and not running


def _products(tensors: Iterable[Aligned], members: Sequence[Member], running: Summing) -> dict[Aligned, Products]:
    """Return for each tensor, tied ones once, what `ckpt_tools.series.rules.stock` takes."""
    from .measure import inner_products

    # The start comes last, for rows are differences from the last.
    rows = {specs: [spec for spec in (*specs[1:], specs[0]) if spec is not None] for specs in tensors}
    found = inner_products([*rows.values()], members, threads=running.threads, on_progress=running.on_progress)
    return dict(zip(rows, found, strict=True))


def _nbytes(tensors: Iterable[Aligned]) -> int:
    return sum(spec.nbytes for specs in tensors for spec in specs if spec is not None)
