"""Staged writing: the old file or the whole new one, and nothing else beside them."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import contents

from ckpt_tools.errors import WriteError
from ckpt_tools.jobs.outputs import check_target
from ckpt_tools.storage import staged
from ckpt_tools.storage.staged import staged_files


class Crash(BaseException):
    """What no handler of ours knows: a signal, say."""


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# One file


def test_staged_files_shows_a_complete_file_when_the_block_ends(here: Path) -> None:
    with staged_files(Path("out.pth"), None, [5]) as (_, (fd,)):
        assert not Path("out.pth").exists()
        assert len(names(here)) == 1
        os.pwrite(fd, b"hello", 0)
    assert Path("out.pth").read_bytes() == b"hello"
    assert names(here) == ["out.pth"]


def test_staged_files_creates_a_hidden_file_of_full_size_beside_the_target(here: Path) -> None:
    Path("deep").mkdir()
    with staged_files(Path("deep/out.pth"), None, [1 << 20]) as (stage, _):
        assert stage.parent == here / "deep"
        assert re.fullmatch(r"\.out\.pth\..+\.partial", stage.name)
        assert stage.stat().st_size == 1 << 20


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt, MemoryError, WriteError])
def test_staged_files_keeps_the_old_file_on_a_crash(here: Path, error: type[BaseException]) -> None:
    Path("out.pth").write_text("old")
    before = contents(here)
    with pytest.raises(error, match="in the block"), staged_files(Path("out.pth"), None, [5]):
        raise error("in the block")
    assert contents(here) == before


def test_staged_files_leaves_other_hard_links_of_the_old_file(here: Path) -> None:
    """Who holds the old file open, or has a second name for it, keeps it."""
    Path("out.pth").write_text("old")
    Path("second.pth").hardlink_to("out.pth")
    with Path("out.pth").open() as opened, staged_files(Path("out.pth"), None, [3], force=True) as (_, (fd,)):
        os.pwrite(fd, b"new", 0)
        assert Path("out.pth").read_text() == "old"
    assert (Path("out.pth").read_text(), Path("second.pth").read_text()) == ("new", "old")
    assert opened.closed
    assert names(here) == ["out.pth", "second.pth"]


def test_staged_files_rejects_a_target_that_cannot_be_created(here: Path) -> None:
    with pytest.raises(WriteError, match=r"out\.pth: cannot be written \(.*\)\. Choose another place with `out`"):  # noqa: SIM117
        with staged_files(Path("gone/out.pth"), None, [1]):
            pytest.fail("the block was entered")
    assert names(here) == []


def test_staged_files_keeps_the_old_file_if_the_sync_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.pth").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: os.close(1 << 20))  # EBADF
    with pytest.raises(WriteError, match=r"out\.pth: cannot be written \(Bad file descriptor\)"):  # noqa: SIM117
        with staged_files(Path("out.pth"), None, [3]):
            pass
    assert Path("out.pth").read_text() == "old"
    assert names(here) == ["out.pth"]


def test_staged_files_syncs_content_before_the_rename_and_the_folder_after(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)))
    monkeypatch.setattr(os, "link", lambda stage, to: (order.append("name"), link(stage, to)))
    with staged_files(Path("out.pth"), None, [3]) as (stage, _):
        pass
    assert order == [stage.name, "name", here.name]


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("links", [True, False])
def test_staged_files_needs_force_for_a_file_that_appears_meanwhile(
    here: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        without_links(monkeypatch)
    with pytest.raises(WriteError, match=r"out\.pth: was created by another program in the meantime, and was kept"):  # noqa: SIM117
        with staged_files(Path("out.pth"), None, [3]):
            Path("out.pth").write_text("theirs")
    assert Path("out.pth").read_text() == "theirs"
    with staged_files(Path("out.pth"), None, [3], force=True) as (_, (fd,)):
        os.pwrite(fd, b"new", 0)
    assert Path("out.pth").read_text() == "new"
    assert names(here) == ["out.pth"]


def test_staged_files_works_without_hard_links(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch)
    with staged_files(Path("out.pth"), None, [3]):
        pass
    assert names(here) == ["out.pth"]


def test_staged_files_ignores_an_interruption_after_the_rename(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not be reported as a run that wrote nothing."""

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(staged, "_sync_folder", interrupted)
    for force in (False, True):
        with staged_files(Path("out.pth"), None, [3], force=force):
            pass
        assert names(here) == ["out.pth"]


