"""Sweeps, against averages and scores made one by one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import PATIENCE, environment, run

from ckpt_tools import average, open_checkpoint, sweep
from ckpt_tools.errors import CkptError, DataError, SeriesError, UsageError, WriteError

Save = Callable[..., Path]
N = 6
OPTIMUM = 3.2  # of the one weight of these models
EVALUATE = f"""
import json, struct, sys, time, zipfile
archive = zipfile.ZipFile(sys.argv[1])  # torch would take a second to import
(first,) = [name for name in archive.namelist() if name.endswith("data/0")]
(weight,) = struct.unpack("<f", archive.read(first)[:4])
errors = [abs(weight - {OPTIMUM}) + 0.01 * (i % 5) for i in range(40)]
print(json.dumps({{"error": sum(errors) / 40, "weight": weight, "per_sample": {{"error": errors}}}}))
"""
FUNCTION = "scores.py:score"
SCORES = f"""
def score(state):
    return {{"error": abs(state["w"].double().mean().item() - {OPTIMUM})}}
"""


def series(save: Save) -> None:
    for i in range(N):
        save(
            f"run/c-{i}.pth",
            {"model": {"w": torch.full((4, 3), float(i)), "n": torch.tensor(i)}, "step": 100 * i + 100},
        )
    Path("evaluate.py").write_text(EVALUATE)
    Path("scores.py").write_text(SCORES)
    sys.modules.pop("scores", None)


COMMAND = f"{sys.executable} evaluate.py {{ckpt}}"


def error_of(**options: Any) -> float:
    average("run", **options, out="alone.pth", force=True)
    return abs(open_checkpoint("alone.pth")["w"].double().mean().item() - OPTIMUM)


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
    assert "nobody can say whether that is chance" in found.verdict


def test_a_search_finds_the_optimum_in_few_evaluations(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", decay=[0.2, 0.9], search="decay", eval_function=FUNCTION, in_memory=True, evaluations=9)
    assert found.evaluations == 1 + N + 9
    values = [each.options["decay"] for each in found.candidates if "decay" in each.options]
    assert len(values) == 9
    errors = {value: error_of(decay=value) for value in [0.2 + 0.005 * i for i in range(141)]}
    exact = min(errors, key=errors.__getitem__)
    best = min((each for each in found.candidates if "decay" in each.options), key=lambda each: each.metrics["error"])
    assert best.options["decay"] == pytest.approx(exact, abs=0.02)
    assert any(note.startswith("Search of decay") for note in found.notes)


def test_a_search_takes_amounts_and_names_with_dashes(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", half_life="50,1k", search="half-life", eval_function=FUNCTION, in_memory=True, evaluations=4)
    values = [each.options["half_life"] for each in found.candidates if "half_life" in each.options]
    assert len(values) == 4
    assert all(50 < value < 1000 for value in values)


def test_a_search_that_ends_at_its_edge_says_so(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", decay=[0.01, 0.2], search="decay", eval_function=FUNCTION, in_memory=True)
    assert any("at the edge of the search" in note for note in found.notes)


def test_the_greedy_soup_is_the_one_of_the_published_procedure(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", greedy=True, eval_function=FUNCTION, in_memory=True)
    soup: list[int] = []
    for i in sorted(range(N), key=lambda i: abs(i - OPTIMUM)):
        if not soup or abs(sum([*soup, i]) / (len(soup) + 1) - OPTIMUM) <= abs(sum(soup) / len(soup) - OPTIMUM):
            soup.append(i)
    assert f"Greedy soup: {', '.join(f'c-{i}.pth' for i in soup)}." in found.notes


def test_the_best_at_an_end_of_the_values_is_told(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", last=[2, 3, 5], eval_function=FUNCTION, in_memory=True)
    assert found.best == "last=5"
    assert any("last=5 is the highest value that was tried" in note for note in found.notes)


def test_the_best_files_stay_and_the_others_go(save: Save, here: Path) -> None:
    series(save)
    found = sweep("run", last=[2, 3, 4, 5], eval_function=FUNCTION, in_memory=True, keep=2, scratch="s")
    kept = sorted(path.name for path in Path("s").glob("*.pth"))
    assert kept == sorted(Path(str(each.file)).name for each in found.candidates[:2])
    sweep("run", last=[2, 3], eval_function=FUNCTION, in_memory=True, keep=0, scratch="t")
    assert not [*Path("t").glob("*.pth")]


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
        ({"eval_command": COMMAND, "search": "last"}, UsageError, "`search='last'`: one of decay, half_life"),
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


def test_an_evaluation_may_delete_its_checkpoint(save: Save, here: Path) -> None:
    series(save)
    Path("evaluate.py").write_text(EVALUATE + "\nimport os; os.unlink(sys.argv[1])\n")
    found = sweep("run", last=[2, 3], eval_command=COMMAND, metric="error", out="best.pth")
    assert Path("best.pth").exists()
    assert all(each.file is None for each in found.candidates)


def test_two_sweeps_do_not_share_a_folder(save: Save, here: Path) -> None:
    series(save)
    from ckpt_tools.storage.journal import alone_in

    with alone_in(Path("ckpt-sweep")), pytest.raises(WriteError, match="another sweep is at work here"):
        sweep("run", last=[2], eval_command=COMMAND, metric="error")


def test_a_dry_run_draws_the_matrix_and_scores_nothing(save: Save, here: Path) -> None:
    series(save)
    shown = run("sweep", "run", "--last", "2,4", "--mode", "uniform,ema", "--eval-command", COMMAND, "--dry-run")
    assert shown.code == 0
    assert "last=4 mode=ema" in shown.err
    assert "█" in shown.err
    assert f"{4 + N} evaluations; reads" in shown.err
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_that_was_stopped_goes_on(save: Save, here: Path, number: int) -> None:
    series(save)
    slow = Path("evaluate.py").read_text() + "\ntime.sleep(0.15)\n"
    Path("evaluate.py").write_text(slow)
    command = [sys.executable, "-m", "ckpt_tools", "sweep", "run", "--last", "2,3,4,5"]
    command += ["--eval-command", COMMAND, "--metric", "error", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    results = Path("ckpt-sweep/results.jsonl")
    end = time.monotonic() + PATIENCE
    while not (results.exists() and len(results.read_bytes().splitlines()) >= 2) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    if number == signal.SIGINT:
        assert said.decode().splitlines()[-1] == (
            "Interrupted; the scores so far are in ckpt-sweep/results.jsonl, and the same command goes on."
        )
        assert not [*Path("ckpt-sweep").glob("*.pth")][1:]
    before = len(results.read_bytes().splitlines())
    with results.open("ab") as file:
        file.write(b'{"key": "cut o')
    done = json.loads(subprocess.run(command, capture_output=True, env=environment(), check=True).stdout)
    assert (done["reused"], done["evaluations"]) == (before, 4 + N - before)
    fresh = sweep("run", last=[2, 3, 4, 5], eval_command=COMMAND, metric="error", scratch="fresh", jobs=4)
    assert [each["label"] for each in done["candidates"]] == [each.label for each in fresh.candidates]
    assert [each["metrics"] for each in done["candidates"]] == [each.metrics for each in fresh.candidates]
    assert any("1 lines were cut off" in note for note in done["notes"])


def test_changed_files_are_scored_again(save: Save, here: Path) -> None:
    series(save)
    sweep("run", last=[2], eval_function=FUNCTION, in_memory=True)
    save("run/c-0.pth", {"model": {"w": torch.full((4, 3), 9.0), "n": torch.tensor(0)}, "step": 100})
    found = sweep("run", last=[2], eval_function=FUNCTION, in_memory=True)
    assert (found.evaluations, found.reused) == (1, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_greedy_soup_is_made_from_the_sum_of_those_before_and_one_more(
    save: Save, here: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(8, 300, generator=generator, dtype=torch.float64) + OPTIMUM
    for i, row in enumerate(rows):
        model = {"w": row.to(dtype), "tied": row.to(dtype), "n": torch.tensor(i)}
        save(f"run/c-{i}.pth", {"model": model, "step": 100 * i + 100})
    (here / "scores.py").write_text(
        f"def score(state):\n    return {{'error': ((state['w'].double() - {OPTIMUM}) ** 2).mean().item()}}\n"
    )
    sys.modules.pop("scores", None)
    found = sweep("run", greedy=True, eval_function=FUNCTION, in_memory=True, keep=99, scratch="s")
    soups = [each for each in found.candidates if each.label.startswith("greedy") and 3 < len(each.checkpoints) < 8]
    assert len(soups) > 3
    assert not [*Path("s").glob("sum*")]
    for each in soups:
        average([f"run/{name}" for name in each.checkpoints], out="alone.pth", force=True)
        ours, alone = open_checkpoint(str(each.file)), open_checkpoint("alone.pth")
        assert torch.equal(ours["n"], alone["n"])
        ulp = torch.nextafter(alone["w"].abs(), torch.tensor(9.0, dtype=dtype)) - alone["w"].abs()
        assert ((ours["w"] - alone["w"]).abs() <= (4 if dtype == torch.float64 else 1) * ulp).all()
        assert ours.provenance == alone.provenance


def test_what_look_tells_of_the_series_is_told(save: Save, here: Path) -> None:
    series(save)
    for i in range(N):
        rate = {"state": {}, "param_groups": [{"lr": 10.0**-i, "params": [0]}]}
        model = {"w": torch.full((4, 3), 100.0 + (50 if i == 2 else i)), "n": torch.tensor(i)}
        save(f"run/c-{i}.pth", {"model": model, "step": 100 * i + 100, "optimizer": rate})
    found = sweep("run", last=[2], eval_function=FUNCTION, in_memory=True)
    assert any("c-2.pth" in note and "times as far" in note for note in found.notes)
    assert any("The learning rate" in note for note in found.notes)
