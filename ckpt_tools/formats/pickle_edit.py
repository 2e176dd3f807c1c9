"""TracedPickle: where a pickle writes each text, so that some can be written otherwise and all else stays as it is.

A pickle writes a text once and afterwards refers to it by a number (a memo), wherever the same text
is needed again. So a text belongs to the opcode that brought it to its place, a literal or a
reference, and each opcode is rewritten by itself.
"""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError
from ..tensors import DType, Storage, TensorSpec, UnsupportedTensor
from . import pickle_read as unpickle
from .format import Renaming


class TracedText(str):
    """A text of a pickle, known by its identity: each opcode makes one of its own."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, eq=False)
class _TextOpcode:
    """An opcode that brings a text to its place.

    Attributes:
        text: the text.
        span: where the opcode stands.
        source: the text in the memo that it refers to; None for a literal.
        narrow: a text of Python 2, in bytes.
    """

    text: TracedText
    span: tuple[int, int]
    source: TracedText | None
    narrow: bool


@dataclass(frozen=True, slots=True, eq=False)
class TracedPickle:
    """A pickle, its tree, and where the texts of the tree stand in it.

    Attributes:
        pickled: the bytes.
        tree: as `unpickle.load` gives it, with a `TracedText` for each text. Storages in it are not located.
    """

    pickled: bytes
    tree: Any
    _opcodes: dict[int, _TextOpcode] = field(default_factory=dict)
    _frames: list[tuple[int, int]] = field(default_factory=list)
    _keys: dict[int, tuple[Any, list[Any]]] = field(default_factory=dict)

    def keys(self, mapping: Mapping[Any, Any]) -> list[Any]:
        """Return the keys of a dict of the tree, once for each time that the pickle sets them.

        So a key of ours may come twice: `_metadata` of a wrapper and of the model in it get one name.
        """
        _, set_later = self._keys.get(id(mapping), (mapping, []))
        return list({id(key): key for key in (*mapping, *set_later)}.values())

    def rewritten(self, wanted: Iterable[tuple[str, str]]) -> bytes:
        """Write the pickle with other texts in some places.

        Args:
            wanted: (a text of the tree, itself and no copy, and what should stand in its place).

        Raises:
            UnsupportedError: one place is wanted twice, differently.
            CorruptError: a text that no opcode of its own brought there.
        """
        targets: dict[int, str] = {}
        for text, target in wanted:
            if id(text) not in self._opcodes:
                raise CorruptError(f"its pickle does not store the name '{text}' as a plain string.")
            if targets.setdefault(id(text), target) != target:
                raise UnsupportedError(
                    f"two state dicts share the name '{text}', which would be '{target}' in one of them only."
                )
        edits = []
        for opcode in self._opcodes.values():
            target = targets.get(id(opcode.text), opcode.text)
            # What the opcode brings there when it stays as it is.
            brought = opcode.text if opcode.source is None else targets.get(id(opcode.source), opcode.source)
            if target != brought:
                edits.append((opcode.span, _literal(target, narrow=opcode.narrow)))
        if edits:
            # A frame says how long it is; the format allows for pickles without.
            edits += [(span, b"") for span in self._frames]
        parts = []
        position = 0
        for (start, end), literal in sorted(edits):
            parts += [self.pickled[position:start], literal]
            position = end
        return b"".join([*parts, self.pickled[position:]])


def trace(pickled: bytes, *, where: str) -> TracedPickle:
    """Read a pickle, which `unpickle.load` has accepted, and note where its texts stand.

    Raises:
        CorruptError: see `unpickle.load`.
    """
    tracer = _Tracer(io.BytesIO(pickled))
    tree = unpickle.run(tracer, where=where)
    return TracedPickle(pickled, tree, tracer.opcodes, tracer.frames, tracer.keys)


def _nowhere(key: str, dtype: DType | None, numel: int, view: Any) -> Storage:
    return Storage(Path(key), 0, sys.maxsize)


_Base: Any = pickle._Unpickler  # the one in Python, whose every opcode is a function of its own


def _noting(read: Callable[[Any], None], *, literal: bool, narrow: bool = False) -> Callable[[Any], None]:
    def load(tracer: _Tracer) -> None:
        start = tracer.pickled.tell() - 1
        read(tracer)
        top = tracer.stack[-1]
        if literal or isinstance(top, TracedText):
            source = None if literal else top
            narrowed = narrow if source is None else tracer.opcodes[id(source)].narrow
            text = TracedText(top)
            tracer.stack[-1] = text
            tracer.opcodes[id(text)] = _TextOpcode(text, (start, tracer.pickled.tell()), source, narrowed)

    return load


class _Tracer(unpickle.Restricted, _Base):  # type: ignore[misc]
    def __init__(self, pickled: io.BytesIO) -> None:
        super().__init__(pickled, _nowhere)
        self.pickled = pickled
        self.opcodes: dict[int, _TextOpcode] = {}
        self.frames: list[tuple[int, int]] = []
        self.keys: dict[int, tuple[Any, list[Any]]] = {}

    def load_frame(self) -> None:
        # Passed over, so that the position in the file is always that of the next opcode.
        start = self.pickled.tell() - 1
        self.read(8)
        self.frames.append((start, self.pickled.tell()))

    def load_bytearray8(self) -> None:
        # The base class allocates the length that the pickle claims, before it reads.
        (length,) = struct.unpack("<Q", self.read(8))
        raw = self.read(length)
        if len(raw) < length:
            raise pickle.UnpicklingError("pickle data was truncated")
        self.append(bytearray(raw))

    def load_stack_global(self) -> None:
        # The base class takes exact texts only.
        self.stack[-2:] = [str(part) if isinstance(part, TracedText) else part for part in self.stack[-2:]]
        _Base.load_stack_global(self)

    def load_setitem(self) -> None:
        mapping, key, _ = self.stack[-3:]
        self._note_keys(mapping, [key])
        _Base.load_setitem(self)

    def load_setitems(self) -> None:
        self._note_keys(self.metastack[-1][-1], self.stack[::2])
        _Base.load_setitems(self)

    def _note_keys(self, mapping: Any, keys: list[Any]) -> None:
        self.keys.setdefault(id(mapping), (mapping, []))[1].extend(keys)

    dispatch = {
        **_Base.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.FRAME[0]: load_frame,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.STACK_GLOBAL[0]: load_stack_global,
        **{
            opcode[0]: _noting(_Base.dispatch[opcode[0]], literal=True)
            for opcode in (pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8)
        },
        **{
            opcode[0]: _noting(_Base.dispatch[opcode[0]], literal=True, narrow=True)
            for opcode in (pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING)
        },
        **{
            opcode[0]: _noting(_Base.dispatch[opcode[0]], literal=False)
            for opcode in (pickle.GET, pickle.BINGET, pickle.LONG_BINGET)
        },
    }


def _literal(text: str, *, narrow: bool) -> bytes:
    """Write a text as an opcode that torch.load(weights_only=True) knows; it knows those of protocol 2."""
    if narrow and text.isascii():
        raw = text.encode()
        short = len(raw) < 256
        return (
            (pickle.SHORT_BINSTRING if short else pickle.BINSTRING)
            + len(raw).to_bytes(1 if short else 4, "little")
            + raw
        )
    raw = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + len(raw).to_bytes(4, "little") + raw


def differs(old: Any, new: Any, names: Mapping[int, Mapping[str, str]]) -> bool:
    """Compare two trees of one pickle, before and after, but for the keys that were to change.

    Args:
        names: id of a dict in the old tree to those of its keys, and what they should be now.
    """
    seen: set[tuple[int, int]] = set()
    stack = [(old, new)]
    while stack:
        a, b = stack.pop()
        if isinstance(a, _CONTAINERS) and isinstance(b, _CONTAINERS):
            if (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            parts, others = _parts(a, names.get(id(a), {})), _parts(b, {})
            if len(parts) != len(others):
                return True
            stack += zip(parts, others, strict=True)
        elif isinstance(a, _PLAIN) and isinstance(b, _PLAIN):
            if a != b and a == a:  # a NaN is no NaN
                return True
        elif type(a) is not type(b):
            return True
    return False


_CONTAINERS = (dict, list, tuple, argparse.Namespace, unpickle.Inert)
_PLAIN = (str, bytes, bytearray, int, float, complex, TensorSpec, UnsupportedTensor)


def _parts(node: Any, names: Mapping[str, str]) -> list[Any]:
    if isinstance(node, dict):
        renamed = {names.get(key, key): value for key, value in node.items()}
        return [*renamed.keys(), *renamed.values(), getattr(node, "_metadata", None)]
    if isinstance(node, argparse.Namespace):
        return [*vars(node).keys(), *vars(node).values()]
    if isinstance(node, unpickle.Inert):
        return [type(node).global_name, *node.args, node.state, *node.items]
    return list(node)


def renamed(traced: TracedPickle, renamings: Sequence[Renaming], path: Path) -> bytes:
    """Write a pickle with other names for the tensors in it.

    Raises:
        UnsupportedError: the names are written in a way that cannot be followed.
    """
    wanted = []
    changed: dict[int, dict[str, str]] = {}
    for renaming in renamings:
        metadata = getattr(renaming.state, "_metadata", None)
        for mapping, names in ((renaming.state, renaming.names), (metadata, renaming.modules)):
            if isinstance(mapping, dict) and names:
                wanted += [(key, names[key]) for key in traced.keys(mapping) if key in names]
                changed.setdefault(id(mapping), {}).update(names)
    try:
        pickled = traced.rewritten(wanted)
    except (CorruptError, UnsupportedError) as error:
        raise UnsupportedError(f"{path}: {error} Load and save it with torch once.") from error
    if differs(traced.tree, trace(pickled, where=str(path)).tree, changed):
        raise UnsupportedError(
            f"{path}: single names in its pickle cannot be changed. Load and save it with torch once."
        )
    return pickled
