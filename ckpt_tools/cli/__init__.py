"""The command line: one module a command; here they come together, and errors become messages."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated

import typer

from ..errors import CkptError
from .avg import avg
from .inspect import inspect

app = typer.Typer(
    name="ckpt",
    help="Average and inspect saved PyTorch checkpoints. No code in a checkpoint is ever run; no input is ever changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(avg)
app.command()(inspect)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"ckpt-tools {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that half-written files go before the process does."""


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def main() -> None:
    """Run `ckpt`; the one place where an error becomes a message and an exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    # torch says this at import where numpy is not installed; nothing here needs numpy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        app()
    except CkptError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("Interrupted; nothing was written.", err=True)
        sys.exit(130)
    except _Terminated:
        typer.echo("Terminated; nothing was written.", err=True)
        sys.exit(143)
    except BrokenPipeError:
        # The reader of our pipe has gone; Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
