"""Sweeps whose evaluations, values and results are not as they should be."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import PATIENCE, run
from torch import nn

from ckpt_tools import average, open_checkpoint, recalibrate_checkpoint, sweep
from ckpt_tools.errors import AlignmentError, CkptError, DataError, UsageError
from ckpt_tools.evaluation.evaluators import Command, Scores, parsed
from ckpt_tools.jobs.sweep.verdict import compared, in_words

Save = Callable[..., Path]
N = 4
FUNCTION = "scores.py:score"
SWEEP = ("sweep", "run", "--eval-function", FUNCTION)


def series(save: Save, score: str = "state['w'].mean().item()") -> None:
    for i in range(N):
        weights = {"w": torch.full((4, 3), float(i)), "n": torch.tensor(i)}
        averaged = {"w": torch.full((4, 3), i + 0.25), "n": torch.tensor(i)}
        save(f"run/c-{i}.pth", {"model": weights, "ema": averaged, "step": 100 * i, "quality": [3, 0, 1, 2][i]})
    Path("scores.py").write_text(f"def score(state):\n    return {score}\n")
    sys.modules.pop("scores", None)


def scored(**options: Any) -> Any:
    return sweep("run", eval_function=FUNCTION, in_memory=True, **options)


def test_other_weights_of_the_same_files_are_scored_again(save: Save, here: Path) -> None:
    series(save)
    assert scored(last=2, state="ema").candidates[0].metrics["metric"] == 3.25
    again = scored(last=2, state="raw")
    assert (again.reused, again.candidates[0].metrics["metric"]) == (0, 3.0)
    assert scored(last=2, state="raw", dtype="bfloat16").reused == 0
    assert scored(last=2, state="raw").evaluations == 0


def test_the_metric_that_chose_the_best_is_in_the_command(save: Save, here: Path) -> None:
    series(save, "{'quality': (state['w'].mean().item() - 1.75) ** 2}")
    found = scored(best=[2, 3], metric="quality", lower_is_better=True, out="best.pth")
    assert found.best == "best=2"
    average(found.paths, **found.options, out="again.pth")
    assert torch.equal(open_checkpoint("again.pth")["w"], open_checkpoint("best.pth")["w"])


def test_a_table_of_metrics_is_no_option_of_a_checkpoint_alone(save: Save, here: Path) -> None:
    series(save)
    Path("table.csv").write_text("step,quality\n" + "".join(f"{100 * i},{i}\n" for i in range(N)))
    series(save, "{'quality': state['w'].mean().item()}")
    found = scored(best=[2, 3], metric="quality", metrics="table.csv")
    assert found.best == "c-3.pth"
    average(found.paths, **found.options, out="again.pth")


def test_an_average_of_one_checkpoint_is_that_checkpoint(save: Save, here: Path) -> None:
    series(save)
    found = scored(decay=[0.0, 0.5], greedy=True)
    assert found.last == "decay=0.0"
    assert [each.same for each in found.candidates if each.label == found.last] == [("c-3.pth",)]
    assert len(found.candidates) == 1 + N + N - 1


def test_a_last_checkpoint_without_a_score_is_not_called_the_best(save: Save, here: Path) -> None:
    series(save, "{'m': 1 / (state['w'].mean().item() - 3.25)}")
    found = scored(last=2)
    assert "The last checkpoint (c-3.pth) could not be scored" in found.verdict
    series(
        save, "{'m': 1 / (3.25 - state['w'].mean().item()), 'per_sample': [1 / (3.25 - state['w'].mean().item())] * 8}"
    )
    assert "could not be scored" in scored(last=2, holdout=0.5).verdict


def test_series_whose_names_differ_are_refused(save: Save, here: Path) -> None:
    series(save)
    save("run/c-9.pth", {"model": {"w": torch.ones(4, 3), "n": torch.tensor(1), "new": torch.ones(2)}, "step": 900})
    for keys in ("intersection", "union"):
        with pytest.raises(AlignmentError, match=f"only some checkpoints of the series have 'new'.*`keys='{keys}'`"):
            scored(last=2, keys=keys, state="raw")


def test_a_test_that_fails_loses_no_score(save: Save, here: Path) -> None:
    series(save)
    Path("test.py").write_text("def score(state):\n    raise ValueError('no data')\n")
    found = scored(last=2, test="test.py:score", out="best.pth", csv="ranking.csv")
    assert re.search(r"`test` of c-3.pth: test.py:score fails .*goes on from there", found.failure)
    assert (found.best, found.candidates[0].metrics["metric"], found.written) == ("c-3.pth", 3.25, False)
    assert Path("ranking.csv").exists()
    assert not Path("best.pth").exists()
    shown = run(*SWEEP, "--in-memory", "--last", "2", "--test", "test.py:score")
    assert shown.code == 1
    assert shown.err.index("c-3.pth") < shown.err.index("Error: --test of c-3.pth")
    assert scored(last=2).evaluations == 0


def test_samples_of_different_numbers_lose_no_ranking(save: Save, here: Path) -> None:
    series(save, "{'metric': 1.0, 'per_sample': {'metric': [1.0] * int(2 + state['w'].mean().item())}}")
    found = scored(last=2, metric="metric")
    assert "not compared" in found.verdict
    assert [each.metrics["metric"] for each in found.candidates] == [1.0] * 5


def test_a_first_candidate_without_the_metric_is_told_and_the_others_go_on(save: Save, here: Path) -> None:
    series(save, "{'a': 1.0, **({'b': state['w'].mean().item()} if state['w'].mean() < 2.4 else {})}")
    found = scored(last=2, metric="b", lower_is_better=False)
    assert {each.label: each.error for each in found.candidates if each.error} == {
        "uniform": "the evaluation gives no 'b'",
        "c-3.pth": "the evaluation gives no 'b'",
    }
    with pytest.raises(UsageError, match="`metric='c'`: the evaluation gives a"):
        scored(last=2, metric="c", scratch="other")


def test_a_missing_evaluation_is_told_by_its_own_option(save: Save, here: Path) -> None:
    for i, name in enumerate("ab"):
        save(f"{name}.pth", {**nn.BatchNorm2d(3).state_dict(), "weight": torch.full((3,), float(i))})
    Path("own.py").write_text(
        "import torch\nfrom torch import nn\ndef net(): return nn.BatchNorm2d(3)\n"
        "def data(): return [(torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))]\n"
    )
    options = {"model": "own.py:net", "data": "own.py:data"}
    with pytest.raises(DataError, match="^`eval_data='gone'`"):
        sweep(["a.pth", "b.pth"], eval_data="gone", **options)
    with pytest.raises(DataError, match="^`test='gone'`"):
        sweep(["a.pth", "b.pth"], eval_data="own.py:data", test="gone", **options)
    with pytest.raises(DataError, match="^`eval_data='gone'`"):
        recalibrate_checkpoint("a.pth", eval_data="gone", out="c.pth", **options)


def test_too_many_combinations_are_refused_before_they_are_listed(save: Save, here: Path) -> None:
    series(save)
    many = "1:900:1"
    for options in ({"last": many, "best": many, "every": many}, {"decay": many, "half_life": many, "gamma": many}):
        with pytest.raises(UsageError, match="combinations of these values, and 1000 are the most|go"):
            scored(**options)


def test_a_value_of_zero_is_a_value(save: Save, here: Path) -> None:
    series(save)
    with pytest.raises(CkptError, match="`last=0`"):
        scored(last=0)


@pytest.mark.parametrize(
    "line",
    [
        '{"key": 1}',
        "[]",
        "3",
        "[" * 100_000,
        "\\xff\\xfe",
        json.dumps({"key": "k", "label": "", "checkpoints": [], "coefficients": [], "metrics": [], "seconds": 0}),
        '{"key": "KEY", "label": "", "checkpoints": [], "coefficients": [], "metrics": {"metric": NaN}, "seconds": 0, '
        '"error": null}',
        '{"key": "KEY", "label": "", "checkpoints": [], "coefficients": [], "metrics": {}, "seconds": 1, "error": null}',  # noqa: E501
        '{"key": "KEY", "label": "", "checkpoints": [], "coefficients": [], "metrics": {"metric": 1' + "0" * 400 + "}}",
    ],
)
def test_lines_of_results_that_are_none_are_passed_over(save: Save, here: Path, line: str) -> None:
    series(save)
    before = scored(last=2, greedy=True)
    results = Path(before.results)
    key = json.loads(results.read_text().splitlines()[0])["key"]
    with results.open("a") as file:
        file.write(line.replace("KEY", key) + "\n")
    again = scored(last=2, greedy=True)
    assert again.evaluations == 0
    assert again.candidates == before.candidates
    assert any("1 lines were cut off" in note for note in again.notes)


def test_values_of_samples_that_cannot_be_read_are_measured_again(save: Save, here: Path) -> None:
    series(save, "{'m': 1.0, 'per_sample': {'m': [0.5, 1.5] * 4}}")
    scored(last=2, holdout=0.5)
    samples = sorted(Path("ckpt-sweep/samples").iterdir())
    for path, text in zip(samples, ["[]", '{"m": ["x"]}', "", "{", "null"], strict=True):
        path.write_text(text)
    again = scored(last=2, holdout=0.5)
    assert "on 4 samples" in again.verdict or again.best == again.last


@pytest.mark.parametrize(
    ("printed", "says"),
    [
        ("1" + "0" * 400, "inf for 'metric'"),
        ("[" * 100_000, "neither a number nor JSON"),
        ('{"a": 1, "per_sample": {"a": [1' + "0" * 400 + "]}}", "no list of finite numbers"),
        ("NaN", "nan for 'metric'"),
        ("true", "there is no number"),
        ("accuracy: 0.5", "'accuracy: 0.5' is neither a number nor JSON"),
        ("", "it printed nothing"),
    ],
)
def test_what_is_no_score_is_an_error(here: Path, printed: str, says: str) -> None:
    Path("printed").write_text(printed)
    with pytest.raises(DataError, match=says):
        Command("cat printed # {ckpt}").score(Path("x"), Path("x.log"))


def test_numbers_too_large_are_no_scores() -> None:
    with pytest.raises(DataError, match="inf for 'metric'"):
        parsed(10**400)


@pytest.mark.parametrize("quoted", ["{ckpt}", "'{ckpt}'", '"{ckpt}"'])
def test_paths_reach_a_command_as_they_are(here: Path, quoted: str) -> None:
    for name in ("a b.pth", "it's.pth", 'say "no".pth', "$(touch pwned).pth", "-n.pth", "*", "ü.pth"):
        Path(name).write_text("7")
        assert Command(f"cat {quoted}").score(Path(name), Path("x.log")).metrics == {"metric": 7.0}
    assert not Path("pwned").exists()


def test_a_command_that_cannot_be_started_is_an_error(here: Path) -> None:
    with pytest.raises(UsageError, match="`eval_command` cannot be started"):
        Command(f"echo 3 {'x' * 3_000_000} {{ckpt}}").score(Path("x"), Path("x.log"))


def test_children_that_outlive_a_command_are_ended(here: Path) -> None:
    stubborn = "import os, signal, time; signal.signal(15, signal.SIG_IGN); open('pid', 'w').write(str(os.getpid()))"
    child = f"{sys.executable} -c {shlex.quote(stubborn + '; time.sleep(600)')}"
    found = Command(f"{child} & while ! [ -s pid ]; do sleep 0.02; done; echo 3 # {{ckpt}}").score(
        Path("x"), Path("x.log")
    )
    assert found.metrics == {"metric": 3.0}
    stat = Path(f"/proc/{Path('pid').read_text()}/stat")
    end = time.monotonic() + PATIENCE
    while (running := stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z") and (
        time.monotonic() < end
    ):
        os.sched_yield()
    assert not running


def test_a_handful_of_samples_shows_no_difference() -> None:
    better = Scores({"loss": 1.0}, {"loss": torch.ones(5, dtype=torch.float64)})
    worse = Scores({"loss": 2.0}, {"loss": 2 * torch.ones(5, dtype=torch.float64)})
    (found,) = compared(better, worse, seed=0)
    assert in_words(found, lower_is_better=True, other="x").startswith("No difference from x is shown")
    assert found.p is None  # losses are neither right nor wrong


def test_the_command_is_for_the_shell(save: Save, here: Path) -> None:
    series(save)
    Path("run").rename("-my run")
    shown = run("sweep", "--eval-function", FUNCTION, "--in-memory", "--last", "2", "--", "-my run")
    assert shown.code == 0
    (said,) = [line for line in shown.err.splitlines() if line.startswith("  ckpt avg")]
    assert run(*shlex.split(said)[1:]).code == 0
