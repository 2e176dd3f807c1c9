"""What a person sees: tables, bars and progress on stderr; JSON, for programs, on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def stderr() -> Console:
    """Return a console on stderr, as wide as the terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=False)


def say(*lines: str) -> None:
    """Write plain lines to stderr; square brackets in them are no markup."""
    console = stderr()
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Write a result to stdout."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")
    sys.stdout.flush()


def size(nbytes: float) -> str:
    """Write bytes as a person reads them, decimal: 1.21 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def count(number: int) -> str:
    """Write a count as the field does: 304M."""
    for unit in ("", "k", "M", "B"):
        if number < 1000 or unit == "B":
            return f"{number:.3g}{unit}" if unit else str(number)
        number = number // 1000 if number >= 10_000_000 else number / 1000  # type: ignore[assignment]
    return str(number)


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
    if not console.is_terminal:
        yield _plain_progress(what)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _plain_progress(what: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 10 and total:
            last = time.monotonic()
            say(f"{what}: {done / total:.0%} of {size(total)}")

    return show
