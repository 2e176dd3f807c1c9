"""The line that tells of progress: what it says, in which width, and where it is drawn."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from cli_runner import environment, run

from ckpt_tools.cli import console, progress
from ckpt_tools.cli.progress import Meter
from ckpt_tools.cli.tables import width_of
from ckpt_tools.compute.progress import HEADERS, SYNCING, Activity

AVERAGING = Activity("averaging")


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, call: Callable[..., None], *given: object) -> None:
        self.now += seconds
        call(*given)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("activity", "total", "done", "seconds", "text"),
    [
        (AVERAGING, 4 * 10**9, 10**9, 10, "Averaging: 25% of 4 GB in 10 s, 100 MB/s, 30 s left"),
        (AVERAGING, None, 10**9, 10, "Averaging: 1 GB in 10 s, 100 MB/s"),
        (AVERAGING, 4 * 10**9, 0, 3, "Averaging: 0% of 4 GB in 3 s"),
        (HEADERS, 500, 120, 3, "Reading headers: 120 of 500 files in 3 s, 9 s left"),
        (SYNCING, 1, 0, 12, "Syncing to disk, 12 s"),
        (SYNCING, 4, 1, 100, "Syncing to disk: 1 of 4 files in 1 min 40 s, 5 min 0 s left"),
        (Activity("loading the model", ""), 1, 0, 2, "Loading the model, 2 s"),
        (Activity("measuring", "images"), 512, 128, 4, "Measuring: 128 of 512 images in 4 s, 32/s, 12 s left"),
        (Activity("measuring", "images"), None, 7, 4, "Measuring: 7 images in 4 s, 1.75/s"),
        (
            Activity("a-1.pth: evaluating", "images", step="evaluating"), 2000, 10, 100,
            "a-1.pth: evaluating: 10 of 2000 images in 1 min 40 s, 0.1/s, 5 h 31 min left",
        ),
    ],
)  # fmt: skip
def test_text_has_the_count_the_time_the_rate_and_the_time_left(
    activity: Activity, total: int | None, done: int, seconds: float, text: str, clock: Clock
) -> None:
    meter = Meter("planning", clock)
    clock.after(50, meter.tell, activity, 0, total)
    clock.after(seconds, meter.tell, activity, done, total)
    assert meter.text() == text


def test_the_time_left_goes_down_until_more_is_done(clock: Clock) -> None:
    meter = Meter("planning", clock)
    activity = Activity("evaluating", "candidates")
    meter.tell(activity, 0, 5)
    clock.after(3, meter.tell, activity, 1, 5)
    clock.now += 2
    assert meter.text() == "Evaluating: 1 of 5 candidates in 5 s, 10 s left"
    clock.now += 60
    assert meter.text() == "Evaluating: 1 of 5 candidates in 65 s, 0 s left"


def test_the_rate_is_that_of_this_run_if_a_job_goes_on(clock: Clock) -> None:
    meter = Meter("planning", clock)
    meter.tell(AVERAGING, 3 * 10**9, 4 * 10**9)
    clock.after(5, meter.tell, AVERAGING, 3_500_000_000, 4 * 10**9)
    assert meter.text() == "Averaging: 88% of 4 GB in 5 s, 100 MB/s, 5 s left"


def test_what_a_job_does_while_it_tells_nothing_is_said_too(clock: Clock) -> None:
    meter = Meter("loading torch", clock)
    clock.now = 4
    assert (meter.text(), meter.name, meter.counts, meter.share) == ("Loading torch, 4 s", "Loading torch", False, None)
    meter.idle("planning")
    clock.now = 6
    assert meter.text() == "Planning, 2 s"
    meter.tell(HEADERS, 0, 5)
    assert meter.counts
    clock.after(2, meter.tell, HEADERS, 5, 5)
    clock.now += 3
    assert (meter.text(), meter.counts) == ("Planning, 3 s", False)


def test_the_time_of_each_step_is_that_between_its_first_call_and_its_last(clock: Clock) -> None:
    meter = Meter("planning", clock)
    clock.after(1, meter.tell, HEADERS, 0, 2)
    clock.after(2, meter.tell, HEADERS, 2, 2)
    clock.after(4, meter.idle, "other work")
    assert meter.text() == "Working, 0 s"
    for epoch in (1, 2):
        training = Activity(f"training, epoch {epoch} of 2", "images", step="training")
        clock.after(8, meter.tell, training, 0, 10)
        clock.after(16, meter.tell, training, 7, 10)
        clock.after(32, meter.tell, training, 10, 10)
    clock.now += 64
    assert meter.times() == (
        "Took 183.00 s: planning 5.00 s, reading headers 2.00 s, other work 80.00 s, training 96.00 s."
    )


@pytest.mark.parametrize("width", [110, 70, 60, 50, 40, 20])
def test_text_says_less_where_there_is_less_room(width: int, clock: Clock) -> None:
    meter = Meter("planning", clock)
    activity = Activity("检查点-12.pth (1 of 10): evaluating", "images", step="evaluating")
    meter.tell(activity, 0, 512)
    clock.after(12, meter.tell, activity, 128, 512)
    text = meter.text(width)
    assert width_of(text) <= width
    assert ("10.7/s" in text, "36 s left" in text, "128 of 512 images" in text) == (width > 80, width > 65, True)


def test_a_name_in_the_text_does_not_control_the_terminal(clock: Clock) -> None:
    meter = Meter("planning", clock)
    meter.tell(Activity("\x1b[2J\nx.pth: evaluating", "images", step="evaluating"), 0, 2)
    assert meter.text() == r"\x1b[2J\nx.pth: evaluating: 0 of 2 images in 0 s"


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> io.BytesIO:
    """Make stderr a terminal; return what is written to it. Not a fixture, for pytest sets stderr before the test."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", _Terminal(written, encoding="utf-8", write_through=True))
    monkeypatch.setattr(progress, "_AT_ONCE", 0.0)
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    return written


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_the_line_moves_below_the_messages_and_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    written = terminal(monkeypatch)
    with progress.shown("loading torch") as line:
        until(lambda: b"Loading torch, 0 s" in written.getvalue())
        console.say("The plan.")
        line.tell(AVERAGING, 0, 4 * 10**9)
        line.tell(AVERAGING, 2 * 10**9, 4 * 10**9)
        until(lambda: b"50% of 4 GB" in written.getvalue())
    shown = written.getvalue().decode()
    before, _, after = shown.partition("The plan.\n")
    assert before.endswith(console.ERASE)
    assert "━━━━━━━━──────── Averaging: 50% of 4 GB" in after
    assert shown.endswith(console.ERASE)
    assert max(width_of(each.removesuffix("\x1b[K")) for each in shown.split("\r")) < 80
    assert "\n" not in after


