"""Jobs in forks of one process, that meet failing calls and signals; Linux only.

A small C library, which is preloaded, counts the system calls that concern a folder; see `failing_calls.c`.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from every_verb import HERE, Job

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Content = dict[str, bytes | None] | bytes | None


def contents(path: Path) -> Content:
    """Return the bytes of a file, or those of all files under a folder by their names; None if it is not there."""
    if not path.is_dir():
        return path.read_bytes() if path.exists() else None
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


@dataclass(frozen=True)
class Outcome:
    """What a run said and left.

    Attributes:
        code: exit code; negative for the signal that ended it.
        out, err: what it printed.
        calls: those that concern its folder, each with its path there; none if the process was killed.
        left: everything in its folder.
    """

    code: int
    out: str
    err: str
    calls: tuple[str, ...]
    left: dict[str, Content]


class Forks:
    """Runs jobs in forks of this process, in a folder with a copy of the inputs.

    Args:
        library: the preloaded one.
        folder: an empty one, for what is said.
        inputs: a folder that `make_inputs` has filled.
        place: where the jobs run; a folder on a file system of interest.
        lacking: what that file system has not; see `failing_calls.c`.

    Attributes:
        place: where they run.
        runs: how many jobs were started.
    """

    def __init__(self, library: Path, folder: Path, inputs: Path, place: Path, lacking: int = 0) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.call_number.restype = ctypes.c_char_p
        self._library.calls_seen.restype = ctypes.c_long
        self._lacking, self._inputs, self.place, self._said = lacking, inputs, place, folder / "said"
        self._said.mkdir()
        self.runs = 0
        for each in STOPPING:  # as `python -m ckpt_tools` has them; here, so that a fork has them from the first moment
            signal.signal(each, signal.SIG_DFL)
        self.before = {path.name: contents(path) for path in inputs.iterdir()}

    def import_for(self, jobs: list[Job]) -> None:
        """Run one job of each verb in this process, so that the forks need not import what it imports."""
        from ckpt_tools.cli import main
        from ckpt_tools.storage.staged import PLACED

        handlers = {each: signal.getsignal(each) for each in STOPPING}
        for job in {(job.verb, (job.target or "").partition(".")[2]): job for job in jobs}.values():
            self.renew(job)
            sys.argv = ["ckpt", *job.arguments]
            with (
                contextlib.chdir(self.place),
                contextlib.redirect_stderr(io.StringIO()),
                contextlib.redirect_stdout(io.StringIO()),
                suppress(SystemExit),
            ):
                main()
        PLACED.clear()
        for each, handler in handlers.items():
            signal.signal(each, handler)

    def renew(self, job: Job) -> None:
        """Fill the folder with what a job needs, and nothing else."""
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in {*job.arguments, *job.needs, *job.outputs} & self.before.keys():
            here = self._inputs / name
            (shutil.copytree if here.is_dir() else shutil.copy2)(here, self.place / name)

    def given(self, job: Job) -> dict[str, Content]:
        """Return what is in the folder before a job."""
        return {name: self.before[name] for name in {*job.arguments, *job.needs, *job.outputs} & self.before.keys()}

    def run(self, job: Job, at: int = 0, reason: int = 0) -> Outcome:
        """Run a job in a renewed folder.

        Args:
            at: number of the call that fails; 0 for none.
            reason: of the failure; or minus a signal that comes in its place.
        """
        self.renew(job)
        return self.ended(self.start(job, at, reason))

    def start(self, job: Job, at: int = 0, reason: int = 0) -> int:
        """Start a job in the folder as it is; return the number of its process."""
        (self._said / "calls").unlink(missing_ok=True)
        self.runs += 1
        process = os.fork()
        if not process:
            self._child(job, at, reason)
        return process

    def ended(self, process: int) -> Outcome:
        """Wait for the end of a job."""
        _, status = os.waitpid(process, 0)
        told = ""
        with suppress(FileNotFoundError):
            told = (self._said / "calls").read_text()
        return Outcome(
            os.waitstatus_to_exitcode(status),
            (self._said / "out").read_text(),
            (self._said / "err").read_text(),
            tuple(json.loads(told)) if told.endswith("]") else (),
            {path.name: contents(path) for path in self.place.iterdir()},
        )

    def _child(self, job: Job, at: int, reason: int) -> None:
        code = 70
        try:
            os.chdir(self.place)
            for number, name in ((1, "out"), (2, "err")):
                fd = os.open(self._said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(fd, number)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
            sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
            sys.argv = ["ckpt", *job.arguments]
            from ckpt_tools.cli import main

            self._library.lack(self._lacking)
            self._library.start_failing(str(self.place).encode(), ctypes.c_long(at), reason)
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            except BaseException:  # noqa: BLE001 - the end of a fork
                import traceback

                traceback.print_exc()
        finally:
            numbers = range(1, self._library.calls_seen() + 1)
            calls = [os.fsdecode(self._library.call_number(ctypes.c_long(each))) for each in numbers]
            (self._said / "calls").write_text(json.dumps(calls))
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def kind_of(call: str, job: Job) -> str:
    """Return a call with what kind of path it concerns: an input, the target, what is hidden, ..."""
    name, path = call.split(" ", 1)
    first, *inner = path.removeprefix("/").split("/")
    if first == job.target:
        first = "target"
    elif first in job.beside:
        first = "beside"
    elif path.endswith(" (deleted)"):
        first = "unnamed"
    elif first.startswith("."):
        first = "features" if "features" in first else f"hidden.{first.rpartition('.')[2]}"
    elif first == job.scratch:
        return f"{name} scratch/{re.sub('[0-9a-f]{8}|[^/]*=[^/-]*|n-[0-9]', '', '/'.join(inner))}"
    elif first:
        first = "input"
    return f"{name} {first}{'/inside' if inner else ''}"


def compiled(folder: Path) -> Path:
    """Compile the library to preload."""
    library = folder / "failing_calls.so"
    command = ["cc", "-shared", "-fPIC", "-w", "-o", str(library), str(HERE / "failing_calls.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def preloaded(inputs: Path | None = None, numbers: int = 4) -> tuple[Path, Path]:
    """Return the library and a folder with inputs; start this script again, with the library, if it is not there.

    Args:
        inputs: the folder, if `make_inputs` has filled one.
        numbers: see `make_inputs`.
    """
    if "FAILING_CALLS" in os.environ:
        library = Path(os.environ["FAILING_CALLS"])
        return library, inputs or library.parent / "inputs"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        library = compiled(folder)
        if inputs is None:
            (folder / "inputs").mkdir()
            # By another process, so that no fork has torch in it.
            made = f"import every_verb; every_verb.make_inputs(every_verb.Path({str(folder / 'inputs')!r}), {numbers})"
            subprocess.run([sys.executable, "-c", made], env=_environment(), check=True)
        more = {"LD_PRELOAD": str(library), "FAILING_CALLS": str(library)}
        code = subprocess.run([sys.executable, *sys.argv], env=_environment() | more, check=False).returncode
    sys.exit(code)


def with_own_mounts() -> None:
    """Start this script again in a namespace in which it may mount what others do not see."""
    if "OWN_MOUNTS" not in os.environ:
        command = ["unshare", "--mount", "--map-root-user", sys.executable, *sys.argv]
        sys.exit(subprocess.run(command, env=os.environ | {"OWN_MOUNTS": "1"}, check=False).returncode)


def _environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
