"""Assembly: from the tensors of the average to the files that hold them.

A .pth keeps the container that the last checkpoint had, without what only a running training needs; a .safetensors is
flat; a folder is sharded, or has a file for each rank. All of it is planned from headers; nothing is written here.
"""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from ..checkpoints.layouts.counterparts import nameless_averages
from ..checkpoints.layouts.layout import StateDict, dotted
from ..checkpoints.optimizers import find_optimizers, looks_like_training_state
from ..checkpoints.training_state import leads
from ..errors import LayoutError, UnsupportedError, UsageError
from ..formats import without_collector
from ..formats.file_plan import FilePlan, OutTensor, Terms, whole_file
from ..formats.format import Format, Writing
from ..formats.header import PROVENANCE, Header
from ..formats.json_file import read_json
from ..formats.pickle_write import plain
from ..formats.ranks import further_files
from ..formats.tree import branches, entries, put, tensors_in, walk, without
from ..storage.source import stamp_at
from ..tensors import Tensor, TensorSpec, UnsupportedTensor
from .companions import companions
from .outputs import Target, check_same_format, check_shard_size


@dataclass(frozen=True, eq=False)
class Assembly:
    """An output, laid out.

    Attributes:
        target: the file or folder.
        files: plans, in the order of writing; the index of a sharded output comes last.
        folder: True for shards; False for the one file.
        companions: small files to copy into a folder: configuration and tokenizer.
        dropped: what of the last checkpoint is not carried over, by dotted path.
        kept: what is carried over as it was, though it may be weights too: dotted path to the number of
            floating-point tensors, scalars not counted.
        content: what `format` laid out as `writing` says: a tree of plain data and OutTensors, or names to OutTensors.
            None for a file without a record.
        checksums: the record has a place for the SHA-256 of each tensor.
    """

    target: Path
    files: tuple[FilePlan, ...]
    folder: bool
    companions: tuple[Path, ...] = ()
    dropped: tuple[str, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    content: Any = None
    format: Format | None = None
    writing: Writing | None = None
    checksums: bool = False

    @property
    def shards(self) -> int:
        """Number of files with weights in a folder; 0 if it is one file."""
        return sum(any(True for _ in plan.payloads) for plan in self.files) if self.folder else 0

    @property
    def nbytes(self) -> int:
        """Size of the output in bytes."""
        return sum(plan.size for plan in self.files) + sum(stamp_at(path).nbytes for path in self.companions)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of the inputs that go into it."""
        return sum(tensor.numel * tensor.terms.width for plan in self.files for tensor, _ in plan.payloads)

    @cached_property
    def bytes_moved(self) -> int:
        """Bytes of tensors to read and to write."""
        return self.bytes_read + sum(tensor.nbytes for plan in self.files for tensor, _ in plan.payloads)

    @property
    def tensors(self) -> dict[str, OutTensor]:
        """All tensors by dotted path, those beside the weights, too.

        Raises:
            UnsupportedError: two have the same.
        """
        found: dict[str, OutTensor] = {}
        for path, node in walk(self.content, lambda _, node: branches(node)):
            if isinstance(node, OutTensor) and found.setdefault(dotted(path), node) is not node:
                raise UnsupportedError(f"{self.target}: two tensors have the path '{dotted(path)}'.")
        return found

    def recording(self, **facts: Any) -> Assembly:
        """Return it with further facts in its record."""
        if self.format is None or self.writing is None:
            raise TypeError("it has no record")
        writing = replace(self.writing, provenance={**(self.writing.provenance or {}), **facts})
        planned = self.format.plan(self.content, writing)
        return replace(self, files=(*planned, *self.files[len(planned) :]), writing=writing)

    @property
    def names(self) -> list[str]:
        """Names of all its files."""
        return [*(plan.name for plan in self.files), *(path.name for path in self.companions)]


@without_collector()
def assemble(
    tensors: Mapping[str, OutTensor],
    writing: Writing,
    *,
    target: Target,
    base: Header,
    state: StateDict,
    renamed: Mapping[str, str],
    edited: Mapping[str, bytes | None] | None = None,
) -> Assembly:
    """Lay the output out in the format that the target's suffix asks for.

    Args:
        tensors: what to write; one OutTensor under two names is tied.
        writing: how; the formats ignore what does not apply to them.
        base: header of the last checkpoint, whose container a .pth keeps.
        state: the set of weights in it that the tensors stand for.
        renamed: its names to the output's names.
        edited: see `flat`.
    """
    check_shard_size(target, writing.max_bytes)
    if base.ranks:
        return _in_ranks(tensors, writing, target, base, state, renamed, edited or {})
    own = base.format.keeps_folder and target.folder
    if not own and not target.format.nests:
        return flat(tensors, writing, target=target, base=base, dropped=beside(base.tree, state), edited=edited)
    format = base.format if own else target.format
    dropped = unkept_metadata(base)
    tree, kept = _container(tensors, base, state, renamed, dropped, in_own_format=own)
    return Assembly(
        target.path,
        format.plan(tree, writing),
        folder=target.folder,
        dropped=tuple(dropped),
        kept=kept,
        content=tree,
        format=format,
        writing=writing,
    )


def _in_ranks(
    tensors: Mapping[str, OutTensor],
    writing: Writing,
    target: Target,
    base: Header,
    state: StateDict,
    renamed: Mapping[str, str],
    edited: Mapping[str, bytes | None],
) -> Assembly:
    """Lay a folder of ranks out as one with the same files.

    Raises:
        UsageError: the target is no folder, or its files should have another size.
    """
    if not target.folder:
        raise UsageError(
            f"{target.path}: the checkpoints are folders with a file for each rank, and so is their average. Give "
            "`out` a name without suffix."
        )
    if writing.max_bytes is not None:
        raise UsageError("`max_shard_size` does not go with folders of ranks, whose files stay as they are.")
    dropped: list[str] = []
    tree, kept = _container(tensors, base, state, renamed, dropped)
    files = base.format.plan(tree, writing)
    made, beside_them = _replaced(companions(base, dropped), edited, dropped)
    files = (*files, *made)
    known = {*base.tree, *(path.name for path in beside_them), *edited}
    dropped = _of_all_ranks([*dropped, *further_files(base.path, known)], base.ranks)
    return Assembly(
        target.path,
        files,
        folder=True,
        companions=tuple(beside_them),
        dropped=tuple(dropped),
        kept=kept,
        content=tree,
        format=base.format,
        writing=writing,
    )


def _of_all_ranks(places: Iterable[str], files: Iterable[str]) -> list[str]:
    """Shorten a list of places in ranks, and of files beside them, to one entry for those of the same name."""
    befores = {f"{file}.": "" for file in files} | {f"{file.rpartition('/')[0]}/": "" for file in files}
    counts: Counter[str] = Counter()
    for place in places:
        before = next((each for each in befores if each != "/" and place.startswith(each)), "")
        counts[place.removeprefix(before)] += 1
    return [f"{name} (of {n} ranks)" if n > 1 else name for name, n in counts.items()]


def unkept_metadata(base: Header, kept: Collection[str] = ()) -> list[str]:
    """List what a safetensors file says in words and another output does not repeat."""
    return [f"__metadata__.{key}" for key in own_metadata(base) if key not in kept]


def own_metadata(header: Header) -> list[str]:
    """List the keys of a safetensors file's ``__metadata__`` that are neither ours nor say how to read the tensors."""
    return [key for key in header.metadata if key not in ("format", PROVENANCE) and key not in header.tree]


# By sd-scripts and modelspec: checksums of the tensors, which are others in an output.
_CHECKSUMS = re.compile(r"sshs_.*|modelspec\.hash_.*")


def _kept_metadata(base: Header, target: Target, names: Collection[str]) -> dict[str, str]:
    """Return what one safetensors file takes over from the ``__metadata__`` of another."""
    if base.in_folder or target.folder:
        return {}
    found = {key: base.metadata[key] for key in own_metadata(base) if key not in names}
    return {key: text for key, text in found.items() if text not in names and not _CHECKSUMS.fullmatch(key)}


def flat(
    tensors: Mapping[str, OutTensor],
    writing: Writing,
    *,
    target: Target,
    base: Header,
    dropped: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    edited: Mapping[str, bytes | None] | None = None,
) -> Assembly:
    """Lay names and tensors out as a safetensors file, or as a folder of shards.

    Args:
        base: header of the checkpoint whose companions a folder takes over, or whose ``__metadata__`` a file does.
        dropped: what is not carried over.
        config: in a folder, entries for its ``config.json``, beside those that the companion has.
        edited: in a folder, files by name that take the place of companions; None for those that are not carried over.
    """
    metadata = _kept_metadata(base, target, tensors)
    dropped = [*unkept_metadata(base, metadata), *dropped]
    writing = replace(writing, metadata=metadata)
    made = Assembly(
        target.path,
        target.format.plan(tensors, writing),
        folder=target.folder,
        content=tensors,
        format=target.format,
        writing=writing,
    )
    if not target.folder:
        return replace(made, dropped=tuple(dropped))
    beside_them = companions(base, dropped)
    edited = dict(edited or {})
    if config is not None:
        edited["config.json"] = _with_config(beside_them, edited.get("config.json"), config)
    texts, beside_them = _replaced(beside_them, edited, dropped)
    return replace(made, files=(*made.files, *texts), companions=tuple(beside_them), dropped=tuple(dropped))


def _replaced(
    paths: Sequence[Path], edited: Mapping[str, bytes | None], dropped: list[str]
) -> tuple[list[FilePlan], list[Path]]:
    """Return the files that take the place of companions, and the companions that stay."""
    dropped += [name for name, text in edited.items() if text is None]
    made = [whole_file(name, text) for name, text in edited.items() if text is not None]
    return made, [path for path in paths if path.name not in edited]


def nested(tree: Any, writing: Writing, *, target: Path, format: Format, dropped: Sequence[str] = ()) -> Assembly:
    """Lay a tree of plain data, specs and OutTensors out in a format that nests.

    What is no plain data is dropped.
    """
    left_out = list(dropped)
    content = plain(tree, left_out, Copies().__getitem__)
    files = format.plan(content, writing)
    return Assembly(
        target,
        files,
        folder=format.folder,
        dropped=tuple(left_out),
        content=content,
        format=format,
        writing=writing,
    )


def _with_config(paths: Sequence[Path], edited: bytes | None, config: Mapping[str, Any]) -> bytes:
    path = next((path for path in paths if path.name == "config.json"), None)
    known = json.loads(edited) if edited is not None else {} if path is None else read_json(path)
    return (json.dumps({**known, **config}, indent=2, sort_keys=True) + "\n").encode()


def beside(tree: Any, state: StateDict) -> list[str]:
    """List what a flat file has no place for: all that stands beside the weights, on each level down to them."""
    parts = state.parts or (state,)
    above = {part.path[:depth] for part in parts for depth in range(len(part.path) + 1)}
    others: list[Sequence[Any]] = []
    for part in parts:
        node = tree
        for depth, key in enumerate(part.path):
            keys = ((*part.path[:depth], other) for other, _ in entries(node))
            others += [path for path in keys if path not in above]
            node = node[key]
        within = [*((*part.path, key) for key in (*part.other_entries, *part.other_set)), *part.ema_paths]
        others += [path for path in within if path[: len(part.path)] == part.path]
    return [dotted(path) for path in dict.fromkeys(others)]


class Copies(dict[TensorSpec, OutTensor]):
    """What is written as an input has it; one OutTensor for each spec, so that what was tied stays so."""

    def __missing__(self, spec: TensorSpec) -> OutTensor:
        self[spec] = OutTensor(spec.dtype, spec.shape, Terms.copy(spec), "an entry beside the weights", finite=False)
        return self[spec]


def _container(
    tensors: Mapping[str, OutTensor],
    base: Header,
    state: StateDict,
    renamed: Mapping[str, str],
    dropped: list[str],
    *,
    in_own_format: bool = False,
) -> tuple[Any, Mapping[str, int]]:
    of_folder = base.format.written_as.folder and not base.ranks and not in_own_format
    if of_folder or not base.format.nests or not base.format.rewritten:
        dropped += beside(base.tree, state)
        return OrderedDict(tensors), {}
    tree = base.tree
    parts = state.parts or (state,)
    if any(_in_list(tree, part.home) for part in parts):  # a list is written as the weights alone
        dropped += beside(tree, state)
        return OrderedDict(tensors), {}
    leads = {part.lead if state.parts else "": part for part in parts}
    ours, theirs = _by_lead(tensors, leads), _by_lead(renamed, leads)
    for lead, part in leads.items():
        own = {name: tensors[lead + name] for name in ours[lead]}
        names = {name: renamed[lead + name].removeprefix(lead) for name in theirs[lead]}
        if not own:
            raise LayoutError(
                f"the checkpoints share no tensor of '{dotted(part.path)}'. Look at them with ckpt inspect."
            )
        tree = _put_in_place(_with_entries(own, base, part, names, dropped), tree, part, dropped)
    homes = [part.home for part in parts]
    for path in [*_training_state(tree, homes, [(name,) for name in base.tree] if base.ranks else [()])]:
        dropped.append(dotted(path))
        tree = without(tree, path)
    for path in [*nameless_averages(tree, parts)]:  # none stays beside a new average
        dropped.append(dotted(path))
        tree = without(tree, path)
    copies = Copies()
    out = plain(tree, dropped, copies.__getitem__)
    return out, _unaveraged(tree, homes, {spec for spec in copies if spec.dtype.averaged and spec.shape})


def _in_list(tree: Any, path: Sequence[Any]) -> bool:
    """True if a path leads through a list."""
    for key in path:
        if not isinstance(tree, Mapping):
            return isinstance(tree, (list, tuple))
        tree = tree.get(key)
    return False


def _by_lead(names: Iterable[str], leads: Collection[str]) -> dict[str, list[str]]:
    """Sort names by what is before them, which goes; no lead is the start of another one."""
    found: dict[str, list[str]] = {lead: [] for lead in leads}
    lengths = sorted({*map(len, leads)})
    for name in names:
        lead = next((name[:n] for n in lengths if name[:n] in found), None)
        if lead is not None:
            found[lead].append(name[len(lead) :])
    return found


def _with_entries(
    tensors: Mapping[str, OutTensor], base: Header, state: StateDict, renamed: Mapping[str, str], dropped: list[str]
) -> OrderedDict[Any, Any]:
    """Make the dict that holds the average: with the module versions and the other entries of the last checkpoint."""
    weights: Any = OrderedDict(tensors)
    metadata = module_versions(base, state, renamed)
    if metadata is not None:
        weights._metadata = metadata
    weights.update(state.other_entries)
    dropped += [dotted((*state.path, words)) for words in state.other_set]
    dropped += [dotted(path) for path in state.ema_paths if path[: len(state.path)] == state.path]
    return weights  # type: ignore[no-any-return]


def _training_state(
    tree: Mapping[Any, Any], homes: Sequence[tuple[Any, ...]], tops: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[Any, ...]]:
    """Find training state at the levels of `tops`, and at those below that hold optimizers; not weights at `homes`."""
    levels = [(top, node) for top in tops if isinstance(node := reduce(getitem, top, tree), Mapping)]
    seen = set()
    while levels:
        outer, node = levels.pop()
        seen.add(id(node))
        for key, value in node.items():
            path = (*outer, key)
            if path in homes:
                continue
            weights = [home[len(path) :] for home in homes if leads(path, home)]
            if looks_like_training_state(key, value) and not weights and not isinstance(value, OutTensor):
                yield path
            elif isinstance(value, dict) and id(value) not in seen and any(find_optimizers(value, weights)):
                levels.append((path, value))


def module_versions(base: Header, state: StateDict, renamed: Mapping[str, str]) -> Any:
    """Find the module versions that torch keeps beside a state dict, by new names.

    Args:
        renamed: names of the set to new ones.

    Returns:
        None where there are none, or where the names of the modules cannot be told from those of the tensors.
    """
    if state.keys is None:
        return None
    metadata = getattr(reduce(getitem, state.path, base.tree), "_metadata", None)
    if not isinstance(metadata, dict):
        return None
    return _renamed_modules(metadata, {state.keys[name]: bare for name, bare in renamed.items()})


def _put_in_place(
    weights: dict[Any, Any], tree: Mapping[Any, Any], state: StateDict, dropped: list[str]
) -> dict[Any, Any]:
    """Copy a tree with the average where the layout keeps weights that stand alone; its other places go."""
    if not state.path:
        return weights
    placed = dict(tree)
    for place in sorted(state.set_paths, key=len):
        left = placed if place in (state.home, state.home[:1]) else without(placed, place)
        if left is not placed:
            placed = left
            dropped.append(dotted(place))
    return put(placed, state.home, weights)  # type: ignore[no-any-return]


def _unaveraged(tree: Any, homes: Sequence[tuple[Any, ...]], copied: Collection[Any]) -> Mapping[str, int]:
    """Count the copied tensors by place: the first key at which a path leaves that of the weights."""
    counts: Counter[str] = Counter()
    for path, spec in tensors_in(tree) if copied else ():
        if spec in copied:
            shared = max(_shared(path, home) for home in homes)
            counts[dotted(path[: shared + 1])] += 1
    return counts


def _shared(path: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many keys two key paths share, from the first on. Keys may be of any types, and have no order."""
    return next((i for i, (a, b) in enumerate(zip(path, other, strict=False)) if a != b), min(len(path), len(other)))


def _renamed_modules(metadata: Mapping[Any, Any], renamed: Mapping[str, str]) -> Any:
    """Take a common prefix off the names of modules, too; None where there is no saying which goes."""
    leads = {name.removesuffix(bare) for name, bare in renamed.items()}
    if len(leads) != 1:
        return None
    lead = leads.pop()
    module = lead.rstrip(".")
    return OrderedDict(
        ("" if key == module else key.removeprefix(lead), value)
        for key, value in metadata.items()
        if isinstance(key, str) and (key == module or key.startswith(lead))
    )


def rewrite(
    base: Header,
    state: StateDict,
    changed: Mapping[str, OutTensor],
    *,
    target: Target,
    provenance: Mapping[str, Any],
) -> Assembly:
    """Lay out a checkpoint as it is, in its own format, but for some tensors of one set of weights.

    Args:
        base: its header.
        state: the set of weights.
        changed: what takes the place of tensors in it, by name; new names come last.
        target: of the same format: a torch file, a safetensors file or a folder. What was in chunks is whole in it.
        provenance: written beside the weights.

    Raises:
        UsageError: the target's suffix asks for another format.
    """
    folder = base.copied_to_folder
    check_same_format(base, target, folder=folder)
    if state.keys is None:
        raise UsageError(
            f"{base.path}: its {state.label} is no dict of names to tensors, so it cannot be written again with some "
            "of them changed. Make plain weights of it first: `convert(to='plain')`."
        )
    name, key = next(iter(state.keys.items()))
    lead = key.removesuffix(name)
    changed = {state.keys.get(name, lead + name): tensor for name, tensor in changed.items()}
    if not base.format.nests or (folder and not base.format.folder):
        copies = Copies()
        tensors = {name: changed.get(name) or copies[dense(base, name, spec)] for name, spec in base.tree.items()}
        tensors |= changed
        writing = Writing(name=target.name, provenance=provenance, like=base)
        return flat(tensors, writing, target=target, base=base)
    old = reduce(getitem, state.path, base.tree)
    weights: Any = OrderedDict((key, changed.get(key, value)) for key, value in old.items())
    weights.update(changed)
    if isinstance(metadata := getattr(old, "_metadata", None), dict):
        weights._metadata = metadata
    tree = put(base.tree, state.path, weights)
    return nested(
        tree,
        Writing(name=target.name, provenance=provenance, like=base),
        target=target.path,
        format=base.format.written_as,
    )


def dense(base: Header, name: str, tensor: Tensor) -> TensorSpec:
    """Return a tensor that can be written.

    Raises:
        UnsupportedError: it cannot.
    """
    if isinstance(tensor, UnsupportedTensor):
        raise UnsupportedError(f"{base.path}: '{name}' is {tensor.reason}, which cannot be written here.")
    return tensor
