"""Layouts and encodings: the types that the modules of this package share, and the lists of those that are known."""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from ...errors import LayoutError
from ...formats.file_plan import OutTensor, Terms
from ...formats.format import Format
from ...formats.header import Header
from ...formats.sharded import SHARDED
from ...formats.tree import Path, follow, put
from ...tensors import DTYPES, DType, Tensor, TensorSpec, UnsupportedTensor
from ..optimizers import flat_training_state

Weights = Mapping[str, OutTensor]


@dataclass(frozen=True, slots=True, eq=False)
class StateDict:
    """One set of weights inside a checkpoint.

    Attributes:
        tensors: by the names that the bare model has; wrapper prefixes such as DDP's stay.
        keys: these names to the keys of the dict at `path`; None where the set is not one dict.
        other_entries: entries of that dict that are no tensors with names.
        other_set: entries of the dict that are no weights of this set, in words: ``model_ema.*``, ``optimizer.*``.
        ema_paths: paths of the EMA update count, decay and settings.
        updates: EMA update count, as it is stored: a number, a tensor of one, or what a damaged file has.
        decay: of the EMA, likewise.
        settings: of diffusers' EMAModel.
        fault: why it cannot be used, in words; None if it can.
        path: keys that lead to it from the top of the checkpoint; empty for the whole of it.
        which: ``raw``, ``ema``, or the dotted path that was asked for, if it is unknown which it is.
        layout: name of the layout.
        home: path at which the layout keeps the weights of a checkpoint with one set.
        set_paths: paths of all sets of weights and of what belongs to them, this one among them.
        parts: the sets that this one joins, each with its path before its names; empty for a set of its own.
        file: that of a rank, by its name: the first key of `path`; empty where the checkpoint is not of ranks.
        dtype: what its floating-point tensors are written in, unless another one is asked for; None for that of each.
    """

    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str] | None = None
    other_entries: dict[Any, Any] = field(default_factory=dict)
    other_set: tuple[str, ...] = ()
    ema_paths: tuple[Path, ...] = ()
    updates: Any = None
    decay: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None
    path: Path = ()
    which: str = ""
    layout: str = ""
    home: Path = ()
    set_paths: tuple[Path, ...] = ()
    parts: tuple[StateDict, ...] = ()
    file: str = ""
    dtype: DType | None = None

    @property
    def lead(self) -> str:
        """What is before its names where all parts are together: ``encoder.``, ``consolidated.00.pth: ``."""
        below = dotted(self.path[1:] if self.file else self.path)
        return (f"{self.file}: " if self.file else "") + (f"{below}." if below else "")

    @property
    def label(self) -> str:
        """What to call it in a table: ``ema (state_dict_ema)``."""
        if files := {part.file for part in self.parts if part.file}:
            return f"{self.which} ({len(files)} file{'s' * (len(files) > 1)})"
        where = dotted(self.path)
        return self.which if self.parts or self.which == where else f"{self.which} ({where or 'the whole file'})"

    def below(self, path: Path, **known: Any) -> StateDict:
        """Return it as a set of a larger tree, which has its tree at this path.

        Args:
            known: attributes that are others there.
        """
        ema_paths, set_paths = (tuple((*path, *each) for each in paths) for paths in (self.ema_paths, self.set_paths))
        where = {"path": (*path, *self.path), "home": (*path, *self.home), "set_paths": set_paths}
        return replace(self, **{**where, "ema_paths": ema_paths, **known})


def dotted(path: Iterable[Any]) -> str:
    """Write a path of keys as the parameter `state` takes it."""
    try:
        return ".".join(map(str, path))
    except ValueError:  # Python writes no integer of more than 4300 digits out
        return "(a number too long to show)"


# By their names, BatchNorm's statistics.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def is_buffer(name: str, tensor: Tensor) -> bool:
    """Tell a buffer from a parameter by dtype and name, which is all that a state dict has: integers, BatchNorm's."""
    return not isinstance(tensor, TensorSpec) or not tensor.dtype.averaged or name.rpartition(".")[2] in _BUFFERS


Sets = dict[str, StateDict]
"""Sets of weights: ``raw``, ``ema`` or both."""
Names = Mapping[str, Tensor] | None
"""A state dict of the same model, for encodings that keep no names, or change them."""


