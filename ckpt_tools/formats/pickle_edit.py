"""Pickle editing: change some strings of a pickle and keep all other bytes.

A pickle stores a string once, as a literal, and refers to it by a memo number where it occurs again. Each opcode that
pushes a string, a literal or a memo reference, is therefore traced and rewritten separately.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError
from ..storage.splice import Span, Splice
from ..tensors import DType, Storage, TensorSpec, UnsupportedTensor
from . import pickle_read as unpickle
from .format import Renaming
from .pickle_objects import Inert

_MOST_COPIED = 100 << 20
"""Characters of traced strings. Each reference to a string is a copy; those beyond are not traced, nor renamed."""


class TracedText(str):
    """A string pushed by one opcode, known by its identity."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, eq=False)
class _TextOpcode:
    """An opcode that pushes a string.

    Attributes:
        text: the string.
        span: [start, stop) of the opcode in the pickle.
        source: the memo string that it refers to; None for a literal.
        narrow: a byte string of Python 2.
    """

    text: TracedText
    span: tuple[int, int]
    source: TracedText | None
    narrow: bool


@dataclass(frozen=True, slots=True, eq=False)
class TracedPickle:
    """A pickle, its tree, and the opcodes of the strings in the tree.

    Attributes:
        pickled: the bytes.
        tree: as `unpickle.load` returns it, with `TracedText` strings and without the locations of storages.
    """

    pickled: bytes
    tree: Any
    _tracer: _Tracer

    def keys(self, mapping: Mapping[Any, Any]) -> list[Any]:
        """Return all keys that the pickle sets in a dict of the tree.

        Equal keys may occur twice: a rename can give a wrapper and its model the same name in `_metadata`.
        """
        _, set_later = self._tracer.keys.get(id(mapping), (mapping, []))
        return list({id(key): key for key in (*mapping, *set_later)}.values())

    def rewritten(self, wanted: Iterable[tuple[str, str]]) -> bytes:
        """Return the pickle with some strings replaced.

        Args:
            wanted: (string object of the tree, its replacement).

        Raises:
            UnsupportedError: two different replacements of one string.
            CorruptError: no opcode of its own pushes a string.
        """
        targets: dict[int, str] = {}
        for text, target in wanted:
            if id(text) not in self._tracer.opcodes:
                raise CorruptError(f"its pickle does not store the name '{text}' as a plain string.")
            if targets.setdefault(id(text), target) != target:
                raise UnsupportedError(
                    f"two state dicts share the name '{text}', which would be '{target}' in one of them only."
                )
        edits = []
        for opcode in self._tracer.opcodes.values():
            target = targets.get(id(opcode.text), opcode.text)
            unedited = opcode.text if opcode.source is None else targets.get(id(opcode.source), opcode.source)
            if target != unedited:
                edits.append((opcode.span, _literal(target, narrow=opcode.narrow)))
        if edits:
            # Frames record their length; the format makes them optional.
            edits += [(span, b"") for span in self._tracer.frames]
        pieces = []
        position = 0
        for (start, end), literal in sorted(edits):
            pieces += [self.pickled[position:start], literal]
            position = end
        return b"".join([*pieces, self.pickled[position:]])


def trace(pickled: bytes, *, where: str) -> TracedPickle:
    """Read a pickle that `unpickle.load` has accepted, and record the opcodes of its strings.

    Raises:
        CorruptError: see `unpickle.load`.
    """
    tracer = _Tracer(io.BytesIO(pickled))
    return TracedPickle(pickled, unpickle.run(tracer, len(pickled), where=where), tracer)


def nowhere(key: str, dtype: DType | None, numel: int, view: Any) -> Storage:
    """Return a storage for a tensor that is not read."""
    return Storage(Path(key), 0, sys.maxsize)


def _noting(read: Callable[[Any], None], *, literal: bool, narrow: bool = False) -> Callable[[Any], None]:
    def load(tracer: _Tracer) -> None:
        start = tracer.pickled.tell() - 1
        read(tracer)
        top = tracer.stack[-1]
        if (literal or isinstance(top, TracedText)) and tracer.copied + len(top) <= _MOST_COPIED:
            tracer.copied += len(top)
            source = None if literal else top
            narrowed = narrow if source is None else tracer.opcodes[id(source)].narrow
            text = TracedText(top)
            tracer.stack[-1] = text
            tracer.opcodes[id(text)] = _TextOpcode(text, (start, tracer.pickled.tell()), source, narrowed)

    return load


