"""Sweeps, against averages and scores made one by one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import swept_series
import torch
from cli_runner import run
from swept_series import FUNCTION, OPTIMUM, N, error_of

from ckpt_tools import average, open_checkpoint, sweep
from ckpt_tools.errors import CkptError, DataError, SeriesError, UsageError, WriteError

Save = Callable[..., Path]
EVALUATE = f"""
import json, struct, sys, time, zipfile
archive = zipfile.ZipFile(sys.argv[1])  # torch would take a second to import
(first,) = [name for name in archive.namelist() if name.endswith("data/0")]
(weight,) = struct.unpack("<f", archive.read(first)[:4])
errors = [abs(weight - {OPTIMUM}) + 0.01 * (i % 5) for i in range(40)]
print(json.dumps({{"error": sum(errors) / 40, "weight": weight, "per_sample": {{"error": errors}}}}))
"""


def series(save: Save) -> None:
    swept_series.series(save)
    Path("evaluate.py").write_text(EVALUATE)


COMMAND = f"{sys.executable} evaluate.py {{ckpt}}"


def test_every_candidate_is_scored_as_its_average_is(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", last=[2, 4], decay=[0.3, 0.9], eval_function=FUNCTION, in_memory=True)
    assert found.evaluations == 4 + N
    assert (found.metric, found.lower_is_better) == ("error", True)
    for each in found.candidates:
        if each.options:
            assert each.metrics["error"] == error_of(**each.options)
        else:
            assert each.metrics["error"] == abs(each.coefficients[0] * int(each.label[2]) - OPTIMUM)
    errors = [each.metrics["error"] for each in found.candidates]
    assert errors == sorted(errors)
    assert found.best == found.candidates[0].label
    assert (found.last, found.best_single) == ("c-5.pth", "c-3.pth")


def test_the_best_is_written_with_the_evidence_and_its_command_makes_the_same(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", last=[2, 3, 4], eval_function=FUNCTION, in_memory=True, out="best.pth")
    assert found.written
    made = open_checkpoint("best.pth").provenance
    assert made is not None
    assert made["sweep"]["metric"] == "error"
    assert made["sweep"]["metrics"]["error"] == found.candidates[0].metrics["error"]
    assert made["sweep"]["candidates"] == 3 + N
    average(found.paths, **found.options, out="again.pth")
    assert torch.equal(open_checkpoint("again.pth")["w"], open_checkpoint("best.pth")["w"])
    report = average([], replay="best.pth", out="replayed.pth")
    assert report.same is True


def test_values_of_samples_decide_whether_a_difference_is_shown(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", last=[4, 6], eval_command=COMMAND, metric="error", holdout=0.5)
    assert found.other_data
    (error,) = [each for each in found.against_last if each.metric == "error"]
    assert error.samples == 20
    assert error.shown
    assert found.verdict.startswith("Better than the last checkpoint (c-5.pth): error is")
    assert (found.best, error.difference) == ("c-3.pth", pytest.approx(0.2 - 1.8))


def test_the_report_data_are_scored_for_the_best_and_the_last_only(save: Save, here: Path) -> None:
    series(save)
    Path("test.py").write_text(EVALUATE + "\nopen('calls', 'a').write(sys.argv[1] + '\\n')\n")
    test = f"{sys.executable} test.py {{ckpt}}"
    found = sweep("run", last=[3, 5], eval_command=COMMAND, metric="error", test=test)
    assert len(Path("calls").read_text().splitlines()) == 2
    assert found.other_data
    again = sweep("run", last=[3, 5], eval_command=COMMAND, metric="error", test=test)
    assert len(Path("calls").read_text().splitlines()) == 2
    assert (again.evaluations, again.reused, again.verdict) == (0, 2 + N, found.verdict)


def test_scores_on_the_data_of_the_choice_are_said_to_flatter(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", last=[4], eval_command=COMMAND, metric="error")
    assert "chosen on the same data, which flatters it" in found.verdict


def test_without_samples_nothing_is_claimed(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", last=[4], eval_function=FUNCTION, in_memory=True)
    assert "Without per-sample values no interval can be given" in found.verdict


def test_the_best_at_an_end_of_the_values_is_told(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", last=[2, 3, 5], eval_function=FUNCTION, in_memory=True)
    assert found.best == "last=5"
    assert any("last=5 is the highest value that was tried" in note for note in found.notes)


def test_a_failed_evaluation_is_told_and_the_others_go_on(save: Save, here: Path) -> None:
    series(save)
    Path("scores.py").write_text(
        "def score(state):\n    if state['n'] < 5:\n        raise ValueError('bad start')\n"
        f"    return abs(state['w'].mean().item() - {OPTIMUM})\n"
    )
    found = sweep("run", last=[2, 3], eval_function=FUNCTION, in_memory=True, lower_is_better=True)
    assert [each.label for each in found.candidates if each.error] == [f"c-{i}.pth" for i in range(5)]
    assert any(
        "Not scored: c-0.pth (scores.py:score fails (ValueError: bad start).), and 4 more" in n for n in found.notes
    )
    assert found.best == "last=3"


def test_if_all_evaluations_fail_the_first_reason_is_the_error(save: Save, here: Path) -> None:
    series(save)
    Path("scores.py").write_text("def score(state):\n    raise ValueError('no data')\n")
    with pytest.raises(
        DataError, match=r"no candidate could be scored; last=2: scores.py:score fails \(ValueError: no data"
    ):
        sweep("run", last=[2, 3], eval_function=FUNCTION, in_memory=True)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, UsageError, "one of `eval_data`, `eval_command` and `eval_function`"),
        ({"eval_command": COMMAND, "eval_function": FUNCTION}, UsageError, "not `eval_command` and `eval_function`"),
        ({"eval_command": COMMAND}, UsageError, "gives error, weight: choose the one that decides with `metric`"),
        ({"eval_command": COMMAND, "metric": "wer"}, UsageError, "`metric='wer'`: the evaluation gives error, weight"),
        ({"eval_command": "python evaluate.py"}, UsageError, "write {ckpt} where"),
        ({"eval_function": FUNCTION, "jobs": 2}, UsageError, "`jobs` goes with `eval_command`"),
        ({"eval_function": FUNCTION, "time_limit": 3}, UsageError, "`time_limit` goes with `eval_command`"),
        ({"eval_command": COMMAND, "in_memory": True}, UsageError, "`in_memory` goes with `eval_function`"),
        ({"eval_command": COMMAND, "holdout": 1.5}, UsageError, "a part between 0 and 1"),
        ({"eval_command": COMMAND, "holdout": 0.5, "test": COMMAND}, UsageError, "two ways to one end"),
        ({"eval_command": COMMAND, "search": "decay", "last": [2, 3]}, UsageError, "`last` has several"),
        ({"eval_command": COMMAND, "search": "half_life"}, UsageError, "needs two numbers, the ends"),
        (
            {"eval_command": COMMAND, "search": "last"},
            UsageError,
            "`search` is one of decay, half_life, .*, not 'last'",
        ),
        ({"eval_command": COMMAND, "search": "half-life", "half_life": "1%,5%"}, UsageError, "not parts of the run"),
        ({"eval_command": COMMAND, "decay": "often"}, UsageError, "'often'` is not a number"),
        ({"eval_command": COMMAND, "mode": "uniform", "decay": 0.5}, UsageError, "`decay` goes with `mode='ema'`"),
        ({"eval_command": COMMAND, "window": "10"}, SeriesError, "only run/c-5.pth is in it"),
        ({"eval_command": COMMAND, "keep": -1}, UsageError, "0 or more"),
        ({"eval_command": COMMAND, "evaluations": 2}, UsageError, "3 or more"),
        ({"eval_command": COMMAND, "lora": "product"}, UsageError, "Merge each adapter into its model"),
        ({"eval_data": "nowhere"}, CkptError, "does not record its model"),
        ({"eval_function": "nowhere.py:score"}, UsageError, "cannot be imported"),
        (
            {"eval_command": COMMAND, "metric": "weight", "holdout": 0.5},
            UsageError,
            "`metric='weight'`: the evaluation",
        ),
        ({"eval_command": COMMAND, "out": "run/c-5.pth", "force": True}, WriteError, "c-5.pth"),
    ],
)
def test_impossible_sweeps_are_one_clear_message(
    save: Save, here: Path, options: dict[str, Any], error: type[CkptError], says: str
) -> None:
    series(save)
    with pytest.raises(error, match=says):
        sweep("run", **options)
    assert not Path("ckpt-sweep").exists() or not [*Path("ckpt-sweep").glob("*.pth")]


def test_one_checkpoint_is_no_series(save: Save, here: Path) -> None:
    series(save)
    with pytest.raises(SeriesError, match="one checkpoint alone"):
        sweep("run/c-1.pth", eval_command=COMMAND)


def test_a_dry_run_draws_the_matrix_and_scores_nothing(save: Save, here: Path) -> None:
    series(save)
    shown = run("sweep", "run", "--last", "2,4", "--mode", "uniform,ema", "--eval-command", COMMAND, "--dry-run")
    assert shown.code == 0
    assert "last=4 mode=ema" in shown.out
    assert "█" in shown.out
    assert f"{4 + N} evaluations; reads" in shown.out
    assert not Path("ckpt-sweep").exists()


def test_the_command_ranks_and_ends_with_the_average_to_make(save: Save, here: Path) -> None:
    series(save)
    shown = run(
        "sweep", "run", "--last", "2:5:1", "--eval-command", COMMAND, "--metric", "error", "--jobs", "2", "--json"
    )
    assert shown.code == 0
    assert shown.err.rstrip().splitlines()[-1] == "  ckpt avg run --last 5 --mode uniform -o best.pth"
    report = json.loads(shown.out)
    assert report["best"] == "last=5"
    assert "c-5.pth (last)" in shown.err


def test_changed_files_are_scored_again(save: Save, here: Path) -> None:
    series(save)
    sweep("run", last=[2], eval_function=FUNCTION, in_memory=True)
    save("run/c-0.pth", {"model": {"w": torch.full((4, 3), 9.0), "n": torch.tensor(0)}, "step": 100})
    found = sweep("run", last=[2], eval_function=FUNCTION, in_memory=True)
    assert (found.evaluations, found.reused) == (1, N)
