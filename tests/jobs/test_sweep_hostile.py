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
from scipy.stats import binomtest
from torch import nn

from ckpt_tools import average, open_checkpoint, recalibrate_checkpoint, sweep
from ckpt_tools.errors import AlignmentError, CkptError, DataError, UsageError
from ckpt_tools.evaluation.evaluators import Command, Scores, parsed
from ckpt_tools.jobs.sweep.aim import Aim
from ckpt_tools.jobs.sweep.verdict import compared, in_words, worse_metrics

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
    assert found.last == "c-3.pth"
    assert [each.same for each in found.candidates if each.label == found.last] == [("decay=0.0",)]
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
    options: dict[str, Any] = {"model": "own.py:net", "data": "own.py:data"}
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


def test_a_command_that_the_shell_does_not_find_ends_the_sweep(save: Save, here: Path) -> None:
    series(save)
    with pytest.raises(UsageError, match=r"`eval_command`: the shell cannot run it \(.*pyton: not found\)"):
        sweep("run", last=2, eval_command="pyton eval.py {ckpt}")
    assert not Path("ckpt-sweep/results.jsonl").exists()


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


def right(n: int, *wrong: int) -> Scores:
    values = torch.full((n,), 100.0, dtype=torch.float64)
    values[[*wrong]] = 0.0
    return Scores({"top1": float(values.mean())}, {"top1": values})


@pytest.mark.parametrize(
    ("best", "other", "shown"),
    [
        (Scores({"loss": 1.0}, {"loss": torch.ones(5)}), Scores({"loss": 2.0}, {"loss": 2 * torch.ones(5)}), False),
        (Scores({"loss": 1.0}, {"loss": torch.ones(6)}), Scores({"loss": 2.0}, {"loss": 2 * torch.ones(6)}), True),
        # The bootstrap alone would show a difference of four of a thousand samples.
        (right(1000), right(1000, 1, 2, 3, 4), False),
        (right(1000), right(1000, *range(9)), True),
        (right(1000, 500, 501, 502), right(1000, *range(10)), False),
    ],
)
def test_a_difference_of_a_handful_of_samples_is_none(best: Scores, other: Scores, shown: bool) -> None:
    (found,) = compared(best, other, seed=0)
    assert found.shown is shown
    said = in_words(found, lower_is_better=found.metric == "loss", other="x")
    assert said.startswith("Better than x: " if shown else "No difference from x is shown: ")
    if found.metric == "top1":
        a, b = (int((each.samples["top1"] == 0).sum()) for each in (best, other))
        assert found.p == pytest.approx(binomtest(min(a, b), a + b).pvalue)
        assert found.shown is (found.p < 0.05)
    else:
        assert found.p is None  # losses are neither right nor wrong


def test_other_metrics_are_told_only_if_the_one_that_decides_is_not_worse() -> None:
    other = Scores({"loss": 2.0, "top1": 60.0, "top5": 90.0})
    for loss, told in ((1.0, ["top1"]), (3.0, [])):
        found = compared(Scores({"loss": loss, "top1": 50.0, "top5": 95.0}), other, seed=0)
        assert [*worse_metrics({each.metric: each for each in found}, Aim("loss", lower=True))] == told


@pytest.mark.parametrize(("optimum", "end"), [(0.29, "half_life=10k is the highest"), (1.7, None)])
def test_numbers_with_units_are_told_at_the_end_of_their_values(
    save: Save, here: Path, optimum: float, end: str | None
) -> None:
    series(save, f"-abs(state['w'].mean().item() - {optimum})")
    found = scored(half_life=["50", "0.2k", "10k"])
    assert str(found.best).startswith("half_life=")
    assert [note.split(" value")[0] for note in found.notes if "may lie beyond" in note] == ([end] if end else [])


def test_what_an_average_tells_of_a_candidate_is_told(save: Save, here: Path) -> None:
    series(save)
    found = scored(last=[2, 20, 30], dry_run=True)
    assert "last=20: `last=20`: there are only 4; all are used." in found.notes
    assert any(note.startswith("ema: `decay=") for note in scored(mode="ema", dry_run=True).notes)


