"""Let the k-th system call of a run fail, for every k, and look at what is left and what is said; Linux only.

As a script it tries every call of every command: ``python tests/support/failing_calls.py``, with ``--every 20`` only
each 20th. It starts itself again with a small C library preloaded, and forks a process for each run.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
REASONS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}


@dataclass(frozen=True)
class Job:
    """A run of `ckpt`.

    Attributes:
        arguments: of the command line.
        target: what it writes; None if nothing.
    """

    arguments: tuple[str, ...]
    target: str | None = None

    @property
    def name(self) -> str:
        return " ".join(self.arguments)


def jobs() -> Iterator[Job]:
    """Yield every command with every format that it writes, into a new place and over an old one."""
    one, force = ("--threads", "1"), ("--force",)
    for out in ("new.pth", "new.safetensors", "new-folder", "old.pth", "old.safetensors", "old-folder"):
        over = force if out.startswith("old") else ()
        if out != "old-folder":
            yield Job(("avg", "a.pth", "b.pth", "-o", out, *over, *one), out)
        yield Job(("avg", "m-1", "m-2", "-o", out, *over, *one), out)
        if out.endswith(".pth"):
            yield Job(("strip", "a.pth", "-o", out, *over), out)
        yield Job(("convert", "m-1", "--to", "plain", "-o", out, *over), out)
    yield Job(("avg", "dcp-1", "dcp-2", "-o", "new-dcp", *one), "new-dcp")
    yield Job(("convert", "dcp-1", "--to", "plain", "-o", "new.pth"), "new.pth")
    yield Job(("fix-prefix", "a.pth"), "a.pth")
    yield Job(("fix-prefix", "s.safetensors"), "s.safetensors")
    yield Job(("fix-prefix", "a.pth", "-o", "new.pth"), "new.pth")
    yield Job(("fix-prefix", "m-1", "-o", "new-folder"), "new-folder")
    for path in ("a.pth", "s.safetensors", "m-1", "dcp-1"):
        yield Job(("inspect", path, "--json"))
    yield Job(("diff", "a.pth", "b.pth", "--json"))
    yield Job(("diff", "m-1", "m-2", "--json"))


def make_inputs(folder: Path) -> None:
    """Write small checkpoints of several formats, and old targets."""
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    def weights(value: float) -> dict[str, torch.Tensor]:
        return {"module.w": torch.full((3, 4), value), "module.b": torch.full((4,), value)}

    for i, name in enumerate("abc"):
        torch.save({"state_dict": weights(i), "epoch": i, "optimizer": {"state": {}}}, folder / f"{name}.pth")
    save_file(weights(1), folder / "s.safetensors")
    for i in (1, 2):
        model = folder / f"m-{i}"
        model.mkdir()
        save_file(weights(i), model / "model.safetensors")
        (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["L"]}))
        (model / "tokenizer.json").write_text("{}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save({"model": weights(i)}, checkpoint_id=folder / f"dcp-{i}", no_dist=True)
    for name in ("old.pth", "old.safetensors"):
        (folder / name).write_text("old")
    (folder / "old-folder").mkdir()
    (folder / "old-folder/config.json").write_text("old")
    (folder / "old-folder/model.safetensors").write_text("old")


def contents(path: Path) -> dict[str, bytes | None] | bytes | None:
    """Return the bytes of a file, or those of all files under a folder by their names; None if it is not there."""
    if not path.is_dir():
        return path.read_bytes() if path.exists() else None
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in sorted(path.rglob("*"))}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str
    calls: int
    failed: str
    left: dict[str, object]


class Runner:
    """Runs jobs in forks of this process, each in a fresh copy of the inputs."""

    def __init__(self, library: Path, folder: Path, inputs: Path | None) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.failed_call.restype = ctypes.c_char_p
        self._library.calls_seen.restype = ctypes.c_long
        self._inputs, self._place, self._said = inputs or folder / "inputs", folder / "place", folder / "said"
        self._said.mkdir()
        if inputs is None:
            self._inputs.mkdir()
            # By another process, so that no fork has torch in it.
            subprocess.run([sys.executable, __file__, "--make-inputs", str(self._inputs)], check=True)
        self.before = self._all(self._inputs)
        # What a first run imports, the forks have.
        for job in jobs():
            if job.arguments[0] != "diff":
                with suppress(SystemExit):
                    self._import(job)

    def _import(self, job: Job) -> None:
        """Run a job in this process, as far as its plan."""
        import contextlib

        from ckpt_tools.cli import main

        sys.argv = ["ckpt", *job.arguments, *(() if job.target is None else ("--dry-run",))]
        here = Path.cwd()
        os.chdir(self._inputs)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                main()
            finally:
                os.chdir(here)

    def _all(self, folder: Path) -> dict[str, object]:
        return {path.name: contents(path) for path in folder.iterdir()}

    def run(self, job: Job, at: int, reason: int) -> Outcome:
        """Run a job whose call of this number fails; none for 0."""
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._inputs, self._place)
        process = os.fork()
        if not process:
            self._child(job, at, reason)
        _, status = os.waitpid(process, 0)
        told = json.loads((self._said / "calls").read_text())
        return Outcome(
            os.waitstatus_to_exitcode(status),
            (self._said / "out").read_text(),
            (self._said / "err").read_text(),
            *told,
            self._all(self._place),
        )

    def _child(self, job: Job, at: int, reason: int) -> None:
        code = 70
        try:
            os.chdir(self._place)
            for number, name in ((1, "out"), (2, "err")):
                fd = os.open(self._said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(fd, number)
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
            sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
            sys.argv = ["ckpt", *job.arguments]
            from ckpt_tools.cli import main

            self._library.start_failing(str(self._place).encode(), ctypes.c_long(at), reason)
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0
            except BaseException:  # noqa: BLE001 - the end of a fork
                import traceback

                traceback.print_exc()
        finally:
            calls = self._library.calls_seen()
            (self._said / "calls").write_text(json.dumps([calls, self._library.failed_call().decode()]))
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def faults(self, job: Job, good: Outcome, bad: Outcome) -> Iterator[str]:
        """Yield what is wrong with a run in which a call has failed."""
        if "Traceback" in bad.err or bad.code not in (0, 1):
            yield "a traceback"
        left = dict(bad.left)
        new = None if job.target is None else left.pop(job.target, None)
        before, after = dict(self.before), None
        if job.target is not None:
            old, after = before.pop(job.target, None), good.left[job.target]
            if new not in (old, after):
                yield "the target is neither the old nor the new one"
        warned = [line for line in bad.err.splitlines() if line.startswith("Warning: ")]
        for name in {*before, *left}:
            if before.get(name) != left.get(name) and not any(name in line for line in warned):
                yield f"{name} is left, or has changed"
        message = bad.err.splitlines()[-1:]
        if bad.code == good.code and not (message and message[0].startswith("Error: ")):
            if bad.out != good.out:
                yield "success is reported, and the result is another one"
            if job.target is not None and new != after:
                yield "success is reported, and the target is not the new one"
        elif not message or not message[0].startswith("Error: "):
            yield "there is no message at the end"
        elif job.target is not None and new != self.before.get(job.target) and "is complete" not in message[0]:
            yield "an error is reported, and the target is the new one"
        if os.strerror(errno.EIO) in bad.err and "Errno" in bad.err:
            yield "the message shows the exception"


def try_all(library: Path, options: argparse.Namespace) -> Iterator[str]:
    """Yield the faults of all jobs, and then how many runs there were."""
    runner, runs, turn = Runner(library, library.parent.resolve(), options.inputs), 0, 0
    for job in jobs():
        if options.only not in job.name or job.arguments[0] == options.without:
            continue
        if job.arguments[0] == "diff":
            import torch  # noqa: F401 - so that the forks have it
        good = runner.run(job, 0, 0)
        if good.code != (job.arguments[0] == "diff"):
            yield f"{job.name}: {good.err}"
            continue
        for at in range(1, good.calls + 1):
            for name, reason in REASONS.items():
                turn += 1
                if turn % options.every:
                    continue
                bad = runner.run(job, at, reason)
                runs += 1
                for fault in runner.faults(job, good, bad):
                    said = "\n    ".join(bad.err.splitlines()[-4:])
                    yield f"ckpt {job.name}: call {at} of {good.calls}, {bad.failed}, {name}: {fault}\n    {said}"
    yield f"{runs} runs"


def compiled(folder: Path) -> Path:
    """Compile the library."""
    library = folder / "failing_calls.so"
    command = ["cc", "-shared", "-fPIC", "-w", "-o", str(library), str(HERE / "failing_calls.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="", help="jobs with this in their command line")
    parser.add_argument("--without", help="a command that is not tried")
    parser.add_argument("--inputs", type=Path, help="a folder in which make_inputs has been")
    parser.add_argument("--make-inputs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_inputs is not None:
        make_inputs(options.make_inputs)
    elif "FAILING_CALLS" in os.environ:
        library = Path(os.environ["FAILING_CALLS"])
        for line in try_all(library, options):
            print(line, flush=True)  # noqa: T201 - a script
    else:
        _start_again()


def _start_again() -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        more = {"LD_PRELOAD": str(library), "FAILING_CALLS": str(library), "OMP_NUM_THREADS": "1"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | more, check=False).returncode)


if __name__ == "__main__":
    main()
