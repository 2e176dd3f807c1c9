"""Stripping: a checkpoint without its training state; everything else is kept."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from ..checkpoints.layouts import StateDict, select, states
from ..checkpoints.layouts.layout import dotted
from ..checkpoints.layouts.schedule_free import evaluation_note, is_computed, refuse_computed
from ..checkpoints.optimizers import flat_training_state, is_optimizer
from ..checkpoints.training_state import any_tensor, leads, nodes, other_weights, stripped, training_state
from ..errors import CkptError, LayoutError, SeriesError, UnsupportedError, UsageError, WriteError
from ..formats import read_header
from ..formats.format import Writing
from ..formats.header import Header
from ..formats.pickle_objects import Inert
from ..formats.tree import put, tensors_in
from ..series.paths import as_path, one_checkpoint, training_state_beside
from ..storage.source import LOCAL, stamp_at, store_of
from ..tensors import Storage, TensorSpec, UnsupportedTensor
from .asked import asked_of
from .assembly import Assembly, nested
from .checksums import with_place
from .option_groups import takes
from .options import KeptState, Moving, Sharing, StrippedOutput
from .outputs import Target, check_same_format, named_after
from .provenance import input_record, provenance
from .reports import Report
from .run import check_output, manners, produce, run

_NO_WEIGHTS = "holds training state alone, and no weights."


@dataclass(frozen=True, slots=True)
class Stripped:
    """An entry that is removed.

    Attributes:
        place: dotted path.
        tensors: number of tensors in it.
        nbytes: of storages that no other entry uses.
    """

    place: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True, repr=False)
class StripReport(Report):
    """What is stripped from a checkpoint; the plan before the work, and the result after it.

    Attributes:
        path, out: the checkpoint, and the new one.
        kept: the sets of weights that are kept.
        beside: other entries at the top level that are kept.
        entries: what is removed, the largest first.
        compacted: bytes of storages that belong to no tensor, such as the rest of a storage behind a view.
        dropped: entries that cannot be written because they are not plain data, by dotted path.
        notes: decisions and warnings, in words.
        nbytes: size of the checkpoint.
        bytes_read, bytes_written: of the job; 0 where there is nothing to strip.
        part: what became of a part of the job, in words.
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
    part: str = ""
    written: bool = False

    @property
    def anything(self) -> bool:
        """True if there is something to strip."""
        return bool(self.entries) or self.compacted > 0


@takes(KeptState, StrippedOutput, Sharing, Moving)
def strip(path: str | Path, which: KeptState, output: StrippedOutput, sharing: Sharing, running: Moving) -> StripReport:
    """Write a checkpoint without optimizers, schedulers, scalers, random states and the like.

    All sets of weights are kept byte for byte, with ``arch``, ``epoch``, ``args`` and all other entries.

    Args:
        path: a torch file or a DCP folder. Safetensors and folders of shards have nothing to strip.
        {options}

    Returns:
        What was stripped. If there is nothing to strip, nothing is written.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; nothing is written then.
    """
    polite = manners(running)
    asked = asked_of(sharing, sign_off=output.sign_off)
    header = read_header(one_checkpoint(path))
    report, assembly = planned(header, _target(header, output.out), which, output)
    if assembly is None:
        return run(report, running)
    more = {"doing": "stripping", "inputs": [header.path], "asked": asked, "allow_nonfinite": True, **polite}
    return produce(report, assembly, header.files, output, running, **more)


