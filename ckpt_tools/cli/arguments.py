"""Arguments: the options that commands share, and what a shell hands over, read as the library takes it."""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError, WriteError

WEIGHTS, OUTPUT, RUNNING = "Which weights", "Output", "Running"
"""Panels of the help that several commands have."""

State = Annotated[
    str,
    typer.Option(help="auto (the EMA where there is one), raw, ema, or a dotted path.", rich_help_panel=WEIGHTS),
]
MaxShardSize = Annotated[str | None, typer.Option(help="Such as 5GB, for a folder.", rich_help_panel=OUTPUT)]
Untie = Annotated[
    bool,
    typer.Option("--untie", help="safetensors: write tied tensors under each name.", rich_help_panel=OUTPUT),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing target.", rich_help_panel=OUTPUT)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.", rich_help_panel=RUNNING)]
Json = Annotated[bool, typer.Option("--json", help="The report on stdout.", rich_help_panel=RUNNING)]
Threads = Annotated[
    int | None, typer.Option(help="Workers.", show_default="the cores, 16 at most", rich_help_panel=RUNNING)
]


def out(meaning: str, *, default: str | bool) -> Any:
    """Return the option -o of a command, with what it means there and what it is if not given."""
    return typer.Option("--out", "-o", metavar="PATH", help=meaning, show_default=default, rich_help_panel=OUTPUT)


def check_folder() -> None:
    """Refuse to start in a folder that is gone.

    Raises:
        WriteError: it is.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise WriteError("the current folder is gone, and torch cannot start in it. cd to another folder.") from error


def target(text: str | None) -> str | None:
    """Read what -o says; a Path would not tell 'a.pth/' from 'a.pth', nor '' from '.'.

    Raises:
        UsageError: no name, or one that asks for a file and a folder at once.
    """
    if text is None:
        return None
    from ..formats import suffixes

    name = Path(text).name
    if not text or name in suffixes():
        raise UsageError(f"-o {text!r}: there is no name in it. Is a variable of the shell unset?")
    if name.endswith(suffixes()) and os.path.basename(text) != name:  # noqa: PTH119
        raise UsageError(f"-o {text}: the suffix asks for a file, the slash for a folder. Leave one of them out.")
    return path(text)


def path(text: str | Path) -> str:
    """Read a path, of which a shell leaves the ~ when it stands in quotes; a ~user that is none stays as it is."""
    return os.path.expanduser(text)  # noqa: PTH111


def numbers(option: str, text: str | None) -> list[float] | None:
    """Read numbers with commas between them.

    Raises:
        UsageError: something else; names the option.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: write numbers with commas, such as 1,2,3.") from error


def parse_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn ``["num_classes=10", "act=relu"]`` into keyword arguments; what is no Python literal is text.

    Raises:
        UsageError: one without ``=``.
    """
    kwargs: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise UsageError(f"--model-kwargs {pair!r}: write name=value.")
        try:
            kwargs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[key] = text
    return kwargs
