"""The scratch folder of a sweep: what it keeps, and how a sweep goes on in it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cli_runner import PATIENCE, environment
from swept_series import FUNCTION, OPTIMUM, SCORES, N, scored, series

from ckpt_tools import sweep
from ckpt_tools.errors import DataError, WriteError
from ckpt_tools.jobs.look import look
from ckpt_tools.jobs.sweep.report import SweepReport
from ckpt_tools.storage.journal import alone_in

Save = Callable[..., Path]


def files(folder: str = "ckpt-sweep") -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.pth"))


def names_of(found: SweepReport, count: int) -> list[str]:
    return sorted(Path(str(each.file)).name for each in found.candidates[:count])


def test_the_best_files_stay_and_the_others_go(save: Save, here: Path) -> None:
    series(save)
    found = scored(last=[2, 3, 4, 5], keep=2)
    assert files() == names_of(found, 2)
    scored(last=[2, 3], keep=0, scratch="t")
    assert not files("t")


def test_more_files_are_kept_if_a_finished_sweep_is_asked_for_them(save: Save, here: Path) -> None:
    series(save)
    scored(last=[2, 3, 4, 5])
    found = scored(last=[2, 3, 4, 5], keep=3)
    assert found.evaluations == 0
    assert files() == names_of(found, 3)
    assert len(files()) == 3


def test_files_of_another_sweep_go_and_those_of_nobody_stay(save: Save, here: Path) -> None:
    series(save)
    scored(last=[2, 3, 4, 5], keep=4)
    save("ckpt-sweep/mine.pth", {"w": torch.ones(2)})
    found = scored(from_step=[300, 400])
    assert files() == sorted([*names_of(found, 1), "mine.pth"])


def test_an_evaluation_may_delete_its_checkpoint(save: Save, here: Path) -> None:
    series(save)
    Path("scores.py").write_text(
        "import os, torch\ndef score(path):\n    w = torch.load(path)['model']['w']\n    os.unlink(path)\n"
        f"    return {{'error': abs(w.mean().item() - {OPTIMUM})}}\n"
    )
    found = sweep("run", last=[2, 3], eval_function=FUNCTION, out="best.pth")
    assert Path("best.pth").exists()
    assert [each.label for each in found.candidates if each.file] == [found.best]


def test_the_geometry_of_a_series_is_measured_once(save: Save, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(save)
    for i in range(N):
        optimizer = {"state": {}, "param_groups": [{"lr": 10.0**-i, "params": [0]}]}
        weights = {"w": torch.full((4, 3), 100.0 + (50 if i == 2 else i)), "n": torch.tensor(i)}
        save(f"run/c-{i}.pth", {"model": weights, "step": 100 * i + 100, "optimizer": optimizer})
    told = scored(last=2).notes
    assert any("c-2.pth" in note and "times as far" in note for note in told)
    assert any("The learning rate" in note for note in told)
    reports = []

    def counted(*arguments: Any, **options: Any) -> Any:
        reports.append(look(*arguments, **options))
        return reports[-1]

    monkeypatch.setattr("ckpt_tools.jobs.sweep.geometry.look", counted)
    assert (scored(last=2).notes, reports) == (told, [])
    Path("ckpt-sweep/look.json").write_text('{"key": 3}')
    assert (scored(last=3).notes, len(reports)) == (told, 1)
    save("run/c-9.pth", {"model": {"w": torch.full((4, 3), 99.0), "n": torch.tensor(9)}, "step": 999})
    scored(last=3)
    assert len(reports) == 2


def test_what_a_function_prints_is_kept(save: Save, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    series(save)
    with Path("scores.py").open("a") as file:
        file.write("    \n_score = score\ndef score(state):\n    print('w', state['w'].mean().item())\n")
        file.write("    return _score(state)\n")
    scored(last=2)
    assert sorted(path.read_text() for path in Path("ckpt-sweep/logs").iterdir())[-1] == "w 5.0\n"
    assert "w 5.0" not in capfd.readouterr().out


def test_two_sweeps_do_not_share_a_folder(save: Save, here: Path) -> None:
    series(save)
    with alone_in(Path("ckpt-sweep")), pytest.raises(WriteError, match="another sweep is at work here"):
        scored(last=[2])


def test_a_checkpoint_with_nan_stops_only_the_averages_that_have_it(save: Save, here: Path) -> None:
    series(save)
    save("run/c-2.pth", {"model": {"w": torch.full((4, 3), torch.nan), "n": torch.tensor(2)}, "step": 300})
    found = scored(last=[2, 3, 4, 5], greedy=True)
    failed = {each.label: str(each.error) for each in found.candidates if each.error is not None}
    assert [*failed] == ["last=4", "last=5", "c-2.pth"]
    assert all("cannot be made: " in reason and "NaN" in reason for reason in failed.values())
    assert {"last=2", "last=3", "c-0.pth", "c-5.pth"} < {each.label for each in found.candidates if each.error is None}
    assert any(note.startswith("Not scored: last=4 (cannot be made: ") for note in found.notes)
    assert not any("c-2.pth" in note for note in found.notes if note.startswith("Greedy soup"))


def test_if_no_candidate_can_be_made_the_first_reason_is_the_error(save: Save, here: Path) -> None:
    series(save)
    for i in range(N):
        save(f"run/c-{i}.pth", {"model": {"w": torch.full((4, 3), torch.nan), "n": torch.tensor(i)}, "step": i})
    with pytest.raises(DataError, match="no candidate could be scored; uniform: cannot be made: .*NaN"):
        scored(last=2)
    assert not files()


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_with_little_space_holds_few_candidates_at_a_time(
    save: Save, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(save)
    size = scored(last=2, dry_run=True).bytes_written // (1 + N)
    most = 0

    def counted(folder: Path) -> Usage:
        nonlocal most
        there = len(files(str(folder)))
        most = max(most, there)
        return Usage(9, 9, int((4.5 - there) * size))

    monkeypatch.setattr(shutil, "disk_usage", counted)
    Path("scores.py").write_text(
        SCORES % OPTIMUM
        + "    \n_score = score\ndef score(state):\n    import shutil, pathlib\n"
        + "    shutil.disk_usage(pathlib.Path('ckpt-sweep'))\n    return _score(state)\n"
    )
    found = scored(last=[2, 3, 4, 5])
    assert most <= 4
    assert len(found.candidates) == 4 + N
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9, 9, size // 2))
    with pytest.raises(WriteError, match=r"bytes are free, .* another place with `scratch`"):
        scored(last=[2, 3], scratch="t")


def test_a_sweep_that_was_stopped_goes_on(save: Save, here: Path) -> None:
    series(save)
    with Path("scores.py").open("a") as file:
        file.write("    \n_score = score\ndef score(state):\n    import os, time\n")
        file.write("    time.sleep(0.1 if os.environ.get('SLOW') else 0)\n    return _score(state)\n")
    options: dict[str, Any] = {"last": 4, "search": "decay", "greedy": True, "evaluations": 5}
    command = [sys.executable, "-m", "ckpt_tools", "sweep", "run", "--last", "4", "--search", "decay", "--greedy"]
    command += ["--evaluations", "5", "--eval-function", FUNCTION, "--in-memory"]
    results = Path("ckpt-sweep/results.jsonl")
    lines = 0
    # In the batch of checkpoints, and in the search.
    for number, until in ((signal.SIGKILL, 2), (signal.SIGINT, 1 + N + 2)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment() | {"SLOW": "1"})
        end = time.monotonic() + PATIENCE
        while not (results.exists() and results.read_bytes().count(b"\n") >= until) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
        assert lines < (lines := results.read_bytes().count(b"\n")) < 1 + N + 5
        if number == signal.SIGKILL:
            assert len(files()) > 1
            with results.open("ab") as file:
                file.write(b'{"key": "cut o')
    assert said.decode().splitlines()[-1] == (
        "Interrupted; the scores so far are in ckpt-sweep/results.jsonl, and the same command goes on."
    )
    assert len(files()) <= 1
    found = scored(**options)
    assert found.reused == lines - 1  # one of them is cut off
    fresh = scored(**options, scratch="fresh")
    assert [each.label for each in found.candidates] == [each.label for each in fresh.candidates]
    assert [each.metrics for each in found.candidates] == [each.metrics for each in fresh.candidates]
    assert (found.verdict, found.best) == (fresh.verdict, fresh.best)
    assert any("1 lines were cut off" in note for note in found.notes)
    assert files() == names_of(found, 1)
    assert not [*Path("ckpt-sweep").glob(".*.partial")]
