"""What was fuzzed: all inputs that are kept hold all properties, and what holds none is told."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

FUZZ = Path(__file__).parents[2] / "fuzz"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    support = FUZZ.parent / "tests" / "support"
    paths = os.pathsep.join([*map(str, (FUZZ, FUZZ.parent, support)), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


def test_every_kept_input_is_read_or_refused_and_runs_and_imports_nothing() -> None:
    done = run(str(FUZZ / "run.py"), "replay")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    counts = {line.partition(":")[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    for archive in (FUZZ / "corpus").iterdir():
        regressions = [*(FUZZ / "regressions" / archive.stem).glob("*")]
        kept = len(zipfile.ZipFile(archive).namelist()) + len(regressions)
        assert kept > 5
        assert counts.pop(archive.stem) > kept  # and the seeds
    assert not counts


def test_a_property_that_does_not_hold_is_a_fault() -> None:
    # In a process of its own, since an audit hook stays to its end.
    code = """
import contextlib, socket, sys, tempfile, types
from pathlib import Path
import oracles, properties, targets
from ckpt_tools.errors import CorruptError

reads = properties.read_header
def planted(act):
    def read(path):
        act(path)
        return reads(path)
    return read

def refuse(path):
    raise CorruptError("no")

def try_import(path):
    with contextlib.suppress(ImportError):
        import no_such_module

def wait(path):
    properties.time = types.SimpleNamespace(process_time=lambda: 1e9)

def allocate(path):
    bytearray(b"x") * (400 << 20)

ACTS = {
    "nothing": lambda path: None,
    "a refusal": refuse,
    "an error of Python": lambda path: {}["key"],
    "an import": lambda path: __import__("colorsys"),
    "an import that fails": try_import,
    "a command": lambda path: __import__("os").system("true"),
    "a file written": lambda path: path.with_name("new").write_bytes(b""),
    "a file elsewhere": lambda path: Path("/etc/hostname").read_bytes(),
    "a socket": lambda path: socket.socket().close(),
    "much memory": allocate,
    "much time": wait,
}
watch = properties.Watch(1e6)
target = targets.TARGETS["pickle"]()
with tempfile.TemporaryDirectory() as folder:
    fuzz = target.start(Path(folder), watch)
    for name, act in ACTS.items():
        properties.read_header = planted(act)
        try:
            fuzz(target.seeds["plain"])
            print(name, "passes")
        except Exception as error:
            print(name, type(error).__name__)
    properties.read_header = reads
    oracles.read_tensor = lambda spec, stamps: properties.read_tensor(spec, stamps) + 1
    try:
        fuzz(target.seeds["plain"])
    except properties.Fault as error:
        print("other values", str(error).partition(":")[0])
"""
    done = run("-c", code)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "nothing passes", "a refusal passes", "an error of Python KeyError", "an import Fault",
        "an import that fails Fault", "a command Fault", "a file written Fault", "a file elsewhere Fault",
        "a socket Fault", "much memory Fault", "much time Fault", "other values .n",
    ]  # fmt: skip
