"""Console: what was asked for goes to stdout, messages and progress to stderr."""

from __future__ import annotations

import _thread
import errno
import io
import json
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ..errors import WriteError, WriteWarning

if TYPE_CHECKING:
    from rich.console import Console

NARROWEST = 40
"""Columns that a table needs; in fewer, a terminal wraps its lines."""
_COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "bold": "1"}
_HEADS = {
    "Error:": "red",
    "FAILED:": "red",
    "Different:": "red",
    "Warning:": "yellow",
    "Wrote": "green",
    "Removed": "green",
    "Verified:": "green",
    "Identical:": "green",
    "Equal:": "green",
    "Equal": "green",
}
"""First words of lines that say how it went, with their colour."""


class Block(Protocol):
    """Several lines, which are laid out when it is known where they go; see `tables.Table`."""

    def lines(self, width: int | None, stream: TextIO) -> list[str]:
        """Return the lines for a terminal of this width; None for a pipe."""


class _Manner:
    """How much is said, as the options `--quiet`, `--verbose` and `--all` have it; the same for all of a run."""

    quiet = False
    verbose = False
    all = False
    printed = False
    """Whether the report is on stdout, as JSON."""
    drawn = False
    """Whether a line that moves stands on the terminal, without an end; see `progress`."""
    results: TextIO | None = None
    """Where results go while the standard output is not for them."""


manner = _Manner()
writing = threading.RLock()
"""Held while something is written, so that a message and a line that moves do not mix."""
if hasattr(os, "register_at_fork"):  # a process that is forked meanwhile, to load images, could never write
    os.register_at_fork(before=writing.acquire, after_in_parent=writing.release, after_in_child=writing.release)
ERASE = "\r\x1b[K"
"""Takes the line away that the cursor is in."""


class _Stderr(io.FileIO):
    """If stderr cannot be written (a pipe without a reader, a full disk), the work goes on."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            if manner.drawn and bytes(data[:1]) != b"\r":  # of the user's code, or a library
                manner.drawn = False
                super().write(ERASE.encode())
            return super().write(data) or len(data)
        return len(data)


class _Stdout(io.FileIO):
    """A result that cannot be written is an error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Python flushes once more at exit, and would complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno == errno.EPIPE:  # such as head, which has seen enough
                sys.exit(1)
            reason = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise WriteError(f"cannot write to standard output ({reason}).") from error


def open_streams() -> None:
    """Make the standard streams behave the same for a terminal, a file, a broken pipe, or nothing."""
    vars(manner).clear()  # as the class has it, for a second run in this process
    # The number of a closed stream would go to the next file opened, and what C code prints would go into that.
    while (spare := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(spare)
    if sys.stdout is sys.__stdout__:  # and not what a test has put there
        sys.stdout = _text(_Stdout(1, "w", closefd=False), sys.stdout, "strict")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Stderr(2, "w", closefd=False), sys.stderr, "backslashreplace")
    # rich obeys a COLUMNS of 0, and draws nothing.
    if os.environ.get("COLUMNS", "").isdigit() or columns() < NARROWEST:
        os.environ["COLUMNS"] = str(max(NARROWEST, columns()))


def _text(raw: io.FileIO, like: TextIO | None, errors: str) -> TextIO:
    encoding, errors = (None, errors) if like is None else (like.encoding, like.errors or errors)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=True)


def columns(stream: TextIO | None = None) -> int:
    """Return the width in COLUMNS, or of the terminal at a stream (stderr if None), or 80."""
    with suppress(ValueError):
        if (asked := int(os.environ.get("COLUMNS", ""))) > 0:
            return asked
    with suppress(OSError):
        return os.get_terminal_size((stream or sys.stderr).fileno()).columns or 80
    return 80


def stderr() -> Console:
    """Return a console on stderr, as wide as the terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=False, emoji=False)


STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals by which people and programs stop a run."""


