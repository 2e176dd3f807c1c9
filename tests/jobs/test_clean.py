"""clean: what dead jobs have left goes; what is alive, could go on, or is not ours stays."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_runner import run

from ckpt_tools import average, clean
from ckpt_tools.errors import ReadError, UsageError
from ckpt_tools.jobs import share
from ckpt_tools.storage import hidden, kept_stage
from ckpt_tools.storage.hidden import locked, new_file, new_folder
from ckpt_tools.storage.kept_stage import stages


@pytest.fixture
def series(here: Path) -> list[str]:
    torch.manual_seed(0)
    for i in (1, 2):
        torch.save({"state_dict": {"w": torch.randn(300, 300)}, "epoch": i}, f"step_{i}.pth")
    return ["step_1.pth", "step_2.pth"]


def results() -> dict[str, tuple[str, str]]:
    """Target to (what was left, what became of it)."""
    return {Path(each.target).name: (each.what, each.result) for each in clean(".").left}


def test_outputs_of_killed_jobs_go_and_those_of_running_ones_stay(here: Path) -> None:
    for name, make in (("a.pth", new_file), ("folder", new_folder)):
        _, dead = locked(Path(name), here, make)
        os.close(dead)
    (here / ".folder.00000000.old").mkdir()
    (here / "folder").mkdir()
    path, alive = locked(Path("a.pth"), here, new_file)
    os.write(alive, b"x" * 10_000)
    found = sorted((Path(each.target).name, each.what, each.result) for each in clean(".").left)
    assert found == [
        ("a.pth", "output", "in use"),
        ("a.pth", "output", "removed"),
        ("folder", "output", "removed"),
        ("folder", "replaced", "removed"),
    ]
    assert sorted(each.name for each in here.iterdir()) == [path.name, "folder"]
    os.close(alive)
    report = clean(".")
    assert report.freed >= 10_000
    assert [each.name for each in here.iterdir()] == ["folder"]


def test_a_dry_run_tells_what_would_be_removed(here: Path) -> None:
    Path(".a.pth.00000000.partial").write_bytes(b"x" * 5000)
    os.utime(".a.pth.00000000.partial", (time.time() - 7200, time.time() - 7200))
    (left,) = clean(".", dry_run=True).left
    assert left.result == "would be removed"
    assert left.nbytes >= 5000
    assert 7200 <= left.age < 7300
    assert Path(left.path).exists()


def test_a_clock_that_is_ahead_makes_nothing_younger_than_now(here: Path) -> None:
    Path(".a.pth.00000000.partial").touch()
    os.utime(".a.pth.00000000.partial", (time.time() + 7200, time.time() + 7200))
    assert clean(".", dry_run=True).left[0].age == 0


def test_parts_of_a_job_stay_until_they_are_asked_for(series: list[str]) -> None:
    average(series, out="out.pth", part="1/1")
    average(series, out="other.pth", part="2/2")
    report = clean(".")
    assert [(Path(each.target).name, each.done, each.begun, each.result) for each in report.left] == [
        ("other.pth", 1.0, ("2/2",), "kept"),  # a single work unit, of which the first part has none
        ("out.pth", 1.0, ("1/1",), "kept"),
    ]
    assert report.notes == ("What is done of jobs in parts is kept, because they can go on. Remove it with `parts`.",)
    average(series, out="out.pth", finish=True)
    assert clean(".", parts=True, dry_run=True).left[0].result == "would be removed"
    assert results() == {"other.pth": ("parts", "kept")}
    report = clean(".", parts=True)
    assert [each.result for each in report.left] == ["removed"]
    assert report.freed >= 300 * 300 * 4
    assert not list(Path().glob(".*"))


def test_parts_of_processes_that_a_launcher_started_go_when_they_are_asked_for(
    series: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert run("avg", *series, "-o", "out.pth").code == 0
    assert [each.result for each in clean(".").left] == ["kept"]
    assert [each.result for each in clean(".", parts=True).left] == ["removed"]


def test_what_cannot_be_looked_into_is_kept_and_the_rest_goes(
    series: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of another user, a journal that is a folder, and one with what no JSON of ours has."""
    Path(".a.000000000000.parts/part-1-of-2.jsonl").mkdir(parents=True)
    Path(".b.000000000000.parts").mkdir()
    Path(".c.000000000000.parts").mkdir()
    lines = [json.dumps({"total": 1, "nbytes": int("9" * 400)}), "[" * 100_000, json.dumps({"total": 4, "nbytes": 1})]
    Path(".c.000000000000.parts/part-1-of-2.jsonl").write_text("\n".join(lines))
    Path(".c.000000000000.parts/job.json").write_text("[" * 100_000)
    Path(".d.00000000.partial").touch()
    listed = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name.startswith(".b"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    a, b, c, d = clean(".").left
    journal = ".a.000000000000.parts/part-1-of-2.jsonl"
    assert (a.result, a.detail) == ("kept", f"it cannot be looked into ({journal}: cannot be read (Is a directory))")
    assert (b.result, b.detail) == ("kept", "it cannot be looked into (Permission denied)")
    assert (c.result, c.done, d.result) == ("removed", 0.25, "removed")


def test_a_job_leaves_what_only_has_the_name_of_parts(series: list[str]) -> None:
    Path(".out.pth.000000000000.parts").touch()
    Path(".out.pth.202401311200.parts").mkdir()
    Path(".out.pth.202401311200.parts/notes.txt").touch()
    average(series, out="out.pth", part="1/1")
    average(series, out="out.pth")
    assert sorted(each.name for each in Path().glob(".*")) == [
        ".out.pth.000000000000.parts",
        ".out.pth.202401311200.parts",
    ]


def test_parts_at_work_stay(series: list[str]) -> None:
    average(series, out="out.pth", part="1/2")
    (stage,) = stages(Path("out.pth"))
    with stage.journal(2, 2).opened():
        assert [each.result for each in clean(".", parts=True).left] == ["in use"]
    with stage.opened([], [], {}):  # before it has a journal
        assert [each.result for each in clean(".", parts=True).left] == ["in use"]
    assert [each.result for each in clean(".", parts=True).left] == ["removed"]


def test_parts_that_no_job_would_trust_go(series: list[str]) -> None:
    average(series, out="out.pth", part="1/1")
    (stage,) = stages(Path("out.pth"))
    (stage.path / "job.json").unlink()
    assert results() == {"out.pth": ("parts", "removed")}


def test_the_only_copy_of_a_folder_stays(here: Path) -> None:
    (here / ".model.00000000.old").mkdir()
    long = "a" * 50
    (here / long).mkdir()
    (here / f".{long[:40]}.00000000.old").mkdir()
    details = {each.result: each.detail for each in clean(".").left}
    assert details.keys() == {"kept"}
    assert len(list(here.iterdir())) == 3


def test_nothing_with_another_name_or_kind_is_touched(here: Path) -> None:
    for name in (".a.partial", "a.00000000.partial", ".a.0000000g.partial", ".a.000000000.partial", ".a.00000000.tmp"):
        Path(name).touch()
    os.mkfifo(".a.00000000.partial")
    Path(".b.000000000000.parts").touch()
    Path(".c.000000000000.parts").mkdir()
    Path(".c.000000000000.parts/notes.txt").touch()
    Path("precious").mkdir()
    Path(".d.000000000000.parts").symlink_to("precious")
    for name in ("e", ".e.00000000.old"):
        Path(name).touch()
    before = {*here.rglob("*")}
    report = clean(".", parts=True)
    assert {each.result for each in report.left} == {"kept"}
    assert {Path(each.target).name: each.detail for each in report.left} == {
        "a": "the system does not tell if a process is at work there",
        "b": "it is no folder",
        "c": "it has something that ckpt does not write there (notes.txt)",
        "d": "it is no folder",
        "e": "it is no folder",
    }
    assert {*here.rglob("*")} == before


def backups(target: str) -> set[str]:
    """Make a target and what a user may keep beside it; return the names of that."""
    Path(target).mkdir()
    files = {f".{target}.{token}" for token in ("20240131.partial", "31122024.partial", "20240131.old", "0badc0de.old")}
    for name in files:
        Path(name).write_text("mine")
    Path(f".{target}.19991231.old").mkdir()
    return {*files, f".{target}.19991231.old"}


def test_backups_with_a_date_and_files_in_place_of_folders_stay(series: list[str]) -> None:
    kept = backups("model")
    report = clean(".")
    assert {Path(each.path).name: each.result for each in report.left} == dict.fromkeys(kept, "kept")
    reasons = {each.detail for each in report.left if "0badc0de" not in each.path}
    assert {each[8:] for each in reasons} == {
        " in its name may be a date, and it a backup. Remove it yourself if nobody needs it"
    }
    assert "  kept (it is no folder): by its name replaced folder of model, " in run("clean", ".").err
    average(series, out="model", max_shard_size=100_000, force=True)
    assert {each.name for each in Path().glob(".*")} == kept


def test_a_name_that_is_made_is_never_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [bytes.fromhex("20240131"), bytes.fromhex("00000000"), bytes.fromhex("2024013a")]
    monkeypatch.setattr(os, "urandom", lambda nbytes: drawn.pop(0))
    assert hidden.hidden(Path("model"), Path()).name == ".model.2024013a.partial"


def test_a_job_leaves_what_belongs_to_a_target_whose_name_begins_like_its_own(series: list[str]) -> None:
    a, b = (f"averaged-of-the-long-experiment-number-12-{each}" for each in "ab")
    average(series, out=a, part="1/2", max_shard_size=100_000)
    (parts,) = Path().glob(".*.parts")
    olds = {Path(f"{hidden.prefix(Path(a))}0badc0de.old"), Path(f".{a[:40]}.0badc0de.old")}
    for path in (Path(b), *olds):
        path.mkdir()
    average(series, out=b, max_shard_size=100_000, force=True)
    assert {*Path().glob(".*")} == {parts, *olds}
    report = clean(".")
    assert {each.result for each in report.left} == {"kept"}
    assert {each.target for each in report.left} == {f"{a[:31]}..."}


def test_nothing_is_removed_where_the_system_has_no_locks(series: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    average(series, out="out.pth", part="1/1")
    Path(".a.pth.00000000.partial").touch()
    for module in (hidden, kept_stage):
        monkeypatch.setattr(module, "try_lock", lambda fd, shared=False: None)
    assert {each.result for each in clean(".", parts=True).left} == {"kept"}


def test_what_cannot_be_removed_is_a_failure(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".a.pth.00000000.partial").touch()

    def refuse(path: Path) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr("ckpt_tools.jobs.clean.remove", refuse)
    report = clean(".")
    assert report.failed
    assert "the system refuses to remove it" in report.left[0].detail


def test_a_folder_that_is_not_there_is_refused(here: Path) -> None:
    with pytest.raises(UsageError, match="gone: is not a folder. Give the folder that has the outputs"):
        clean("gone")


def test_a_folder_that_cannot_be_read_is_no_empty_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ReadError, match=r"\.: cannot be read \(Permission denied\)"):
        clean(".")


def test_the_command_tells_how_a_job_in_parts_goes_on(series: list[str]) -> None:
    assert run("avg", *series, "-o", "out.pth", "--part", "1/1", "--mode", "ema", "--decay", "0.5").code == 0
    Path(".a.pth.00000000.partial").touch()
    result = run("clean", ".", "--json")
    assert result.code == 0
    lines = result.err.splitlines()
    assert "  removed: unfinished output of a.pth, 0 B, 0 seconds old" in lines
    command = f"{' '.join(['ckpt', 'avg', *series])} -o out.pth --mode ema --decay 0.5 --resume"
    assert f"  to go on, in {Path.cwd()}: {command}" in lines
    assert lines[-2:] == [
        "What is done of jobs in parts is kept, because they can go on. Remove it with --parts.",
        "Removed 1 of 2, 0 B.",
    ]
    assert [each["result"] for each in json.loads(result.out)["left"]] == ["removed", "kept"]
    assert run(*command.split()[1:]).code == 0
    assert run("clean", ".").err == ".: no job has left anything here.\n"
    assert run("clean", "gone").code == 2


def test_what_a_job_in_parts_keeps_shows_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["ckpt", "avg", "https://h/a.pth?secret", "--out=s3://b/a.pth"]
    monkeypatch.setattr(share, "COMMAND", words)
    assert share.told({})["command"] == ["ckpt", "avg", "https://h/a.pth", "--out=s3://b/a.pth"]


def test_the_command_fails_if_something_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".a.pth.00000000.partial").touch()
    monkeypatch.setattr("ckpt_tools.jobs.clean.remove", lambda path: None)
    result = run("clean", ".")
    assert result.code == 1
    assert "  failed (the system refuses to remove it; it may belong to another user): unfinished output" in result.err
