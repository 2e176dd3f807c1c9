"""Fixing prefixes: names of tensors change, and the kernel copies the payload."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from ..checkpoints.optimizers import is_optimizer
from ..checkpoints.prefixes import NewNames, StateNames, plan_names
from ..checkpoints.state_dicts import state_dicts
from ..compute.progress import Activity, counted
from ..errors import CorruptError, LayoutError, ReadError, UsageError, WriteError
from ..formats import holds_weights, read_header
from ..formats.format import Renaming
from ..formats.header import Header
from ..formats.sharded import stays_inside
from ..series.paths import one_checkpoint
from ..storage.source import LOCAL, Stamp, read_failed, stamp_at, store_of
from ..storage.splice import Span, Splice
from ..storage.staged import is_writable, staged_files
from .option_groups import takes
from .options import Prefixes, RenamedOutput, Running
from .outputs import Target, check_same_format, check_target, on_this_machine
from .reports import Report
from .run import copy, run, told_of_sync


@dataclass(frozen=True, slots=True, repr=False)
class PrefixReport(Report):
    """What a change of names does; the plan before the work, and the result after it.

    Attributes:
        path, out: the checkpoint, and the new one.
        in_place: the new one replaces the old.
        format: of both.
        states: each state dict inside.
        nbytes: size of the new checkpoint.
        notes: decisions and warnings, in words.
        written: True once the new checkpoint is there.
    """

    path: str
    out: str
    in_place: bool
    format: str
    states: tuple[StateNames, ...]
    nbytes: int
    notes: tuple[str, ...] = ()
    written: bool = False

    @property
    def changed(self) -> bool:
        """True if any name changes."""
        return any(state.example for state in self.states)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self) | {"changed": self.changed}


@takes(Prefixes, RenamedOutput, Running)
def fix_prefix(path: str | Path, prefixes: Prefixes, output: RenamedOutput, running: Running) -> PrefixReport:
    """Remove wrapper prefixes from the names in a checkpoint; everything else is kept byte for byte.

    Each state dict is handled separately: raw weights, averaged weights, any dict of names to tensors, but no
    optimizer. Without `strip` and `add`, the prefixes of `prefixes.WRAPPERS` are removed, as in `average`. Several
    prefixes are applied one after the other.

    Args:
        path: the checkpoint, which is replaced if `out` is not given.
        {options}

    Returns:
        What was done. If no name changes, nothing is written, or, with `out`, a copy.

    Raises:
        CkptError: one of the errors of `ckpt_tools.errors`; the checkpoint is as it was then.
    """
    for name, given in (("strip", prefixes.strip), ("add", prefixes.add)):
        if isinstance(given, str):
            raise UsageError(f"`{name}` takes a list of prefixes, such as ['model.'], not {given!r}.")
        if not all(isinstance(prefix, str) and prefix for prefix in given):
            raise UsageError(f"`{name}` takes prefixes such as 'model.', not {given!r}.")
    source = one_checkpoint(path)
    header = read_header(source)
    notes: list[str] = []
    in_place = output.out is None
    if in_place and store_of(source) is not LOCAL:
        raise WriteError(f"{source}: is not a local file, so it cannot be replaced. Give `out`.")
    sharded = header.format.folder
    if output.out is not None:
        on_this_machine(output.out, "out")
        chosen = Target.of(output.out, Target(header.path, folder=sharded or header.in_folder))
        target, folder = chosen.path, sharded or (header.in_folder and chosen.format is not header.format.written_as)
        check_same_format(header, chosen, folder=folder)
    else:
        target, folder = header.path if sharded else header.files[0].path, sharded
    stamps = list(header.files)
    try:
        changes, splices = _renamed(header, prefixes.strip, prefixes.add, notes)
        if folder and not in_place:
            stamps += _add_companions(header, splices, notes)
    except (FileNotFoundError, BadZipFile, JSONDecodeError, struct.error) as error:
        raise CorruptError(f"{source}: changed while it was read ({error}). Try again when it is whole.") from error
    except OSError as error:
        raise read_failed(error.filename or source, error.strerror) from error
    nbytes = sum(part.size for part in splices.values())
    idle = in_place and not any(change.names for change in changes)
    if in_place and not idle and target.stat().st_nlink > 1 and not sharded:
        notes.append(_other_names(target))
    report = PrefixReport(
        path=str(source),
        out=str(target),
        in_place=in_place,
        format=header.format.name,
        states=tuple(change.report for change in changes),
        nbytes=nbytes,
        notes=tuple(notes),
    )

    def check() -> None:
        if in_place:
            _check_in_place(header, target, nbytes)
            return
        if target.exists() and any(target.samefile(stamp.path) for stamp in header.files):
            raise WriteError(f"{target}: is the checkpoint itself. Omit `out` to replace it, or choose another name.")
        inputs = [*([header.files[0].path.parent] if folder else []), *(stamp.path for stamp in header.files)]
        check_target(target, inputs, nbytes=nbytes, force=output.force, names=splices if folder else None)

    def work(plan: PrefixReport) -> PrefixReport:
        names = list(splices) if folder else None
        sizes = [each.size for each in splices.values()]
        tell = counted(running.on_progress, Activity("copying"), sum(each.copied for each in splices.values()))
        on_sync = told_of_sync(running.on_progress, len(sizes))
        with staged_files(target, names, sizes, force=output.force or in_place, on_sync=on_sync) as fds:
            copy(list(splices.values()), fds, stamps, tell, in_place=in_place)
            if in_place:
                _check_same(target, stamps[0])
        return plan

    return run(report, running) if idle else run(report, running, check=check, work=work)


def _renamed(
    header: Header, strip: Sequence[str], add: Sequence[str], notes: list[str]
) -> tuple[list[NewNames], dict[str, Splice]]:
    """Plan the names of a checkpoint, and from them its files by name."""
    named = header.format.rename(header)
    tree = named.tree
    states = state_dicts(tree)
    if not states:
        raise LayoutError(f"{header.path}: {_no_names(tree)}")
    changes = plan_names(states, strip, add, where=str(header.path), notes=notes)
    if not any(change.names for change in changes):
        return changes, {stamp.path.name: _copy(stamp.path) for stamp in header.files}
    pairs = zip(states.values(), changes, strict=True)
    splices = named.renamed([Renaming(state, change.names, change.modules) for state, change in pairs])
    return changes, {part.source.name: part for part in splices}


def _copy(path: Path) -> Splice:
    return Splice(path, (Span(0, stamp_at(path).nbytes),))


def _no_names(tree: Any) -> str:
    if is_optimizer(tree):
        return "is the state of an optimizer, which has no wrapper prefixes. The weights are in another file."
    return "holds no dict of names to tensors. Save the model's state_dict(), not the model."


def _add_companions(header: Header, splices: dict[str, Splice], notes: list[str]) -> list[Stamp]:
    """Add the other files of the folder, but no other weights; return their stamps."""
    left_out, stamps = [], []
    store, home = store_of(header.path), header.files[0].path.parent
    for path in (home / name for name in store.names(home)):
        if path.name in splices or path.name.startswith("."):
            continue
        if not store.is_file(path) or holds_weights(path.name):
            left_out.append(path.name)
            continue
        if not stays_inside(path):
            left_out.append(f"{path.name} (a link out of its folder)")
            continue
        try:
            stamps.append(stamp_at(path))
        except ReadError as error:
            raise ReadError(f"{error} It belongs in the new folder.") from error
        splices[path.name] = _copy(path)
    if left_out:
        notes.append(f"Not copied into the new folder: {', '.join(left_out[:6])}{' ...' if left_out[6:] else ''}.")
    return stamps


def _check_in_place(header: Header, target: Path, nbytes: int) -> None:
    if header.format.folder:
        raise WriteError(
            f"{header.path}: no single rename can replace a folder of shards. Say where the new one goes, with `out`."
        )
    if target.is_symlink():
        raise WriteError(
            f"{target}: is a symbolic link. Name the file itself, {target.resolve()}, or a new one with `out`."
        )
    if not is_writable(target):
        raise WriteError(
            f"{target}: cannot be replaced (read-only). Allow it (chmod u+w), or name a new file with `out`."
        )
    check_target(target, [], nbytes=nbytes, force=True, names=None)


def _other_names(target: Path) -> str:
    others = target.stat().st_nlink - 1
    return f"{target} has {others} more {'name' if others == 1 else 'names'} (hard links); there the old file stays."


def _check_same(path: Path, stamp: Stamp) -> None:
    """Refuse to replace a file that is not the one that was read."""
    try:
        same = stamp_at(path) == stamp
    except ReadError:
        same = False
    if not same:
        raise CorruptError(f"{path}: was replaced by another file meanwhile, which stays. Try again.")
