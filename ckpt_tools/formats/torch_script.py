"""TorchScript: a zip with the pickle of a module, the code of its classes, and a tensor an entry. Read only.

``<root>/data.pkl`` is the module with all of its attributes, ``<root>/code/`` has the source of each class, which says
which attributes are parameters and buffers, ``<root>/constants.pkl`` what its program uses besides: no weights. The
code is text here. The names are those of the state dict of the loaded module.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CorruptError, UnsupportedError
from ..storage.source import InputFile
from ..tensors import Tensor, UnsupportedTensor
from .format import Format
from .header import Header
from .pickle_objects import Inert
from .torch_zip import TORCH_ZIP, read_archive
from .tree import tensors_in
from .zip import Archive

_LARGEST_CODE = 64 << 20  # bytes of all classes; a hostile archive may claim any number
_MOST_MODULES = 1 << 17  # likewise; a module may be in several places
_DEEPEST = 100
_CLASS = re.compile(r"class (\w+)\((\w*)\):")
_NAMED = re.compile(r"  __(parameters|buffers)__ = (\[.*\])")
_OF_ALL_MODULES = "training"
_CUSTOM = "__torch__.torch.classes."


class TorchScript(Format):
    """What `torch.jit.save` writes."""

    name = "torchscript"
    suffixes = (".torchscript",)
    nests = True
    export = True

    @property
    def written_as(self) -> Format:
        return TORCH_ZIP

    def sniff(self, path: Path, start: bytes) -> bool:
        return start.startswith(b"PK\3\4")

    def read(self, path: Path) -> Header:
        """Read the parameters and buffers of a module; one that is quantized or packed is an UnsupportedTensor.

        Raises:
            NotACheckpointError: another zip.
            UnsupportedError: a frozen module.
            CorruptError: truncated or damaged.
        """
        where = str(path)
        with InputFile(path) as file:
            archive = Archive(file, where=where)
            root, module, foreign = read_archive(archive, path, where=where, script=True)
            code = _Code(archive, root, where)
            found: OrderedDict[str, Tensor] = OrderedDict(_state_dict(module, code))
        constants = any(name.startswith(f"{root}/constants/") for name in archive.entries)
        if constants and (not found or _is_frozen(module)):
            raise UnsupportedError(
                f"{where}: a frozen TorchScript module: its weights are constants of its program, without names. "
                "Give the archive from before torch.jit.freeze."
            )
        others = {name: n for name, n in foreign.items() if not name.startswith(("__torch__.", "torch.jit."))}
        return Header(path, self, found, (file.stamp,), Counter(others))


class _Code:
    """The classes of an archive; the file of each is read when it is asked for."""

    def __init__(self, archive: Archive, root: str, where: str) -> None:
        self.where = where
        self._archive, self._root, self._left = archive, root, _LARGEST_CODE
        self._files: dict[str, dict[str, _Names | None]] = {}

    def module(self, value: Any) -> _Names | None:
        """Return what the class of an object says of its attributes; None if it is not one of modules.

        Raises:
            CorruptError: the archive does not have the class.
        """
        qualified = type(value).global_name if isinstance(value, Inert) else ""
        if not qualified.startswith("__torch__.") or qualified.startswith(_CUSTOM):
            return None
        package, _, name = qualified.rpartition(".")
        if package not in self._files:
            self._files[package] = dict(self._classes(f"{self._root}/code/{package.replace('.', '/')}.py"))
        if name not in self._files[package]:
            raise CorruptError(f"{self.where}: the code of {qualified[:200]} is missing. The file is damaged.")
        return self._files[package][name]

    def _classes(self, entry: str) -> Iterator[tuple[str, _Names | None]]:
        if entry not in self._archive.entries:
            return
        source = self._archive.inflated(entry, self._left)
        self._left -= len(source)
        names: _Names | None = None
        for line in source.decode("utf-8", "replace").split("\n"):
            if head := _CLASS.match(line):
                names = {} if head[2] == "Module" else None
                yield head[1], names
            elif names is not None and (listed := _NAMED.fullmatch(line)):
                try:
                    names[listed[1]] = {*ast.literal_eval(listed[2])}
                except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                    raise CorruptError(f"{self.where}: {entry} lists no names of {listed[1]}.") from error


_Names = dict[str, set[str]]
"""``parameters`` and ``buffers`` to names of attributes; archives from before torch 1.6 have no ``buffers``."""


def _state_dict(module: Any, code: _Code) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the order of a state dict: parameters of a module, its buffers, modules inside."""
    if code.module(module) is None:
        raise UnsupportedError(f"{code.where}: a TorchScript archive of an object that is no module.")
    stack: list[tuple[str, int, Any]] = [("", 0, module)]
    count = 0
    while stack:
        lead, depth, node = stack.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST_MODULES:
            raise CorruptError(f"{code.where}: modules inside each other without end. The file is damaged.")
        names = code.module(node)
        state = node.state
        if names is None or not isinstance(state, dict):
            if any(True for _ in tensors_in([node.args, state, node.items])):
                yield lead[:-1], UnsupportedTensor("packed" if names is None else "unpacked by code of its module")
            continue
        own = {key: value for key, value in state.items() if isinstance(key, str) and value is not None}
        parameters = names.get("parameters", set())
        buffers = names.get("buffers", {key for key, value in own.items() if isinstance(value, Tensor)} - parameters)
        for listed in (parameters, buffers):
            for key in (key for key in own if key in listed):
                tensor = own[key]
                yield lead + key, tensor if isinstance(tensor, Tensor) else UnsupportedTensor("of an unknown kind")
        inside = [
            (f"{lead}{key}.", depth + 1, value)
            for key, value in own.items()
            if isinstance(value, Inert) and (code.module(value) is not None or _is_custom(value))
        ]
        stack += inside[::-1]


def _is_frozen(module: Any) -> bool:
    """True if freezing took the attributes that all modules have; those that it was told to keep are there still."""
    return isinstance(module.state, dict) and _OF_ALL_MODULES not in module.state


def _is_custom(value: Inert) -> bool:
    return type(value).global_name.startswith(_CUSTOM)


TORCH_SCRIPT = TorchScript()
