"""The command line: one module a command; here they come together, and errors become messages."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from ..errors import CkptError
from . import common, console
from .commands import Commands, NotUsable, show_defaults

app = typer.Typer(
    name="ckpt",
    cls=Commands,
    help="Average, convert, rename, recalibrate, strip, compare and inspect saved PyTorch checkpoints. No code in a "
    "checkpoint is ever run; no input is ever changed (fix-prefix replaces its own, in one rename, without -o).",
    epilog="'ckpt help COMMAND' shows the options of a command, and an example.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=common.version_asked, is_eager=True, help="Show the version.")
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion", callback=common.complete_shell, is_eager=True, help="Let this shell complete ckpt."
        ),
    ] = False,
    show_completion: Annotated[
        bool,
        typer.Option(
            "--show-completion", callback=common.complete_shell, is_eager=True, help="Show the script for that."
        ),
    ] = False,
    show_config: Annotated[
        bool,
        typer.Option("--show-config", callback=show_defaults, is_eager=True, help="Show the defaults that are set."),
    ] = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    common.speak(quiet=quiet, verbose=verbose)


def main() -> None:
    """Run `ckpt`; the one place where an error becomes a message and an exit code."""
    try:
        _run()
    except SystemExit:
        raise
    except BaseException as error:
        code = _stopped(error)
        if code is None:
            raise
        sys.exit(code)


def _stopped(error: BaseException) -> int | None:
    """Tell that a signal has ended the run, if it has; return the exit code.

    The exception is in no variable of `main`: a cycle would keep all that the run held until the process has ended.
    """
    stopped = console.stopped_by(error)  # the only one, wherever it came: see `console.clean_up_when_stopped`
    if stopped is None:
        return None
    what = "Interrupted" if stopped.number == signal.SIGINT else "Terminated"
    message, code = f"{what}; {stopped.left or _left()}.", 128 + stopped.number
    console.say_error(message)
    _print_error(what, message, code)
    return code


def _run() -> None:
    thresholds = gc.get_threshold()
    try:
        # Headers are many objects and no cycles; with the usual 700 the collector takes as long as all the planning.
        gc.set_threshold(100_000, 20, 20)
        with console.showing_warnings():
            console.open_streams()
            if "_CKPT_COMPLETE" in os.environ:
                from .completion import prepare

                prepare()
            sys.exit(app(prog_name="ckpt", standalone_mode=False) or 0)
    except CkptError as error:
        from .arguments import spelled
        from .defaults import blamed

        complete = _complete()
        message = spelled(str(error))
        message += blamed(message) + (f" {complete}." if complete else "")
        _fail(type(error).__name__, message, error.exit_code)
    except NotUsable as error:
        message = error.format_message()
        end = "" if message.endswith((".", "?")) else "."
        _fail("UsageError", f"{message}{end} Try '{getattr(error.ctx, 'command_path', 'ckpt')} --help'.", 2)
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        _fail("OSError", f"{where}{error.strerror or error}; {_left()}.", 1)
    except MemoryError:
        _fail("MemoryError", f"there is not enough memory; {_left()}.", 1)
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        _fail("OSError", f"the system allows no more threads (ulimit -u, or ulimit -v); {_left()}.", 1)
    except ImportError as error:
        if "shared object" not in str(error):
            raise
        why = "memory is limited (ulimit -v), or the installation is not complete"
        _fail("OSError", f"a library cannot be loaded: {error}. Either {why}; {_left()}.", 1)
    finally:
        console.let_end()
        gc.set_threshold(*thresholds)


def _fail(kind: str, message: str, code: int) -> NoReturn:
    """Show an error, to a program as JSON, and end the run."""
    console.say_error(f"Error: {message}")
    _print_error(kind, message, code)
    sys.exit(code)


def _print_error(kind: str, message: str, code: int) -> None:
    if "--json" in sys.argv and not console.manner.printed:
        console.print_json({"error": {"type": kind, "message": message, "exit_code": code}})


def _left() -> str:
    """Say what a run that ends early leaves behind."""
    from ..storage.kept_stage import KEPT

    kept = f"what is done of {KEPT[-1]} is kept, and the same command goes on with it" if KEPT else ""
    return _complete() or kept or "nothing was written"


def _complete() -> str:
    """Say which outputs are in their places; empty if none is."""
    from ..storage.staged import PLACED

    # What was sent to a store is there; a file of this machine may have gone since.
    complete = [str(path) for path in PLACED if "://" in str(path) or os.path.lexists(path)]
    return f"{', '.join(complete)} {'is' if len(complete) == 1 else 'are'} complete" if complete else ""
