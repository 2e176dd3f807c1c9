"""Reads that leave others room: a rate, hashes for the same read of the disk, and pages that are dropped."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_tools
from ckpt_tools.compute import follower, native
from ckpt_tools.compute.follower import Follower
from ckpt_tools.errors import CorruptError, UsageError
from ckpt_tools.formats import read_header
from ckpt_tools.storage import page_cache
from ckpt_tools.storage.pace import Pace
from ckpt_tools.storage.source import InputFile


class Clock(threading.Event):
    """A time that goes on when somebody waits."""

    now = 10.0

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0.0
        return False


def test_a_pace_is_kept_by_all_who_take_from_it() -> None:
    clock = Clock()
    pace = Pace(1000, clock)
    times = []
    for nbytes in (100, 300, 50, 50):
        pace.take(nbytes, clock)
        times.append(round(clock.now, 6))
    assert times == [10.0, 10.1, 10.4, 10.45]


def test_a_pace_does_not_make_up_for_a_pause() -> None:
    clock = Clock()
    pace = Pace(1000, clock)
    pace.take(100, clock)
    clock.now += 60
    begin = clock.now
    pace.take(100, clock)
    pace.take(100, clock)
    assert (begin, clock.now) == (70.0, pytest.approx(70.1))


@pytest.fixture
def series(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints with an optimizer, of several work units in each way of reading."""
    monkeypatch.setattr(native, "SLICE", 512)
    torch.manual_seed(0)
    for i in range(3):
        weights = {"wide": torch.randn(40, 70), "turned": torch.randn(60, 50).t(), "bias": torch.randn(5)}
        torch.save(
            {"optimizer": {"state": {0: {"m": torch.randn(900)}}, "param_groups": []}, "state_dict": weights},
            f"{i}.pth",
        )
    return [f"{i}.pth" for i in range(3)]


def digests(paths: list[str]) -> list[dict[str, str]]:
    return [{path: hashlib.sha256(Path(path).read_bytes()).hexdigest()} for path in paths]


@pytest.mark.parametrize("job", ["average", "convert", "copy"])
def test_the_pace_counts_each_byte_that_is_read(
    series: list[str], way: str, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(Pace, "take", lambda _, nbytes, stop: taken.append(nbytes))
    if job == "average":
        expected = ckpt_tools.average(series, out="out.pth", max_read_rate="1GB").bytes_read
    elif job == "convert":
        ckpt_tools.convert("0.pth", out="out.safetensors", max_read_rate=10**9)
        expected = 4 * (40 * 70 + 60 * 50 + 5)
    else:
        ckpt_tools.strip("0.pth", out="out.pth", max_read_rate="1GB")
        expected = 4 * (40 * 70 + 60 * 50 + 5)
    assert abs(sum(taken) - expected) < (8192 if job == "copy" else 1)


def test_a_rate_that_is_no_size_is_refused_before_any_work(here: Path) -> None:
    with pytest.raises(UsageError, match="`max_read_rate='fast'` is not a size"):
        ckpt_tools.average(["missing.pth"], max_read_rate="fast")


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "out"])
@pytest.mark.parametrize("more", [{}, {"drop_cache": True}, {"write_checksums": True}, {"resume": True}])
def test_hashes_of_the_same_pass_are_those_of_the_files(
    series: list[str], out: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "BLOCK", 1000)
    monkeypatch.setattr(follower, "BEHIND", 3000)
    report = ckpt_tools.average(series, out=out, hash=True, threads=2, **more)
    assert [each.sha256 for each in report.inputs] == digests(series)
    provenance = read_header(Path(out)).provenance
    assert provenance is not None
    assert [each["sha256"] for each in provenance["inputs"]] == digests(series)
    assert more or ckpt_tools.verify(out, inputs=".").passed


def test_a_copy_records_the_hash_of_its_input(here: Path) -> None:
    torch.save({"state_dict": {"n": torch.arange(9)}}, "a.pth")
    ckpt_tools.average(["a.pth"], out="out.safetensors", hash=True)
    provenance = read_header(Path("out.safetensors")).provenance
    assert provenance is not None
    assert [each["sha256"] for each in provenance["inputs"]] == digests(["a.pth"])


def test_nothing_is_hashed_before_the_sums_have_read_it(series: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the sums are done, no byte is asked for that they have not passed."""
    ahead = []
    follow, finish = Follower._follow, Follower.finish
    done = threading.Event()

    def watched(self: Follower, file: Any, block: memoryview, nbytes: int) -> None:
        if not done.is_set():
            ahead.append(file.at + nbytes > file.front)
        follow(self, file, block, nbytes)

    def ended(self: Follower, *given: Any) -> Any:
        done.set()
        return finish(self, *given)

    monkeypatch.setattr(follower, "BLOCK", 100)
    monkeypatch.setattr(follower, "BEHIND", 500)  # so that the sums wait
    monkeypatch.setattr(Follower, "_follow", watched)
    monkeypatch.setattr(Follower, "finish", ended)
    ckpt_tools.average(series, out="out.pth", hash=True, threads=1)
    assert len(ahead) > 10
    assert not any(ahead)


@pytest.mark.parametrize("resume", [False, True])
def test_a_change_that_the_hashes_meet_ends_the_job(
    series: list[str], resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Follower.read
    monkeypatch.setattr(Follower, "read", lambda self, unit: (os.utime("1.pth", (1, 1)), read(self, unit)))
    with pytest.raises(CorruptError, match=r"1\.pth: changed while it was read"):
        ckpt_tools.average(series, out="out.pth", hash=True, resume=resume)
    assert not Path("out.pth").exists()


def pages(path: str) -> float | None:
    with InputFile(Path(path)) as file:
        return page_cache.cached(file.source.fileno())  # type: ignore[arg-type]


def forget(paths: list[str]) -> None:
    for path in paths:
        with InputFile(Path(path)) as file:
            os.fsync(file.source.fileno())  # type: ignore[arg-type]
            page_cache.drop(file.source.fileno())  # type: ignore[arg-type]


@pytest.fixture
def large(here: Path, synced: None) -> list[str]:
    """Files of which the page cache keeps nothing, on a disk that tells."""
    names = []
    for i in range(2):
        torch.save({"w": torch.full((1 << 20,), float(i)), "n": torch.arange(9)}, f"{i}.pth")
        names.append(f"{i}.pth")
    forget(names)
    if pages("0.pth") != 0.0:
        pytest.skip("the file system keeps its pages, or does not tell")
    return names


@pytest.mark.parametrize("more", [{}, {"hash": True}])
def test_dropped_pages_are_those_that_the_job_brought(large: list[str], more: dict[str, Any]) -> None:
    Path("0.pth").read_bytes()
    ckpt_tools.average(large, out="out.pth", drop_cache=True, **more)
    assert pages("0.pth") == 1.0
    assert pages("1.pth") < 0.1  # type: ignore[operator]
    assert pages("out.pth") < 0.1  # type: ignore[operator]


def test_pages_stay_unless_they_are_to_be_dropped(large: list[str]) -> None:
    ckpt_tools.average(large, out="out.pth")
    assert [pages(path) for path in (*large, "out.pth")] == [1.0] * 3
