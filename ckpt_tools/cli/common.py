"""Options that all commands have, and that stand before a command, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from ..errors import UsageError
from ..series.rules.option import Origins
from . import console


def version_asked(asked: bool) -> None:
    """Show the version, and end the run."""
    if asked:
        show_version(verbose=False)


def show_version(*, verbose: bool) -> NoReturn:
    """Show the version, `verbose` also of what ckpt runs on, and end the run."""
    from .. import __version__

    typer.echo(f"ckpt-tools {__version__}")
    if verbose:
        for what, version in _surroundings():
            typer.echo(f"{what} {version}")
    raise typer.Exit


def _surroundings() -> Iterator[tuple[str, str]]:
    """Yield names and versions for a report of a fault; no library is imported for it."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from ..compute import native

    yield "C extension", "yes" if native.present() else "no"
    yield platform.python_implementation(), platform.python_version()
    yield platform.system(), f"{platform.release()} {platform.machine()}"
    for library in ("torch", "safetensors", "typer", "rich", "timm", "obstore"):
        with suppress(PackageNotFoundError):
            yield library, version(library)


def complete_shell(context: typer.Context, param: typer.CallbackParam, asked: bool) -> None:
    """Install the completion of the shell that started this process, or show it."""
    if asked and not context.resilient_parsing:
        from typer import completion

        from .completion import prepare

        prepare()
        callback = completion.install_callback if param.name == "install_completion" else completion.show_callback
        callback(context, param, asked)


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


ONE_RUN = Origins(once_only=True)
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Say nothing but errors, and what is asked for."),
    Origins(from_environment=True, overrules=("verbose",)),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also say what is decided, and how long it takes."),
    Origins(from_environment=True, overrules=("quiet",)),
]
ShowConfig = Annotated[
    bool,
    typer.Option("--show-config", help="Show the value of each option and where it is from; do nothing."),
    ONE_RUN,
]
All = Annotated[bool, typer.Option("--all", help="Show all rows of a long table on a terminal, too."), ONE_RUN]
