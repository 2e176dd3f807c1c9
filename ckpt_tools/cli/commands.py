"""Commands: made by Typer when they are called for, so that a run of one does not pay for the others.

Three things differ from what Typer does by itself, each for the time that it takes. Only the command that runs is
imported. Its help is plain text in groups: rich would need 400 modules to draw boxes around them. And a value that is
right is read here: Typer (0.29) makes a pydantic adapter for each option, and pydantic takes as long to import as all
of an average. A wrong value goes to Typer, which has the message.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, get_args

import typer.core
import typer.main

from . import console

NAMES = (
    "avg",
    "look",
    "sweep",
    "convert",
    "fix-prefix",
    "inspect",
    "diff",
    "verify",
    "strip",
    "recal-bn",
    "tune",
    "clean",
)
"""Each is made by a function in a module of its name; see `arguments.with_options`."""


class _QuickHelp:
    """A command whose --help has a quick value."""

    _help: _Option | None = None

    def get_help_option(self, ctx: Any) -> Any:
        """Return --help; the same one each time."""
        if self._help is None:
            self._help = _Option(super().get_help_option(ctx), bool)  # type: ignore[misc]
        return self._help


class Commands(_QuickHelp, typer.core.TyperGroup):
    """The commands by name, each imported and made when it is asked for."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rich_markup_mode = None
        self.commands = {name: typer.core.TyperCommand(name) for name in NAMES}  # what Typer guesses slips from

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return the command of this name; None if there is none."""
        if name not in NAMES:
            return None
        module = name.replace("-", "_")
        made = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        command = getattr(import_module(f".{module}", __package__), module)
        made.command(name, cls=_Command)(command())
        return typer.main.get_command(made)


class _Command(_QuickHelp, typer.core.TyperCommand):
    """A command whose values are read quickly and whose help is plain text."""

    def __init__(self, name: str, *, callback: Callable[..., Any], params: list[Any], **options: Any) -> None:
        types = {
            parameter.name: get_args(parameter.annotation)[0]
            for parameter in inspect.signature(callback, eval_str=True).parameters.values()
        }
        quick: list[Any] = [
            (_Option if isinstance(param, typer.core.TyperOption) else _Argument)(param, types[param.name])
            for param in params
        ]
        super().__init__(name, callback=callback, params=quick, **options)
        self.rich_markup_mode = None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, as wide as the terminal."""
        formatter.width = min(console.columns(), 100)
        if formatter.width < 80:  # names of options would leave no room for what they mean
            formatter.write_dl = partial(formatter.write_dl, col_max=formatter.width // 3)
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options under the titles of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                title = "Arguments" if isinstance(param, typer.core.TyperArgument) else "Options"
                groups.setdefault(getattr(param, "rich_help_panel", None) or title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _read(value: Any, type_: Any) -> Any:
    """Read a value of the command line that is there, and plainly right; ValueError for any other."""
    if isinstance(value, bool):
        return value
    kinds = {type_, *get_args(type_)}
    if isinstance(value, str):
        if str in kinds:
            return value
        if int in kinds and re.fullmatch(r"-?[0-9]{1,18}", value):
            return int(value)
        if float in kinds and value.isascii():
            return float(value)
    elif value and isinstance(value, (list, tuple)) and list[str] in (type_, *kinds):
        return list(value)
    elif isinstance(value, (int, float)) and type(value) in kinds:
        return value
    raise ValueError(f"{value!r} is not plainly right")


class _Quick:
    """An option or argument as Typer made it, with quick values."""

    def __init__(self, made: Any, plain_type: Any) -> None:
        vars(self).update(vars(made), plain_type=plain_type)

    def process_value(self: Any, ctx: Any, value: Any) -> Any:
        """Return a value of the command line as the command wants it."""
        if value is None and not self.required:
            value = () if self.multiple or self.nargs == -1 else None
        else:
            try:
                value = _read(value, self.plain_type)
            except ValueError:
                return super().process_value(ctx, value)  # type: ignore[misc]
        return value if self.callback is None else self.callback(ctx, self, value)


class _Option(_Quick, typer.core.TyperOption):
    pass


class _Argument(_Quick, typer.core.TyperArgument):
    pass