@pytest.mark.parametrize("folder", [False, True])
def test_staged_files_replaces_a_link_but_not_its_target(
    here: Path, old_folder: Callable[..., Path], folder: bool
) -> None:
    old = old_folder("precious")
    files = [path.name for path in old.iterdir()] if folder else None
    for behind in ("precious" if folder else "precious/config.json", "nowhere"):
        Path("out").symlink_to(behind)
        with pytest.raises(WriteError, match="out: exists already. Pass `force=True`"):
            check_target(Path("out"), [], nbytes=0, force=False, names=files)
        check_target(Path("out"), [], nbytes=0, force=True, names=files)
        with staged_files(Path("out"), files, [3] * (3 if folder else 1), force=True):
            pass
        assert not Path("out").is_symlink()
        assert Path("precious/config.json").read_text() == "old"
        assert {path.parts[0] for path in map(Path, names(here))} == {"out", "precious"}
        shutil.rmtree("out") if folder else Path("out").unlink()


# A folder


def test_staged_files_shows_a_complete_folder(here: Path) -> None:
    with staged_files(Path("out"), ["a.bin", "index.json"], [2, 2]) as (stage, fds):
        for fd in fds:
            os.pwrite(fd, b"ok", 0)
        (stage / "config.json").write_text("{}")
        assert not Path("out").exists()
    assert names(here) == ["out", "out/a.bin", "out/config.json", "out/index.json"]


def test_staged_files_replaces_a_folder_as_a_whole(here: Path, old_folder: Callable[..., Path]) -> None:
    old_folder()
    with staged_files(Path("out"), ["model.safetensors"], [3], force=True) as (_, (fd,)):
        os.pwrite(fd, b"new", 0)
        assert (Path("out") / "config.json").read_text() == "old"
    assert names(here) == ["out", "out/model.safetensors"]


def test_staged_files_replaces_an_empty_folder(here: Path) -> None:
    Path("out").mkdir()
    with staged_files(Path("out"), ["model.safetensors"], [3]):
        pass
    assert names(here) == ["out", "out/model.safetensors"]


def test_staged_files_keeps_the_old_folder_on_a_crash(here: Path, old_folder: Callable[..., Path]) -> None:
    old_folder()
    before = contents(here)
    with pytest.raises(Crash, match="in the block"), staged_files(Path("out"), ["model.safetensors"], [3]):
        raise Crash("in the block")
    assert contents(here) == before


def test_staged_files_keeps_a_folder_that_appears_meanwhile(here: Path, old_folder: Callable[..., Path]) -> None:
    with pytest.raises(WriteError, match="out: was created by another program in the meantime, and was kept"):  # noqa: SIM117
        with staged_files(Path("out"), ["model.safetensors"], [3]):
            before = contents(old_folder())
    assert contents(Path("out")) == before
    assert {Path(name).parts[0] for name in names(here)} == {"out"}


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt("between the renames")])
def test_staged_files_restores_the_old_folder_on_failure(
    here: Path, old_folder: Callable[..., Path], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_folder()
    before = contents(here)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(  # noqa: SIM117
        (WriteError, KeyboardInterrupt), match=r"out: cannot be written \(Input/output error\)|between"
    ):
        with staged_files(Path("out"), ["model.safetensors"], [3], force=True):
            pass
    assert contents(here) == before


def test_staged_files_names_an_old_folder_that_cannot_be_restored(
    here: Path, old_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old_folder())
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if to == Path("out"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WriteError, match=r"The old content is now .*\.old; move it back") as refusal:  # noqa: SIM117
        with staged_files(Path("out"), ["model.safetensors"], [3], force=True):
            pass
    (kept,) = here.iterdir()
    assert str(kept) in str(refusal.value)
    assert contents(kept) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets blocks aside")
def test_staged_files_finds_a_full_disk_before_the_work(here: Path) -> None:
    """The limit of a file's size stands in for the end of the disk: the system refuses both alike."""
    script = """
import os, resource
from ckpt_tools.storage.staged import reserve
from ckpt_tools.errors import WriteError
fd = os.open("out", os.O_WRONLY | os.O_CREAT)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
reserve(fd, 0, 1 << 20, "out.pth")
try:
    reserve(fd, 1 << 20, 1, "out.pth")
except WriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("out.pth: writing failed: File too large.")
    assert (here / "out").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("force", [False, True])
def test_staged_files_finishes_in_a_folder_that_cannot_be_opened(
    here: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """A folder with mode 0300 may be written but not read; the error would come when the file is in its place."""
    real, synced = os.open, []

    def closed(path: object, flags: int, *mode: int, **more: int) -> int:
        if Path(str(path)) == here and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *mode, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", closed)
    monkeypatch.setattr(os, "sync", lambda: synced.append(names(here)))
    with staged_files(Path("out.pth"), None, [5], force=force) as (_, (fd,)):
        os.pwrite(fd, b"hello", 0)
    assert Path("out.pth").read_bytes() == b"hello"
    assert names(here) == ["out.pth"]
    assert "out.pth" in synced[0]
