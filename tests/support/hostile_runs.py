"""Run the commands on hostile files, and find what they do beside that.

As a program, it reads ``[[kind, path, read], ...]`` from standard input, as JSON, and writes a line for each run. The
process that runs the commands is forked when all of `ckpt` is imported, so a module that is imported later is one that
a file made it import.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECRET = b"the private key of the user"
PATIENCE = 60
"""Seconds until a command counts as hanging; the slowest takes one."""
_CPU = 5
_MEMORY = 100 << 20
_ADDRESSES = 3 << 30
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_RUNS = re.compile(
    r"exec|compile|import|marshal\.loads?|code\.__new__|function\.__new__|os\.(system|exec|fork|forkpty|posix_spawn|spawn|"
    r"startfile|kill)|subprocess\.Popen|pty\.spawn|pickle\.find_class|(socket|ctypes|urllib|ftplib|smtplib|http|webbrowser)"
    r"\..*|sys\.(settrace|setprofile|addaudithook)"
)
_CHANGES = re.compile(r"os\.(remove|rename|mkdir|rmdir|link|symlink|truncate|chmod|chown|utime|mknod|mkfifo|setxattr)")


def commands(path: Path, good: Path, out: Path) -> dict[str, list[str]]:
    """Return the arguments of each command for a file, by the name of the command; `out` is its folder for outputs."""
    hostile, other = str(path), str(good)
    return {
        "inspect": ["inspect", hostile, "--tensors"],
        "avg --dry-run --json": ["avg", hostile, other, "--keys", "intersection", "--dry-run", "--json"],
        "avg": ["avg", hostile, "-o", str(out / "avg.pth")],
        "convert": ["convert", hostile, "--to", "plain", "-o", str(out / "plain.safetensors")],
        "strip": ["strip", hostile, "-o", str(out / "strip.pth")],
        "fix-prefix": ["fix-prefix", hostile, "-o", str(out / f"fixed{path.suffix if path.is_file() else ''}")],
        "diff": ["diff", hostile, other],
    }


class Audit:
    """What a process runs, imports, or writes outside a folder, beside what honest files make it do.

    Attributes:
        out: the folder for outputs.
        usual: the events of honest files; typer evaluates its own annotations in each command.
        found: the other events since they were last asked for; None while no command runs.
    """

    def __init__(self, out: Path) -> None:
        self.inside = (f"{out}{os.sep}", "/proc/self/", "/dev/null")
        self.usual: set[str] = set()
        self.found: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.found is None:
            return
        names = []
        if _RUNS.fullmatch(event):
            code = args[0] if args else None
            # Of a code object, and of a library, which is another one each time, what it has.
            names = [
                f"{event} {code.co_names} {code.co_consts!r:.300}" if event == "exec" else f"{event} {args[-1:]!r:.300}"
            ]
        elif _CHANGES.fullmatch(event) or (event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE):
            paths = args[:2] if event in ("os.rename", "os.link") else args[:1]
            given = [os.path.abspath(os.fsdecode(each)) for each in paths if isinstance(each, (str, bytes))]  # noqa: PTH100
            names = [f"{event} {each}" for each in given if not f"{each}{os.sep}".startswith(self.inside)]
        self.found += [name for name in names if name not in self.usual]

    def begin(self) -> None:
        self.found = []

    def end(self) -> list[str]:
        found, self.found = self.found or [], None
        return found


def state(folder: Path) -> dict[str, Any]:
    """Return what is in a folder: of each file its time, size and, if it is small, bytes."""
    found: dict[str, Any] = {}
    for path in sorted([folder, *folder.rglob("*")], key=os.fsencode):
        info = path.lstat()
        small = path.is_file() and not path.is_symlink() and info.st_size < 1 << 26
        link = str(path.readlink()) if path.is_symlink() else None
        found[str(path)] = (info.st_mode, info.st_size, info.st_mtime_ns, link, path.read_bytes() if small else None)
    return found


def complaints(code: int, out: str, err: str, folder: Path, command: str) -> Iterator[str]:
    """Say what is wrong with the end of a command."""
    if code not in (0, 1, 2):
        yield f"exit code {code}: {err[-300:]}"
    if "Traceback" in err:
        yield f"traceback: {err[-300:]}"
    if (found := _CONTROL.search(err + ("" if "--json" in command else out))) is not None:
        yield f"writes {ascii(found[0])} to the terminal"
    # diff has an answer then, and inspect a table with the faults of a folder.
    listed = command.startswith("inspect") and "cannot be averaged" in out
    if code and command != "diff" and not listed:
        last = (err.splitlines() or [""])[-1]
        if not last.startswith("Error: "):
            yield f"no error at the end: {err[-300:]}"
        if len(last) > 6000:
            yield f"an error of {len(err)} characters"
    if "--json" in command and code == 0:
        json.loads(out)
    if SECRET.decode() in err + out:
        yield "shows the secret"
    there = sorted(path.name for path in folder.iterdir())
    if code == 0 and command in ("avg", "convert", "strip", "fix-prefix"):
        if len(there) > 1 or any(name.startswith(".") for name in there):
            yield f"leaves {there}"
        if not there and "Wrote" in err:
            yield "wrote nothing"
    elif there:
        yield f"leaves {there} after exit code {code}"


def broken(path: Path) -> str | None:
    """Say why torch, zipfile or the safetensors library cannot load an output; None if they can."""
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.name == "fixed.pth" and zipfile.is_zipfile(path):  # which keeps objects of all classes, as they are
            with zipfile.ZipFile(path) as archive:
                return archive.testzip()
        elif path.name != "fixed.pth":
            torch.load(path, weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever it is, the output is not whole
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def check_outputs(folder: Path, source: Path) -> Iterator[str]:
    """Say which outputs are not whole, though the input is, and which have the secret."""
    for path in filter(Path.is_file, folder.rglob("*")):
        if path.parent == folder and (why := broken(path)) is not None:
            original = folder.parent / "original" / path.name
            original.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, original)
            # fix-prefix copies what it does not rename, broken or not.
            if not path.name.startswith("fixed.") or broken(original) is None:
                yield f"{path.name} is not whole: {why}"
            shutil.rmtree(original.parent)
        if SECRET in path.read_bytes():
            yield f"{path.name} has the secret"


def _kilobytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


@contextmanager
def _measured(used: dict[str, float]) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
    before, cpu = _kilobytes("VmRSS"), time.process_time()
    yield
    used["cpu"] = time.process_time() - cpu
    used["memory"] = 1024 * (_kilobytes("VmHWM") - before)


def in_turn(names: Sequence[str], number: int, read: bool) -> set[str]:
    """Return the commands for the file with this number: those that all files have, and others in turn.

    Of a file that is refused, all of them end where its header is read; `fix-prefix` has code of its own for pickles.
    """
    if not read:
        return {"inspect", ("avg", "fix-prefix")[number % 2]}
    others = [name for name in names if name not in ("inspect", "avg")]
    return {"inspect", "avg", others[number % len(others)]}


def _run_all(
    files: Sequence[tuple[str, str, bool]], good: Path, work: Path, audit: Audit, tell: Any, *, every: bool
) -> None:
    """Run commands on all files, every one or those of `in_turn`; tell what each is found to do."""
    from cli_runner import run

    resource.setrlimit(resource.RLIMIT_AS, (1024 * _kilobytes("VmSize") + _ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = work / "out"
    known = set(sys.modules)
    for number, (kind, name, read) in enumerate(files):
        path = Path(name)
        before = state(path.parent)
        size = sum(info[1] for info in before.values() if info[4] is not None)
        arguments_of = commands(path, good / "good.pth", out)
        for command in arguments_of if every else arguments_of.keys() & in_turn([*arguments_of], number, read):
            arguments = arguments_of[command]
            tell({"kind": kind, "number": number, "command": command})
            out.mkdir()
            used: dict[str, float] = {}
            bad: list[str] = []
            audit.begin()
            with _measured(used):
                try:
                    result = run(*arguments)
                except BaseException:  # noqa: BLE001 - any exception is a fault
                    bad.append(f"traceback: {traceback.format_exc()[-1500:]}")
                    result = None
            bad += audit.end()
            bad += [f"imports {module}" for module in sorted(set(sys.modules) - known)]
            known |= set(sys.modules)
            if used["cpu"] > _CPU:
                bad.append(f"takes {used['cpu']:.1f} s")
            if used["memory"] > _MEMORY + 4 * size:
                bad.append(f"takes {used['memory'] / 1e6:.0f} MB")
            if result is not None:
                bad += complaints(result.code, result.out, result.err, out, command)
                bad += check_outputs(out, path)
                if command == "inspect" and (result.code == 0) is not read:
                    bad.append("is read" if result.code == 0 else f"is refused: {result.err[-300:]}")
            shutil.rmtree(out)
            tell({"kind": kind, "number": number, "command": command, "bad": bad, **used})
        if state(path.parent) != before:
            tell({"kind": kind, "number": number, "command": "all", "bad": ["an input was changed"]})


def _tell(fd: int, record: Mapping[str, Any]) -> None:
    data = memoryview(json.dumps(record).encode("ascii") + b"\n")
    while data:
        data = data[os.write(fd, data) :]


def _watch(reading: int, child: int) -> Iterator[dict[str, Any]]:
    """Yield what a process says; end it if it says nothing for too long."""
    rest, last = b"", {"kind": "none", "number": -1, "command": "the start"}
    while True:
        ready, _, _ = select.select([reading], [], [], PATIENCE)
        if not ready:
            os.kill(child, signal.SIGKILL)
        data = os.read(reading, 1 << 16) if ready else b""
        if not data:
            _, status = os.waitpid(child, 0)
            if status:
                how = (
                    f"the process ends with {os.waitstatus_to_exitcode(status)}" if ready else f"hangs for {PATIENCE} s"
                )
                yield {**last, "bad": [how]}
            return
        *lines, rest = (rest + data).split(b"\n")
        for last in map(json.loads, lines):
            if "bad" in last:
                yield last


def serve(good: Path, work: Path, files: list[tuple[str, str, bool]], *, every: bool) -> None:
    """Run commands on all files, and write a line of JSON for each run; see `in_turn`.

    A process does it that starts with all of `ckpt` imported. If it ends, or hangs, another goes on with the next file.
    """
    from functools import cache
    from unittest import mock

    from cli_runner import run

    import ckpt_tools.cli.commands as listed

    # A command is made once, and not for each file; to make it takes ten times as long as to refuse a file.
    mock.patch.object(listed, "made", cache(listed.made)).start()
    warnings.simplefilter("ignore")  # of torch, which loads the outputs
    audit = Audit(work)
    for path in sorted(good.iterdir()):  # imports what any honest or broken file needs
        for command, arguments in commands(path, good / "good.pth", work).items():
            audit.begin()
            result = run(*arguments)
            audit.usual |= set(audit.end())
            found = [*complaints(result.code, result.out, result.err, work, command), *check_outputs(work, path)]
            if found:
                raise RuntimeError(f"{path.name}: {found}")
            for each in work.iterdir():
                each.unlink()
    os.chdir(good.parent)
    sys.path.insert(0, str(good.parent))  # with a module of the name that some pickles have
    import encodings.cp437  # noqa: F401 - in which zipfile reads names

    gc.collect()
    gc.freeze()
    time.sleep(0.05)  # a timer of the progress may still be ending
    while files:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                _run_all(files, good, work, audit, lambda record: _tell(writing, record), every=every)  # noqa: B023
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                os._exit(code)
        os.close(writing)
        for record in _watch(reading, child):
            sys.stdout.write(json.dumps(record) + "\n")
        os.close(reading)
        shutil.rmtree(work / "out", ignore_errors=True)
        files = files[record["number"] + 1 :]
    sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), json.load(sys.stdin), every=sys.argv[3:] == ["--every"])