def test_what_other_code_prints_does_not_stand_behind_the_line() -> None:
    """Of a process, for its own stream is at stake."""
    script = (
        "import sys, time, warnings\n"
        "from ckpt_tools.cli import console, progress\n"
        "console.open_streams()\n"
        "progress._AT_ONCE = 0\n"
        "with progress.shown('loading torch'):\n"
        "    while not console.manner.drawn: time.sleep(0.01)\n"
        "    print('theirs', file=sys.stderr)\n"
    )
    main, other_end = pty.openpty()
    shown = b""
    with subprocess.Popen([sys.executable, "-c", script], env=environment(TERM="xterm"), stderr=other_end):
        os.close(other_end)
        with suppress(OSError):
            while block := os.read(main, 65536):
                shown += block
    os.close(main)
    assert "\r\x1b[Ktheirs\r\n" in shown.decode()


@pytest.mark.parametrize("term", ["dumb", ""])
def test_nothing_moves_on_a_terminal_that_cannot_redraw(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = terminal(monkeypatch, TERM=term)
    monkeypatch.setattr(progress, "_LINE_EVERY", 0)
    with progress.shown("planning") as line:
        line.tell(AVERAGING, 0, None)
    assert written.getvalue() == b"Averaging: 0 B in 0 s\n"


def test_a_pipe_has_a_line_every_ten_seconds(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", clock)
    meter = Meter("planning", clock)
    line = progress._Lines(meter)
    shown = progress.Shown(meter, line)
    for seconds, done in ((1, 0), (4, 1), (6, 2), (5, 3), (6, 4)):
        clock.after(seconds, shown.tell, AVERAGING, done * 10**9, 5 * 10**9)
    line.hide()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Averaging: 40% of 5 GB in 10 s, 200 MB/s, 15 s left",
        "Averaging: 80% of 5 GB in 21 s, 190 MB/s, 5 s left",
    ]


@pytest.mark.parametrize(("patience", "said"), [(0, "Syncing to disk ...\n"), (3600, "")])
def test_a_pipe_is_told_once_of_what_has_no_count(
    patience: float, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_AFTER", 3600)
    with progress.shown("planning") as line:
        monkeypatch.setattr(progress, "_LINE_AFTER", patience)
        line.tell(SYNCING, 0, 1)
        until(lambda: patience > 0 or threading.active_count() == 1 or not line._line._timer.is_alive())
    assert capsys.readouterr().err == said


def test_the_line_of_a_sweep_gives_way_to_a_table_with_the_first_result(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in (1, 2):
        torch.save({"state_dict": {"w": torch.full((4,), float(i))}, "epoch": i}, here / f"c-{i}.pth")
    monkeypatch.setattr(progress, "_AT_ONCE", 0.0)
    wait = "until [ -e go ]; do sleep 0.01; done; echo 0.5 # {ckpt}"

    def go_on(self: Meter, width: int | None = None) -> str:
        drawn.append(said(self, width))
        if sum("0 of 3 candidates" in text for text in drawn) == 2:  # the first of them stands there by now
            Path("go").touch()
        return drawn[-1]

    said = Meter.text
    drawn: list[str] = []
    monkeypatch.setattr(Meter, "text", go_on)
    result = run("sweep", "c-1.pth", "c-2.pth", "--eval-command", wait, terminal=True, TERM="xterm")
    assert result.code == 0
    line, table = result.err.index("Evaluating: 0 of 3 candidates"), result.err.index("the last candidates")
    assert line < table
    assert "1 of 3 scored" in result.err[table:]
    assert "\r\x1b[K" not in result.err[table:]


def test_a_process_that_is_forked_while_the_line_is_drawn_can_write_messages() -> None:
    held = threading.Event()

    def draw() -> None:
        with console.writing:
            held.set()
            time.sleep(0.1)

    drawing = threading.Thread(target=draw)
    drawing.start()
    held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads
        child = os.fork()
    if not child:
        os._exit(0 if console.writing.acquire(timeout=5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    drawing.join()


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_job_goes_on_where_no_thread_can_be_started_for_its_line(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    written = terminal(monkeypatch, TERM=term)
    monkeypatch.setattr(threading.Thread, "start", start)
    with progress.shown("planning") as line:
        line.tell(SYNCING, 0, 1)
        line.tell(SYNCING, 1, 1)
    assert written.getvalue() == b""


def test_a_quiet_run_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    written = terminal(monkeypatch)
    monkeypatch.setattr(console.manner, "quiet", True)
    with progress.shown("planning") as line:
        line.tell(AVERAGING, 0, None)
        assert "ckpt-progress" not in [thread.name for thread in threading.enumerate()]
    assert written.getvalue() == b""
