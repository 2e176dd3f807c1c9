"""All kinds of hostile files.

As a program, ``python tests/support/hostile_files.py --every`` runs every command on each of them in one process, and
prints what was found; the tests take some of the commands in turn. With ``--commands``, each has a process of its own,
as with a user, which takes half an hour. With text after that, only kinds whose name or group has it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hostile_archives
import hostile_folders
import hostile_pickles
import torch
from hostile_kind import Kind
from hostile_runs import PATIENCE, check_outputs, commands, complaints, state
from safetensors.torch import save_file

KINDS: list[Kind] = [*hostile_pickles.KINDS, *hostile_archives.KINDS, *hostile_folders.KINDS]
RUNS = Path(__file__).with_name("hostile_runs.py")
_VICTIM = "open('run-by-a-pickle', 'w')\nclass Victim: pass\n"


def make_good(folder: Path) -> Path:
    """Make a folder of files that need all that honest files need, one that is refused, and what pickles would import.

    Returns:
        The folder of the files.
    """
    good = folder / "good"
    good.mkdir()
    weights = {"w": torch.arange(4.0), "größe": torch.ones(1)}
    args = argparse.Namespace(model="resnet", lr=0.1)
    values: dict[str, Any] = {"size": torch.Size([2]), "dtype": torch.float16, "device": torch.device("cpu")}
    values |= {"set": {1}, "object": Path("a"), "epoch": 3}
    values["optimizer"] = {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": [{"params": [0]}]}
    torch.save({"state_dict": OrderedDict(weights), "args": args, **values}, good / "good.pth")
    torch.save(weights, good / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, good / "good.safetensors")
    torch.save({"one": weights, "other": weights}, good / "unknown.pth")  # refused with a line to type
    (good / "none.pth").write_bytes(b"nothing")
    (folder / "victim.py").write_text(_VICTIM)
    return good


def make(kinds: Sequence[Kind], folder: Path) -> list[tuple[str, str, bool]]:
    """Make the files of kinds, each in a folder of its own; return (name, path, whether it is read) of each."""
    made = []
    for number, kind in enumerate(kinds):
        inside = folder / str(number)
        inside.mkdir(parents=True)
        made.append((kind.name, str(kind.make(inside)), kind.read))
    return made


def run(kinds: Sequence[Kind], folder: Path, *, every: bool = False) -> list[dict[str, Any]]:
    """Run commands on kinds in one process, as `hostile_runs.serve` does; return what it says of each run."""
    good = make_good(folder)
    (folder / "work").mkdir()
    done = subprocess.run(
        [sys.executable, RUNS, good, folder / "work", *(["--every"] if every else [])],
        input=json.dumps(make(kinds, folder / "kinds")),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or done.stderr:
        raise RuntimeError(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]


# What a process reports at its end: the modules that it has, and what it ran.
_AUDITED = """
import atexit, sys
events = []
STARTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.", "socket.", "pty.", "webbrowser.")
def hook(event, args):
    if event.startswith(STARTS):
        events.append("".join(f"{event}:{args[:1]}".split()))
sys.addaudithook(hook)
report = sys.argv.pop(1)
def end():
    with open(report, "w") as file:
        print(*sys.modules, file=file)
        print(*events, file=file)
atexit.register(end)
from ckpt_tools.__main__ import main
main()
"""


def _in_processes(chosen: Sequence[Kind]) -> None:
    """Run all commands on kinds in processes of their own, and print what was found."""
    os.nice(10)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good, out, report = make_good(folder), folder / "out", folder / "report"
        usual: dict[str, set[str]] = {}
        starts: set[str] = set()  # what honest files start: torch asks ldconfig for libraries

        def started(arguments: list[str]) -> tuple[int | None, str, str, set[str], list[str]]:
            report.unlink(missing_ok=True)
            try:
                done = subprocess.run(
                    [sys.executable, "-c", _AUDITED, str(report), *arguments],
                    capture_output=True,
                    timeout=PATIENCE,
                    cwd=folder,
                    check=False,
                    env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}", "OMP_NUM_THREADS": "1"},
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),  # noqa: PLW1509
                )
            except subprocess.TimeoutExpired:
                return None, "", "", set(), []
            modules, _, ran = report.read_text().partition("\n") if report.exists() else ("", "", "")
            return done.returncode, done.stdout.decode(), done.stderr.decode(), set(modules.split()), ran.split()

        for path in sorted(good.iterdir()):
            for command, arguments in commands(path, good / "good.pth", out).items():
                out.mkdir()
                code, _, _, modules, ran = started(arguments)
                starts.update(ran)
                if code is None:
                    raise SystemExit(f"{path.name}: {command} takes longer than {PATIENCE} s. The machine is too busy.")
                usual[command] = usual.get(command, set()) | modules
                shutil.rmtree(out)
        for kind, (_, made, _) in zip(chosen, make(chosen, folder / "kinds"), strict=True):
            path = Path(made)
            before = state(path.parent)
            for command, arguments in commands(path, good / "good.pth", out).items():
                out.mkdir()
                start = time.monotonic()
                code, shown, said, modules, ran = started(arguments)
                bad = ["hung"] if code is None else []
                bad += ["crashed"] if code is not None and code < 0 else []
                bad += ["ran code"] if {*ran} - starts or (folder / "run-by-a-pickle").exists() else []
                bad += (
                    ["imported"]
                    if any("." not in m or not m.startswith("torch") for m in modules - usual[command])
                    else []
                )
                bad += ["traceback"] if "Traceback" in said else []
                faults = [] if code is None or code < 0 else [*complaints(code, shown, said, out, command)]
                bad += ["other"] if [*faults, *check_outputs(out, path)] and not bad else []
                counts.update(["runs", *bad])
                if bad:
                    print(kind.name, command, bad, faults, sorted(modules - usual[command])[:5], said[-200:])  # noqa: T201
                if (took := time.monotonic() - start) > 5:
                    print(f"{kind.name}: {command} took {took:.1f} s")  # noqa: T201
                shutil.rmtree(out)
            counts["kinds"] += 1
            counts["inputs changed"] += state(path.parent) != before
    for what in ("kinds", "runs", "ran code", "imported", "hung", "crashed", "traceback", "other", "inputs changed"):
        print(f"{what:15} {counts[what]}")  # noqa: T201


def _in_one_process(chosen: list[Kind]) -> None:
    """Run every command on kinds in one process, and print what was found."""
    with tempfile.TemporaryDirectory() as name:
        records = run(chosen, Path(name), every=True)
    for each in records:
        if each["bad"]:
            print(each["kind"], each["command"], each["bad"])  # noqa: T201
    print(f"kinds {len(chosen)}, runs {len(records)}, bad {sum(bool(each['bad']) for each in records)}")  # noqa: T201


if __name__ == "__main__":
    how, text = sys.argv[1:2], " ".join(sys.argv[2:])
    kinds = [kind for kind in KINDS if text in kind.name or text in kind.group]
    if not kinds:
        raise SystemExit(f"no kind or group has {text!r} in its name")
    if how == ["--every"]:
        _in_one_process(kinds)
    elif how == ["--commands"]:
        _in_processes(kinds)
    else:
        raise SystemExit(__doc__)
