"""Options that all commands have, and that stand before a command, too."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UsageError
from . import console


def show_version(asked: bool) -> None:
    """Show the version, and end the run."""
    if asked:
        from .. import __version__

        typer.echo(f"ckpt-tools {__version__}")
        raise typer.Exit


def speak(*, quiet: bool, verbose: bool, all_rows: bool = False) -> None:
    """Say as much as these options want, from here on.

    Raises:
        UsageError: they contradict each other.
    """
    console.manner.quiet |= quiet
    console.manner.verbose |= verbose
    console.manner.all |= all_rows
    if console.manner.quiet and console.manner.verbose:
        raise UsageError("`quiet` and `verbose` do not go together.")


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors, and what is asked for.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also say what is decided, and how long it takes.")]
All = Annotated[bool, typer.Option("--all", help="Show all rows of a long table on a terminal, too.")]