class Stopped(BaseException):
    """A signal to stop, as an exception, so that half-written files go before the process does.

    Attributes:
        number: of the signal.
        left: what a command leaves behind, in words; None if it is its output or nothing.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.left: str | None = None


def clean_up_when_stopped() -> None:
    """Let signals to stop raise `Stopped` from here on: what has begun must be cleaned up.

    Before, they have their default action, which ends the process at once, whatever C code it is in. An exception that
    is raised in a finalizer ends nothing: the signal comes again then, when that has returned.
    """
    sys.unraisablehook = _stop_again
    for each in STOPPING:
        if signal.getsignal(each) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(each, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    for each in STOPPING:  # once is enough: a second one would break off the cleaning up
        signal.signal(each, lambda *_: None)
    raise Stopped(number)


def _stop_again(lost: sys.UnraisableHookArgs) -> None:
    if not isinstance(lost.exc_value, Stopped):
        sys.__unraisablehook__(lost)
        return
    number = lost.exc_value.number
    signal.signal(number, _stop)
    again = threading.Timer(0.01, _thread.interrupt_main, [number])  # not here, where it would be lost again
    again.daemon = True
    again.start()


def stopped_by(error: BaseException | None) -> Stopped | None:
    """Return the signal that ended a run; None if it was something else.

    It may have come in the middle of code that fails then itself: a lock is released that was not taken again.
    """
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def let_end() -> None:
    """Ignore signals to stop from here on: the output is complete, or gone."""
    for each in STOPPING:
        signal.signal(each, signal.SIG_IGN)


def wrote(text: str) -> None:
    """Report the output; signals to stop come too late from here on."""
    let_end()
    say(text)


def say(*lines: str | Block) -> None:
    """Write messages to stderr, unless only errors are wanted."""
    if not manner.quiet:
        _write(sys.stderr, lines)


def say_more(*lines: str | Block) -> None:
    """Write messages that only some want: what was decided, and how long it took."""
    if manner.verbose:
        _write(sys.stderr, lines)


def say_error(*lines: str) -> None:
    """Write an error, or a warning of one, to stderr."""
    _write(sys.stderr, lines)


def show(*lines: str | Block) -> None:
    """Write what was asked for to stdout."""
    _write(manner.results or sys.stdout, lines)


Tell = Callable[..., None]
"""`show` or `say`."""


def shown_by(*, asked: bool, json: bool) -> Tell:
    """Return what shows a report: `show` if it is what was `asked` for, `say` if it is not, or is on stdout as JSON."""
    return show if asked and not json else say


def _write(stream: TextIO, lines: Sequence[str | Block]) -> None:
    """Write lines without control characters; on a terminal they wrap between words, elsewhere they do not."""
    width = columns(stream) if stream.isatty() else None
    colour = coloured(stream)
    with writing:
        erase()
        for line in lines:
            text = "\n".join(line.lines(width, stream)) if not isinstance(line, str) else _wrapped(visible(line), width)
            head, space, rest = text.partition(" ")
            if colour and head in _HEADS:
                text = painted(head, _HEADS[head]) + space + rest
            stream.write(encodable(text, stream) + "\n")
        stream.flush()


def erase() -> None:
    """Take a line that moves off the terminal, until it is drawn again."""
    if manner.drawn:
        manner.drawn = False
        sys.stderr.write(ERASE)
        sys.stderr.flush()


def _wrapped(line: str, width: int | None) -> str:
    if width is None or len(line) <= width or line.startswith("  ckpt "):  # a command is copied as it stands
        return line
    import textwrap

    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def coloured(stream: TextIO) -> bool:
    """Return True if a stream shows colours; for NO_COLOR and FORCE_COLOR see no-color.org and force-color.org."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or redraws(stream)


