"""Failing calls: whatever the system refuses, a run ends in one true line, with the old target or the whole new one."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import every_verb
import failing_calls
import pytest
from cli_runner import refused, run

from ckpt_tools.errors import WriteError
from ckpt_tools.storage.journal import alone_in

Save = Callable[..., Path]
SCRIPT = Path(failing_calls.__file__)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="a C library is preloaded, on Linux")
def test_no_failing_call_of_a_sample_leaves_anything_or_is_told_wrongly(tmp_path: Path) -> None:
    """One call of each function and kind of path; `python tests/support/failing_calls.py` tries all, for hours."""
    every_verb.make_inputs(tmp_path)
    arguments = ["--each-kind", "--without-torch", "--inputs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True, timeout=600
    )
    *faults, runs = done.stdout.splitlines()
    assert faults == []
    assert int(runs.removesuffix(" runs")) > 50


def refusing(name: str, reason: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a function of `os` fail from here on."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, name, fail)


def weights() -> dict[str, object]:
    import torch

    return {"module.a": torch.ones(3)}


def test_fix_prefix_in_place_keeps_the_old_file_if_the_new_one_cannot_be_synced(
    here: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("c.pth", weights())
    refusing("fsync", errno.ENOSPC, monkeypatch)
    message = refused(here, "fix-prefix", "c.pth")
    assert message.startswith("Error: c.pth: writing failed: No space left on device. Nothing was left at the target.")


def test_fix_prefix_in_place_keeps_the_old_file_where_its_mode_cannot_be_set(
    here: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("c.pth", weights()).chmod(0o600)
    refusing("fchmod", errno.EPERM, monkeypatch)
    assert refused(here, "fix-prefix", "c.pth") == (
        "Error: c.pth: a new file there cannot have its mode 600 (Operation not permitted), so it was not replaced. "
        "Name a new file with -o."
    )


def test_fix_prefix_in_place_needs_no_mode_that_is_already_right(
    here: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FAT or CIFS mount gives all files one mode, and lets nobody change it."""
    save("c.pth", weights()).chmod(0o666 & ~umask())
    refusing("fchmod", errno.EPERM, monkeypatch)
    assert run("fix-prefix", "c.pth").code == 0


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="only Linux")
def test_a_folder_whose_disk_is_full_by_the_companions_is_not_left(
    here: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("m/pytorch_model.bin", weights())
    Path("m/config.json").write_text('{"model_type": "llama"}')
    Path("m/tokenizer.json").write_text("x" * 1000)
    write, copy = os.pwrite, os.copy_file_range

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) == 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    def full_copy(source: int, target: int, count: int, *offsets: int) -> int:
        if count == 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(source, target, count, *offsets)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "copy_file_range", full_copy)
    for command in (("avg",), ("convert", "--to", "plain"), ("fix-prefix",)):
        name, *options = command
        message = refused(here, name, "m", *options, "-o", "out")
        assert "tokenizer.json" in message
        assert "failed" in message
        assert "No space left on device" in message


@pytest.mark.usefixtures("unsynced")
def test_what_fails_after_the_rename_is_a_line_and_no_failure(save: Save) -> None:
    save("c.pth", weights())
    result = run("avg", "c.pth", "-o", "out.pth")
    assert result.code == 0
    *_, warning, wrote = result.err.splitlines()
    assert warning.startswith("Warning: out.pth: is complete and in its place, but the system does not confirm")
    assert wrote.startswith("Wrote out.pth: ")


def test_an_error_after_the_output_is_in_place_says_so(here: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_tools.cli import console

    def failing(text: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")

    save("c.pth", weights())
    monkeypatch.setattr(console, "wrote", failing)
    result = run("avg", "c.pth", "-o", "out.pth")
    assert (result.code, result.err.splitlines()[-1]) == (
        1,
        "Error: somewhere: Input/output error; out.pth is complete.",
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "Error: there is not enough memory; nothing was written."),
        (
            RuntimeError("can't start new thread"),
            "Error: the system allows no more threads (ulimit -u, or ulimit -v); nothing was written.",
        ),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            "Error: a library cannot be loaded: libtorch_cpu.so: failed to map segment from shared object. Either "
            "memory is limited (ulimit -v), or the installation is not complete; nothing was written.",
        ),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "Error: Input/output error; nothing was written."),
    ],
)
def test_a_system_without_memory_threads_or_disk_is_a_line(
    here: Path, save: Save, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    from ckpt_tools.compute import engine

    def failing(*_: object, **__: object) -> None:
        raise error

    save("c.pth", weights())
    monkeypatch.setattr(engine, "run", failing)
    assert refused(here, "avg", "c.pth", "-o", "out.pth") == message


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (errno.EWOULDBLOCK, "scratch: another sweep is at work here"),
        (errno.ENOLCK, r"scratch: cannot be locked \(No locks"),
    ],
)
def test_a_folder_without_locks_is_not_taken_for_one_in_use(
    here: Path, monkeypatch: pytest.MonkeyPatch, reason: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(WriteError, match=message), alone_in(Path("scratch")):
        pytest.fail("the block was entered")
