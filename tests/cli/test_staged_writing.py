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

from ckpt_tools.errors import WriteError, WriteWarning
from ckpt_tools.jobs.outputs import check_target
from ckpt_tools.storage import staged
from ckpt_tools.storage.staged import staged_files


class Crash(BaseException):
    """What no handler of ours knows: a signal, say."""


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(params=["unnamed", "named"])
def growing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the file system has files without a name, and where it has not."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif sys.platform != "linux":
        pytest.skip("only Linux has files without a name")
    return str(request.param)


@pytest.fixture(params=["exchange", "two renames"])
def replacing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a folder and its successor change places in one step, and where they cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(staged, "_exchanged", lambda *_: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux has the call")


# One file


def test_staged_files_shows_a_complete_file_when_the_block_ends(here: Path, growing: str) -> None:
    with staged_files(Path("out.pth"), None, [5]) as (fd,):
        assert not Path("out.pth").exists()
        assert len(names(here)) == (growing == "named")
        os.pwrite(fd, b"hello", 0)
    assert Path("out.pth").read_bytes() == b"hello"
    assert names(here) == ["out.pth"]


def test_staged_files_creates_a_file_of_full_size_beside_the_target(here: Path, growing: str) -> None:
    Path("deep").mkdir()
    with staged_files(Path("deep/out.pth"), None, [1 << 20]) as (fd,):
        assert (os.fstat(fd).st_size, os.fstat(fd).st_dev) == (1 << 20, Path("deep").stat().st_dev)
        assert os.fstat(fd).st_nlink == (growing == "named")
        if growing == "named":
            (stage,) = Path("deep").iterdir()
            assert re.fullmatch(r"\.out\.pth\.[0-9a-f]{8}\.partial", stage.name)


def test_a_new_file_has_the_usual_mode(here: Path, growing: str) -> None:
    for force in (False, True):
        old = os.umask(0o027)
        try:
            with staged_files(Path("out.pth"), None, [1], force=force):
                pass
        finally:
            os.umask(old)
        assert Path("out.pth").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt, MemoryError, WriteError])
def test_staged_files_keeps_the_old_file_on_a_crash(here: Path, growing: str, error: type[BaseException]) -> None:
    Path("out.pth").write_text("old")
    before = contents(here)
    with pytest.raises(error, match="in the block"), staged_files(Path("out.pth"), None, [5]):
        raise error("in the block")
    assert contents(here) == before


def test_staged_files_leaves_other_hard_links_of_the_old_file(here: Path, growing: str) -> None:
    """Who holds the old file open, or has a second name for it, keeps it."""
    Path("out.pth").write_text("old")
    Path("second.pth").hardlink_to("out.pth")
    with Path("out.pth").open() as opened, staged_files(Path("out.pth"), None, [3], force=True) as (fd,):
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


