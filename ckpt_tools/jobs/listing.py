"""Listing: several checkpoints in the order of training, with what tells them apart, from their headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.layouts import StateDict
from ..checkpoints.optimizers import find_optimizers
from ..checkpoints.parts import unwrapped
from ..checkpoints.steps import named_positions, stored_positions
from ..errors import AlignmentError
from ..formats.tree import tensors_in
from ..series.find import excluded, notes_of
from ..series.member import Member
from ..series.metrics import metric_at_hand
from ..series.numbered import natural_key
from ..series.paths import find, training_state_beside
from ..series.usable import Skipped, sorted_out
from ..storage.source import stamp_at
from ..tensors import TensorSpec
from .inspect import sets_of
from .option_groups import takes
from .options import Drawing, Skipping, Telling
from .pictures import Picture
from .provenance import short_names
from .reports import Report

Sets = Mapping[str, StateDict]
"""The sets of weights in a checkpoint, by name."""
Shapes = Mapping[str, tuple[int, ...] | None]
"""The shapes of tensors, by name; None for one that cannot be averaged."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint in a table.

    Attributes:
        path: of the file or folder.
        name: a short name, distinct in the table.
        step: training step or epoch; None if unknown.
        metric: a number that tells how good it is; None if it has none.
        sets: the sets of weights, ``raw`` and ``ema``.
        optimizer: bytes of the tensors of optimizers, and of the files of training state in its folder.
        nbytes: size on disk; None if it cannot be read.
        made: the command of ckpt-tools that wrote it; empty if none did.
        fault: why it cannot be used; empty if it can.
        differs: how its tensors differ in names or shapes from those of most of the others; empty if they do not.
    """

    path: str
    name: str
    step: int | None
    metric: float | None
    sets: tuple[str, ...]
    optimizer: int
    nbytes: int | None
    made: str = ""
    fault: str = ""
    differs: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Listing(Report):
    """The checkpoints in a folder, or at several paths.

    Attributes:
        checkpoints: in the order of training; what cannot be used is last.
        counter: what the steps are: ``global_step``, ``epoch``, or ``name`` for numbers in names.
        notes: decisions, in words.
        skipped: checkpoints that were left out, and why.
    """

    checkpoints: tuple[Listed, ...]
    counter: str
    notes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def faults(self) -> int:
        """Number of those that cannot be used."""
        return sum(bool(each.fault) for each in self.checkpoints)


@takes(Skipping, Drawing, Telling)
def listing(
    paths: Iterable[str | Path], metric: str, skipping: Skipping, drawing: Drawing, telling: Telling
) -> Listing:
    """List checkpoints by their headers; no payload is read. What cannot be used is listed with its fault.

    Args:
        paths: files, globs, folders.
        metric: name of the number to show.
        {options}

    Raises:
        CkptError: a path does not exist, nothing is there, or the picture cannot be written.
    """
    picture = Picture.of(drawing.plot, force=drawing.force)
    skip_broken = skipping.skip_broken
    notes: list[str] = []
    there = find([*paths], notes, skipping.exclude)
    if picture is not None:
        picture.check(there.paths)
    headers, errors = sorted_out(there.paths, there.empty, on_progress=telling.on_progress)
    places = (stored_positions(headers) if headers else None) or named_positions([header.path for header in headers])
    members = [
        Member(header.path, header, step, places.counter) for header, step in zip(headers, places.steps, strict=True)
    ]
    order = sorted(zip(places.keys, members, strict=True), key=lambda pair: (pair[0], natural_key(pair[1].path)))
    skipped = [*excluded(there), *(Skipped.of(*each) for each in errors.items() if skip_broken)]
    faults = [] if skip_broken else [Skipped.of(*each) for each in errors.items()]
    names = iter(short_names([*(member.path for _, member in order), *(Path(each.path) for each in faults)]))
    sets = {header.path: sets_of(header) for header in headers}
    differ = _unlike_most(sets, notes)
    rows = [_listed(member, next(names), metric, sets[member.path], differ.get(member.path, "")) for _, member in order]
    rows += [Listed(each.path, next(names), None, None, (), 0, None, fault=each.reason) for each in faults]
    report = Listing(tuple(rows), places.counter, (*notes, *notes_of(skipped)), tuple(skipped))
    if picture is not None:
        from .report_pictures import AVERAGE_SIZE, draw_listing

        picture.write(lambda figure: draw_listing(report, figure), AVERAGE_SIZE)
    return report


def _listed(member: Member, name: str, metric: str, sets: Sets, differs: str) -> Listed:
    header = member.header
    found = find_optimizers(header.tree, [each.path for each in sets.values()])
    state = (spec for _, optimizer in found for _, spec in tensors_in(optimizer["state"]))
    beside = training_state_beside(header.path) if header.in_folder else []
    return Listed(
        path=str(member.path),
        name=name,
        step=member.step,
        metric=metric_at_hand(member, metric),
        sets=tuple(sets),
        optimizer=sum(spec.nbytes for spec in state if isinstance(spec, TensorSpec))
        + sum(stamp_at(path).nbytes for path in beside),
        nbytes=header.nbytes,
        made=str((header.provenance or {}).get("command", "")),
        differs=differs,
    )


def _unlike_most(sets: Mapping[Path, Sets], notes: list[str]) -> dict[Path, str]:
    """Find the checkpoints whose tensors have other names or shapes than those of most, wrapper prefixes aside.

    Args:
        notes: receives that there is no majority.

    Returns:
        path to the difference, in words.
    """
    common = next((which for which in ("ema", "raw") if all(which in own for own in sets.values())), None)
    shapes: dict[Path, Shapes] = {}
    for path, own in sets.items():
        weights = next(iter(own.values()), None) if common is None else own[common]
        if weights is not None:
            try:
                bare = unwrapped(weights)
            except AlignmentError:  # two names become one
                bare = dict(zip(weights.tensors, weights.tensors, strict=True))
            shapes[path] = {bare[name]: getattr(spec, "shape", None) for name, spec in weights.tensors.items()}
    models = {path: frozenset(own.items()) for path, own in shapes.items()}
    times = Counter(models.values())
    usual, most = times.most_common(1)[0] if times else (frozenset(), 0)
    if 2 * most > len(models):
        return {path: _difference(own, dict(usual)) for path, own in shapes.items() if models[path] != usual}
    if len(times) > 1:
        notes.append(f"These are checkpoints of {len(times)} models: names or shapes of their tensors differ.")
    return {}


def _difference(own: Shapes, usual: Shapes) -> str:
    shared = own.keys() & usual.keys()
    if 2 * len(shared) < max(len(own), len(usual)):
        return f"another model: it shares {len(shared)} of {len(own)} tensor names with most"
    first, *others = [
        *(f"no tensor '{name}', which most have" for name in sorted(usual.keys() - shared)),
        *(f"a tensor '{name}', which most lack" for name in sorted(own.keys() - shared)),
        *(
            f"'{name}' has shape {_shown(own[name])}, and {_shown(usual[name])} in most"
            for name in own
            if name in shared and own[name] != usual[name]
        ),
    ]
    return f"{first}; {len(others)} more {'difference' if len(others) == 1 else 'differences'}" if others else first


def _shown(shape: tuple[int, ...] | None) -> str:
    return "an unknown one" if shape is None else str([*shape])
