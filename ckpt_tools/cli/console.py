"""What a person sees: tables, bars and progress on stderr; JSON, for programs, on stdout."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, WriteError

if TYPE_CHECKING:
    from rich.console import Console


def stderr() -> Console:
    """Return a console on stderr, as wide as the terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=False, emoji=False)


def say(*lines: str) -> None:
    """Write plain lines to stderr; nothing in them is markup, and nothing in them steers the terminal."""
    console = stderr()
    for line in lines:
        console.print(visible(line), markup=False, soft_wrap=True)


def visible(text: str) -> str:
    """Write control characters out: a tensor may be called anything, and the file may be a stranger's."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)


def print_json(data: Any) -> None:
    """Write a result to stdout.

    Raises:
        WriteError: stdout does not take it.
    """
    try:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more at exit, and would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # such as head, which has seen enough
            sys.exit(1)
        raise WriteError(f"the report cannot be written to standard output ({error.strerror}).") from error


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


def bar(value: float, largest: float, width: int = 20) -> str:
    """Draw a value as a bar; the largest one fills the width, and what is not zero is seen."""
    if largest <= 0 or value == 0:
        return ""
    eighths = max(1, round(abs(value) / largest * width * 8))
    drawn = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    try:
        drawn.encode(sys.stderr.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        drawn = "#" * max(1, eighths // 8)
    return drawn


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show bytes, rate and time left on a terminal; a plain line every ten seconds elsewhere.

    Yields:
        A function to call with (bytes done, bytes in all).
    """
    console = stderr()
    if not console.is_interactive:
        yield _plain_progress(what)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=console, transient=True)
    task = shown.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        shown.start()  # the plan stands above it by now
        shown.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        shown.stop()


@contextmanager
def counting(unit: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show how many of something are done, as `progress` does for bytes.

    Yields:
        A function to call with (what is being done, how many are done, how many there are, if known).
    """
    console = stderr()
    if not console.is_interactive:
        yield _plain_counting(unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=console, transient=True)
    task = shown.add_task("", total=None)
    current = ""

    def show(what: str, done: int, total: int | None) -> None:
        nonlocal current
        shown.start()
        if what != current:  # its own clock
            shown.reset(task)
            current = what
        shown.update(task, description=what, completed=done, total=total)

    try:
        yield show
    finally:
        shown.stop()


def _plain_counting(unit: str) -> Callable[[str, int, int | None], None]:
    last = time.monotonic()

    def show(what: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"{what}: {done}{'' if total is None else f' of {total}'} {unit}")

    return show


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


def _plain_progress(what: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10 and total:
            last = time.monotonic()
            say(f"{what}: {done / total:.0%} of {size(total)}")

    return show