@takes(KeptState, StrippedOutput, Sharing, Moving)
def check_together(
    paths: Sequence[str | Path], which: KeptState, output: StrippedOutput, sharing: Sharing, running: Moving
) -> str | None:
    """Plan to strip several checkpoints, each into a file of its own, before the first is written.

    Returns:
        `out` for each of them.

    Raises:
        UsageError: an option goes with one checkpoint alone.
        CkptError: some cannot be stripped; names all of them.
        WriteError: one would be written twice, or take the place of another.
    """
    for name, value in (vars(sharing) | {"sign_off": output.sign_off}).items():
        if value:
            raise UsageError(f"`{name}` goes with one checkpoint.")
    out = None if output.out is None else str(output.out)
    if out is not None:
        if not Target.of(out).folder:
            raise UsageError(f"`out={out!r}`: {len(paths)} checkpoints go into a folder, such as `out='stripped/'`.")
        out = f"{out.rstrip('/')}/"
        folder = as_path(out)
        if store_of(folder) is LOCAL and not folder.exists() and not running.dry_run:
            raise WriteError(f"`out`: there is no folder {folder}. Make it first: mkdir -p {folder}")
    stripped_ones: set[Path] = set()  # what an earlier run has stripped is an input again, with nothing to lose
    targets: Counter[Path] = Counter()
    faults: list[CkptError] = []
    for path in paths:
        try:
            header = read_header(one_checkpoint(path))
            target = _target(header, out)
            _, assembly = planned(header, target, which, output)
            if assembly is None:
                continue
            if not running.dry_run:  # which says itself what would be refused
                own = [header.path, *(stamp.path for stamp in header.files)]
                check_output(assembly, own, force=output.force)
        except CkptError as error:
            faults.append(error)
        else:
            stripped_ones.add(header.path.resolve())
            targets[target.path] += 1
    if len(faults) == 1:
        raise faults[0]
    if faults:
        said = [str(fault).split(". ")[0].rstrip(".") for fault in faults[:10]]
        more = f", and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise SeriesError(
            f"{len(faults)} of {len(paths)} checkpoints cannot be stripped, and none was: {'; '.join(said)}{more}."
        )
    for path, times in targets.items():
        if times > 1:
            raise WriteError(f"{path}: would be written twice. Strip checkpoints with the same name one at a time.")
        if path.resolve() in stripped_ones:
            raise WriteError(f"{path}: is one of the inputs, which stay as they are. Choose another folder with `out`.")
    return out


def _target(header: Header, out: str | Path | None) -> Target:
    usual = named_after(header, "-stripped")
    return usual if out is None else Target.of(out, usual)


def planned(
    header: Header, target: Target, which: KeptState, output: StrippedOutput
) -> tuple[StripReport, Assembly | None]:
    """Plan what is stripped; see `strip`.

    Returns:
        (the report; what is written, None if there is nothing to strip)
    """
    if is_optimizer(header.tree):
        raise LayoutError(f"{header.path}: {_NO_WEIGHTS}")
    if not header.format.rewritten:
        check_same_format(header, target, folder=header.copied_to_folder)
    found = states(header)
    chosen = None if which.state is None else select(header, which.state)
    sets = list(found.values()) if chosen is None else [chosen]
    notes: list[str] = []
    tops = [(name,) for name in header.tree] if header.ranks else [()]
    gone = list(training_state(header.tree, sets, notes, alone=chosen is not None, tops=tops))
    if chosen is not None:
        gone += other_weights(header, chosen, found.values(), gone, notes)
    tree = stripped(header.tree, gone)
    tree, flat = _without_flat(tree, sets)
    if chosen is not None and is_computed(chosen):
        tree = _with_sums(header, tree, chosen)
        notes += [note for note in (evaluation_note(chosen),) if note is not None]
    report = StripReport(
        path=str(header.path),
        out=str(target.path),
        kept=tuple(each.label for each in sets),
        beside=_beside(tree, sets),
        entries=tuple(sorted((*_entries(header.tree, tree, gone), *flat), key=lambda entry: -entry.nbytes)),
        compacted=_unseen_bytes(tree),
        dropped=(),
        notes=tuple(notes),
        nbytes=header.nbytes,
    )
    if not report.anything:
        return replace(report, notes=(*report.notes, *_beside_weights(header))), None
    _check_kept(header, tree, sets)
    check_same_format(header, target, folder=header.copied_to_folder)
    said = provenance(
        "strip",
        {"state": which.state},
        state=" and ".join(report.kept) or "all weights",
        stripped=[entry.place for entry in report.entries],
        input=input_record(header),
    )
    writing = Writing(name=target.name, provenance=said, like=header)
    assembly = nested(tree, writing, target=target.path, format=header.format.written_as)
    assembly = with_place(assembly, output.write_checksums)
    report = replace(
        report,
        beside=tuple(place for place in report.beside if place not in assembly.dropped),
        dropped=assembly.dropped,
        bytes_read=assembly.bytes_read,
        bytes_written=assembly.nbytes,
    )
    return report, assembly


def _beside_weights(header: Header) -> Iterator[str]:
    """Report training state in files of its own, which stay: no input is changed."""
    files = training_state_beside(header.path) if header.in_folder else []
    if files:
        said = ", ".join(f"{path.name} ({stamp_at(path).nbytes:,} bytes)" for path in files[:6])
        more = f" and {len(files) - 6} more" if len(files) > 6 else ""
        yield f"The training state is in files beside the weights, which you may delete: {said}{more}."


