"""Evaluations, against the network itself and numbers that are known."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import small_network
import torch
from cli_runner import run
from scipy import stats
from small_network import Net, labelled, trained
from torch import Tensor
from torch.nn import functional as F

from ckpt_tools import average, convert, evaluate, recalibrate_checkpoint
from ckpt_tools.errors import CkptError, DataError, UsageError

Save = Callable[..., Path]
SUPPORT = Path(small_network.__file__)
ON_DATA = {"data": f"{SUPPORT}:labelled", "model": f"{SUPPORT}:Net", "workers": 0}
SCORES = """
import torch

def score(state):
    with open("calls", "a") as calls:
        print("called", file=calls)
    values = [abs(float(state["w"].mean()) - 1.2) + 0.01 * (i % 5) for i in range(20)]
    return {"error": sum(values) / 20, "size": state["w"].numel(), "per_sample": {"error": values}}
"""
COMMAND = f"""{sys.executable} -c "print(len('{{ckpt}}'))" """


def oracle(path: str) -> dict[str, float]:
    """Score a checkpoint by torch alone."""
    saved = torch.load(path)
    net = Net()
    net.load_state_dict(saved.get("model", saved))
    images, labels = labelled().tensors
    with torch.no_grad():
        logits = net.eval()(images).double()
    return {
        "top1": float((logits.argmax(1) == labels).double().mean() * 100),
        "top5": 100.0,  # of three classes
        "loss": float(F.cross_entropy(logits, labels)),
    }


def networks(save: Save, n: int = 3) -> None:
    for i in range(n):
        save(f"run/c-{i}.pth", {"model": trained(i), "step": 10 * i})


def numbers(save: Save) -> None:
    """Write checkpoints of one weight, 0 to 3, their average, and a function that likes 1.2 best."""
    for i in range(4):
        save(f"run/c-{i}.pth", {"model": {"w": torch.full((4,), float(i))}, "step": 100 * i})
    average("run", last=3, out="avg.pth")
    average("run", from_step=0, to_step=200, out="near.pth")
    Path("scores.py").write_text(SCORES)
    sys.modules.pop("scores", None)


BY_NUMBER = {"eval_function": "scores.py:score", "in_memory": True, "metric": "error"}


def values(of: float) -> np.ndarray:
    return abs(of - 1.2) + 0.01 * (np.arange(20) % 5)


def test_scores_are_those_of_the_network_itself(save: Save, here: Path) -> None:
    networks(save)
    average("run", out="avg.pth")
    found = evaluate(["run", "avg.pth"], **ON_DATA)
    assert (found.metric, found.lower_is_better, found.samples) == ("top1", False, 24)
    assert {each.path for each in found.checkpoints} == {"run/c-0.pth", "run/c-1.pth", "run/c-2.pth", "avg.pth"}
    for each in found.checkpoints:
        assert each.metrics == pytest.approx(oracle(each.path), rel=1e-6)
    order = [(-each.metrics["top1"], each.metrics["loss"]) for each in found.checkpoints]
    assert order == sorted(order)
    assert [(each.name, each.step) for each in found.checkpoints if each.step == 20] == [("c-2.pth", 20)]


def test_the_interval_of_an_accuracy_is_that_of_a_share(save: Save, here: Path) -> None:
    networks(save, 1)
    (row,) = evaluate("run", **ON_DATA).checkpoints
    n = round(row.metrics["top1"] * 24 / 100)
    expected = stats.binomtest(n, 24).proportion_ci(0.95, method="wilson")
    assert (row.low, row.high) == pytest.approx((100 * expected.low, 100 * expected.high))


def test_averages_are_known_by_their_records_whatever_was_made_of_them(save: Save, here: Path) -> None:
    networks(save)
    save("run/swa.pth", {"model": trained(7), "step": 90})
    average("run", out="avg.pth", last=2)
    convert("avg.pth", out="avg.safetensors")
    convert("run/c-1.pth", out="c-1.safetensors")
    recalibrate_checkpoint("avg.safetensors", out="bn.safetensors", **ON_DATA)
    average("run/c-2.pth", out="one.pth")
    paths = ["avg.safetensors", "bn.safetensors", "c-1.safetensors", "run/swa.pth", "one.pth"]
    found = evaluate(paths, **ON_DATA)
    assert {each.path: each.what for each in found.checkpoints} == {
        "avg.safetensors": "average of 2",
        "bn.safetensors": "average of 2, recalibrated",
        "c-1.safetensors": "checkpoint",
        "run/swa.pth": "checkpoint",
        "one.pth": "checkpoint",
    }
    assert [note for note in found.notes if "not measured" in note] == [
        "avg.safetensors: its BatchNorm statistics are averaged, not measured, so it may look worse than it is. "
        "`recalibrate_checkpoint(...)` measures them."
    ]


def test_statistics_that_are_measured_before_every_score_are_those_of_recal_bn(save: Save, here: Path) -> None:
    networks(save)
    average("run", out="avg.pth")
    recalibrate_checkpoint("avg.pth", **ON_DATA)
    found = evaluate("avg.pth", recal_bn=ON_DATA["data"], **ON_DATA)
    (alone,) = evaluate("avg-bn.pth", **ON_DATA).checkpoints
    assert found.checkpoints[0].metrics == pytest.approx(alone.metrics, rel=1e-5)
    assert found.checkpoints[0].metrics["loss"] != oracle("avg.pth")["loss"]
    assert not any("not measured" in note for note in found.notes)


def test_an_average_is_compared_with_the_best_single_checkpoint_sample_by_sample(save: Save, here: Path) -> None:
    numbers(save)
    found = evaluate(["run", "avg.pth", "near.pth"], **BY_NUMBER)
    assert (found.best, found.best_single, found.best_average) == ("c-1.pth", "c-1.pth", "near.pth")
    by_name = {each.name: each for each in found.checkpoints}
    for name, weight in (("avg.pth", 2.0), ("near.pth", 1.0)):
        against = by_name[name].against
        assert against is not None
        difference = values(weight) - values(1.0)
        assert against.difference == pytest.approx(difference.mean(), abs=1e-12)
        assert against.low is not None
        assert against.high is not None
        assert against.low <= difference.mean() + 1e-12
        assert against.high >= difference.mean() - 1e-12
        assert against.differing == np.count_nonzero(difference)
    assert all(by_name[name].against is None for name in ("c-0.pth", "c-3.pth"))
    low, high = by_name["avg.pth"].low, by_name["avg.pth"].high
    assert low is not None
    assert high is not None
    assert low < values(2.0).mean() < high


@pytest.mark.parametrize(
    ("paths", "verdict"),
    [
        (
            ["run/c-0.pth", "avg.pth"],
            "Best: avg.pth (average of 3). Better than the best single checkpoint (c-0.pth): ",
        ),
        (["run/c-1.pth", "avg.pth"], "Best: c-1.pth (checkpoint). Better than the best average (avg.pth): "),
        (["run/c-1.pth", "near.pth"], "Best: c-1.pth (checkpoint). No difference from the best average (near.pth) is"),
        (["run/c-1.pth", "run/c-0.pth"], "Best: c-1.pth (checkpoint). Better than c-0.pth: "),
        (["avg.pth"], "avg.pth (average of 3): error is 0.82 (95 % interval "),
    ],
)
def test_the_verdict_names_the_best_and_whether_the_difference_is_chance(
    save: Save, here: Path, paths: list[str], verdict: str
) -> None:
    numbers(save)
    if paths == ["run/c-0.pth", "avg.pth"]:
        save("run/c-0.pth", {"model": {"w": torch.full((4,), -1.0)}, "step": 0})
    found = evaluate(paths, **BY_NUMBER)
    assert found.verdict.startswith(verdict)
    assert ("No single checkpoint" in " ".join(found.notes)) == (paths == ["avg.pth"])


def test_the_metric_that_decides_is_asked_for_after_one_score(save: Save, here: Path) -> None:
    numbers(save)
    with pytest.raises(UsageError, match="the evaluation gives error, size: choose the one that decides"):
        evaluate("run", **{**BY_NUMBER, "metric": None})
    assert Path("calls").read_text().splitlines() == ["called"]


def test_a_checkpoint_that_cannot_be_scored_does_not_stop_the_others(save: Save, here: Path) -> None:
    networks(save)
    save("run/other.pth", {"model": {**trained(5), "0.weight": torch.zeros(9, 6)}, "step": 90})
    result = run("eval", "run", *options(ON_DATA), "--json", "--csv", "t.csv")
    assert result.code == 1
    report = json.loads(result.out)
    assert [each["error"] is None for each in report["checkpoints"]] == [True, True, True, False]
    assert "0.weight" in report["checkpoints"][3]["error"]
    assert "Not scored: other.pth: " in result.err
    rows = list(csv.DictReader(Path("t.csv").read_text().splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2", "3", ""]
    for row, each in zip(rows[:3], report["checkpoints"], strict=False):
        assert float(row["metrics.loss"]) == each["metrics"]["loss"] == pytest.approx(oracle(row["path"])["loss"])


def test_if_none_can_be_scored_the_reason_is_the_error(save: Save, here: Path) -> None:
    numbers(save)
    Path("scores.py").write_text("def score(state):\n    raise ValueError('no data')\n")
    with pytest.raises(DataError, match=r"no checkpoint could be scored; c-0.pth: scores.py:score fails .*no data"):
        evaluate("run", **BY_NUMBER)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_command_scores_paths_and_its_logs_stay_only_if_it_fails(
    save: Save, here: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    numbers(save)
    (here / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(here / "tmp"))
    found = evaluate(["run", "avg.pth"], eval_command=COMMAND, jobs=jobs)
    assert {each.path: each.metrics["metric"] for each in found.checkpoints} == {
        each.path: len(each.path) for each in found.checkpoints
    }
    assert found.logs is None
    assert list((here / "tmp").iterdir()) == []
    found = evaluate(["run", "avg.pth"], eval_command="test {ckpt} != avg.pth && echo 1", jobs=jobs)
    assert [each.path for each in found.failed] == ["avg.pth"]
    assert found.logs is not None
    assert Path(found.logs, "5.log").exists()


def test_the_set_of_weights_is_the_one_asked_for(save: Save, here: Path) -> None:
    raw, ema = ({"w": torch.full((4,), value)} for value in (1.0, 3.0))
    numbers(save)
    save("both.pth", {"state_dict": raw, "state_dict_ema": ema})
    for state, weight in (("auto", 3.0), ("raw", 1.0)):
        (row,) = evaluate("both.pth", state=state, **BY_NUMBER).checkpoints
        assert row.metrics["error"] == pytest.approx(values(weight).mean())


def test_copies_count_once_and_a_dry_run_scores_nothing(save: Save, here: Path) -> None:
    numbers(save)
    Path("run/last.pth").write_bytes(Path("run/c-3.pth").read_bytes())
    found = evaluate("run", dry_run=True, **BY_NUMBER)
    assert [each.name for each in found.checkpoints] == ["c-0.pth", "c-1.pth", "c-2.pth", "c-3.pth"]
    assert any("last.pth" in note for note in found.notes)
    assert not Path("calls").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of `data`, `eval_command` and `eval_function`: it says how a checkpoint is scored"),
        ({"data": "d", "eval_command": "c"}, "not `data` and `eval_command`"),
        ({"eval_command": "true {ckpt}", "model": "net"}, "`model` goes with `data`"),
        ({"eval_command": "true {ckpt}", "recal_bn": "d"}, "`recal_bn` goes with `data`"),
        ({"eval_command": "true {ckpt}", "amp": True}, "`amp` goes with `data`"),
        ({"eval_command": "true {ckpt}", "state": "raw"}, "`state` goes with `data` or `in_memory`"),
        ({"eval_command": "true"}, "write {ckpt} where the path"),
        ({"data": "d", "in_memory": True}, "`in_memory` goes with `eval_function`"),
        ({"data": "d", "jobs": 2}, "`jobs` goes with `eval_command`"),
        ({"data": "nowhere", "model": f"{SUPPORT}:Net"}, "nowhere"),
        ({**ON_DATA, "csv": "t.txt"}, "give it the suffix .csv"),
        ({**ON_DATA, "csv": "run/c-0.pth/t.csv"}, "is a file, not a folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_score(
    save: Save, here: Path, options: Mapping[str, object], message: str
) -> None:
    networks(save)
    with pytest.raises(CkptError, match=message):
        evaluate("run", **options)  # type: ignore[arg-type]


def options(given: Mapping[str, object]) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_the_command_shows_a_line_for_each_checkpoint_on_stdout_and_the_verdict(save: Save, here: Path) -> None:
    numbers(save)
    result = run("eval", "run", "avg.pth", "--eval-function", "scores.py:score", "--in-memory", "--metric", "error")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split("  ")[0] == "checkpoint"
    assert lines[0].endswith("vs best single")
    shown = {line.split()[0]: line for line in lines[1:6]}
    assert shown.keys() == {"c-0.pth", "c-1.pth", "c-2.pth", "c-3.pth", "avg.pth"}
    assert "average of 3" in shown["avg.pth"]
    assert "step 200" in shown["c-2.pth"]
    assert "+0.6 (+0.6 to +0.6)" in shown["avg.pth"]
    assert "Best: c-1.pth (checkpoint). Better than the best average (avg.pth): error is 0.22" in result.out
    assert "5 checkpoints; ckpt averaged 1 of them." in result.err


def test_messages_name_the_options_of_this_command(save: Save, here: Path) -> None:
    networks(save)
    Path("own.py").write_text("import torch\ndef images(): return [torch.zeros(2, 6)]\n")
    result = run("eval", "run/c-0.pth", "--data", "own.py:images", "--model", f"{SUPPORT}:Net")
    assert result.code == 1
    assert "--data needs images with labels" in result.err
    assert "--eval" not in result.err


def test_weights_of_a_network_without_batchnorm_are_scored(save: Save, here: Path) -> None:
    Path("own.py").write_text("import torch\ndef net(): return torch.nn.Linear(6, 3)\n")
    weight: Tensor = torch.eye(3, 6)
    path = save("linear.pth", {"weight": weight, "bias": torch.zeros(3)})
    images, labels = labelled().tensors
    right = float((images[:, :3].argmax(1) == labels).double().mean() * 100)
    how = {**ON_DATA, "model": "own.py:net"}
    found = evaluate(path, recal_bn=ON_DATA["data"], **how)
    assert found.checkpoints[0].metrics["top1"] == pytest.approx(right)
    assert "The model has no BatchNorm, so `recal_bn` has no effect." in found.notes
    report = recalibrate_checkpoint(path, eval_data=ON_DATA["data"], **how)
    assert report.before is not None
    assert report.before.top1 == pytest.approx(right)
    assert (report.after, report.written) == (None, False)
    assert "nothing to recalibrate" in report.notes[-1]
    result = run("recal-bn", path, *options(how), "--eval", ON_DATA["data"])
    assert result.code == 0, result.err
    assert f"{right:.2f}" in result.err
    assert "The model has no BatchNorm statistics: nothing to recalibrate. It is evaluated as it is." in result.err
