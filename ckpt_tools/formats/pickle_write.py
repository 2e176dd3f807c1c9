"""Pickle writing: the pickle of a torch file as torch.save writes it, without torch.

`torch.load(weights_only=True)` accepts plain data and a few globals of torch. A pickler writes a global only if it can
import it, so stand-ins are importable during writing, in modules with random names; the random names are then replaced
by torch's.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import IO, Any

from ..errors import WriteError, shortened
from ..tensors import TensorSpec, c_strides
from .file_plan import OutTensor
from .pickle_objects import Inert, numbers_of
from .tree import ITEM, LEFT_OUT, PLAIN, Instead, map_tree

_REBUILD, _REBUILD_WITH_DTYPE = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")
_UNTYPED = ("torch.storage", "UntypedStorage")


class _StorageOut:
    """A storage of the output; the pickler turns it into a persistent id."""

    __slots__ = ("key", "tensor")

    def __init__(self, tensor: OutTensor, key: str) -> None:
        self.tensor = tensor
        self.key = key


class _Names(dict[tuple[str, str], type]):
    """Stand-in classes by (module, name) of torch, made on demand in modules with random names."""

    def __init__(self) -> None:
        super().__init__()
        self._random = os.urandom(16).hex()
        self._modules: dict[str, ModuleType] = {}

    def __missing__(self, key: tuple[str, str]) -> type:
        module, name = key
        made = self._modules.setdefault(module, ModuleType(f"{self._random}{len(self._modules)}"))
        sys.modules[made.__name__] = made
        self[key] = type(name, (), {"__module__": made.__name__})
        setattr(made, name, self[key])
        return self[key]

    def with_torch_names(self, pickled: bytes) -> bytes:
        """Replace the random module names, which occur nowhere else, by torch's."""
        for module, made in self._modules.items():
            pickled = pickled.replace(made.__name__.encode(), module.encode())
        return pickled

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Keep the modules importable inside the block."""
        try:
            yield
        finally:
            for module in self._modules.values():
                sys.modules.pop(module.__name__, None)


class _Pickler(pickle.Pickler):
    """Writes a tree of plain data with OutTensors in it."""

    def __init__(self, file: IO[bytes], names: _Names) -> None:
        super().__init__(file, protocol=2)  # the one that torch's restricted loader knows
        self.storages: list[OutTensor] = []
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._names = names

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not _StorageOut:
            return None
        dtype = obj.tensor.dtype
        if dtype.storage is None:
            return ("storage", self._names[_UNTYPED], obj.key, "cpu", obj.tensor.nbytes)
        return ("storage", self._names["torch", dtype.storage], obj.key, "cpu", obj.tensor.numel)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, OutTensor):
            return NotImplemented
        storage = _StorageOut(obj, str(len(self.storages)))
        self.storages.append(obj)
        # A pickler writes one object once. As in torch's files, each tensor has its own tuples, except that two names
        # of one input tensor share the shape.
        shape = self._shapes.setdefault(id(obj.origin), (*obj.shape,))
        stride = (*c_strides(obj.shape),)
        hooks: OrderedDict[Any, Any] = OrderedDict()
        args = (storage, 0, shape, stride, False, hooks)
        if obj.dtype.storage is None:
            return self._names[_REBUILD_WITH_DTYPE], (*args, self._names["torch", obj.dtype.name])
        return self._names[_REBUILD], args


def dump(tree: Any, *, name: str) -> tuple[bytes, list[OutTensor]]:
    """Pickle a tree as torch.save does.

    Args:
        tree: plain data (see `plain`) with OutTensors; an OutTensor in several places stays tied.
        name: of the file, for messages.

    Returns:
        The pickle, and the tensors in the order of their storage keys 0, 1, 2, ...

    Raises:
        WriteError: an object cannot be pickled, or the tree is nested too deeply.
    """
    stream = io.BytesIO()
    names = _Names()
    pickler = _Pickler(stream, names)
    try:
        with names.importable():
            pickler.dump(tree)
    except (pickle.PicklingError, RecursionError, TypeError) as error:
        raise WriteError(
            f"{name}: the entries other than weights cannot be written ({error}). Write a .safetensors file instead."
        ) from error
    return names.with_torch_names(stream.getvalue()), pickler.storages


def _data(inert: Inert) -> Any:
    """Return the data in an object of omegaconf or NumPy; None for other objects."""
    if type(inert).global_name.startswith("omegaconf.") and isinstance(inert.state, dict):
        # Containers have a content, which is text or None for an interpolation or nothing; nodes have a value.
        key = next((key for key in ("_content", "_val") if key in inert.state), None)
        return None if key is None else Instead(inert.state[key])
    return numbers_of(inert)


def _stream(inert: Inert) -> io.BytesIO | None:
    """Return the file in memory that Transformer Engine had for the scales of a module; None for other objects."""
    state = inert.state if type(inert).global_name == "_io.BytesIO" else None
    whole = isinstance(state, tuple) and len(state) == 3 and type(state[0]) is bytes and state[2] is None
    return io.BytesIO(state[0]) if whole and state is not None else None


_MOST_SHOWN = 100  # keys of a path


def plain(tree: Any, dropped: list[str], convert: Callable[[TensorSpec], OutTensor]) -> Any:
    """Copy a tree so that torch.load(weights_only=True) accepts it.

    Namespaces and omegaconf's configurations become dicts and lists (interpolations stay text), frozensets become sets,
    small NumPy arrays of numbers become lists, and objects that are not plain data are left out. Shared and recursive
    containers stay so in the copy. An ``_extra_state`` that is a file in memory (`io.BytesIO`) stays one: its model is
    not loaded without it, and its checkpoints never load with weights_only.

    Args:
        tree: of a header; it may contain OutTensors.
        dropped: receives the dotted path of each object left out.
        convert: returns the output tensor for a tensor of an input.

    Raises:
        WriteError: nested beyond Python's recursion limit.
    """
    atoms: tuple[type, ...] = (bool, int, float, complex, str, bytes, bytearray, OutTensor)
    if "torch" in sys.modules:  # otherwise no tree contains torch objects
        import torch

        atoms += (torch.Size, torch.dtype, torch.device)
    keys = (str, int, float, bool, tuple, type(None))
    containers = (dict, argparse.Namespace, list, tuple, set, frozenset)

    def is_key(key: Any) -> bool:
        return isinstance(key, keys) and (not isinstance(key, tuple) or all(map(is_key, key)))

    def place(path: list[Any]) -> str:
        where = ""
        for key in path[-_MOST_SHOWN:]:
            text = shortened(str(key)) if is_key(key) else type(key).__name__
            where = where + ITEM if key is ITEM else f"{where}.{text}".lstrip(".")
        return shortened(where) or "the object itself"

    def replace(path: list[Any], node: Any) -> Any:
        if not path or is_key(path[-1]):
            if node is None or isinstance(node, atoms):
                return node
            if isinstance(node, TensorSpec):
                return convert(node)
            if isinstance(node, containers):
                return NotImplemented
            if isinstance(node, Inert) and (found := _data(node)) is not None:
                return found
            if isinstance(node, Inert) and str(path[-1]).endswith("_extra_state"):
                found = _stream(node)
                if found is not None:
                    return found
        dropped.append(place(path))
        return LEFT_OUT

    try:
        return map_tree(tree, replace, PLAIN)
    except RecursionError as error:
        raise WriteError(
            "the entries other than weights are nested too deeply to be copied. Write a .safetensors file instead."
        ) from error
