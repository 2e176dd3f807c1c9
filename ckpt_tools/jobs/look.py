"""Looking at a series: the geometry of its checkpoints, and what tells whether an average of them will help."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.ema_updates import stored_decay, stored_updates
from ..checkpoints.layouts import StateDict
from ..checkpoints.layouts import states as states_of
from ..checkpoints.layouts.layout import is_buffer
from ..checkpoints.layouts.schedule_free import refuse_computed
from ..checkpoints.optimizers import find_optimizers
from ..checkpoints.scalars import as_number
from ..compute.threads import check_threads
from ..errors import AlignmentError, NumericsError, UsageError
from ..formats.header import Header
from ..series.align import is_copied
from ..series.find import find_series
from ..series.geometry import FAR, ONE_BASIN, Geometry, geometry, movement
from ..series.member import Member
from ..series.rules.rule import Products
from ..series.usable import Skipped
from ..tensors import TensorSpec
from .lined_up import line_up, selected
from .measure import inner_products
from .option_groups import takes
from .options import Alignment, Drawing, Matching, Reading, Selection
from .pictures import Picture
from .provenance import short_names
from .reports import Report

_DECAYED = 10.0
"""A run has decayed if its learning rate has fallen so many times, over the series or since its schedule began."""
_RATES = (1e-30, 1e30)
"""What is smaller or larger is no learning rate."""
_OLD = 0.01
"""The part of an average that is still its first weights, from which on it is told."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where one checkpoint lies.

    Attributes:
        name: of the checkpoint.
        step: training step or epoch; None if unknown.
        norm: of its weights.
        to_mean: distance to the mean of all.
        to_next: distance to the next checkpoint; None for the last.
        cosine: between the steps to it and from it; None at the ends, or if one is 0.
        learning_rate: of the first group of its first optimizer; None if it stores none.
        start_left: the part of its average that is still the weights that it began with; None if it does not tell.
    """

    name: str
    step: int | None
    norm: float
    to_mean: float
    to_next: float | None
    cosine: float | None
    learning_rate: float | None
    start_left: float | None


@dataclass(frozen=True, slots=True, repr=False)
class LookReport(Report):
    """The geometry of a series; lengths are Euclidean, over all parameters together.

    Attributes:
        checkpoints: oldest first.
        state: which weights.
        ordered_by: what the order is taken from, in words.
        mean_norm: norm of the mean over the mean of the norms; 1 if all are one point.
        one_basin: False if the mean is much shorter than the checkpoints.
        outlier: name of the one that is far from all others, or None.
        movement: tensor name to how far it moves, relative to its norm; the farthest first.
        warnings: what tells against an average of these, in words.
        notes: these, and decisions.
        bytes_read: of the job.
        skipped: checkpoints that were left out, and why.
    """

    checkpoints: tuple[Position, ...]
    state: str
    ordered_by: str
    mean_norm: float
    one_basin: bool
    outlier: str | None
    movement: dict[str, float]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_read: int
    skipped: tuple[Skipped, ...] = ()


@takes(Selection, Alignment, Drawing, Reading)
def look(
    paths: str | Path | Iterable[str | Path],
    selection: Selection,
    alignment: Alignment,
    drawing: Drawing,
    running: Reading,
) -> LookReport:
    """Measure where the checkpoints of a series lie to each other, in one pass over them, in float64.

    Buffers, integers and what is copied by an average are left out.

    Args:
        paths: files, globs, folders (of checkpoints, or sharded ones).
        {options}

    Returns:
        Distances, cosines, and warnings.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`.
    """
    check_threads(running.threads)
    picture = Picture.of(drawing.plot, force=drawing.force)
    given = [paths] if isinstance(paths, (str, Path)) else paths
    series = find_series(given, state=alignment.state, on_progress=running.on_progress, **vars(selection))
    members = series.members
    if len(members) < 2:
        raise UsageError(f"{members[0].path} is one checkpoint alone. Give a series of two or more.")
    if picture is not None:
        picture.check([member.path for member in members])
    names = short_names([member.path for member in members])
    matching = Matching(**vars(alignment))
    states = selected(members, names, matching)
    for member, state in zip(members, states, strict=True):
        refuse_computed(member.header, state)
    lined_up = line_up(members, names, matching, mixed_dtypes=True, chosen=states)
    aligned = {name: specs for name, inputs in lined_up.aligned.items() if (specs := _moving(name, inputs)) is not None}
    if not aligned:
        raise AlignmentError("the checkpoints share no parameter, so there is nothing to measure.")
    products = inner_products([*aligned.values()], members, threads=running.threads, on_progress=running.on_progress)
    for name, each in zip(aligned, products, strict=True):
        _check_finite(name, each, names)
    whole = geometry(_total(products))
    left = [_start_left(member.header, state) for member, state in zip(members, states, strict=True)]
    rates, begun_at = zip(*[_learning_rates(member.header) for member in members], strict=True)
    moves = {name: movement(each) for name, each in zip(aligned, products, strict=True)}
    warnings = tuple(_warnings(names, whole, rates, begun_at[-1], left))
    report = LookReport(
        checkpoints=tuple(_positions(members, names, whole, rates, left)),
        state=states[-1].label,
        ordered_by=series.ordered_by,
        mean_norm=whole.mean_norm,
        one_basin=whole.one_basin,
        outlier=None if whole.outlier is None else names[whole.outlier],
        movement=dict(sorted(moves.items(), key=lambda pair: -pair[1])),
        warnings=warnings,
        notes=(*series.notes, *warnings, *lined_up.notes),
        skipped=series.skipped,
        bytes_read=sum(spec.nbytes for specs in aligned.values() for spec in specs),
    )
    if picture is not None:
        from .look_picture import SIZE, draw

        picture.write(lambda figure: draw(report, figure), SIZE)
    return report


def _moving(name: str, inputs: Sequence[TensorSpec | None]) -> list[TensorSpec] | None:
    """Return the tensors of a parameter; None for those that are not measured."""
    specs = [spec for spec in inputs if spec is not None]
    last = specs[-1]
    if len(specs) < len(inputs) or not last.dtype.averaged or is_buffer(name, last) or is_copied(name, last):
        return None
    return specs if last.numel else None


def _check_finite(name: str, products: Products, names: Sequence[str]) -> None:
    """Refuse values that have no distance: NaN in the last checkpoint spoils all differences from it.

    Raises:
        NumericsError: a value is NaN, infinity, or too large to be squared.
    """
    bad = [each for i, each in reversed([*enumerate(names)]) if not math.isfinite(products[i][i])]
    if bad:
        raise NumericsError(
            f"'{name}' in {bad[0]}: a value is NaN or infinity, or too large to be squared, so its distance to the "
            "others is not known. Leave the file out, or find out why."
        )


def _total(products: Sequence[Products]) -> Products:
    return [[sum(each) for each in zip(*rows, strict=True)] for rows in zip(*products, strict=True)]


def _positions(
    members: Sequence[Member],
    names: Sequence[str],
    whole: Geometry,
    rates: Sequence[float | None],
    left: Sequence[float | None],
) -> Iterator[Position]:
    last = len(members) - 1
    for i, (member, name) in enumerate(zip(members, names, strict=True)):
        yield Position(
            name=name,
            step=member.step,
            norm=whole.norms[i],
            to_mean=whole.to_mean[i],
            to_next=whole.steps[i] if i < last else None,
            cosine=whole.cosines[i - 1] if 0 < i < last else None,
            learning_rate=rates[i],
            start_left=left[i],
        )


def _learning_rates(header: Header) -> tuple[float | None, float | None]:
    """Return the learning rate of the first group of the first optimizer, and the one that its schedule began with."""
    for _, optimizer in find_optimizers(header.tree):
        groups = optimizer.get("param_groups")
        first = groups[0] if isinstance(groups, list) and groups else None
        if isinstance(first, dict) and (rate := _rate(header, first.get("lr"))) is not None:
            return rate, _rate(header, first.get("initial_lr"))
    return None, None


def _rate(header: Header, found: Any) -> float | None:
    value = as_number(header, found)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and (value == 0 or _RATES[0] <= abs(value) <= _RATES[1]) else None


def _start_left(header: Header, state: StateDict) -> float | None:
    """Return d^n of an EMA with decay d after n updates; its start counts so much."""
    average = states_of(header).get("ema") if state.which == "ema" else None
    if average is None:
        return None
    decay, updates = stored_decay(header, average), stored_updates(header, average)
    return None if decay is None or updates is None else decay**updates


def _warnings(
    names: Sequence[str],
    whole: Geometry,
    rates: Sequence[float | None],
    begun_at: float | None,
    left: Sequence[float | None],
) -> Iterator[str]:
    if whole.outlier is not None and whole.farthest is not None:
        yield (
            f"{names[whole.outlier]} is far from all others: the nearest is {whole.farthest[1]:.1f} times as far from "
            f"it as they are from one another, in the median (more than {FAR:g} is far). Leave it out, or find out why."
        )
    if not whole.one_basin:
        yield (
            f"The mean is {whole.mean_norm:.2f} times as long as the checkpoints, and less than {ONE_BASIN:g} means "
            "that they are in no common basin, as runs from different starts: an average of them is of no use."
        )
    known = [rate for rate in rates if rate is not None]
    if known and max(known[0], begun_at or 0.0) > _DECAYED * known[-1]:
        fall = (
            f"falls from {known[0]:.3g} to {known[-1]:.3g} over these files"
            if known[0] > _DECAYED * known[-1]
            else f"began at {begun_at:.3g}, and is {known[-1]:.3g} in the last file"
        )
        yield (
            f"The learning rate {fall}. A run that has decayed gains little from an average; older files may help more."
        )
    old = [(name, share) for name, share in zip(names, left, strict=True) if share is not None and share > _OLD]
    if old:
        more = f", and more than {_OLD:.0%} in {len(old) - 1} more" if len(old) > 1 else ""
        yield f"{old[0][1]:.1%} of the EMA in {old[0][0]} is still the weights that it began with{more}."
