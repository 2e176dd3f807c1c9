"""The restricted unpickler: reads the structure of a checkpoint and runs none of it.

A pickle is a program that may import and call any Python object. Here a global is looked up in a short table of plain
data types (`pickle_objects`); any other global becomes a subclass of `Inert`. No module named in a file is imported.
"""

from __future__ import annotations

import argparse
import codecs
import copyreg
import io
import pickle
from collections import Counter
from collections.abc import Callable, Collection, Container, Sequence
from typing import IO, Any

from ..errors import CkptError, CorruptError
from ..tensors import DTYPES, DType, Storage, TensorSpec, UnsupportedTensor
from .pickle_check import check
from .pickle_objects import (
    GLOBALS,
    TORCH_VALUES,
    DtypeName,
    Inert,
    InertGetattr,
    Sealed,
    Size,
    StorageType,
    TypedStorage,
    begin,
    distinct,
    inert_class,
)

# From torch's persistent id (key, element type, element count, view) to a byte range of the file.
# The element type is None for an untyped storage, whose count is in bytes.
Locate = Callable[[str, DType | None, int, Any], Storage]

_MOST_NAMES = 10_000
"""Unknown names of classes in a pickle; each becomes a class."""


class Restricted:
    """Mixin that resolves the globals of a pickle; it precedes one of Python's unpicklers among the base classes."""

    _named: list[str] | None = None
    """Dtypes that were met, if they are not to be those of torch."""

    def __init__(self, file: IO[bytes], locate: Locate, values: Container[str] = TORCH_VALUES) -> None:
        # latin1 preserves the bytes of numpy scalars of Python 2; ASCII names are the same in any encoding.
        super().__init__(file, encoding="latin1")  # type: ignore[call-arg]
        self._locate = locate
        self._values = values
        self._inert: dict[str, type] = {}
        self.foreign: Counter[str] = Counter()

    def find_class(self, module: str, name: str) -> Any:
        # Protocol 2, which torch.save writes, has Python 2's name for builtins.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full in GLOBALS:
            return GLOBALS[full]
        if full in self._values:
            if self._named is not None and name in DTYPES:
                self._named.append(name)
                return DtypeName(DTYPES[name])
            import torch

            return Size if name == "Size" else getattr(torch, name)
        if full not in self._inert:
            if len(self._inert) >= _MOST_NAMES:
                raise pickle.UnpicklingError("too many names of classes")
            self._inert[full] = inert_class(full, InertGetattr if full == "builtins.getattr" else Inert)
        self.foreign[full] += 1
        return self._inert[full]

    def persistent_load(self, pid: Any) -> Any:
        tag, *rest = pid if isinstance(pid, tuple) and pid else ("",)
        if isinstance(tag, bytes):
            tag = tag.decode("latin1")
        if tag == "module" and rest and isinstance(rest[0], type):  # legacy: (container class, source file, its text)
            return rest[0]
        storage_type, key, numel = (rest[0], rest[1], rest[3]) if tag == "storage" and len(rest) > 3 else (None,) * 3
        if isinstance(key, bytes):
            key = key.decode("latin1")
        if not isinstance(storage_type, Sealed) or not issubclass(storage_type, StorageType):
            raise pickle.UnpicklingError("an unknown type of persistent object")
        if not isinstance(key, str) or type(numel) is not int:
            raise pickle.UnpicklingError("a storage without a name or a size")
        view = rest[4] if len(rest) > 4 else None
        return TypedStorage(self._locate(key, storage_type.dtype, numel, view), storage_type.dtype)


class _Unpickler(Restricted, pickle.Unpickler):
    pass


_Base: Any = pickle._Unpickler


class ByOpcode(Restricted, _Base):  # type: ignore[misc]
    """The restricted unpickler in Python, with one function per opcode; it takes ten times as long."""

    def load_bytearray8(self) -> None:
        # The base class allocates the claimed length before it reads.
        raw = self.read(size := int.from_bytes(self.read(8), "little"))
        if len(raw) < size:
            raise pickle.UnpicklingError("pickle data was truncated")
        self.append(bytearray(raw))

    def load_unicode(self) -> None:
        # The base class looks the codec up by its name, which imports a module.
        self.append(codecs.raw_unicode_escape_decode(self.readline()[:-1])[0])

    dispatch = {**_Base.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8, pickle.UNICODE[0]: load_unicode}


