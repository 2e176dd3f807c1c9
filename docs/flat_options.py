"""The reference shows each function with the keyword arguments that it takes, which are made at run time."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe


class FlatOptions(griffe.Extension):
    """Take the signature and the docstring of functions that are declared with `@takes` from the running package."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """See `griffe.Extension`."""
        if not any(str(decorator.value).startswith("takes(") for decorator in func.decorators) or not func.docstring:
            return
        call = getattr(importlib.import_module(func.module.path), func.name)
        func.docstring.value = inspect.cleandoc(call.__doc__)
        func.parameters = griffe.Parameters(*map(_parameter, inspect.signature(call).parameters.values()))


def _parameter(given: inspect.Parameter) -> griffe.Parameter:
    annotation = inspect.formatannotation(given.annotation).strip("'")
    return griffe.Parameter(
        given.name,
        annotation=re.sub(r"\b(?:\w+\.)+(?=\w)", "", annotation),
        kind=griffe.ParameterKind[given.kind.name.lower()],
        default=None if given.default is inspect.Parameter.empty else repr(given.default),
    )
