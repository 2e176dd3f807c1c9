"""Inspection: the contents of a checkpoint, from its header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.layouts import StateDict, states
from ..checkpoints.layouts.layout import dotted
from ..checkpoints.layouts.schedule_free import training_mode_note
from ..checkpoints.optimizer_states import kept, optimizer_name
from ..checkpoints.optimizers import find_optimizers
from ..checkpoints.parts import of_ranks, select_parts
from ..checkpoints.prefixes import prefixes
from ..checkpoints.steps import stored_counters
from ..errors import LayoutError
from ..formats import read_header
from ..formats.header import Header
from ..formats.tree import tensors_in
from ..series.metrics import metric_of
from ..series.paths import one_checkpoint
from ..tensors import Tensor, TensorSpec, UnsupportedTensor
from .assembly import own_metadata
from .option_groups import takes
from .options import Drawing
from .pictures import Picture
from .reports import Report


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor in the list of tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightSet:
    """A set of weights.

    Attributes:
        which: ``raw`` or ``ema``.
        label: `which`, with the path in the file.
        layout: name of the layout.
        elements: of all parameters and buffers.
        dtypes: name to (tensors, bytes), the largest first.
        prefixes: wrapper prefix to the number of names with it.
        tensors: all of them, in order.
    """

    which: str
    label: str
    layout: str
    elements: int
    nbytes: int
    dtypes: dict[str, tuple[int, int]]
    prefixes: dict[str, int]
    tensors: tuple[TensorRow, ...]


@dataclass(frozen=True, slots=True)
class KeptRow:
    """What an optimizer keeps under one name; `multiple` and `times` as in `Optimizer`."""

    name: str
    nbytes: int
    multiple: float | None
    times: float | None


@dataclass(frozen=True, slots=True)
class Optimizer:
    """The state of an optimizer.

    Attributes:
        place: its path.
        name: ``unknown`` if what it keeps is not that of a known one.
        nbytes: of its tensors.
        multiple: its bytes over those of the weights; None if there are none.
        times: its values over those of the weights, likewise; more than `multiple` if they are of 8 bits.
        kept: what it keeps, the largest first.
    """

    place: str
    name: str
    nbytes: int
    multiple: float | None
    times: float | None
    kept: tuple[KeptRow, ...]


@dataclass(frozen=True, slots=True, repr=False)
class InspectReport(Report):
    """The contents of a checkpoint.

    Attributes:
        path, format, nbytes: of the file or folder.
        files: number of its files.
        sets: the weights in known layouts.
        other: other top-level entries with tensors, and the number of tensors.
        counters: step, epoch and the like.
        metric: timm's ``metric``, if there is one.
        optimizers: their states.
        foreign: unknown Python names; they were neither imported nor run.
        metadata: what a safetensors file says of itself in words: of training tools and user interfaces.
        provenance: the record of ckpt-tools in its own outputs.
        notes: warnings, in words.
    """

    path: str
    format: str
    nbytes: int
    files: int
    sets: tuple[WeightSet, ...]
    other: dict[str, int]
    counters: dict[str, int]
    metric: float | None
    optimizers: tuple[Optimizer, ...]
    foreign: dict[str, int]
    metadata: dict[str, str]
    provenance: dict[str, Any] | None
    notes: tuple[str, ...] = ()


@takes(Drawing)
def inspect(path: str | Path, drawing: Drawing) -> InspectReport:
    """Describe what a checkpoint holds, from its header alone; no payload is read, and nothing in it is run.

    Args:
        path: a file, a folder with a sharded checkpoint, or a folder with a single checkpoint in it.
        {options}

    Returns:
        Format, layout, the sets of weights with their tensors, counters, optimizers, and the record of ckpt-tools.

    Raises:
        CkptError: it cannot be read, the folder holds several checkpoints, or the picture cannot be written.

    Example:
        >>> report = ckpt_tools.inspect("averaged.pth")
        >>> report.sets[0].dtypes
        {'float32': (10, 21640)}
    """
    picture = Picture.of(drawing.plot, force=drawing.force)
    header = read_header(one_checkpoint(path))
    if picture is not None:
        picture.check([header.path, *(stamp.path for stamp in header.files)])
    report = describe(header)
    if picture is not None:
        from .report_pictures import SIZES_SIZE, draw_sizes

        picture.write(lambda figure: draw_sizes(report, figure), SIZES_SIZE)
    return report


def describe(header: Header) -> InspectReport:
    """Describe a checkpoint from its header; no payload is read."""
    sets = sets_of(header)
    weights = {which: _weight_set(state) for which, state in sets.items()}
    counted = weights.get("raw") or next(iter(weights.values()), None)
    note = training_mode_note(header.tree, [each.path for each in sets.values()])
    return InspectReport(
        path=str(header.path),
        format=header.format.name,
        nbytes=header.nbytes,
        files=len(header.files),
        sets=tuple(weights.values()),
        other=_other(header, sets),
        counters=stored_counters(header),
        metric=metric_of(header, "metric"),
        optimizers=tuple(_optimizers(header, sets, counted)),
        foreign=dict(header.foreign),
        metadata={key: header.metadata[key] for key in own_metadata(header)},
        provenance=header.provenance,
        notes=() if note is None else (note,),
    )


def sets_of(header: Header) -> Mapping[str, StateDict]:
    """Return the sets of weights; of a checkpoint of ranks, the one that all files have."""
    if not header.ranks:
        return states(header)
    try:
        found = of_ranks(header, lambda rank: select_parts(rank, ["auto"]))
    except LayoutError:
        return {}
    return {found.which: found}


def _row(name: str, spec: Tensor) -> TensorRow:
    if isinstance(spec, UnsupportedTensor):
        return TensorRow(name, spec.reason, None, 0)
    return TensorRow(name, spec.dtype.name, spec.shape, spec.nbytes)


def _weight_set(state: StateDict) -> WeightSet:
    rows = tuple(_row(name, spec) for name, spec in state.tensors.items())
    dtypes: dict[str, tuple[int, int]] = {}
    for row in rows:
        count, nbytes = dtypes.get(row.dtype, (0, 0))
        dtypes[row.dtype] = (count + 1, nbytes + row.nbytes)
    return WeightSet(
        which=state.which,
        label=state.label,
        layout=state.layout,
        elements=sum(spec.numel for spec in state.tensors.values() if isinstance(spec, TensorSpec)),
        nbytes=sum(row.nbytes for row in rows),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
        prefixes=dict(prefixes(state.tensors)),
        tensors=rows,
    )


def _other(header: Header, sets: Mapping[str, StateDict]) -> dict[str, int]:
    taken = {state.path[0] for state in sets.values() if state.path}
    if any(not state.path for state in sets.values()):
        return {}
    counts: dict[str, int] = {}
    for path, _ in tensors_in(header.tree):
        key = str(path[0]) if path else "the object itself"
        if key not in taken:
            counts[key] = counts.get(key, 0) + 1
    return counts


def _optimizers(header: Header, sets: Mapping[str, StateDict], weights: WeightSet | None) -> Iterator[Optimizer]:
    nbytes, elements = (0, 0) if weights is None else (weights.nbytes, weights.elements)

    def over(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    for path, state in find_optimizers(header.tree, [each.path for each in sets.values()]):
        tensors = [spec for _, spec in tensors_in(state["state"]) if isinstance(spec, TensorSpec)]
        own = sum(spec.nbytes for spec in tensors)
        rows = sorted(kept(state).items(), key=lambda item: -item[1].nbytes)
        yield Optimizer(
            place=dotted(path) or "the whole file",
            name=optimizer_name(state),
            nbytes=own,
            multiple=over(own, nbytes),
            times=over(sum(spec.numel for spec in tensors), elements),
            kept=tuple(
                KeptRow(name, each.nbytes, over(each.nbytes, nbytes), over(each.elements, elements))
                for name, each in rows
            ),
        )
