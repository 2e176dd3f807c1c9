"""Interruption: whatever stops a run, the target is as it was, and what is hidden is gone."""

from __future__ import annotations

import json
import os
import pty
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import PATIENCE, command, environment, is_writing, run
from safetensors.torch import load_file, save_file

SIZE = 1 << 30
"""Bytes of an input. Its payload is a hole in the file: it takes time to average, and no room on the disk."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    header = json.dumps({"w": {"dtype": "F32", "shape": [SIZE // 4], "data_offsets": [0, SIZE]}}).encode()
    for i in (1, 2):
        with Path(f"c-{i}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + SIZE)
    Path("averaged.safetensors").write_text("old")
    yield
    for path in tmp_path.iterdir():
        path.unlink()


ARGUMENTS = ("avg", "c-1.safetensors", "c-2.safetensors", "--force", "--threads", "1")


@contextmanager
def running() -> Iterator[subprocess.Popen[str]]:
    """Start a run, and hand it over while it is writing."""
    process = subprocess.Popen(
        command(*ARGUMENTS), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for_writing(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_writing(process: subprocess.Popen[Any]) -> None:
    while not is_writing(process.pid):
        if process.poll() is not None:
            pytest.fail(f"it ended before it could be stopped: {process.communicate()}")
        time.sleep(0.005)


def files() -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in Path().iterdir()}


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "Interrupted"),
        (signal.SIGTERM, 143, "Terminated"),
    ],
)
def test_avg_leaves_nothing_on_a_signal(number: signal.Signals, code: int, word: str) -> None:
    before = files()
    with running() as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (code, "")
    assert err.splitlines()[-1] == f"{word}; nothing was written."
    assert "Traceback" not in err
    assert files() == before
    assert Path("averaged.safetensors").read_text() == "old"


def test_avg_ignores_a_signal_after_writing() -> None:
    for path in Path().glob("c-?.safetensors"):
        save_file({"w": torch.ones(3)}, path)
    for delay in (0.0, 0.002, 0.01, 0.02):  # until Python has shut down
        process = subprocess.Popen(
            command(*ARGUMENTS, "-o", "out.safetensors"), env=environment(), stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        err = ""
        while "Wrote" not in err:
            err += process.stderr.readline() or pytest.fail(err)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, more = process.communicate(timeout=PATIENCE)
        assert (process.returncode, more) == (0, "")


def test_avg_keeps_the_complete_file_on_a_signal_after_the_rename() -> None:
    """A descriptor is closed only when the target is in its place."""
    close = (
        "import os, runpy, signal, sys\n"
        "close = os.close\n"
        "def closing(fd):\n"
        "    out = os.path.exists('out.safetensors') and os.path.samestat(os.stat('out.safetensors'), os.fstat(fd))\n"
        "    close(fd)\n"
        "    if out: os.kill(os.getpid(), signal.SIGTERM)\n"
        "os.close = closing\n"
        "sys.argv[0] = 'ckpt'\n"
        "runpy.run_module('ckpt_tools', run_name='__main__')\n"
    )
    for path in Path().glob("c-?.safetensors"):
        save_file({"w": torch.ones(3)}, path)
    done = subprocess.run(
        [sys.executable, "-c", close, *ARGUMENTS, "-o", "out.safetensors"], capture_output=True, text=True, check=False
    )
    assert load_file("out.safetensors")["w"].tolist() == [1.0] * 3
    assert not list(Path().glob(".*"))
    assert done.returncode == 0
    assert "Wrote out.safetensors" in done.stderr


def test_avg_cleans_up_despite_more_signals() -> None:
    """A terminal that is closed sends SIGHUP; an impatient user, Ctrl-C again and again."""
    before = files()
    with running() as process:
        process.send_signal(signal.SIGHUP)
        for _ in range(5):
            time.sleep(0.002)
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 129
    assert "Traceback" not in err
    assert files() == before


def test_avg_keeps_the_old_target_when_killed() -> None:
    """Nothing can be cleaned up then, and where files need no name nothing has to be; see test_staged_writing."""
    before = files()
    with running() as process:
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert Path("averaged.safetensors").read_text() == "old"
    if sys.platform == "linux":
        assert files() == before
    Path("averaged.safetensors").unlink()
    Path(".averaged.safetensors.0123abcd.partial").write_text("left by a killed run")
    again = run("avg", ".", "--dry-run", "--json")
    assert [i["name"] for i in json.loads(again.out)["inputs"]] == ["c-1.safetensors", "c-2.safetensors"]


def test_avg_takes_the_line_that_moves_away_on_ctrl_c() -> None:
    before = files()
    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        command(*ARGUMENTS, first="import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)"),
        env=environment(TERM="xterm-256color", COLUMNS="80"),
        start_new_session=True,
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
    )
    os.close(other_end)
    wait_for_writing(process)
    shown = b""
    while b"GB/s" not in shown and b"MB/s" not in shown:
        shown += os.read(terminal, 65536)
    os.write(terminal, b"\x03")
    with suppress(OSError):  # when the other end is closed
        while block := os.read(terminal, 65536):
            shown += block
    os.close(terminal)
    text = shown.decode()
    assert process.wait(timeout=PATIENCE) == 130
    assert text.endswith("\r\x1b[KInterrupted; nothing was written.\r\n")
    assert text.index("2 checkpoints: ") < text.index("Averaging")
    assert files() == before


def stopped(when: str, *numbers: signal.Signals) -> tuple[int, str]:
    """Run `avg` in a process that sends itself signals when Python meets an audit event; return its end."""
    script = (
        "import os, runpy, sys\n"
        "sent = []\n"
        "def audit(event, arguments):\n"
        f"    if not sent and {when}:\n"
        "        sent.append(event)\n"
        f"        for number in {[int(number) for number in numbers]}: os.kill(os.getpid(), number)\n"
        "sys.argv = ['ckpt', *sys.argv[1:]]\n"
        "sys.addaudithook(audit)\n"
        "runpy.run_module('ckpt_tools', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *ARGUMENTS], env=environment(), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["typer", "ckpt_tools.cli.arguments", "ckpt_tools.jobs.average"])
def test_a_signal_while_modules_are_imported_ends_in_no_traceback(module: str) -> None:
    before = files()
    code, err = stopped(f"event == 'import' and arguments[0] == {module!r}", signal.SIGINT)
    assert "Traceback" not in err
    assert code in (-signal.SIGINT, 130)  # a shell shows 130 for both
    assert files() == before


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGINT, signal.SIGINT)])
def test_signals_at_the_same_time_end_in_one_line(numbers: tuple[signal.Signals, ...]) -> None:
    before = files()
    code, err = stopped("event == 'os.truncate'", *numbers)
    assert code in {128 + number for number in numbers}
    assert err.splitlines()[-1].endswith("; nothing was written.")
    assert files() == before


MIDDLE_OF_A_LOCK = (
    "class Condition(threading.Condition):\n"
    "    def _acquire_restore(self, state): os.kill(os.getpid(), 2)\n"
    "def happens():\n"
    "    condition = Condition(threading.Lock())\n"
    "    with condition: condition.wait(0.01)\n"
)
"""wait() gives its lock up and takes it again; a handler that raises between the two makes it fail."""
FINALIZER = (
    "class Object: pass\n"
    "objects = [Object()]\n"
    "known = weakref.ref(objects[0], lambda _: os.kill(os.getpid(), 2))\n"
    "happens = objects.clear\n"
)
"""Exceptions in a finalizer are lost."""


@pytest.mark.parametrize("code", [MIDDLE_OF_A_LOCK, FINALIZER], ids=["lock", "finalizer"])
def test_a_signal_that_meets_code_in_the_middle_of_something_ends_the_run_in_one_line(code: str) -> None:
    before = files()
    script = (
        f"import os, sys, threading, weakref\n{code}"
        "def audit(event, arguments):\n"
        "    if event == 'os.truncate': happens()\n"
        "sys.argv = ['ckpt', *sys.argv[1:]]\n"
        "sys.addaudithook(audit)\n"
        "from ckpt_tools.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *ARGUMENTS], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "Interrupted; nothing was written."
    assert "Traceback" not in done.stderr
    assert "Stopped" not in done.stderr
    assert files() == before


def test_a_signal_ends_a_long_call_of_c_while_headers_are_read() -> None:
    """Nothing has to be cleaned up then, and a handler in Python would run only when the call is over."""
    before = files()
    script = (
        "import os, sys\n"
        "endless = ()\n"
        "for _ in range(80): endless = (endless, endless)\n"
        "def audit(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]) == 'c-1.safetensors':\n"
        "        os.write(1, b'!')\n"
        "        hash(endless)\n"
        "sys.argv = ['ckpt', *sys.argv[1:]]\n"
        "sys.addaudithook(audit)\n"
        "from ckpt_tools.__main__ import main\n"
        "main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, *ARGUMENTS], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"!"
            process.terminate()
            assert process.wait(timeout=60) == -signal.SIGTERM
        finally:
            process.kill()
    assert files() == before


def test_a_run_that_was_halted_ends_as_any_other_on_a_signal() -> None:
    before = files()
    with running() as process:
        for number in (signal.SIGTSTP, signal.SIGTERM, signal.SIGCONT):
            process.send_signal(number)
            time.sleep(0.01)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err.splitlines()[-1]) == (143, "Terminated; nothing was written.")
    assert files() == before


def test_a_signal_after_the_rename_says_that_the_output_is_complete() -> None:
    for path in Path().glob("c-?.safetensors"):
        save_file({"w": torch.ones(3)}, path)
    script = (
        "import os, signal, sys\n"
        "from ckpt_tools.cli import console, main\n"
        "console.wrote = lambda text: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['ckpt', *sys.argv[1:]]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *ARGUMENTS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        130,
        "Interrupted; averaged.safetensors is complete.",
    )
    assert load_file("averaged.safetensors")["w"].tolist() == [1.0] * 3
