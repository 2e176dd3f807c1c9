"""The build: without a compiler it goes on from source, and stops where wheels are made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("setuptools")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The source of the extension, without anything built."""
    for name in ("setup.py", "ckpt_tools/compute/csrc"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    return tmp_path


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    return subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_build_without_a_compiler_goes_on_without_the_extension(source: Path) -> None:
    done = build(source, CC="false", CKPT_TOOLS_REQUIRE_NATIVE="")
    assert done.returncode == 0, done.stderr
    assert "_native" in done.stderr  # a warning
    assert not list(source.glob("lib/**/_native*"))


def test_build_that_requires_the_extension_fails_without_a_compiler(source: Path) -> None:
    done = build(source, CC="false", CKPT_TOOLS_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "false" in done.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_build_that_requires_the_extension_makes_it_with_a_compiler(source: Path) -> None:
    quick = source / "quick"
    quick.write_text('#!/bin/bash\nexec cc "${@/#-O3/-O0}"\n')  # the machine code is not what is tested
    quick.chmod(0o755)
    done = build(source, CKPT_TOOLS_REQUIRE_NATIVE="1", CC=str(quick))
    assert done.returncode == 0, done.stderr
    assert list(source.glob("lib/ckpt_tools/compute/_native*"))