class _Comparing(ByOpcode):
    """Reads a pickle of very many tuples as keys, and refuses those of one hash."""

    def load_setitem(self) -> None:
        self._compare(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._compare(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._compare(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        self._compare(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        self._compare(self.stack)
        super().load_frozenset()

    def _compare(self, keys: Sequence[Any]) -> None:
        for key in keys:
            if isinstance(key, (tuple, frozenset)):
                distinct(key)

    dispatch = {
        **ByOpcode.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }


def no_storage(key: str, dtype: DType | None, numel: int, view: Any) -> Storage:
    """Refuse a storage, in a pickle without tensors."""
    raise pickle.UnpicklingError("an unexpected storage")


def load(
    file: IO[bytes], locate: Locate = no_storage, *, where: str, torch_values: bool = True
) -> tuple[Any, Counter[str]]:
    """Read one pickle from an open file, and leave the file position after it.

    Args:
        file: open for reading in binary.
        locate: returns the byte range of a storage.
        where: the file's name, for messages.
        torch_values: return sizes, dtypes and devices as torch objects; otherwise as Inert, without torch.

    Returns:
        The object tree, with a TensorSpec or UnsupportedTensor for each tensor and an Inert for each object of an
        unknown class; and the unknown globals, with counts.

    Raises:
        CorruptError: the pickle is damaged or hostile.
    """
    pickled, hashes = _next_pickle(file, where)
    kind = _Comparing if hashes else _Unpickler
    # Most dtypes in pickles are those of tensors, for which torch need not be imported.
    unpickler = kind(_buffered(pickled), locate, TORCH_VALUES if torch_values else ())
    unpickler._named = [] if torch_values else None
    try:
        tree = run(unpickler, len(pickled), where=where)
        done = not unpickler._named or not _names_dtype(tree)
    except CorruptError:
        if not unpickler._named:
            raise
        done = False
    if not done:
        unpickler = kind(_buffered(pickled), locate, TORCH_VALUES)
        tree = run(unpickler, len(pickled), where=where)
    check_depth(tree, where)
    return tree, unpickler.foreign


def _buffered(pickled: bytes) -> IO[bytes]:
    return io.BufferedReader(io.BytesIO(pickled))  # from io.BytesIO alone, each opcode is a call


def _next_pickle(file: IO[bytes], where: str) -> tuple[bytes, bool]:
    """Read the next pickle of a file, check what it costs to load, and leave the file position after it.

    Returns:
        The pickle, and whether hashes of keys are to be compared (`pickle_check.Checked`).
    """
    start = file.tell()
    size = -1 if isinstance(file, io.BytesIO) else 1 << 16
    try:
        while True:
            file.seek(start)
            data = file.read(size)
            checked = check(data, whole=size < 0 or len(data) < size)
            if checked is not None:
                end = checked.end
                file.seek(start + end)
                return data if end == len(data) else data[:end], checked.hashes
            size *= 8
    except (pickle.UnpicklingError, MemoryError) as error:
        raise _unreadable(where, error) from error


_DEEPEST = 1000
"""Levels of containers. Python's own pickler ends with a RecursionError below that."""


def check_depth(tree: Any, where: str) -> None:
    """Refuse a tree in which containers are nested so deeply that paths to all of them would fill the memory.

    Raises:
        CorruptError: it is.
    """
    seen: set[int] = set()
    levels = [iter((tree,))]
    while levels:
        for node in levels[-1]:
            if type(node) in _LEAVES or id(node) in seen or not isinstance(node, _CONTAINERS):
                continue
            seen.add(id(node))
            below: Collection[Any]
            if isinstance(node, dict):
                below = node.values()
                metadata = getattr(node, "_metadata", None)
                if metadata is not None:
                    below = [*below, metadata]
            elif isinstance(node, argparse.Namespace):
                below = vars(node).values()
            else:
                below = [*node.args, node.state, *node.items] if isinstance(node, Inert) else node
            if _LEAVES.issuperset(map(type, below)):
                continue
            levels.append(iter(below))
            if len(levels) > _DEEPEST:
                raise CorruptError(
                    f"{where}: its values are nested more than {_DEEPEST} levels deep. "
                    "The file is damaged or not a checkpoint; nothing in it was run."
                )
            break
        else:
            levels.pop()


_CONTAINERS = (dict, list, tuple, argparse.Namespace, Inert)
_LEAVES = frozenset({TensorSpec, UnsupportedTensor, str, int, float, bool, bytes, type(None), complex})


def _names_dtype(tree: Any) -> bool:
    """True if a dtype is left in a tree, as a value of its own."""
    seen: set[int] = set()
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if type(node) is DtypeName:
            return True
        if not isinstance(node, (dict, list, tuple, argparse.Namespace, Inert)) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            waiting += [*node, *node.values(), getattr(node, "_metadata", None)]
        elif isinstance(node, argparse.Namespace):
            waiting += vars(node).values()
        else:
            waiting += [*node.args, node.state, *node.items] if isinstance(node, Inert) else node
    return False


def run(unpickler: Any, size: int, *, where: str) -> Any:
    """Run a restricted unpickler and return the tree.

    Args:
        unpickler: of a pickle that `pickle_check.check` has passed.
        size: of the pickle, in bytes.
        where: the file's name, for messages.

    Raises:
        CorruptError: see `load`.
    """
    # Extension codes are looked up in a cache of the process before `find_class` is called.
    copyreg.clear_extension_cache()
    begin(size)
    try:
        return unpickler.load()
    except CkptError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise any exception
        raise _unreadable(where, error) from error
    finally:
        copyreg.clear_extension_cache()


def _unreadable(where: str, error: Exception) -> CorruptError:
    return CorruptError(
        f"{where}: its pickle cannot be read ({type(error).__name__}: {error}). "
        "The file is damaged or not a checkpoint; nothing in it was run."
    )