def _with_sums(header: Header, tree: Any, chosen: StateDict) -> Any:
    """Copy a tree with the averages of a schedule-free optimizer in the place of the weights that it trains."""
    if chosen.keys is None:
        refuse_computed(header, chosen)
    keys = chosen.keys or {}
    old = reduce(getitem, chosen.path, tree)
    weights: Any = OrderedDict(old) | {keys[name]: tensor for name, tensor in chosen.tensors.items()}
    if (metadata := getattr(old, "_metadata", None)) is not None:
        weights._metadata = metadata
    return put(tree, chosen.path, weights)


def _beside(tree: Any, sets: Iterable[StateDict]) -> tuple[str, ...]:
    weights = {each.path[0] for each in sets if each.path}
    nested = isinstance(tree, dict) and (weights or not any(True for _ in sets))
    return tuple(dotted([key]) for key in tree if key not in weights) if nested else ()


def _without_flat(tree: Any, sets: Iterable[StateDict]) -> tuple[Any, list[Stripped]]:
    """Copy a tree without training state that has names among those of weights, and say what went."""
    entries: list[Stripped] = []
    for path in dict.fromkeys(each.path for each in sets):
        node = reduce(getitem, path, tree)
        found = flat_training_state(node) if isinstance(node, dict) else {}
        if not found:
            continue
        gone = {name for names in found.values() for name in names}
        kept: Any = OrderedDict((key, value) for key, value in node.items() if key not in gone)
        if (metadata := getattr(node, "_metadata", None)) is not None:
            kept._metadata = metadata
        counted = _storages(kept)
        for head, names in found.items():
            own = _storages({name: node[name] for name in names}) - counted
            counted |= own
            tensors = sum(1 for _ in tensors_in([node[name] for name in names]))
            place = dotted((*path, head if [head] == names else f"{head}.*"))
            entries.append(Stripped(place, tensors, sum(storage.nbytes for storage in own)))
        tree = put(tree, path, kept)
    return tree, entries


def _specs(tree: Any) -> set[TensorSpec]:
    """Return the specs of the tensors in a tree; of a chunked tensor, those of its chunks."""
    found = (tensor for _, tensor in tensors_in(tree) if isinstance(tensor, TensorSpec))
    return {part for tensor in found for _, part in tensor.as_chunks}


def _storages(tree: Any) -> set[Storage]:
    return {spec.storage for spec in _specs(tree)}


def _entries(before: Any, after: Any, gone: Iterable[tuple[Any, ...]]) -> tuple[Stripped, ...]:
    counted = _storages(after)
    entries = []
    for path in gone:
        node = reduce(getitem, path, before)
        own = _storages(node) - counted
        counted |= own
        tensors = sum(1 for _ in tensors_in(node))
        entries.append(Stripped(dotted(path), tensors, sum(storage.nbytes for storage in own)))
    return tuple(sorted(entries, key=lambda entry: -entry.nbytes))


def _unseen_bytes(tree: Any) -> int:
    """Count the bytes saved by writing each tensor by itself; negative if tensors overlap without being tied."""
    specs = _specs(tree)
    return sum(storage.nbytes for storage in {spec.storage for spec in specs}) - sum(spec.nbytes for spec in specs)


def _check_kept(header: Header, tree: Any, sets: Sequence[StateDict]) -> None:
    """Refuse a checkpoint that cannot be written again, or that would be left without weights."""
    if not header.format.nests or header.in_folder != header.format.folder:
        raise UnsupportedError(f"{header.path}: only torch files and DCP folders can be stripped. See `convert(...)`.")
    if not any_tensor(tree):
        raise LayoutError(f"{header.path}: {_NO_WEIGHTS}")
    for path, tensor in tensors_in(tree):
        if isinstance(tensor, UnsupportedTensor):
            raise UnsupportedError(f"{header.path}: '{dotted(path)}' is {tensor.reason}, which cannot be written here.")
    for path, node in nodes(tree):
        if not isinstance(node, Inert) or (path and str(path[-1]).endswith("_extra_state")):
            continue
        if any_tensor(node) or any(each.path and leads(each.path, path) for each in sets):
            raise LayoutError(
                f"{header.path}: '{dotted(path) or 'the whole file'}' is a pickled object ({type(node).global_name}), "
                "which cannot be written, and it may contain weights. Take them out first: `convert(to='plain')`."
            )
