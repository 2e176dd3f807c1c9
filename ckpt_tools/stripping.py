"""Stripping: a checkpoint without what only a running training needs.

What goes is a set of paths in the object tree; all else stays as it is, and no set of weights is among what goes.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .assembly import check_same_format, named_after, nested
from .errors import LayoutError, UnsupportedError
from .formats import read_header
from .formats.header import Header
from .formats.staged import check_replaceable, check_target
from .formats.unpickle import Inert, tensors_in
from .keys import unwrap
from .layouts import StateDict, dotted, is_optimizer, looks_like_training_state, select, states
from .provenance import provenance
from .tensors import Storage, Tensor, TensorSpec, UnsupportedTensor
from .writing import only_noted, write

_Path = tuple[Any, ...]

# Averages that a callback or an optimizer keeps; not `exp_avg`, which is Adam's.
_AVERAGES = re.compile(r"(.*_)?(ema|swa|shadow|averaged?)(_(?!sq$).*)?|.*average_model.*")
_MASTERS = re.compile(r".*(fp32|master|float32).*")
_NO_WEIGHTS = "holds nothing but training state; no weights would be left."
_DEEPEST = 8
"""Levels at which weights are looked for in training state; a hostile file may have any number."""


@dataclass(frozen=True, slots=True)
class Stripped:
    """An entry that goes.

    Attributes:
        place: dotted path.
        tensors: how many are in it.
        nbytes: of storages that nothing else needs.
    """

    place: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StripReport:
    """What is stripped from a checkpoint; the same before the work (the plan) and after it.

    Attributes:
        path, out: the checkpoint, and where the new one goes.
        kept: the sets of weights that stay.
        beside: the other entries that stay, at the top level.
        entries: what goes, the largest first.
        compacted: bytes of storages that no tensor shows, such as the rest of what a view was cut from.
        dropped: what stays no more because it is no plain data, by dotted path.
        notes: decisions worth knowing.
        nbytes: size of the checkpoint.
        bytes_read, bytes_written: of the job; 0 where there is nothing to strip.
        written: True once the new checkpoint is there.
    """

    path: str
    out: str
    kept: tuple[str, ...]
    beside: tuple[str, ...]
    entries: tuple[Stripped, ...]
    compacted: int
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    nbytes: int
    bytes_read: int = 0
    bytes_written: int = 0
    written: bool = False

    @property
    def anything(self) -> bool:
        """True if there is something to strip."""
        return bool(self.entries) or self.compacted > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)


def strip(
    path: str | Path,
    *,
    out: str | Path | None = None,
    state: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[StripReport], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> StripReport:
    """Write a checkpoint without optimizers, schedulers, scalers, random states and the like.

    All sets of weights stay, byte for byte, wherever they stand; so do ``arch``, ``epoch``, ``args`` and all else.

    Args:
        path: a file, or a folder of DCP; safetensors and folders of shards have nothing to strip, and are told so.
        out: target; the checkpoint's name with ``-stripped`` if not given.
        state: keep only these weights: ``auto`` (the EMA where there is one), ``raw``, ``ema``, or a dotted path.
        force: replace the target if it exists.
        dry_run: plan and check, write nothing.
        on_plan: called with the plan before the work.
        on_progress: called in this thread with (bytes done, bytes in all).

    Returns:
        What was stripped; with nothing to strip, nothing is written.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    header = read_header(Path(path))
    if is_optimizer(header.tree):
        raise LayoutError(f"{header.path}: {_NO_WEIGHTS}")
    target = Path(out) if out is not None else named_after(header.path, "-stripped")
    found = states(header)
    chosen = None if state is None else select(header, state)
    sets = list(found.values()) if chosen is None else [chosen]
    notes: list[str] = []
    gone = list(_training_state(header.tree, sets, notes, alone=chosen is not None))
    if chosen is not None:
        gone += _other_weights(header, chosen, found.values(), gone, notes)
    tree = _without(header.tree, gone)
    report = StripReport(
        path=str(header.path),
        out=str(target),
        kept=tuple(each.label for each in sets),
        beside=_beside(tree, sets),
        entries=_entries(header.tree, tree, gone),
        compacted=_unseen_bytes(tree),
        dropped=(),
        notes=tuple(notes),
        nbytes=header.nbytes,
    )
    if not report.anything:
        if on_plan is not None:
            on_plan(report)
        return report
    _check_kept(header, tree, sets)
    check_same_format(header, target)
    said = provenance(
        "strip",
        {"state": state},
        state=" and ".join(report.kept) or "all weights",
        stripped=[entry.place for entry in report.entries],
        input={"name": header.path.name, "size": header.nbytes, "made": header.provenance},
    )
    assembly = nested(tree, target=target, provenance=said, folder=header.path.is_dir())
    with only_noted(notes, dry_run):
        inputs = [header.path, *(stamp.path for stamp in header.files)]
        check_target(target, inputs, nbytes=assembly.nbytes, force=force, folder=assembly.folder)
        if assembly.folder:
            check_replaceable(target, assembly.names)
    report = replace(
        report,
        dropped=assembly.dropped,
        notes=tuple(notes),
        bytes_read=assembly.bytes_read,
        bytes_written=assembly.nbytes,
    )
    if on_plan is not None:
        on_plan(report)
    if dry_run:
        return report
    total = report.bytes_read + report.bytes_written
    write(
        assembly, header.files, force=force, allow_nonfinite=True,
        on_progress=None if on_progress is None else lambda moved: on_progress(moved, total),
    )  # fmt: skip
    return replace(report, written=True)


