"""Selection: which checkpoints of a series stay, and the places where their metrics are found."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from ckpt_tools.errors import SeriesError, UsageError
from ckpt_tools.series.find import Series, find_series
from ckpt_tools.series.metrics import lower_by_name

Save = Callable[..., Path]


def weights(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), value)}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def scored(save: Save) -> list[Path]:
    """Five checkpoints with an epoch and a metric; the second and the fourth are equally good."""
    figures = [(1, 70.0), (2, 90.0), (3, 60.0), (4, 90.0), (5, 80.0)]
    return [save(f"e{n}.pth", {"state_dict": weights(n), "epoch": n, "metric": m}) for n, m in figures]


@pytest.fixture
def stepped(save: Save) -> Callable[..., list[Path]]:
    """Write checkpoints at these steps."""
    return lambda *steps: [save(f"s{n}.pth", {"state_dict": weights(n), "step": n}) for n in steps]


def names(series: Series) -> list[str]:
    return [member.path.name for member in series.members]


def steps(series: Series) -> list[int | None]:
    return [member.step for member in series.members]


def trainer_folder(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    save_file(weights(float(step)), folder / "model.safetensors")
    return folder


def test_find_series_with_last_takes_the_newest_and_says_if_there_are_fewer(scored: list[Path]) -> None:
    assert names(find_series(scored, last=2)) == ["e4.pth", "e5.pth"]
    more = find_series(scored, last=9)
    assert (len(more.members), more.notes) == (5, ("`last=9`: there are only 5; all are used.",))


def test_find_series_with_best_keeps_the_order_of_training_and_the_earlier_of_two_equals(scored: list[Path]) -> None:
    assert names(find_series(scored, best=1)) == ["e2.pth"]
    assert names(find_series(scored, best=2)) == ["e2.pth", "e4.pth"]
    assert names(find_series(scored, best=3)) == ["e2.pth", "e4.pth", "e5.pth"]
    assert find_series(scored, best=8).notes[0] == "`best=8`: there are only 5; all are used."


def test_find_series_with_lower_is_better_reverses_the_ranking(scored: list[Path]) -> None:
    assert names(find_series(scored, best=2, lower_is_better=True)) == ["e1.pth", "e3.pth"]


def test_find_series_takes_a_nested_metric_with_the_direction_that_its_name_says(save: Save) -> None:
    for i, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        save(f"a-{i}.pth", {"state_dict": weights(i), "val": {"loss": loss}})
    found = find_series(["a-*.pth"], best=2, metric="val.loss")
    assert names(found) == ["a-2.pth", "a-3.pth"]
    assert found.notes == (
        "Best 2 of 3 by 'val.loss', from the files (lower is better, by its name): a-2.pth 0.1, a-3.pth 0.2.",
    )
    assert names(find_series(["a-*.pth"], best=1, metric="val.loss", lower_is_better=False)) == ["a-1.pth"]


def test_find_series_names_the_file_without_a_metric_and_what_it_has(scored: list[Path], save: Save) -> None:
    save("e6.pth", {"state_dict": weights(), "epoch": 6, "top1": 50.0})
    with pytest.raises(SeriesError, match=r"e6\.pth: has no number under 'metric'.*It has epoch, top1\."):
        find_series([*scored, "e6.pth"], best=2)


@pytest.mark.parametrize("metric", ["90", True, None, 10**400])
def test_find_series_rejects_a_metric_that_is_no_number(save: Save, metric: Any) -> None:
    save("a.pth", {"state_dict": weights(), "metric": metric})
    with pytest.raises(SeriesError, match="'metric'.*so `best` cannot rank it. It stores no numbers"):
        find_series(["a.pth"], best=1)


@pytest.mark.parametrize(
    ("metric", "what"), [(float("nan"), "is NaN"), (torch.ones(2), "is a tensor"), (torch.tensor(math.nan), "is NaN")]
)
def test_find_series_says_what_a_metric_is_that_cannot_be_ranked(save: Save, metric: Any, what: str) -> None:
    save("a.pth", {"state_dict": weights(), "metric": metric})
    with pytest.raises(SeriesError, match=f"a.pth: its 'metric' {what}.*so `best` cannot rank it"):
        find_series(["a.pth"], best=1)


@pytest.mark.parametrize("write", ["zip", "legacy", "safetensors", "dcp"])
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]
)
def test_find_series_with_best_reads_a_metric_that_is_a_tensor(save: Save, write: str, dtype: str) -> None:
    scores = torch.tensor([3, 100, 40, 77, 12], dtype=getattr(torch, dtype))
    for i, score in enumerate(scores):
        state = {"net": weights(i), "val": {"score": score.reshape(1, 1) if i % 2 else score}}
        if write == "safetensors":
            save_file({**weights(i), "val.score": score.clone()}, f"run-{i}.st")
        elif write == "dcp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is one process
                dcp.save(state, checkpoint_id=f"run-{i}.st")
        else:
            save(f"run-{i}.st", state, _use_new_zipfile_serialization=write == "zip")
    (best,) = find_series(["run-*.st"], best=1, metric="val.score").members
    worst = find_series(["run-*.st"], best=2, metric="val.score", lower_is_better=True)
    assert best.path.name == f"run-{int(scores.double().argmax())}.st"
    assert names(worst) == [f"run-{i}.st" for i in sorted(scores.double().argsort()[:2].tolist())]


def test_find_series_takes_the_metrics_of_trainer_folders_at_their_step() -> None:
    log = []
    for step, loss in ((500, 0.3), (1000, 0.1), (1500, 0.2)):
        folder = trainer_folder(Path(f"checkpoint-{step}"), step)
        log += [{"step": step, "loss": 9.0 - loss}, {"step": step, "eval_loss": loss}]
        state = {"global_step": step, "best_metric": 0.1, "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert names(find_series(["checkpoint-*"], best=2, metric="eval_loss", lower_is_better=True)) == [
        "checkpoint-1000",
        "checkpoint-1500",
    ]
    with pytest.raises(SeriesError, match=r"has no number under 'metric'.*It has step, loss, eval_loss\."):
        find_series(["checkpoint-*"], best=1)


def test_find_series_ranks_an_infinite_loss_last(save: Save) -> None:
    for i, loss in ((1, float("inf")), (2, 0.1)):
        save(f"a-{i}.pth", {"state_dict": weights(i), "loss": loss})
    assert names(find_series(["a-*.pth"], best=1, metric="loss", lower_is_better=True)) == ["a-2.pth"]


def test_find_series_with_every_counts_from_the_last(scored: list[Path]) -> None:
    assert names(find_series(scored, every=2)) == ["e1.pth", "e3.pth", "e5.pth"]
    assert names(find_series(scored, every=3)) == ["e2.pth", "e5.pth"]
    assert names(find_series(scored, every=3, last=1)) == ["e5.pth"]


def test_find_series_includes_from_step_and_to_step(scored: list[Path]) -> None:
    assert names(find_series(scored, from_step=2, to_step=4)) == ["e2.pth", "e3.pth", "e4.pth"]
    assert names(find_series(scored, from_step=4)) == ["e4.pth", "e5.pth"]
    assert names(find_series(scored, to_step=1)) == ["e1.pth"]


def test_find_series_combines_selections_in_the_documented_order(scored: list[Path]) -> None:
    assert names(find_series(scored, from_step=2, best=3, every=2, last=1)) == ["e5.pth"]


def test_find_series_rejects_missing_steps_and_names_those_there_are(scored: list[Path]) -> None:
    with pytest.raises(
        SeriesError, match="`from_step=6` `to_step=9`: no checkpoint in this range; they go from epoch 1 to 5"
    ):
        find_series(scored, from_step=6, to_step=9)


def test_find_series_rejects_a_range_of_steps_for_an_unknown_step(save: Save) -> None:
    with pytest.raises(SeriesError, match=r"best\.pth: its step is unknown, so `to_step=3` cannot apply to it"):
        find_series([save("best.pth", weights())], to_step=3)


@pytest.mark.parametrize("option", ["last", "best", "every"])
def test_find_series_rejects_counts_below_one(scored: list[Path], option: str) -> None:
    with pytest.raises(UsageError, match=f"`{option}=0`: must be 1 or more"):
        find_series(scored, **{option: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["last", "best", "every", "from_step", "to_step"])
@pytest.mark.parametrize("value", [1.5, True])
def test_find_series_rejects_counts_that_are_no_whole_numbers(scored: list[Path], option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"`{option}` is a whole number, not {value!r}"):
        find_series(scored, **{option: value})


def test_find_series_rejects_a_metric_without_best(scored: list[Path]) -> None:
    for given in ({"metric": "loss"}, {"lower_is_better": False}, {"metrics": "a.csv"}):
        with pytest.raises(UsageError, match="go with `best`"):
            find_series(scored, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("window", "kept"),
    [
        (1000, [9000, 10000]),
        ("2k", [8000, 9000, 10000]),
        ("30%", [7000, 8000, 9000, 10000]),
        ("1M", [*range(1000, 11000, 1000)]),
    ],
)
def test_a_window_keeps_the_steps_before_the_last(
    stepped: Callable[..., list[Path]], window: int | str, kept: list[int]
) -> None:
    assert steps(find_series(stepped(*range(1000, 11000, 1000)), window=window)) == kept


def test_a_window_ends_at_to_step(stepped: Callable[..., list[Path]]) -> None:
    paths = stepped(*range(1000, 11000, 1000))
    assert steps(find_series(paths, to_step="5k", window="2k")) == [3000, 4000, 5000]


def test_a_window_that_holds_one_checkpoint_alone_is_refused(stepped: Callable[..., list[Path]]) -> None:
    with pytest.raises(SeriesError, match=r"`window='500'`: only .*s3000\.pth is in it; .* 1000 steps older"):
        find_series(stepped(1000, 2000, 3000), window="500")
    assert steps(find_series(stepped(1000), window="500")) == [1000]


def test_min_gap_walks_back_from_the_last_as_megatron_does(stepped: Callable[..., list[Path]]) -> None:
    paths = stepped(0, 400, 900, 1000, 1500, 1999, 2000)
    assert steps(find_series(paths, min_gap=1000)) == [0, 1000, 2000]
    assert steps(find_series(paths, min_gap="0.6k")) == [400, 1000, 2000]
    assert steps(find_series(paths, min_gap=1)) == [0, 400, 900, 1000, 1500, 1999, 2000]


def test_every_of_steps_keeps_the_latest_of_each_stretch(stepped: Callable[..., list[Path]]) -> None:
    paths = stepped(100, 990, 1000, 1990, 2500, 3000)
    assert steps(find_series(paths, every="1000steps")) == [1000, 1990, 3000]
    assert steps(find_series(paths, every="1k steps")) == [1000, 1990, 3000]
    assert steps(find_series(paths, every="2")) == [990, 1990, 3000]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": "all"}, "`window='all'` is not a length of training"),
        ({"window": 0}, "not a length"),
        ({"min_gap": "5%"}, "`min_gap='5%'` is not a whole number of steps"),
        ({"min_gap": 0}, "must be 1 or more"),
        ({"every": "x steps"}, "`every='x'` is not a whole number of steps"),
        ({"from_step": "ten"}, "`from_step='ten'` is not a whole number"),
    ],
)
def test_selections_that_are_no_lengths_are_refused(
    stepped: Callable[..., list[Path]], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        find_series(stepped(1, 2), **given)


@pytest.mark.parametrize("given", [{"window": 5}, {"min_gap": 5}, {"every": "5steps"}, {"window": "5%"}])
def test_selections_by_steps_refuse_checkpoints_without(save: Save, given: dict[str, Any]) -> None:
    paths = [save("best.pth", weights(1)), save("c2.pth", weights(2))]
    with pytest.raises(SeriesError, match=r"best\.pth: its step is unknown, so .* cannot apply to it"):
        find_series(paths, **given)


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "eval_loss",
        "val/loss",
        "valid.wer",
        "FID",
        "test-error",
        "ppl",
        "cross_entropy_loss",
        "mae",
        "trainloss",
        "dev/PER",
        "val_bits_per_byte",
    ],
)
def test_lower_is_better_for_losses_and_error_rates(name: str) -> None:
    assert lower_by_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "metric",
        "top1",
        "acc",
        "mAP",
        "bleu",
        "iou",
        "answer",
        "hyper",
        "f1",
        "flower_acc",
        "acc_per_class",
        "tokens_per_second",
    ],
)
def test_higher_is_better_for_other_names(name: str) -> None:
    assert not lower_by_name(name)


def test_timms_metric_has_the_direction_of_what_its_script_evaluates(save: Save) -> None:
    for i, loss in ((1, 0.3), (2, 0.1)):
        args = SimpleNamespace(eval_metric="loss")
        save(f"a-{i}.pth", {"state_dict": weights(i), "metric": loss, "args": vars(args)})
    found = find_series(["a-*.pth"], best=1)
    assert names(found) == ["a-2.pth"]
    assert names(find_series(["a-*.pth"], best=1, metric="loss")) == ["a-2.pth"]


def test_a_dict_of_metrics_is_looked_into(save: Save) -> None:
    for i, (top1, loss) in ((1, (80.0, 0.3)), (2, (70.0, 0.1))):
        save(f"a-{i}.pth", {"state_dict": weights(i), "metrics": {"top1": top1, "loss": loss}, "metric_name": "top1"})
    assert names(find_series(["a-*.pth"], best=1)) == ["a-1.pth"]
    assert names(find_series(["a-*.pth"], best=1, metric="loss")) == ["a-2.pth"]
    assert names(find_series(["a-*.pth"], best=1, metric="metrics.loss")) == ["a-2.pth"]


@pytest.mark.parametrize(
    ("form", "key", "best"),
    [
        ("epoch={i}-val_loss={v:.2f}.ckpt", "val_loss", "low"),
        ("ckpt-{i}_acc_{p:.1f}.pth", "acc", "high"),
        ("e{i}-wer-{p:.1f}.pt", "wer", "low"),
        ("run/{i}/loss={v:e}.pth", "loss", "low"),
        ("m{i}_top1{p}.pth", "top1", "high"),
    ],
)
def test_a_metric_is_read_from_names(save: Save, form: str, key: str, best: str) -> None:
    values = {1: 0.31, 2: 0.12, 3: 0.25}
    paths = {}
    for i, value in values.items():
        path = Path(form.format(i=i, v=value, p=100 * value))
        path.parent.mkdir(parents=True, exist_ok=True)
        paths[i] = save(str(path), weights(i))
    found = find_series([*paths.values()], best=1, metric=key)
    assert [m.path for m in found.members] == [paths[2 if best == "low" else 1]]
    assert any("from the names" in note for note in found.notes)


def test_of_several_losses_in_a_name_the_one_asked_for_counts(save: Save) -> None:
    for i, train, val in ((1, 0.1, 0.9), (2, 0.2, 0.3)):
        save(f"a-{i}-train_loss={train}-val_loss={val}.pth", weights(i))
        save(f"b-{i}-val_loss={train}-loss={val}.pth", weights(i))
    assert names(find_series(["a-*.pth"], best=1, metric="val_loss")) == ["a-2-train_loss=0.2-val_loss=0.3.pth"]
    assert names(find_series(["b-*.pth"], best=1, metric="loss")) == ["b-2-val_loss=0.2-loss=0.3.pth"]
    with pytest.raises(SeriesError, match="has no number under 'loss'"):
        find_series(["a-*.pth"], best=1, metric="loss")


def test_the_state_of_lightnings_model_checkpoint_is_read_with_its_mode(save: Save) -> None:
    for i, score in ((1, 0.5), (2, 0.9), (3, 0.7)):
        key = "ModelCheckpoint{'monitor': 'quality', 'mode': 'min', 'every_n_train_steps': 0}"
        state = {"monitor": "quality", "current_score": torch.tensor(score), "best_k_models": {}}
        save(f"a-{i}.ckpt", {"state_dict": weights(i), "epoch": i, "callbacks": {key: state}})
    found = find_series(["a-*.ckpt"], best=1, metric="quality")
    assert names(found) == ["a-1.ckpt"]
    assert "lower is better, as the checkpoints say" in found.notes[-1]
    assert names(find_series(["a-*.ckpt"], best=1)) == ["a-1.ckpt"]


def test_the_last_of_lightnings_files_knows_the_scores_of_the_others(save: Save) -> None:
    best_k = {f"/gone/a-{i}.ckpt": torch.tensor(score) for i, score in ((1, 0.5), (2, 0.9))}
    state = {"monitor": "acc", "current_score": None, "best_k_models": best_k | {"/gone/a-3.ckpt": torch.tensor(0.7)}}
    for i in (1, 2, 3):
        extra = {"callbacks": {"ModelCheckpoint{'mode': 'max'}": state}} if i == 3 else {}
        save(f"a-{i}.ckpt", {"state_dict": weights(i), "epoch": i, **extra})
    assert names(find_series(["a-*.ckpt"], best=2, metric="acc")) == ["a-2.ckpt", "a-3.ckpt"]


def test_timms_summary_is_read_by_epoch(save: Save) -> None:
    for i in (0, 1, 2):
        save(f"checkpoint-{i}.pth.tar", {"state_dict": weights(i), "epoch": i})
    Path("summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_top1,lr\n0,5.0,3.0,40.5,0.1\n1,4.0,2.0,60.25,0.1\n2,3.0,2.5,55.0,0.1\n"
    )
    assert names(find_series(["checkpoint-*"], best=1, metric="top1")) == ["checkpoint-1.pth.tar"]
    assert names(find_series(["checkpoint-*"], best=1, metric="eval_loss")) == ["checkpoint-1.pth.tar"]
    found = find_series(["checkpoint-*"], best=1, metric="train_loss")
    assert names(found) == ["checkpoint-2.pth.tar"]
    assert "from summary.csv" in found.notes[-1]


def test_yaml_beside_a_checkpoint_is_read_as_wenet_and_speechbrain_write_it(save: Save) -> None:
    for i, loss in ((1, 2.5), (2, 1.25)):
        save(f"epoch_{i}.pt", weights(i))
        Path(f"epoch_{i}.yaml").write_text(f"epoch: {i}\nloss_dict:\n  acc: 0.{i}\n  loss: {loss}\ntag: epoch_{i}\n")
    assert names(find_series(["epoch_*.pt"], best=1, metric="loss")) == ["epoch_2.pt"]
    assert names(find_series(["epoch_*.pt"], best=1, metric="loss_dict.acc")) == ["epoch_2.pt"]
    for i, wer in ((1, 5.0), (2, 7.5)):
        Path(f"CKPT+{i}").mkdir()
        save(f"CKPT+{i}/model.ckpt", weights(i))
        Path(f"CKPT+{i}/CKPT.yaml").write_text(f"# yamllint disable\nWER: {wer}\nend-of-epoch: true\n")
    assert [m.path.parent.name for m in find_series(["CKPT+*/model.ckpt"], best=1, metric="WER").members] == ["CKPT+1"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "step,val_acc\n1,0.5\n2,0.9\n3,0.7\n"),
        ("m.csv", "\ufefffile, val_acc\ns1.pth, 0.5\ns2.pth, 0.9\ns3.pth,0.7\n"),
        (
            "m.jsonl",
            '{"step": 1, "val_acc": 0.5}\n\n{"step": 2, "val_acc": 0.9}\n{"step": 3, "val_acc": 0.7, "loss": 1}\n',
        ),
        (
            "m.jsonl",
            '{"path": "/x/s1.pth", "val_acc": 0.5}\n{"path": "s2", "val_acc": "0.9"}\n'
            '{"ckpt": "s3.pth", "val_acc": 0.7}',
        ),
    ],
)
def test_a_table_of_metrics_is_read_by_step_or_name(stepped: Callable[..., list[Path]], name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")
    found = find_series(stepped(1, 2, 3), best=2, metric="val_acc", metrics=name)
    assert steps(found) == [2, 3]
    assert f"from {name}" in found.notes[-1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "step,acc\n1,0.5\n", r"has no number under 'acc' for .*s2\.pth, by its name or its step \(2\)"),
        ("m.csv", "step,acc\n1,0.5\n2,nan\n", r"has no number under 'acc' for .*s2\.pth"),
        ("m.csv", "step,acc\n1,0.5\n2,good\n", r"has no number under 'acc' for .*s2\.pth"),
        ("m.csv", "step,loss\n1,0.5\n2,1\n", "It has the columns step, loss"),
        ("m.csv", "", "has no row"),
        ("m.jsonl", "step", "not a file of JSON lines"),
        ("m.jsonl", "[1]", "a line that is not a JSON object"),
    ],
)
def test_a_table_that_lacks_a_checkpoint_is_refused(
    stepped: Callable[..., list[Path]], name: str, text: str, message: str
) -> None:
    Path(name).write_text(text)
    with pytest.raises((SeriesError, UsageError), match=message):
        find_series(stepped(1, 2), best=1, metric="acc", metrics=name)


def test_a_table_that_is_not_there_is_an_error(stepped: Callable[..., list[Path]]) -> None:
    with pytest.raises(Exception, match="gone.csv"):
        find_series(stepped(1, 2), best=1, metrics="gone.csv")
