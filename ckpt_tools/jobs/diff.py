"""Diffing: the differences between the weights of two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.layouts import StateDict, called, select
from ..checkpoints.layouts.schedule_free import refuse_computed
from ..checkpoints.parts import of_ranks, select_parts, unwrapped
from ..checkpoints.prefixes import prefixes, renamed
from ..compute.norms import Norms, added
from ..compute.progress import LOADING_TORCH, Activity, uncounted
from ..compute.threads import check_threads
from ..errors import UsageError
from ..formats import read_header
from ..formats.header import Header
from ..series.paths import one_checkpoint, refuse_other_queries
from ..tensors import DTYPES, Tensor, TensorSpec, UnsupportedTensor
from .asked import Asked, asked_of
from .option_groups import takes
from .options import Comparison, Drawing, Reading, SharedComparison, Tolerance
from .pictures import Picture
from .provenance import short_names
from .reports import Report

if TYPE_CHECKING:
    from ..compute.compare import Distance


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints.

    Attributes:
        path: the file or folder.
        name: a short name, distinct from the other's where the paths are.
        state: which weights are compared, such as ``ema (state_dict_ema)``, or ``weights`` where there is one set.
        tensors: number of tensors.
        prefixes: wrapper prefixes that are ignored in its names.
    """

    path: str
    name: str
    state: str
    tensors: int
    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A shape or a dtype that differs, in words."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """A tensor whose bytes or dtype differ.

    Attributes:
        name: without wrapper prefixes.
        tied: further names of the same tensors.
        dtype: in a.
        values: number of values; a complex element is two.
        differing, beyond, nonfinite, max_abs, max_rel: see `ckpt_tools.compute.compare.Distance`.
        norms: the tensors as vectors; None for integers and codes, and beyond the range of float64.
    """

    name: str
    tied: tuple[str, ...]
    dtype: str
    values: int
    differing: int
    beyond: int
    nonfinite: int
    max_abs: float | None
    max_rel: float | None
    norms: Norms | None

    @property
    def weights(self) -> bool:
        """True for floating-point and complex tensors; False for counters, masks and codes."""
        return DTYPES[self.dtype].averaged


@dataclass(frozen=True, slots=True, repr=False)
class DiffReport(Report):
    """The differences between two sets of weights.

    Attributes:
        a, b: the checkpoints; b is the reference of the tolerance.
        rtol, atol: values may differ by atol + rtol * |b|.
        only_a, only_b: names that the other does not have.
        shapes: tensors whose shapes differ; their values are not compared.
        dtypes: tensors whose dtypes differ.
        not_compared: names whose values cannot be compared, and why.
        compared: number of names whose values were compared.
        identical: number of them with the same bytes.
        tensors: the others: what is beyond the tolerance, then the largest distance relative to the norm, first.
        norms: all floating-point tensors as one vector, tied ones once; None if none was compared, or some need not be
            read, because both checkpoints have them at one place of one file, or beyond the range of float64.
        notes: decisions, in words.
        bytes_read: of both, by all parts.
        part: what became of a part of the comparison, in words.
        complete: all parts are in it. If not, no values are: `compared` is 0.
    """

    a: Side
    b: Side
    rtol: float
    atol: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: tuple[Change, ...]
    dtypes: tuple[Change, ...]
    not_compared: Mapping[str, str]
    compared: int
    identical: int
    tensors: tuple[TensorDiff, ...]
    norms: Norms | None
    notes: tuple[str, ...]
    bytes_read: int
    part: str = ""
    complete: bool = True

    @property
    def tolerant(self) -> bool:
        """True if a tolerance was given; dtypes may differ then."""
        return self.rtol > 0 or self.atol > 0

    @property
    def verdict(self) -> str:
        """``identical`` (every byte), ``equal`` (every value), ``within tolerance``, ``different``, ``incomplete``."""
        if not self.complete:
            return "incomplete"
        if self.only_a or self.only_b or self.shapes or self.not_compared or any(t.beyond for t in self.tensors):
            return "different"
        if self.dtypes and not self.tolerant:
            return "different"
        if self.identical == self.compared:
            return "identical"
        return "within tolerance" if self.dtypes or any(t.differing for t in self.tensors) else "equal"

    @property
    def max_abs(self) -> tuple[float, str]:
        """The largest absolute difference between finite values, and its tensor."""
        return _largest((t.max_abs, t.name) for t in self.tensors)

    @property
    def max_rel(self) -> tuple[float, str]:
        """The largest relative difference between finite values, and its tensor."""
        return _largest((t.max_rel, t.name) for t in self.tensors)

    @property
    def largest(self) -> tuple[float, str]:
        """`max_abs` of the weights; of all tensors if no weight differs. Counters go on by thousands."""
        weights = [t for t in self.tensors if t.weights and t.differing]
        return _largest((t.max_abs, t.name) for t in weights or self.tensors)

    @property
    def nonfinite(self) -> int:
        """Number of values that differ because one of the two is NaN or infinity."""
        return sum(t.nonfinite for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        facts = {"max_abs": self.max_abs[0], "max_rel": self.max_rel[0], "nonfinite": self.nonfinite}
        return {"verdict": self.verdict} | facts | asdict(self)


def _largest(found: Iterable[tuple[float | None, str]]) -> tuple[float, str]:
    """Return the largest value and its name; of equal ones the first."""
    numbers = ((value, name) for value, name in found if value is not None)
    return max(numbers, key=lambda pair: pair[0], default=(0.0, ""))


@takes(Comparison, Tolerance, SharedComparison, Drawing, Reading)
def diff(
    a: str | Path,
    b: str | Path,
    which: Comparison,
    tolerance: Tolerance,
    sharing: SharedComparison,
    drawing: Drawing,
    running: Reading,
) -> DiffReport:
    """Compare the weights of two checkpoints, of any formats and layouts, in bounded memory.

    Names are compared without wrapper prefixes, and floating-point values in float64; integers must be equal
    whatever the tolerance. NaN is equal to NaN. Packed codes are compared as bytes.

    Args:
        a, b: files, or folders with a sharded checkpoint.
        {options}

    Returns:
        The differences; ``verdict`` summarizes them.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`.
    """
    for name, value in vars(tolerance).items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise UsageError(f"`{name}={value!r}`: must be a number, 0 or more.")
    check_threads(running.threads)
    asked = asked_of(sharing)
    picture = Picture.of(drawing.plot, force=drawing.force)
    refuse_other_queries([a, b])
    headers = read_header(one_checkpoint(a)), read_header(one_checkpoint(b))
    if picture is not None:
        picture.check([stamp.path for header in headers for stamp in header.files])
    names = short_names([header.path for header in headers])
    chosen = (
        _select(headers[0], which.state),
        _select(headers[1], which.state if which.state_b is None else which.state_b),
    )
    for header, state in zip(headers, chosen, strict=True):
        refuse_computed(header, state)
    bare = unwrapped(chosen[0]), unwrapped(chosen[1])
    plan = _plan(
        renamed(chosen[0].tensors, bare[0]),
        renamed(chosen[1].tensors, bare[1]),
        headers=headers,
        same_place=chosen[0].path == chosen[1].path,
    )
    distances, words = _distances(plan, headers, tolerance, running, asked)
    found = [] if distances is None else [*zip(plan.pairs.items(), distances, strict=True)]
    differing = [_tensor_diff(spec, tied, how) for ((spec, _), tied), how in found if not how.same_bytes]
    report = DiffReport(
        a=_side(headers[0], names[0], chosen[0], bare[0]),
        b=_side(headers[1], names[1], chosen[1], bare[1]),
        rtol=float(tolerance.rtol),
        atol=float(tolerance.atol),
        only_a=plan.only_a,
        only_b=plan.only_b,
        shapes=tuple(plan.shapes),
        dtypes=tuple(plan.dtypes),
        not_compared=plan.not_compared,
        compared=0 if distances is None else plan.same + sum(len(tied) for tied in plan.pairs.values()),
        identical=0 if distances is None else plan.same + sum(len(tied) for (_, tied), how in found if how.same_bytes),
        tensors=tuple(sorted(differing, key=_rank)),
        norms=None if plan.same or distances is None else _in_all(plan, distances),
        notes=tuple(_remarks(chosen, names) if which.state == "auto" and which.state_b is None else ()),
        bytes_read=plan.nbytes,
        part=words,
        complete=distances is not None,
    )
    if picture is not None and report.complete:
        from .report_pictures import DIFF_SIZE, draw_diff

        picture.write(lambda figure: draw_diff(report, figure), DIFF_SIZE)
    return report


def _select(header: Header, state: str) -> StateDict:
    if not header.ranks:
        return select(header, state)
    return of_ranks(header, lambda rank: select_parts(rank, [state]))


def _side(header: Header, name: str, weights: StateDict, bare: Mapping[str, str]) -> Side:
    wrappers = tuple(prefixes(weights.tensors)) if any(old != new for old, new in bare.items()) else ()
    return Side(str(header.path), name, called(header, weights), len(weights.tensors), wrappers)


def _remarks(chosen: Sequence[StateDict], names: Sequence[str]) -> Iterator[str]:
    a, b = (weights.which for weights in chosen)
    if a != b:
        yield (
            f"Comparing {a} weights ({names[0]}) with {b} weights ({names[1]}): only one has an EMA. "
            "Choose with `state` and `state_b`."
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to read, and what is known from the headers.

    Attributes:
        pairs: two tensors to all of their names; each pair is read once.
        same: number of names whose two tensors are the same bytes of one file.
        nbytes: to read.
    """

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    pairs: dict[tuple[TensorSpec, TensorSpec], tuple[str, ...]] = field(default_factory=dict)
    same: int = 0
    shapes: list[Change] = field(default_factory=list)
    dtypes: list[Change] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for pair in self.pairs for spec in pair)


def _plan(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, headers: Sequence[Header], same_place: bool) -> _Plan:
    """Pair the tensors by name.

    Args:
        same_place: both sets of weights have the same path in their files.
    """
    # One file under two names is one file.
    known = {stamp.identity: stamp.path for stamp in headers[0].files}
    paths = {stamp.path: known.get(stamp.identity, stamp.path) for stamp in headers[1].files}
    twice = same_place and {stamp.identity for stamp in headers[1].files} == known.keys()
    plan = _Plan(tuple(name for name in a if name not in b), tuple(name for name in b if name not in a))
    same = 0
    for name, one in a.items():
        if name not in b:
            continue
        other = _at(b[name], paths)
        if one == other and (twice or isinstance(one, TensorSpec)):
            same += 1
        elif isinstance(one, UnsupportedTensor) or isinstance(other, UnsupportedTensor):
            reasons = dict.fromkeys(t.reason for t in (one, other) if isinstance(t, UnsupportedTensor))
            plan.not_compared[name] = " and ".join(reasons)
        else:
            _pair_off(plan, name, one, other)
    return replace(plan, same=same)


def _at(tensor: Tensor, paths: Mapping[Path, Path]) -> Tensor:
    if isinstance(tensor, UnsupportedTensor):
        return tensor
    path = paths.get(tensor.storage.path, tensor.storage.path)
    return replace(tensor, storage=replace(tensor.storage, path=path))


def _pair_off(plan: _Plan, name: str, a: TensorSpec, b: TensorSpec) -> None:
    if a.dtype is not b.dtype:
        plan.dtypes.append(Change(name, a.dtype.name, b.dtype.name))
    if a.shape != b.shape:
        plan.shapes.append(Change(name, str(list(a.shape)), str(list(b.shape))))
    elif not a.dtype.comparable(b.dtype):
        plan.not_compared[name] = f"{a.dtype.name} and {b.dtype.name}"
    else:
        plan.pairs[a, b] = (*plan.pairs.get((a, b), ()), name)


def _distances(
    plan: _Plan, headers: Sequence[Header], tolerance: Tolerance, running: Reading, asked: Asked | None
) -> tuple[Sequence[Distance] | None, str]:
    """Read the pairs, and compare them.

    Returns:
        See `diff_parts.distances`.
    """
    stamps = [stamp for header in headers for stamp in header.files]

    def work(asked: Asked) -> Sequence[Distance]:
        if not plan.pairs:
            return []
        show = None if asked.silent else running.on_progress
        with uncounted(show, LOADING_TORCH):
            from ..compute.compare import compare

        return compare(
            list(plan.pairs),
            **vars(tolerance),
            stamps=stamps,
            threads=running.threads,
            part=(asked.index, asked.count),
            on_progress=None if show is None else partial(show, Activity("comparing")),
        )

    if asked is None:
        return work(Asked()), ""
    from .diff_parts import distances
    from .share import job_of

    return distances(
        asked, list(plan.pairs), job_of(("diff", *vars(tolerance).values()), _described(plan), stamps), work
    )


def _described(plan: _Plan) -> Iterator[str]:
    """Write everything that the comparison depends on, apart from the payload."""
    from .share import described_spec

    yield repr((plan.only_a, plan.only_b, plan.same, plan.shapes, plan.dtypes, plan.not_compared))
    for (a, b), names in plan.pairs.items():
        yield f"\n{names} {a.shape} {described_spec(a)} {described_spec(b)}"


def _tensor_diff(spec: TensorSpec, names: tuple[str, ...], distance: Distance) -> TensorDiff:
    facts = asdict(distance)
    del facts["same_bytes"], facts["products"]
    known = distance.products if spec.dtype.averaged else None
    return TensorDiff(names[0], names[1:], spec.dtype.name, **facts, norms=Norms.of(known))


def _in_all(plan: _Plan, distances: Iterable[Distance]) -> Norms | None:
    found = [how.products for (spec, _), how in zip(plan.pairs, distances, strict=True) if spec.dtype.averaged]
    return Norms.of(added(found)) if found else None


def _rank(tensor: TensorDiff) -> tuple[Any, ...]:
    """Sort key: what is beyond the tolerance; what has no number for it; weights before counters; then by distance."""
    numbered = tensor.max_abs is not None and tensor.nonfinite == 0
    far = math.inf if tensor.norms is None else tensor.norms.relative  # beyond float64; or a counter
    return tensor.beyond == 0, numbered, not tensor.weights, -far, -(tensor.max_abs or 0.0), tensor.name