def _training_state(tree: Any, sets: Sequence[StateDict], notes: list[str], *, alone: bool) -> Iterator[_Path]:
    """Find what goes: at the top level, and in checkpoints that stand one level below.

    Args:
        sets: that stay, wherever they stand.
        alone: of weights, nothing stays but these.
    """
    if not isinstance(tree, dict):
        return
    # A flat state dict may have a module that is called like a scheduler.
    flat = any(not each.path for each in sets)
    for key, value in tree.items():
        if isinstance(value, Tensor) and flat:
            continue
        if _goes(key, value):
            yield from _all_but_weights((key,), value, sets, notes, alone=alone)
        elif isinstance(value, dict) and any(map(is_optimizer, _and_one_below(value.values()))):
            for inner, below in value.items():
                if _goes(inner, below):
                    yield from _all_but_weights((key, inner), below, sets, notes, alone=alone)


def _goes(key: Any, value: Any) -> bool:
    """True for training state that takes room: a number, such as the metric, is worth keeping."""
    empty = isinstance(value, (dict, list, tuple, set)) and not value
    plain = value is None or isinstance(value, (bool, int, float, str))
    return not (empty or plain or key == "metric") and looks_like_training_state(key, value)


def _and_one_below(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield value
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value


def _all_but_weights(
    path: _Path, value: Any, sets: Sequence[StateDict], notes: list[str], *, alone: bool
) -> Iterator[_Path]:
    """Yield the path of an entry; where weights stand in it, the paths of all that stands around them."""
    known = [each.path for each in sets if each.path[: len(path)] == path]
    # What stands beside a set that a layout knows belongs to it, such as its counter.
    kept = [place[: max(len(path) + 1, len(place) - 1)] for place in known]
    if not alone:
        inside = [(*path, *inner) for inner in _weights_in(value, sets)]
        kept += [place for place in inside if not any(_leads(outer, place) for outer in kept)]
    if kept:
        notes.append(f"Weights stand in '{dotted(path)}', and stay there: {', '.join(map(dotted, kept))}.")
    masters = next((inner for inner in _paths(value) if _MASTERS.fullmatch(str(inner[-1]))), None)
    if masters is not None:
        place = dotted((*path, *masters))
        notes.append(f"'{place}' looks like a float32 copy of the weights, which optimizers keep. It goes, too.")
    yield from _around(path, value, kept)


def _leads(path: _Path, to: _Path) -> bool:
    return to[: len(path)] == path


def _around(path: _Path, value: Any, kept: Collection[_Path]) -> Iterator[_Path]:
    if path in kept:
        return
    if not any(_leads(path, to) for to in kept):
        yield path
        return
    for key, child in _children(value):
        yield from _around((*path, key), child, kept)


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _nodes(value: Any) -> Iterator[tuple[_Path, Any]]:
    """Walk dicts and lists, but not what torch's optimizers keep for each parameter."""
    seen: set[int] = set()
    stack: list[tuple[_Path, Any]] = [((), value)]
    while stack:
        path, node = stack.pop()
        yield path, node
        if id(node) in seen:
            continue
        seen.add(id(node))
        own = ("state", "param_groups") if is_optimizer(node) else ()
        if len(path) < _DEEPEST:
            stack += [((*path, key), child) for key, child in _children(node) if key not in own]


def _paths(value: Any) -> Iterator[_Path]:
    return (path for path, node in _nodes(value) if path and any(True for _ in tensors_in(node)))


def _weights_in(value: Any, sets: Iterable[StateDict]) -> list[_Path]:
    """Find weights in training state: dicts with the names of the weights, and what is called an average."""
    known = [_bare(each.tensors) for each in sets]
    found: list[_Path] = []
    for path, node in _nodes(value):
        if any(_leads(outer, path) for outer in found):
            continue
        called = bool(path) and isinstance(path[-1], str) and _AVERAGES.fullmatch(path[-1]) is not None
        if _has_names_of(node, known) or (called and any(True for _ in tensors_in(node))):
            found.append(path)
    return found


def _bare(names: Iterable[str]) -> set[str]:
    names = list(names)
    return set(names) | set(unwrap(names).values())


def _has_names_of(node: Any, known: Iterable[set[str]]) -> bool:
    """True for a dict of tensors that has at least half of the names of some weights."""
    if not isinstance(node, dict):
        return False
    names = [key for key, value in node.items() if isinstance(key, str) and isinstance(value, Tensor)]
    return bool(names) and any(2 * len(_bare(names) & weights) >= len(weights) > 0 for weights in known)


def _other_weights(
    header: Header, chosen: StateDict, sets: Iterable[StateDict], gone: Sequence[_Path], notes: list[str]
) -> Iterator[_Path]:
    """Find the sets of weights that were not chosen: those of the layout, and dicts with the same names."""
    own = set(chosen.tensors.values())
    found = []
    for each in sets:
        found.append(each.path)
        if each.path == chosen.path and not own.issuperset(each.tensors.values()):
            notes.append(
                f"{each.label} stands in the same dict as {chosen.label}, and stays. "
                "To take one of them out: ckpt convert --to plain."
            )
    found += [path for path, node in _nodes(header.tree) if _has_names_of(node, [_bare(chosen.tensors)])]
    elsewhere = own.difference(tensor for _, tensor in tensors_in(_at(header.tree, chosen.path)))
    for path in dict.fromkeys(found):
        if _leads(path, chosen.path) or _leads(chosen.path, path) or any(_leads(other, path) for other in gone):
            continue
        if elsewhere.isdisjoint(tensor for _, tensor in tensors_in(_at(header.tree, path))):
            yield path
        else:
            notes.append(f"'{dotted(path)}' stays: {chosen.label} takes tensors from it that it lacks itself.")


def _at(tree: Any, path: _Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _without(node: Any, gone: Collection[_Path], path: _Path = ()) -> Any:
    """Copy a tree as far as something in it goes; the rest is shared."""
    if not any(_leads(path, other) for other in gone):
        return node
    kept = [(key, _without(child, gone, (*path, key))) for key, child in _children(node) if (*path, key) not in gone]
    if isinstance(node, (list, tuple)):
        return type(node)(child for _, child in kept)
    copy: Any = OrderedDict(kept) if isinstance(node, OrderedDict) else dict(kept)
    if (metadata := getattr(node, "_metadata", None)) is not None:
        copy._metadata = metadata
    return copy


def _beside(tree: Any, sets: Iterable[StateDict]) -> tuple[str, ...]:
    weights = {each.path[0] for each in sets if each.path}
    nested = isinstance(tree, dict) and (weights or not any(True for _ in sets))
    return tuple(dotted([key]) for key in tree if key not in weights) if nested else ()


def _specs(tree: Any) -> set[TensorSpec]:
    """Collect what is stored of the tensors in a tree: of a chunked one, its chunks."""
    found = (tensor for _, tensor in tensors_in(tree) if isinstance(tensor, TensorSpec))
    return {part for tensor in found for _, part in tensor.parts}


def _storages(tree: Any) -> set[Storage]:
    return {spec.storage for spec in _specs(tree)}


def _entries(before: Any, after: Any, gone: Iterable[_Path]) -> tuple[Stripped, ...]:
    counted = _storages(after)
    entries = []
    for path in gone:
        node = _at(before, path)
        own = _storages(node) - counted
        counted |= own
        tensors = sum(1 for _ in tensors_in(node))
        entries.append(Stripped(dotted(path), tensors, sum(storage.nbytes for storage in own)))
    return tuple(sorted(entries, key=lambda entry: -entry.nbytes))


def _unseen_bytes(tree: Any) -> int:
    """Count what writing each tensor by itself gains; negative where tensors overlap without being the same."""
    specs = _specs(tree)
    return sum(storage.nbytes for storage in {spec.storage for spec in specs}) - sum(spec.nbytes for spec in specs)


def _check_kept(header: Header, tree: Any, sets: Sequence[StateDict]) -> None:
    """Refuse what could not be written again, or would leave nothing worth writing."""
    if header.format != "dcp" and (not header.format.startswith("torch") or header.path.is_dir()):
        raise UnsupportedError(f"{header.path}: only torch files and folders of DCP are stripped. See ckpt convert.")
    if not any(True for _ in tensors_in(tree)):
        raise LayoutError(f"{header.path}: {_NO_WEIGHTS}")
    for path, tensor in tensors_in(tree):
        if isinstance(tensor, UnsupportedTensor):
            raise UnsupportedError(f"{header.path}: '{dotted(path)}' is {tensor.kind}, which cannot be written here.")
    for path, node in _nodes(tree):
        if not isinstance(node, Inert) or (path and str(path[-1]).endswith("_extra_state")):
            continue
        if any(True for _ in tensors_in(node)) or any(each.path and _leads(each.path, path) for each in sets):
            raise LayoutError(
                f"{header.path}: '{dotted(path) or 'the whole file'}' is a pickled object ({type(node).global_name}), "
                "which is not written again, and weights may be in it. Take them out first: ckpt convert --to plain."
            )