class AnyOrder(dict[str, Tensor]):
    """A state dict whose order is not the model's: safetensors files and indexes sort names."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """How a set of weights, or two in one object, is encoded, wherever it is.

    Attributes:
        name: of the layout that an object in this encoding is by itself.
        detect: from an object of the tree to whether it is in this encoding.
        read: from the object, names for it, and the raw weights with it to its sets of weights.
        write: from a set of weights and the whole content to a dict.
        keeps: what it stores of an average: ``updates``, ``decay``, ``settings``.
        flat: it is a dict of names to tensors and nothing else, so that any file format can hold it.
    """

    name: str
    detect: Callable[[Any], bool]
    read: Callable[[Any, Names, Names], Sets]
    write: Callable[[Weights, Content], dict[str, Any]] = lambda weights, content: _not_written()
    keeps: frozenset[str] = frozenset()
    flat: bool = True


def _not_written() -> dict[str, Any]:
    raise NotImplementedError("an encoding that is read, but not written")


class Unchanged(Mapping[str, str]):
    """Names, each mapped to itself; a dict of a hundred thousand would take 10 MB."""

    def __init__(self, names: Mapping[str, object]) -> None:
        self._names = names

    def __getitem__(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(name)
        return name

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_TENSORS = (TensorSpec, UnsupportedTensor)  # a union takes longer to test


def has_tensors(node: Any) -> bool:
    """True for a dict in which a tensor with a name is."""
    return isinstance(node, dict) and any(isinstance(k, str) and isinstance(v, _TENSORS) for k, v in node.items())


def split(node: Mapping[Any, Any]) -> tuple[Mapping[str, Tensor], dict[Any, Any]]:
    """Split a dict into tensors with names, and other entries; a dict of tensors alone is returned as it is."""
    if {str}.issuperset(map(type, node)) and {TensorSpec}.issuperset(map(type, node.values())):
        return node, {}
    tensors = {key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, _TENSORS)}
    return tensors, {k: v for k, v in node.items() if k not in tensors} if len(tensors) < len(node) else {}


def _read_plain(node: Any, names: Names, raw: Names) -> Sets:
    training = flat_training_state(node)
    if training:
        gone = {name for names in training.values() for name in names}
        node = {key: value for key, value in node.items() if key not in gone}
    tensors, others = split(node)
    left_out = tuple(head if [head] == names else f"{head}.*" for head, names in training.items())
    return {"raw": StateDict(tensors, Unchanged(tensors), others, left_out)} if tensors else {}


def state_dict_of(counts: Weights, sets: Mapping[str, Weights]) -> dict[str, Any]:
    """Make a state dict of EMA values and of weights below prefixes, with their module versions (``_metadata``)."""
    made: Any = OrderedDict(counts)
    versions: dict[str, Any] = OrderedDict()
    for prefix, weights in sets.items():
        made.update((f"{prefix}{name}", tensor) for name, tensor in weights.items())
        for module, version in getattr(weights, "_metadata", {}).items():
            versions[f"{prefix}{module}" if module else prefix.removesuffix(".")] = version
    if versions:
        made._metadata = versions
    return made  # type: ignore[no-any-return]


PLAIN_ENCODING = Encoding("plain", has_tensors, _read_plain, lambda weights, content: state_dict_of({}, {"": weights}))
"""A dict of names to tensors."""


@cache
def _encodings() -> tuple[Encoding, ...]:
    """Those of all layouts; the plain one takes any tensors with names, so it is the last."""
    found = dict.fromkeys(each for layout in (*DETECTED, *LAYOUTS) for each in layout.encodings)
    return (*(each for each in found if each is not PLAIN_ENCODING), PLAIN_ENCODING)


def encoding_of(node: Any) -> Encoding | None:
    """Return the encoding of an object of the tree; None where none is detected."""
    return next((encoding for encoding in _encodings() if encoding.detect(node)), None)


def read_sets(node: Any, names: Names = None, raw: Names = None) -> Sets:
    """Read the sets of weights that an object is, or holds by its encoding.

    Args:
        node: of the object tree.
        names: a state dict of the same model.
        raw: the raw weights with it, which have names, and the buffers that an average may leave out.
    """
    encoding = encoding_of(node)
    if encoding is None:
        return {}
    found = encoding.read(node, names, raw)
    return {which: replace(each, which=which, layout=encoding.name) for which, each in found.items()}


def set_at(tree: Any, path: Path | None, which: str, names: Names) -> StateDict | None:
    """Read the set at a path, which is what it is called there, unless its encoding holds both."""
    return one_of(read_sets(follow(tree, path), names), which)


def one_of(sets: Sets, which: str) -> StateDict | None:
    """Return this set, or else the only one."""
    return sets.get(which) or next(iter(sets.values()), None)


def is_scalar(value: Any, *dtypes: str) -> bool:
    """True for a tensor of one element (of one of these dtypes)."""
    return isinstance(value, TensorSpec) and value.numel == 1 and (not dtypes or value.dtype.name in dtypes)


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What goes into a checkpoint.

    Attributes:
        raw, ema: the sets, by the names of the bare model; of one alone, both are that one. They may have a
            ``_metadata``, as torch's state dicts have, with the versions of the modules.
        pair: there are two sets, and not one for both.
        parameters: names of what is averaged by libraries that average parameters alone.
        in_order: they are in the order of the model.
        updates: EMA update count; None where nobody knows.
        decay: of the EMA, likewise.
        settings: of diffusers' EMAModel, as the checkpoint has them.
        other_entries: of the checkpoint, by key.
        notes: receives what is lost or made up, in words.
    """

    raw: Weights
    ema: Weights
    pair: bool
    parameters: tuple[str, ...]
    in_order: bool = True
    updates: int | None = None
    decay: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    other_entries: Mapping[Any, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self) -> OutTensor:
        """Return the EMA update count as an int64 tensor, 1 where it is not known or 0."""
        if self.updates is None:
            self.notes.append("EMA update count unknown, set to 1, so that a further update averages (use `updates`).")
        elif self.updates == 0:
            self.notes.append("The EMA update count is written as 1: with 0 the next update would replace the average.")
        return scalar("int64", "q", self.updates or 1)

    def known_updates(self, library: str) -> int:
        """Return the EMA update count for a library that needs it.

        Raises:
            LayoutError: it is not known.
        """
        if self.updates is None:
            raise LayoutError(
                f"{library} counts its updates (with a count of 0 the next one replaces the average), and the "
                "checkpoint does not say how many there were. Give `updates`."
            )
        return self.updates

    def known_decay(self) -> float:
        """Return the decay, or the default of the classes that keep one."""
        if self.decay is None:
            self.notes.append(
                "The decay is not known: 0.9999, the default of these classes, is written. `decay` sets another."
            )
            return 0.9999
        return self.decay

    def note_lost(self, kept: set[str], why: str, *, raw_stays: bool) -> None:
        """Add a note on the averages that are not written, under their own or another name."""
        written = {self.ema[name] for name in kept} | (set(self.raw.values()) if raw_stays else set())
        lost = [name for name, tensor in self.ema.items() if tensor not in written]
        if lost:
            what = "are lost, their raw values stay" if raw_stays else "are lost"
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            self.notes.append(f"The averages of '{lost[0]}'{more} {what}: {why} alone.")


