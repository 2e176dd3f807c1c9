"""Progress: what a job is doing, how far it is, and how long its steps took, as the job tells it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from ..compute.progress import HEADERS, LOADING_TORCH, Activity
from ..jobs.asked import started_together
from . import console
from .tables import width_of

PLANNING, OTHER = "planning", "other work"
"""What a job is doing while it tells nothing: before its plan, and after it."""
_AT_ONCE = 0.4
"""Seconds; what is quicker needs no line."""
_BAR = 16
"""Columns of a bar."""
_LINE_EVERY, _LINE_AFTER = 10, 60
"""Where no line can move: seconds from a line to the next, and until a line tells of what has no count."""
_PACED = ("bytes", "images")
"""Units of which so many are done in a second."""


class _Call(NamedTuple):
    """A call of `on_progress`, and the first one of the same activity.

    Attributes:
        at: when it came, in seconds.
        began: when the first one came.
        first: how much was done then.
    """

    activity: Activity
    done: int
    total: int | None
    at: float
    began: float
    first: int

    @property
    def ended(self) -> bool:
        """True if all of it is done."""
        return self.total is not None and self.done >= self.total

    @property
    def counted(self) -> bool:
        """True if how much is done is worth showing; one file is done or not."""
        return bool(self.activity.unit) and not (self.activity.unit == "files" and self.total == 1)

    @property
    def rate(self) -> float:
        """How much of it is done in a second; 0 if that is not known."""
        return (self.done - self.first) / (self.at - self.began) if self.at > self.began else 0.0


class Meter:
    """What a job is doing.

    Args:
        idle: what it is doing while it tells nothing.
        clock: gives the time in seconds.

    Attributes:
        took: step to seconds, in the order of their beginnings; what is at work is not counted yet.
    """

    def __init__(self, idle: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.took: dict[str, float] = {}
        self._clock = clock
        self._idle = self._step = idle
        self._since = self._began = clock()
        self._last = _Call(Activity(idle, ""), 1, 1, 0, 0, 0)  # another thread reads it: replaced as a whole

    def tell(self, what: Activity, done: int, total: int | None) -> None:
        """Take note of how far the job is; see `ckpt_tools.compute.progress.Progress`."""
        now, last = self._clock(), self._last
        same = what == last.activity and done >= last.done
        self._enter(what.step, now)
        self._last = _Call(what, done, total, now, last.began if same else now, last.first if same else done)
        if self._last.ended:
            self._enter(self._idle, now)

    def idle(self, name: str) -> None:
        """Say what the job is doing from here on while it tells nothing."""
        self._idle = name
        self._enter(name, self._clock())

    def _enter(self, step: str, now: float) -> None:
        """Let a step begin, if it is not at work, and count the time until now for the one that is."""
        if step != self._step:
            self.took[self._step] = self.took.get(self._step, 0.0) + now - self._since
            self._step, self._since = step, now

    @property
    def counts(self) -> bool:
        """True if what the job is doing has a count."""
        last = self._last
        return last.counted and not last.ended

    @property
    def unit(self) -> str:
        """What the job counts; empty if nothing."""
        return self._last.activity.unit if self.counts else ""

    @property
    def name(self) -> str:
        """What the job is doing."""
        if not self._last.ended:
            return _named(self._last.activity)
        # To who waits now, nothing is known that it would be other than.
        return "Working" if self._idle == OTHER else _named(Activity(self._idle))

    @property
    def share(self) -> float | None:
        """The part of it that is done; None if that is not known."""
        last = self._last
        return last.done / last.total if last.total and last.counted and not last.ended else None

    def text(self, width: int | None = None) -> str:
        """Return what the job is doing, how far it is, how fast it goes, and how long it still takes.

        Args:
            width: columns; less is said in few of them.
        """
        last, now = self._last, self._clock()
        if last.ended:
            return _fitting([f"{self.name}, {_span(now - self._since)}"], width)
        name, seconds = self.name, _span(now - last.began)
        if not last.counted:
            return _fitting([f"{name}, {seconds}"], width)
        unit, rate, pace, left = last.activity.unit, last.rate, "", ""
        if rate > 0 and unit in _PACED:
            pace = f", {console.size(rate) if unit == 'bytes' else f'{rate:.3g}'}/s"
        if rate > 0 and last.total is not None:
            left = f", {_span(max((last.total - last.done) / rate - (now - last.at), 0))} left"
        count = f"{name}: {_count(last.done, last.total, unit)}"
        took = f" in {seconds}"
        return _fitting([count + took + pace + left, count + took + left, count + left, count], width)

    def times(self) -> str:
        """Return how long the steps took, in words."""
        now = self._clock()
        took = {**self.took, self._step: self.took.get(self._step, 0.0) + now - self._since}
        return f"Took {now - self._began:.2f} s: " + ", ".join(f"{step} {took[step]:.2f} s" for step in took) + "."


def _named(activity: Activity) -> str:
    name = console.visible(activity)
    return name[:1].upper() + name[1:] if name.startswith(activity.step) else name  # which begins with that of a file


def _count(done: int, total: int | None, unit: str) -> str:
    if unit == "bytes":
        return f"{done / total:.0%} of {console.size(total)}" if total else console.size(done)
    return f"{done}{'' if total is None else f' of {total}'} {unit}"


def _span(seconds: float) -> str:
    """Write a time in one or two units: 12 s, 3 min 20 s."""
    whole = int(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _fitting(texts: list[str], width: int | None) -> str:
    """Return the first text that is not wider than this, or the end of the last, which has the count."""
    if width is None:
        return texts[0]
    text = next((text for text in texts if width_of(text) <= width), None)
    if text is None:
        text = texts[-1]
        while text and width_of(text) >= width:
            text = text[1:]
        text = f"…{text}"
    return text


class Line:
    """How a person sees the progress of a job; this one shows nothing."""

    def update(self) -> None:
        """Show what the meter has just been told."""

    def hide(self) -> None:
        """Show nothing from here on."""


class _Moving(Line):
    """A line on a terminal that is drawn again and again, below the messages."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._ended = threading.Event()
        _start(threading.Thread(target=self._turn, name="ckpt-progress", daemon=True))

    def hide(self) -> None:
        self._ended.set()
        with console.writing:
            console.erase()

    def _turn(self) -> None:
        spinner = _encodable("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\")
        time_left = _AT_ONCE
        turn = 0
        while not self._ended.wait(time_left):
            time_left = 0.1
            line = self._drawn(spinner[turn % len(spinner)])
            with console.writing:
                if not self._ended.is_set():
                    sys.stderr.write(f"\r{console.encodable(line, sys.stderr)}\x1b[K")
                    sys.stderr.flush()
                    console.manner.drawn = True
            turn += 1

    def _drawn(self, mark: str) -> str:
        """Return the line, with a bar if there is room for one, too."""
        width = console.columns() - 3
        text, share = self._meter.text(width), self._meter.share
        if share is None or width_of(text) + _BAR + 1 > width:
            return f"{mark} {text}"
        full, empty = [*_encodable("━─", "#-")]
        length = round(min(share, 1.0) * _BAR)
        filled = full * length
        if console.coloured(sys.stderr) and filled:
            filled = console.painted(filled, "blue")
        return f"{mark} {filled}{empty * (_BAR - length)} {text}"


def _encodable(letters: str, plain: str) -> str:
    return letters if console.encodable(letters, sys.stderr) == letters else plain


class _Lines(Line):
    """A line now and then, where none can move."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._last = time.monotonic()
        self._timer = self._started()

    def update(self) -> None:
        self.hide()
        now = time.monotonic()
        if not self._meter.counts:
            self._timer = self._started()
        elif now - self._last >= _LINE_EVERY:
            self._last = now
            console.say(self._meter.text())

    def hide(self) -> None:
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()  # what comes next may fork, for workers that load images

    def _started(self) -> threading.Timer:
        timer = threading.Timer(_LINE_AFTER, lambda: console.say(f"{self._meter.name} ..."))
        timer.daemon = True
        _start(timer)
        return timer


def _start(thread: threading.Thread) -> None:
    """Start a thread if the system allows one more; a job does not end for want of a line."""
    with suppress(RuntimeError):
        thread.start()


class Shown:
    """The progress of a job, as it is shown.

    Attributes:
        meter: what the job is doing.
    """

    def __init__(self, meter: Meter, line: Line) -> None:
        self.meter = meter
        self._line = line
        self._begun = False

    def tell(self, what: Activity, done: int, total: int | None) -> None:
        """Show how far the job is; its `on_progress`."""
        self.meter.tell(what, done, total)
        self._line.update()

    def working(self, what: Activity, done: int, total: int | None) -> None:
        """Show how far a job is that has no plan to show: its work begins after the headers and torch."""
        if not self._begun and what not in (HEADERS, LOADING_TORCH):
            self._begin()
        self.tell(what, done, total)

    def idle(self, name: str) -> None:
        """Say what the job is doing from here on while it tells nothing."""
        self.meter.idle(name)
        self._line.update()

    def hide(self) -> None:
        """Show nothing from here on: something else does, by the meter."""
        self._line.hide()
        self._line = Line()

    def _begin(self) -> None:
        """Let signals to stop raise an exception from here on, for what is done must be cleaned up."""
        self._begun = True
        self.idle(OTHER)
        console.clean_up_when_stopped()

    def planned(self, show: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return the `on_plan` of a job that shows its plan before its work."""

        def show_plan(plan: Any) -> None:
            self._begin()
            show(plan)

        return show_plan


@contextmanager
def shown(idle: str) -> Iterator[Shown]:
    """Show the progress of a job: a line that moves on a terminal, elsewhere a line every ten seconds.

    At the end, `--verbose` says how long each step took.

    Args:
        idle: what the job is doing while it tells nothing.
    """
    meter = Meter(idle)
    part = started_together()
    silent = console.manner.quiet or (part is not None and part.silent)
    job = Shown(meter, Line() if silent else _Moving(meter) if console.redraws(sys.stderr) else _Lines(meter))
    try:
        yield job
    finally:
        job.hide()
    console.say_more(meter.times())
