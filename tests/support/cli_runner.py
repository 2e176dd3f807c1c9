"""Run `ckpt` like a user: in this process, or in its own where that makes a difference."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ckpt_tools.cli import main
from ckpt_tools.jobs.asked import COMMAND
from ckpt_tools.storage.staged import PLACED

BIN = Path(sys.executable).parent
# Environment variables that change the output.
_FOREIGN = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONIOENCODING")
# Seconds until a hanging process is ended; a slow machine needs far less.
PATIENCE = 600
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if key not in _FOREIGN and not key.startswith("CKPT_")}
    return clean | {"PATH": f"{BIN}{os.pathsep}{clean.get('PATH', '')}", "PYTHONUTF8": "1"} | extra


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def run(
    *args: str | Path, columns: int = 80, encoding: str = "utf-8", terminal: bool = False, **variables: str
) -> Result:
    """Call `main` in this process, with arguments and streams like those of a separate process.

    Args:
        columns: of the terminal.
        terminal: the streams say that they are one.
        variables: of the environment.
    """
    kind = _Terminal if terminal else io.TextIOWrapper
    out, err = (kind(io.BytesIO(), encoding=encoding, errors="backslashreplace") for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    code: Any = 0
    PLACED.clear()  # as in a new process
    COMMAND.clear()
    try:
        with (
            mock.patch.object(sys, "argv", ["ckpt", *map(str, args)]),
            mock.patch.dict(os.environ, environment(COLUMNS=str(columns), **variables), clear=True),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))  # type: ignore[attr-defined]
    return Result(code, *texts)


def command(*args: str | Path, first: str = "") -> list[str]:
    """Return the command line of `ckpt`, after Python code `first` in its process, such as dropping privileges."""
    script = f"{first}\nimport os, sys\nos.execvp('ckpt', ['ckpt', *sys.argv[1:]])"
    return [*([sys.executable, "-c", script] if first else ["ckpt"]), *map(str, args)]


def spawn(*args: str | Path, cwd: Path, first: str = "") -> subprocess.CompletedProcess[str]:
    """Run `ckpt` in a separate process."""
    return subprocess.run(
        command(*args, first=first),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def is_writing(pid: int) -> bool:
    """Return True if a process has written to a file without a name, or to a hidden one."""
    here = Path.cwd()
    written = list(here.glob(".*.partial"))
    with suppress(OSError):
        written += (fd for fd in Path(f"/proc/{pid}/fd").iterdir() if str(fd.readlink()).startswith(f"{here}/#"))
    for path in written:
        with suppress(OSError):
            if path.stat().st_blocks:
                return True
    return False


def contents(folder: Path) -> dict[str, tuple[bytes, int] | None]:
    """All paths under a folder, hidden ones too: (bytes, modification time) of a file, None for a folder."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(folder: Path, *args: str | Path, code: int = 1) -> str:
    """Run `ckpt`, assert that it fails and leaves the folder unchanged, and return its message."""
    before = contents(folder)
    result = run(*args)
    assert result.code == code, result
    *others, message = result.err.splitlines()
    assert message.startswith("Error: ")
    if "--json" in args:
        error = json.loads(result.out)["error"]
        assert (f"Error: {error['message']}", error["exit_code"]) == (message, code)
    else:
        assert result.out == ""
    assert not any("Error" in line or "Traceback" in line for line in others)
    assert contents(folder) == before
    return message