def scalar(dtype: str, code: str, value: float) -> OutTensor:
    """Make a tensor without dimensions of a number of our own."""
    return OutTensor(DTYPES[dtype], (), Terms(), "an EMA value", finite=False, data=struct.pack(f"<{code}", value))


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A checkpoint without nesting, for safetensors and folders.

    Attributes:
        tensors: by name.
        stem: what the files of a folder are called; None for the usual name.
        config: entries for the ``config.json`` of a folder.
    """

    tensors: Weights
    stem: str | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Layout:
    """Where one family of training scripts keeps its weights, raw and averaged: reads and writes them there.

    Most layouts are two paths and need nothing else. Where a library does more, a subclass overrides a method.

    Attributes:
        name: as the parameter `to` of `convert` takes it.
        about: a line for the list of layouts.
        raw, ema: paths of the sets; None for a set that a layout does not have.
        raw_encoding, ema_encoding: how they are encoded there. An average in another encoding is another layout's,
            unless this one is plain.
        single: which of the two paths has the weights of a checkpoint with one set.
        updates: path of the EMA update count, if the encoding has none.
        alone: what raw weights without averaged ones are called; empty if this layout always has both.
        written: `convert` writes it.
        folder_format: of a folder in this layout.
        held_by: see `outputs`; empty where it follows from the paths and encodings.
        exponential: its averages are exponential, or are so by default; others may be means.
        batches: of a mean over all batches so far: keys of their number, and of the period in which it is updated.
    """

    name: str
    about: str
    raw: Path | None = None
    ema: Path | None = None
    raw_encoding: Encoding = PLAIN_ENCODING
    ema_encoding: Encoding = PLAIN_ENCODING
    single: str = "raw"
    updates: Path | None = None
    alone: str = ""
    written: bool = True
    folder_format: Format = SHARDED
    held_by: tuple[str, ...] = ()
    exponential: bool = False
    batches: tuple[str, str] | None = None

    @property
    def pair(self) -> bool:
        """True if it has a path for each of two sets."""
        return self.raw is not None and self.ema is not None

    @property
    def encodings(self) -> tuple[Encoding, Encoding]:
        """Encodings of the raw and of the averaged weights."""
        return self.raw_encoding, self.ema_encoding

    @property
    def home(self) -> Path:
        """Path of the weights of a checkpoint with one set."""
        return (self.raw if self.single == "raw" else self.ema) or ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """Paths of the sets, and of what belongs to them."""
        named = (self.raw, self.ema, self.updates and (self.updates[:-1] or self.updates))
        return tuple(dict.fromkeys(path for path in named if path))

    @property
    def swaps(self) -> bool:
        """True if the average is where other layouts have raw weights."""
        return self.ema in raw_paths() and self.raw not in (None, self.ema)

    @property
    def _one_dict(self) -> bool:
        return not self.pair or self.raw == self.ema

    @property
    def outputs(self) -> tuple[str, ...]:
        """What can hold it: ``nested``, a file of nested objects; ``flat``, one of names and tensors; ``folder``."""
        flat = self._one_dict and all(each.flat for each in self.encodings)
        return self.held_by or (("nested", "flat", "folder") if flat else ("nested",))

    def keeps(self, what: str) -> bool:
        """True if it stores the ``updates``, ``decay`` or ``settings`` of an average."""
        return any(what in each.keeps for each in self.encodings) or (what == "updates" and self.updates is not None)

    def read(self, tree: Mapping[Any, Any], names: Names) -> Sets:
        """Read the sets of a checkpoint with an average in this layout; empty if it has none.

        Args:
            tree: of the checkpoint.
            names: a state dict of the same model.
        """
        if not self.ema or (node := follow(tree, self.ema)) is None:
            return {}
        if self.ema_encoding is not PLAIN_ENCODING and self.ema_encoding is not encoding_of(node):
            return {}
        # The raw weights may be where another layout has them.
        paths = [path for path in (self.raw, *raw_paths()) if path is not None and path != self.ema]
        raws = ((path, set_at(tree, path, "raw", names)) for path in paths)
        raw_path, raw = next((found for found in raws if found[1] is not None), (self.ema, None))
        sets = read_sets(node, names, None if raw is None else raw.tensors)
        ema = one_of(sets, "ema")
        if ema is None or (raw is not None and raw_path != self.raw and not _of_one_model(raw.tensors, ema.tensors)):
            return {}
        if raw is None and "ema" in sets:  # an encoding that may hold both
            raw = sets.get("raw")
        swapped = self.single == "ema" and raw_path == self.raw
        home = self.home if raw is None or swapped else raw_path  # the script loads its weights from there
        known = {"layout": self.name, "home": home, "set_paths": self.set_paths(tree)}
        ema = ema.below(self.ema, which="ema", **known)
        if self.updates is not None:
            ema_paths = (*ema.ema_paths, self.updates)
            ema = replace(ema, updates=follow(tree, self.updates), ema_paths=ema_paths)
        return {"ema": ema} if raw is None else {"ema": ema, "raw": raw.below(raw_path, which="raw", **known)}

    def read_alone(self, tree: Mapping[Any, Any], names: Names) -> Sets:
        """Read raw weights without an average; empty if there are none."""
        sets = read_sets(follow(tree, self.raw), names) if self.alone and self.raw else {}
        return {
            which: each.below(
                self.raw or (),
                layout=self.alone if each.layout == PLAIN_ENCODING.name else each.layout,
                set_paths=self.set_paths(tree),
            )
            for which, each in sets.items()
        }

    def set_paths(self, tree: Mapping[Any, Any]) -> tuple[Path, ...]:
        """Return the paths of the sets in this layout, and of those of other layouts in the same checkpoint."""
        others = (path for each in LAYOUTS for path in (each.raw, each.ema) if path and _may_be_a_set(tree, path))
        return tuple(dict.fromkeys((*self.paths, *others)))

    def write(self, content: Content) -> dict[Any, Any]:
        """Make the tree of a checkpoint: dicts, plain values, and OutTensors.

        Raises:
            LayoutError: the layout needs what the content lacks, or two names become one in it.
        """
        if self._one_dict:  # with one set in it or both
            return put(content.other_entries, self.home, self._whole(content))  # type: ignore[no-any-return]
        tree: dict[Any, Any] = put(content.other_entries, self.raw or (), self.raw_encoding.write(content.raw, content))
        if content.pair or not self.alone:
            tree = put(tree, self.ema or (), self.ema_encoding.write(content.ema, content))
        return tree

    def flatten(self, content: Content) -> Flat:
        """Make what a safetensors file or a folder in this layout holds.

        Raises:
            LayoutError: as for `write`.
        """
        return Flat(self._whole(content))

    def _whole(self, content: Content) -> dict[str, Any]:
        if self.ema is None:
            return self.raw_encoding.write(content.raw, content)
        return self.ema_encoding.write(content.ema, content)

    def ema_file(self, header: Header) -> Mapping[str, Any] | None:
        """Return what a file with one set says of it as an EMA, by its name or its configuration.

        Returns:
            Attributes of StateDict (updates, decay, settings); None if nothing says that it is an EMA.
        """
        return None

    def ema_file_of(self, path: FilePath) -> FilePath | None:
        """Return the other file that has the average of these weights; None if this layout uses none."""
        return None


def _of_one_model(raw: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> bool:
    """False if an average cannot be of these weights: the teacher of a model that distils it."""
    shapes, averaged = (
        {name.removeprefix("module."): getattr(tensor, "shape", None) for name, tensor in weights.items()}
        for weights in (raw, ema)
    )
    shared = shapes.keys() & averaged.keys()
    return bool(shared) and all(shapes[name] == averaged[name] for name in shared)


def _may_be_a_set(tree: Mapping[Any, Any], path: Path) -> bool:
    above = follow(tree, path[:-1])
    if not isinstance(above, Mapping) or path[-1] not in above:
        return False
    value = above[path[-1]]
    tensors = isinstance(value, dict) and any(isinstance(v, _TENSORS) for v in value.values())
    named = isinstance(value, dict) and path[-1] in set_keys()
    return value is None or tensors or named or encoding_of(value) is not None


LAYOUTS: list[Layout] = []
"""All layouts, in the order of the list for users."""
DETECTED: list[Layout] = []
"""Layouts with averaged weights, in the order in which they are tried."""


def register(layout: Layout) -> None:
    """Make a layout known to all commands; it is tried before those of this package.

    Raises:
        ValueError: one of this name is known.
    """
    if any(known.name == layout.name for known in LAYOUTS):
        raise ValueError(f"there is a layout named {layout.name!r} already")
    LAYOUTS.append(layout)
    DETECTED.insert(0, layout)
    _encodings.cache_clear()


def unregister(layout: Layout) -> None:
    """Undo `register`.

    Raises:
        ValueError: it is not registered.
    """
    LAYOUTS.remove(layout)
    DETECTED.remove(layout)
    _encodings.cache_clear()


def raw_paths() -> tuple[Path, ...]:
    """Paths at which layouts have raw weights without averaged ones, in the order in which they are tried."""
    return tuple(dict.fromkeys(layout.raw for layout in LAYOUTS if layout.alone and layout.raw))


def set_keys() -> tuple[Any, ...]:
    """Keys under which weights are, in whatever encoding, in the layouts of `raw_paths`."""
    pairs = ((layout.raw, layout.ema) for layout in LAYOUTS if layout.alone and layout.raw)
    return tuple(dict.fromkeys(path[0] for pair in pairs for path in pair if path and len(path) == 1))


def swapped_keys() -> tuple[Any, ...]:
    """Keys of raw weights in layouts where another key, which elsewhere has raw weights, has the average."""
    return tuple(dict.fromkeys(layout.raw[0] for layout in LAYOUTS if layout.swaps and layout.raw))
