"""The command line: one module a command; here they come together, and errors become messages."""

from __future__ import annotations

import gc
import signal
import sys
import warnings
from functools import partial
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from ..errors import CkptError
from . import console
from .avg import avg
from .convert import convert
from .diff import diff
from .fix_prefix import fix_prefix
from .inspect import inspect
from .recal_bn import recal_bn
from .strip import strip


class _PlainList(typer.core.TyperGroup):
    """`ckpt --help` as plain text: the panels of rich, which each command has, cost as much time as all the rest."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rich_markup_mode = None


class _Command(typer.core.TyperCommand):
    """Help in panels, where they fit: in fewer columns they would cut the names of options short."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if console.columns() < 80:
            self.rich_markup_mode = None
            formatter.width = console.columns()
            formatter.write_dl = partial(formatter.write_dl, col_max=console.columns() // 3)
        super().format_help(ctx, formatter)


app = typer.Typer(
    name="ckpt",
    cls=_PlainList,
    help="Average, convert, rename, recalibrate, strip, compare and inspect saved PyTorch checkpoints. No code in a "
    "checkpoint is ever run; no input is ever changed (fix-prefix replaces its own, in one rename, without -o).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(cls=_Command)(avg)
app.command(cls=_Command)(convert)
app.command("fix-prefix", cls=_Command)(fix_prefix)
app.command(cls=_Command)(inspect)
app.command(cls=_Command)(diff)
app.command(cls=_Command)(strip)
app.command("recal-bn", cls=_Command)(recal_bn)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"ckpt-tools {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


class _Stopped(BaseException):
    """A signal to stop, as an exception, so that half-written files go before the process does."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, _frame: FrameType | None) -> None:
    for each in console.STOPPING:  # once is enough: a second one would break off the cleaning up
        signal.signal(each, lambda *_: None)
    raise _Stopped(number)


def main() -> None:
    """Run `ckpt`; the one place where an error becomes a message and an exit code."""
    for each in console.STOPPING:
        if signal.getsignal(each) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(each, _stop)
    # Headers are many objects and no cycles; with the usual 700 the collector takes as long as all the planning.
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 20, 20)
    # torch says this at import where numpy is not installed; nothing here needs numpy.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    console.open_streams()
    try:
        app()
    except CkptError as error:
        console.say(f"Error: {error}")
        sys.exit(error.exit_code)
    except _Stopped as stopped:
        what = "Interrupted" if stopped.number == signal.SIGINT else "Terminated"
        console.say(f"{what}; nothing was written.")
        sys.exit(128 + stopped.number)
    finally:
        console.let_end()
        gc.set_threshold(*thresholds)
