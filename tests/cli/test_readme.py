"""The README: each command that it shows prints what it shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pages import PROGRESS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SESSIONS = [session for block in BLOCKS for session in re.split(r"\n+(?=\$ )", block) if session.startswith("$ ckpt ")]


def comparable(text: str, command: str) -> list[str]:
    """Return the lines without what changes from run to run: progress, times, memory, and what a network computes."""
    lines = [line.rstrip() for line in text.splitlines() if line and not PROGRESS.match(line)]
    lines = [re.sub(r"\d[\d.]* s\b|about \d[\d.]* MB", "_ s", line) for line in lines]
    if command == "recal-bn":  # sums of torch in float32 depend on the processor
        lines = [re.sub(r"[ \u2580-\u259f]+", " ", re.sub(r"\d+(\.\d+)?", "#", line)).rstrip() for line in lines]
    return lines


def test_readme_commands_print_what_the_readme_shows(tmp_path: Path) -> None:
    for name in ("runs", "digits"):
        shutil.copytree(ROOT / "fixtures" / name, tmp_path / name)
    shutil.copy(ROOT / "fixtures" / "digits_net.py", tmp_path)
    environment = os.environ | {"COLUMNS": "100", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    files = " ".join(f"runs/{path.name}" for path in (tmp_path / "runs").iterdir())
    for session in SESSIONS:  # in order: some read what an earlier one has written
        line, _, expected = session.partition("\n")
        words = line.removeprefix("$ ckpt ").replace("runs/*.pth", files).split()
        command = [sys.executable, "-m", "ckpt_tools", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert comparable(done.stdout + done.stderr, words[0]) == comparable(expected, words[0])


def test_readme_shows_every_command() -> None:
    shown = {session.split()[2] for session in SESSIONS}
    assert shown == {"avg", "convert", "diff", "fix-prefix", "inspect", "recal-bn", "strip", "verify"}


def test_the_readme_names_targets_that_make_has_and_how_to_run_the_tests() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    pages = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", pages, flags=re.MULTILINE))
    assert named <= targets
    assert {"demo", "test"} <= named