@pytest.mark.usefixtures("growing")
@pytest.mark.parametrize("force", [False, True])
def test_staged_files_syncs_content_before_the_rename_and_the_folder_after(
    here: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    order: list[str] = []
    fsync = os.fsync

    def noting(fd: int) -> None:
        kind = "folder" if os.path.samestat(os.fstat(fd), here.stat()) else "file"
        order.append(f"{kind}, {Path('out.pth').stat().st_size if Path('out.pth').exists() else 'no'} bytes in place")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    with staged_files(Path("out.pth"), None, [3], force=force):
        pass
    assert order == ["file, no bytes in place", "folder, 3 bytes in place"]


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
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
    with staged_files(Path("out.pth"), None, [3], force=True) as (fd,):
        os.pwrite(fd, b"new", 0)
    assert Path("out.pth").read_text() == "new"
    assert names(here) == ["out.pth"]


def test_staged_files_works_without_hard_links(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch)
    with staged_files(Path("out.pth"), None, [3]):
        pass
    assert names(here) == ["out.pth"]


@pytest.mark.usefixtures("growing")
def test_staged_files_ignores_an_interruption_after_the_rename(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not be reported as a run that wrote nothing."""

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(staged, "_sync_folder", interrupted)
    for force in (False, True):
        with staged_files(Path("out.pth"), None, [3], force=force):
            pass
        assert names(here) == ["out.pth"]


@pytest.mark.usefixtures("replacing")
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
    with staged_files(Path("out"), ["a.bin", "deep/index.json"], [2, 2]) as fds:
        for fd in fds:
            os.pwrite(fd, b"ok", 0)
        assert not Path("out").exists()
    assert names(here) == ["out", "out/a.bin", "out/deep", "out/deep/index.json"]


@pytest.mark.usefixtures("replacing")
def test_staged_files_replaces_a_folder_as_a_whole(here: Path, old_folder: Callable[..., Path]) -> None:
    old_folder()
    with staged_files(Path("out"), ["model.safetensors"], [3], force=True) as (fd,):
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

    monkeypatch.setattr(staged, "_exchanged", lambda *_: False)
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
        if to.name == "out":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(staged, "_exchanged", lambda *_: False)
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
from ckpt_tools.errors import WriteError, WriteWarning
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


@pytest.mark.usefixtures("growing")
@pytest.mark.parametrize("force", [False, True])
def test_staged_files_finishes_in_a_folder_that_cannot_be_opened(
    here: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """A folder with mode 0300 may be written but not read; the error would come when the file is in its place."""
    real, synced = os.open, []

    def closed(path: object, flags: int, *mode: int, **more: int) -> int:
        if Path(str(path)) == here and not flags & (os.O_CREAT | os.O_PATH):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *mode, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", closed)
    monkeypatch.setattr(os, "sync", lambda: synced.append(names(here)))
    with staged_files(Path("out.pth"), None, [5], force=force) as (fd,):
        os.pwrite(fd, b"hello", 0)
    assert Path("out.pth").read_bytes() == b"hello"
    assert names(here) == ["out.pth"]
    assert "out.pth" in synced[0]


# What killed runs leave


def killed(folder: Path, name: str = "out.pth", *, of_files: str = "None", first: str = "pass") -> list[str]:
    """End a process with SIGKILL while it writes a target, and return what it leaves."""
    script = f"""
import os, signal
from pathlib import Path
from ckpt_tools.storage import staged
{first}
with staged.staged_files(Path({name!r}), {of_files}, [5], force=True):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=False)
    return [path for path in names(folder) if path.startswith(".")]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has files without a name")
@pytest.mark.parametrize("files", ["None", "['a.bin']"])
def test_a_killed_run_leaves_nothing_of_a_file_or_folder(here: Path, files: str) -> None:
    assert killed(here, of_files=files) == []
    assert names(here) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux leads to an open file without a name")
def test_a_scratch_file_has_no_name_and_can_be_opened(here: Path) -> None:
    with staged.scratch_file(Path("out.pth")) as scratch:
        os.pwrite(scratch.fd, b"sums", 0)
        assert names(here) == []
        assert scratch.path.read_bytes() == b"sums"


def test_a_scratch_file_is_gone_at_the_end_where_open_files_have_no_path(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "is_open_as", lambda *_: False)
    with staged.scratch_file(Path("out.pth")) as scratch:
        os.pwrite(scratch.fd, b"sums", 0)
        assert names(here) == [scratch.path.name]
        assert scratch.path.read_bytes() == b"sums"
    assert names(here) == []


@pytest.mark.parametrize("files", ["None", "['a.bin']"])
def test_the_next_run_for_a_target_removes_what_a_killed_one_left(here: Path, files: str) -> None:
    left = killed(here, of_files=files, first="del os.O_TMPFILE")
    assert left
    killed(here, "another.pth", first="del os.O_TMPFILE")
    Path(".out.pth.notes.partial").write_text("of somebody else")
    with staged_files(Path("out.pth"), None, [3]):
        pass
    kept = {path.name for path in here.iterdir()}
    assert {".out.pth.notes.partial", "out.pth"} == {name for name in kept if not name.startswith(".another.pth.")}
    assert len(kept) == 3


@pytest.mark.parametrize("folder", [False, True])
def test_a_run_leaves_alone_what_another_one_for_its_target_is_writing(
    here: Path, folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    files = ["a.bin"] if folder else None
    with staged_files(Path("out"), files, [3], force=True) as (fd,):
        os.pwrite(fd, b"one", 0)
        with (
            staged.scratch_file(Path("out")) as scratch,
            staged_files(Path("out"), files, [3], force=True) as (other,),
        ):
            os.pwrite(other, b"two", 0)
            assert scratch.path.exists()
    assert (Path("out/a.bin") if folder else Path("out")).read_bytes() == b"one"
    assert [path.name for path in here.iterdir()] == ["out"]


def test_a_full_disk_counts_what_a_killed_run_left_as_free(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (left,) = killed(here, first="del os.O_TMPFILE")
    Path(left).write_bytes(b"0" * 100_000)
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    check_target(Path("out.pth"), [], nbytes=100_010, force=False, names=None)
    with pytest.raises(WriteError, match=r"other\.pth: needs 100,010 bytes, and .* has 10 left"):
        check_target(Path("other.pth"), [], nbytes=100_010, force=False, names=None)
    assert Path(left).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux replaces a folder in one step")
def test_a_folder_is_the_old_or_the_new_one_when_a_run_is_killed_at_any_rename(
    here: Path, old_folder: Callable[..., Path]
) -> None:
    before = contents(old_folder())
    kill = (
        "def audit(event, arguments):\n"
        "    if event in ('os.rename', 'os.remove', 'shutil.rmtree'): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    script = "import os, signal, sys\nfrom pathlib import Path\nfrom ckpt_tools.storage import staged\n" + kill
    script += (
        "with staged.staged_files(Path('out'), ['model.safetensors'], [3], force=True):\n    sys.addaudithook(audit)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=here, check=False)
    assert done.returncode == -9  # when the old one was about to be removed
    assert [path.name for path in Path("out").iterdir()] == ["model.safetensors"]
    (left,) = (path for path in here.iterdir() if path.name != "out")
    assert {name: data for name, (data, _) in contents(left).items()} == {  # type: ignore[misc]
        name: data
        for name, (data, _) in before.items()  # type: ignore[misc]
    }
    with staged_files(Path("out"), ["model.safetensors"], [3], force=True):
        pass
    assert [path.name for path in here.iterdir()] == ["out"]


def test_an_old_folder_that_a_killed_run_has_renamed_away_is_kept_while_there_is_no_other(
    here: Path, old_folder: Callable[..., Path]
) -> None:
    """Where a folder is replaced by two renames, it can be all that there is."""
    before = contents(old_folder(".out.0123abcd.old"))
    with staged_files(Path("out"), ["model.safetensors"], [3]):
        assert contents(Path(".out.0123abcd.old")) == before
    with staged_files(Path("out"), ["model.safetensors"], [3], force=True):
        assert names(here)[-2:] == ["out", "out/model.safetensors"]
        assert not Path(".out.0123abcd.old").exists()


# What fails or changes meanwhile


@pytest.mark.usefixtures("growing", "unsynced")
@pytest.mark.parametrize("force", [False, True])
def test_what_fails_after_the_rename_is_a_warning(here: Path, force: bool) -> None:
    message = r"out\.pth: is complete and in its place, but the system does not confirm .* \(Input/output error\)"
    with pytest.warns(WriteWarning, match=message), staged_files(Path("out.pth"), None, [3], force=force) as (fd,):
        os.pwrite(fd, b"new", 0)
    assert Path("out.pth").read_text() == "new"
    assert names(here) == ["out.pth"]


def test_a_hidden_file_that_cannot_be_removed_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, *, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(Path, "unlink", failing)
    with pytest.warns(WriteWarning, match=r"\.out\.pth\..*\.partial: is of no use any more, and cannot be removed"):  # noqa: SIM117
        with staged_files(Path("out.pth"), None, [3]):
            pass
    assert Path("out.pth").exists()


@pytest.mark.usefixtures("growing")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a folder that is renamed")
@pytest.mark.parametrize("files", [None, ["a.bin"]])
def test_a_folder_of_targets_that_is_renamed_meanwhile_is_refused(here: Path, files: list[str] | None) -> None:
    Path("runs").mkdir()
    message = r"runs/out: its folder, or what was written there, was moved"
    with pytest.raises(WriteError, match=message), staged_files(Path("runs/out"), files, [3]):  # noqa: PT012
        Path("runs").rename("moved")
        Path("runs").mkdir()
    assert names(here) == ["moved", "runs"]


def test_a_hidden_file_that_another_program_has_put_in_its_place_is_not_published(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    with pytest.raises(WriteError, match="was moved in the meantime"), staged_files(Path("out.pth"), None, [3]):  # noqa: PT012
        (stage,) = here.iterdir()
        stage.unlink()
        stage.write_text("theirs")
    assert not Path("out.pth").exists()