def redraws(stream: TextIO) -> bool:
    """Return True if a stream is a terminal on which a line can be drawn again."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def painted(text: str, colour: str) -> str:
    """Put a text in a colour, for a terminal."""
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def encodable(text: str, stream: TextIO) -> str:
    """Escape what the encoding of a stream does not have."""
    if text.isascii():
        return text
    encoding = stream.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def showing_warnings() -> Iterator[None]:
    """Write warnings about the output as lines like any other."""
    with warnings.catch_warnings():
        # torch says this at import where numpy is not installed; nothing here needs numpy.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        warnings.simplefilter("always", WriteWarning)
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, WriteWarning):
                say_error(f"Warning: {message}")
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


def visible(text: str) -> str:
    """Escape what a terminal obeys and does not show: names in a file of unknown origin may contain any of it."""
    if text.isprintable() and max(text, default="") < "\U000e0000":
        return text  # and no pattern is compiled, which takes longer than a small job
    return re.sub(_INVISIBLE, lambda match: ascii(match[0])[1:-1], text)


# Controls; spaces without width, and marks of direction; line ends and turned text; joiners; the byte order mark.
_INVISIBLE = (
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def print_json(data: Any) -> None:
    """Write a result to stdout.

    Raises:
        WriteError: stdout does not take it.
    """
    try:
        text = json.dumps(_plain(data), indent=2, allow_nan=False)
    except RecursionError as error:  # such as the provenance in a file of unknown origin
        raise WriteError("nested too deeply to be shown as JSON.") from error
    manner.printed = True
    with writing:
        erase()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _plain(data: Any) -> Any:
    """Replace what JSON and UTF-8 do not have: NaN and infinity by null, bytes that are not text by U+FFFD."""
    if isinstance(data, dict):
        return {_plain(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", data)
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def printing_to_stderr() -> Iterator[None]:
    """Send to stderr what the user's code, and C code and processes below it, print to stdout, which is for results."""
    sys.stdout.flush()
    kept = os.dup(1)
    ours = sys.stdout.buffer if isinstance(sys.stdout, io.TextIOWrapper) else None
    if isinstance(getattr(ours, "raw", None), _Stdout):
        manner.results = _text(_Stdout(kept, "w", closefd=False), sys.stdout, "strict")
    else:
        manner.results = sys.stdout
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        manner.results = None
        os.dup2(kept, 1)
        os.close(kept)


def size(nbytes: float) -> str:
    """Write bytes as a person reads them, decimal: 1.21 GB."""
    return _short(nbytes, (" B", " kB", " MB", " GB", " TB"))


def count(number: int) -> str:
    """Write a count as the field does: 304M."""
    return _short(number, ("", "k", "M", "B", "T"))


def _short(value: float, units: tuple[str, ...]) -> str:
    """Write three figures and a unit."""
    for unit in units[:-1]:
        if abs(value) < 999.5:  # what rounds to 1000 belongs to the next unit
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}{units[-1]}"


def plural(number: int, noun: str, several: str | None = None) -> str:
    """Write a number and its noun: 1 tensor, 2 tensors."""
    return f"{number} {noun if number == 1 else several or noun + 's'}"


def some(names: Sequence[str], most: int = 6) -> str:
    """Write the first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def output(out: str, files: int, companions: Sequence[str]) -> str:
    """Name an output; of a folder, with what is in it.

    Args:
        files: with weights; 0 if the output is no folder.
        companions: names of the small files beside them.
    """
    if not files:
        return out
    words = [word for word in ("config", "tokenizer") if any(name.partition(".")[0] == word for name in companions)]
    more = len(companions) - len(words)
    others = f"{more}{' more' if words else ''} file{'s' * (more > 1)}" if more else ""
    along = " and ".join(filter(None, (", ".join(words), others)))
    return f"{out.rstrip('/')}/ ({plural(files, 'shard')}{f'; {along} carried along' if along else ''})"


def span(seconds: float) -> str:
    """Write a time as a person reads it: 3 hours."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return plural(int(seconds // length), unit)
    return plural(int(seconds), "second")