def test_a_checkpoint_called_like_an_average_has_another_label(save: Save, here: Path) -> None:
    series(save)
    Path("run/c-1.pth").rename("uniform")
    found = sweep(["run", "uniform"], eval_function=FUNCTION, in_memory=True)
    labels = [each.label for each in found.candidates]
    assert sorted(labels) == ["c-0.pth", "c-2.pth", "c-3.pth", "uniform", "uniform alone"]


def test_means_are_weighed_as_avg_weighs_them(save: Save, here: Path) -> None:
    series(save)
    for i in range(3):
        batches = {"batch_idx_train": 1000 * (i + 1) + 50, "average_period": 100}
        weights = {"w": torch.full((4, 3), float(i))}
        save(f"run/c-{i}.pth", {"model": weights, "model_avg": weights, **batches})
    Path("run/c-3.pth").unlink()
    found = scored(mode="difference", last=2, dry_run=True)
    (each,) = [each for each in found.candidates if each.kind == "average"]
    average("run", mode="difference", last=2, out="avg.pth")
    record = open_checkpoint("avg.pth").provenance
    assert record is not None
    assert [*each.coefficients] == [entry["coefficient"] for entry in record["inputs"]] == [-2.0, 3.0]
    series(save)
    with pytest.raises(CkptError, match="does not say how many weights are in its"):
        scored(mode="difference", last=2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data": "photos"}, "`data` goes with `eval_data`: with `eval_function`, the model is built"),
        ({"model": "net.py:net"}, "`model` goes with `eval_data`"),
        ({"passes": 2}, "`passes` goes with `eval_data`"),
        ({"amp": True}, "`amp` goes with `eval_data`"),
        ({"test": FUNCTION}, r"`test='scores.py:score'`: the candidates are chosen on the same data. Give other data"),
        ({"test": "other.py:score"}, r"`test='other.py:score'`: cannot be imported"),
        ({"test_split": "train"}, "`test_split` goes with `test` and `eval_data`"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    save: Save, here: Path, options: dict[str, Any], says: str
) -> None:
    series(save)
    with pytest.raises(UsageError, match=says):
        scored(**options)
    scored(seed=3, last=2, dry_run=True)


def test_scores_of_a_model_with_other_arguments_are_measured_again(save: Save, here: Path) -> None:
    series(save)
    Path("scaled_net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, scale=1.0):\n        super().__init__()\n        self.scale = scale\n"
        "        self.w = torch.nn.Parameter(torch.zeros(4, 3))\n        self.register_buffer('n', torch.tensor(0))\n"
        "    def forward(self, x):\n        return self.scale * x.flatten(1) @ self.w\n\n"
        "def images():\n    return [(torch.arange(8.0).reshape(2, 1, 2, 2), torch.tensor([0, 2]))] * 4\n"
    )
    sys.modules.pop("scaled_net", None)
    options: dict[str, Any] = {"last": 2, "model": "scaled_net.py:Net", "metric": "loss", "state": "raw"}
    found = sweep("run", eval_data="scaled_net.py:images", **options)
    assert found.evaluations == 1 + N
    for others in ({"model_kwargs": {"scale": 2.0}}, {"split": "train"}, {"data_root": "there"}):
        assert sweep("run", eval_data="scaled_net.py:images", **options, **others).reused == 0
    assert sweep("run", eval_data="scaled_net.py:images", **options).evaluations == 0


def test_averaged_statistics_are_told_if_a_function_scores_them(save: Save, here: Path) -> None:
    series(save)
    assert not any("BatchNorm" in note for note in scored(last=2).notes)
    for i in range(N):
        save(f"run/c-{i}.pth", {"w": torch.full((4, 3), float(i)), "bn.running_var": torch.ones(3), "n": torch.ones(1)})
    assert any("BatchNorm statistics, which are averaged, not measured" in note for note in scored(last=2).notes)


def test_the_command_is_for_the_shell(save: Save, here: Path) -> None:
    series(save)
    Path("run").rename("-my run")
    shown = run("sweep", "--eval-function", FUNCTION, "--in-memory", "--last", "2", "--", "-my run")
    assert shown.code == 0
    (said,) = [line for line in shown.out.splitlines() if line.startswith("  ckpt avg")]
    assert run(*shlex.split(said)[1:]).code == 0