class _Tracer(unpickle.ByOpcode):
    def __init__(self, pickled: io.BytesIO) -> None:
        super().__init__(pickled, nowhere)
        self.pickled = pickled
        self.copied = 0
        self.opcodes: dict[int, _TextOpcode] = {}
        self.frames: list[tuple[int, int]] = []
        self.keys: dict[int, tuple[Any, list[Any]]] = {}

    def load_frame(self) -> None:
        # Do not buffer the frame, so that the file position is always that of the next opcode.
        start = self.pickled.tell() - 1
        self.read(8)
        self.frames.append((start, self.pickled.tell()))

    def load_stack_global(self) -> None:
        # The base class accepts no subclass of str.
        self.stack[-2:] = [str(name) if isinstance(name, TracedText) else name for name in self.stack[-2:]]
        super().load_stack_global()

    def load_setitem(self) -> None:
        mapping, key, _ = self.stack[-3:]
        self._note_keys(mapping, [key])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._note_keys(self.metastack[-1][-1], self.stack[::2])
        super().load_setitems()

    def _note_keys(self, mapping: Any, keys: list[Any]) -> None:
        self.keys.setdefault(id(mapping), (mapping, []))[1].extend(keys)

    dispatch = {
        **unpickle.ByOpcode.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.FRAME[0]: load_frame,
        pickle.STACK_GLOBAL[0]: load_stack_global,
        **{
            opcode[0]: _noting(unpickle.ByOpcode.dispatch[opcode[0]], literal=True)
            for opcode in (pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8)
        },
        **{
            opcode[0]: _noting(unpickle.ByOpcode.dispatch[opcode[0]], literal=True, narrow=True)
            for opcode in (pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING)
        },
        **{
            opcode[0]: _noting(unpickle.ByOpcode.dispatch[opcode[0]], literal=False)
            for opcode in (pickle.GET, pickle.BINGET, pickle.LONG_BINGET)
        },
    }


def _literal(text: str, *, narrow: bool) -> bytes:
    """Return a string as an opcode of protocol 2, which torch.load(weights_only=True) accepts."""
    if narrow and text.isascii():
        raw = text.encode()
        if len(raw) < 256:
            return pickle.SHORT_BINSTRING + bytes([len(raw)]) + raw
        return pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw
    raw = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + len(raw).to_bytes(4, "little") + raw


def differs(old: Any, new: Any, names: Mapping[int, Mapping[str, str]]) -> bool:
    """Return True if two trees differ in anything but the renamed keys.

    Args:
        names: id of a dict in the old tree to its renamed keys, old to new.
    """
    seen: set[tuple[int, int]] = set()
    stack = [(old, new)]
    while stack:
        a, b = stack.pop()
        if isinstance(a, _CONTAINERS) and isinstance(b, _CONTAINERS):
            if (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            children, others = _children(a, names.get(id(a), {})), _children(b, {})
            if len(children) != len(others):
                return True
            stack += zip(children, others, strict=True)
        elif isinstance(a, _PLAIN) and isinstance(b, _PLAIN):
            if a != b and a == a:  # NaN differs from itself
                return True
        elif type(a) is not type(b):
            return True
    return False


_CONTAINERS = (dict, list, tuple, argparse.Namespace, Inert)
_PLAIN = (str, bytes, bytearray, int, float, complex, TensorSpec, UnsupportedTensor)


def _children(node: Any, names: Mapping[str, str]) -> list[Any]:
    if isinstance(node, dict):
        renamed = {names.get(key, key): value for key, value in node.items()}
        return [*renamed.keys(), *renamed.values(), getattr(node, "_metadata", None)]
    if isinstance(node, argparse.Namespace):
        return [*vars(node).keys(), *vars(node).values()]
    if isinstance(node, Inert):
        return [type(node).global_name, *node.args, node.state, *node.items]
    return list(node)


@dataclass(frozen=True, slots=True, eq=False)
class NamedPickle:
    """A file with a pickle in which names can be changed; see `Named`.

    Attributes:
        path: the file.
        traced: the pickle.
        around: from the new pickle to the pieces of the new file.
    """

    path: Path
    traced: TracedPickle
    around: Callable[[bytes], tuple[bytes | Span, ...]]

    @property
    def tree(self) -> Any:
        return self.traced.tree

    def renamed(self, renamings: Sequence[Renaming]) -> tuple[Splice, ...]:
        wanted = []
        changed: dict[int, dict[str, str]] = {}
        for renaming in renamings:
            metadata = getattr(renaming.state, "_metadata", None)
            for mapping, names in ((renaming.state, renaming.names), (metadata, renaming.modules(renaming.state))):
                if isinstance(mapping, dict) and names:
                    wanted += [(key, names[key]) for key in self.traced.keys(mapping) if key in names]
                    changed.setdefault(id(mapping), {}).update(names)
        try:
            pickled = self.traced.rewritten(wanted)
        except (CorruptError, UnsupportedError) as error:
            raise UnsupportedError(f"{self.path}: {error} Load and save it with torch once.") from error
        if differs(self.tree, trace(pickled, where=str(self.path)).tree, changed):
            raise UnsupportedError(
                f"{self.path}: single names in its pickle cannot be changed. Load and save it with torch once."
            )
        return (Splice(self.path, self.around(pickled)),)
