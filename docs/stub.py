"""Writes ckpt_tools/__init__.pyi: the signatures of the public functions, for type checkers and editors.

A function takes the options of its groups as keyword arguments, which no type checker can follow; `make generated`
writes them out, and a test compares.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import ckpt_tools
from ckpt_tools.checkpoints.layouts import LAYOUTS
from ckpt_tools.tensors import ALIASES, FLOAT_DTYPES

TARGET = Path(ckpt_tools.__file__).with_suffix(".pyi")
HEAD = '''\
"""Signatures of the public functions, for type checkers and editors: written by docs/stub.py (make generated)."""
# ruff: noqa: E501, I001
# fmt: off

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch

'''
CLOSED = {"dtype": (*FLOAT_DTYPES, *ALIASES, "same"), "to": tuple(layout.name for layout in LAYOUTS)}
"""Words that an option takes where its type at run time says less: layouts may be registered, and torch has dtypes."""


def stub() -> str:
    """Return the text of the stub."""
    homes: dict[str, list[str]] = {}
    functions = []
    for name, home in ckpt_tools._HOMES.items():
        public = getattr(ckpt_tools, name)
        if hasattr(public, "__wrapped__") and hasattr(public, "__signature__"):
            functions.append(_function(name, public))
        else:
            homes.setdefault(home, []).append(f"{name} as {name}")
    imports = [f"from .{home} import {', '.join(sorted(names))}\n" for home, names in sorted(homes.items())]
    names = "".join(f'    "{name}",\n' for name in ckpt_tools.__all__)
    imports.append("from .compute.progress import Activity\n")  # an argument of `on_progress`
    return HEAD + "".join(sorted(imports)) + f"\n__version__: str\n__all__ = [\n{names}]\n\n" + "\n".join(functions)


def _function(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    if name != "average":
        return _signature(name, function, signature)
    # One without an output returns the weights.
    parameters = signature.parameters
    out = parameters["out"]
    written = signature.replace(
        parameters=[*(parameters | {"out": out.replace(annotation=str | Path)}).values()],
        return_annotation="AverageReport",
    )
    in_memory = signature.replace(
        parameters=[*(parameters | {"out": out.replace(annotation=None, default=out.empty)}).values()],
        return_annotation="dict[str, torch.Tensor]",
    )
    return "\n".join(f"@overload\n{_signature(name, function, each)}" for each in (written, in_memory))


def _signature(name: str, function: Any, signature: inspect.Signature) -> str:
    lines, keywords = [], False
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not keywords:
            lines, keywords = [*lines, "*"], True
        default = "" if each.default is each.empty else f" = {each.default!r}"
        kind = f"Callable[[{_report(signature)}], None] | None" if each.name == "on_plan" else _type(each)
        lines.append(f"{each.name}: {kind}{default}")
    parameters = "".join(f"    {line},\n" for line in lines)
    doc = inspect.getdoc(function) or ""
    text = "\n".join(f"    {line}".rstrip() for line in f'r"""{doc}\n"""'.splitlines())
    return f"def {name}(\n{parameters}) -> {signature.return_annotation}:\n{text}\n    ...\n"


def _report(signature: inspect.Signature) -> str:
    """Return the report of a plan."""
    return "AverageReport" if "Tensor" in signature.return_annotation else str(signature.return_annotation)


def _type(parameter: inspect.Parameter) -> str:
    if isinstance(parameter.annotation, str):
        return parameter.annotation
    if parameter.name in CLOSED:
        words = f"Literal[{', '.join(map(repr, CLOSED[parameter.name]))}]"
        return words if parameter.name == "to" else f"{words} | torch.dtype | None"
    return written(parameter.annotation)


def written(kind: Any) -> str:
    """Return a type as it is written in source code."""
    if kind in (None, NoneType, Any, Ellipsis):
        return {None: "None", NoneType: "None", Any: "Any", Ellipsis: "..."}[kind]
    origin, own = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(written, own))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, own))}]"
    if isinstance(kind, list):  # the parameters of a callable
        return f"[{', '.join(map(written, kind))}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(written, own))}]"
    return str(kind.__name__)


if __name__ == "__main__":
    TARGET.write_text(stub())
