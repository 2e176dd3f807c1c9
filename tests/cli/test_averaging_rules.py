"""`ckpt avg` with rules, windows and metrics, on folders as training scripts leave them: what is shown, and refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import refused, run
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2, 3), float(value))}


def write(path: str, content: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def stepped(*steps: int) -> None:
    for i, step in enumerate(steps):
        write(f"run/c{i}.pth", {"model": weights(i), "step": step})


def even(n: int = 10) -> None:
    stepped(*range(1000, 1000 * n + 1, 1000))


def nameless() -> None:
    for name in "abc":
        write(f"run/{name}.pth", weights(ord(name)))


def timm() -> None:
    for i, metric in enumerate((10, 30, 50, 50, 70, 60)):
        content = {"epoch": i, "state_dict": weights(i), "metric": metric, "args": {"eval_metric": "top1"}}
        write(f"run/checkpoint-{i}.pth.tar", content)


def trainer() -> None:
    log = []
    for step, loss in ((500, 0.3), (1000, 0.1), (1500, 0.2)):
        log.append({"step": step, "eval_loss": loss, "eval_accuracy": 1 - loss})
        folder = Path(f"run/checkpoint-{step}")
        folder.mkdir(parents=True)
        save_file(weights(step), folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))


def icefall() -> None:
    """Means of all batches so far: after epoch n, 1000 n of them."""
    for n in range(1, 6):
        content = {"model": weights(n), "model_avg": weights(n * n), "batch_idx_train": 1000 * n}
        write(f"run/epoch-{n}.pt", content)


def scored(*metrics: Any) -> None:
    for i, metric in enumerate(metrics, 1):
        write(f"run/c{i}.pth", {"model": weights(i), "epoch": i, "metric": metric, "val": {"acc": 1.0}})


def phema() -> None:
    for kimg in range(1000, 11000, 1000):
        for width in ("0.050", "0.100"):
            write(f"run/network-snapshot-{kimg:07d}-{width}.pt", weights(kimg * float(width)))


def coefficients(*arguments: str) -> dict[str, float]:
    result = run("avg", "run", *arguments, "--dry-run", "--json")
    assert result.code == 0, result.err
    return {entry["name"]: entry["coefficient"] for entry in json.loads(result.out)["inputs"]}


def shown(*arguments: str) -> str:
    result = run("avg", "run", *arguments, "--dry-run", columns=1000)
    assert result.code == 0, result.err
    return result.out + result.err


@pytest.mark.parametrize("more", [[], ["--mode", "decay"]])
def test_a_shape_alone_says_which_rule_it_is_also_the_usual_one(more: list[str]) -> None:
    even(4)
    expected = [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    assert [*coefficients("--shape", "1-sqrt", *more).values()] == pytest.approx(expected, rel=1e-14)


def test_mode_decay_is_1_sqrt() -> None:
    even()
    assert coefficients("--mode", "decay") == coefficients("--shape", "1-sqrt")


def test_the_window_of_icefall_is_the_mean_between_two_of_its_means() -> None:
    """average_checkpoints_with_averaged_model: (end A_end - start A_start) / (end - start)."""
    icefall()
    result = run("avg", "run/epoch-2.pt", "run/epoch-5.pt", "--mode", "difference", "-o", "a.pth")
    assert result.code == 0, result.err
    assert "The mean of 3000 weights, from those of the first 2000 and of the first 5000" in result.err
    expected = (5000 * 25 - 2000 * 4) / 3000
    assert torch.load("a.pth")["model"]["w"].tolist() == [[pytest.approx(expected, rel=1e-6)] * 3] * 2


def test_the_difference_of_two_averaged_models_is_the_mean_of_the_updates_between_them() -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    average, kept = AveragedModel(model), []
    for i in range(1, 9):
        torch.nn.init.normal_(model.weight)
        average.update_parameters(model)
        kept.append(model.weight.detach().clone())
        if i in (3, 8):
            write(f"run/swa-{i}.pt", average.state_dict())
    result = run("avg", "run", "--mode", "difference", "-o", "a.pth")
    assert result.code == 0, result.err
    (found,) = [tensor for name, tensor in torch.load("a.pth").items() if name.endswith("weight")]
    torch.testing.assert_close(found, torch.stack(kept[3:]).mean(dim=0), rtol=1e-12, atol=1e-12)


def test_best_takes_the_lowest_loss_and_the_highest_accuracy() -> None:
    trainer()
    text = shown("--best", "2", "--metric", "eval_loss")
    assert "(lower is better, by its name): checkpoint-1000 0.1, checkpoint-1500 0.2." in text
    assert [*coefficients("--best", "1", "--metric", "eval_accuracy")] == ["checkpoint-1000"]
    assert [*coefficients("--best", "1", "--metric", "eval_loss", "--higher-is-better")] == ["checkpoint-500"]


def test_best_names_folders_where_all_files_have_one_name() -> None:
    for i, wer in ((1, 9.5), (2, 7.5)):
        write(f"run/CKPT+{i}/model.ckpt", weights(i))
        Path(f"run/CKPT+{i}/CKPT.yaml").write_text(f"WER: {wer}\n")
    result = run("avg", "run/*/model.ckpt", "--best", "1", "--metric", "WER", "--dry-run", columns=1000)
    said = "Best 1 of 2 by 'WER', from the YAML files beside them (lower is better, by its name): CKPT+2 7.5."
    assert said in result.out


def test_files_at_one_step_are_counted_as_files_and_that_is_said() -> None:
    stepped(10, 20, 20, 30)
    assert "The training steps do not increase from file to file, so it counts files." in shown("--shape", "cosine")
    assert [*coefficients("--shape", "linear").values()] == [0.25] * 4


def test_advice_offers_nothing_that_is_on_or_cannot_be() -> None:
    even()
    fitting = "To spread it, use --mode ema without --decay, which then fits the series"
    for options, advice in {
        ("--half-life", "5%"): "To spread it, use a larger --half-life.",
        ("--half-life", "20k"): "To spread it, use a smaller --half-life.",
        ("--decay", "0.9999"): f"{fitting}, or use --per-step or --bias-correction.",
        ("--decay", "0.99999999", "--per-step"): f"{fitting}.",
        ("--decay", "0.99999999", "--by", "steps"): f"{fitting}.",
        ("--decay", "0.1", "--bias-correction"): f"{fitting}.",
        ("--decay", "0.1", "--warmup", "timm"): f"{fitting}.",
    }.items():
        assert shown(*options).splitlines()[-1].endswith(f"of this average. {advice}"), options


def test_a_decay_that_is_chosen_is_shown_and_what_it_reaches() -> None:
    even()
    assert "--decay 0.7678, which fits 10 checkpoints: the average is as old as a third of them." in shown(
        "--mode", "EMA"
    )
    assert "no decay makes the average as old as a third." in shown("--warmup", "timm", "--update-after", "20")
    write("one/a-1.pth", weights(1))
    assert "which fits" not in run("avg", "one", "--mode", "ema", "--dry-run").out
    last_three = shown("--last", "3", "--mode", "ema")
    assert "which fits 3 checkpoints" in last_three
    assert "To spread it" not in last_three


def test_one_checkpoint_that_counts_alone_is_where_tensors_are_copied_from() -> None:
    nameless()
    assert "0 tensors averaged, 1 copied from a.pth and c.pth." in shown("--weights", "1,0,0")
    assert "1 tensor averaged, 0 copied from the last checkpoint." in shown("--weights", "1,2,0")


def test_weights_belong_to_the_paths_in_their_order_whatever_is_typed() -> None:
    even(4)
    result = run("avg", "run/c3.pth", "run/c[01].pth", "run", "--weights", "5,1,2,0", "--dry-run", columns=1000)
    assert "The weights of the files: c3.pth 0.625, c0.pth 0.125, c1.pth 0.25, c2.pth 0." in result.out


@pytest.mark.parametrize(
    ("length", "kept"), [("3k", 4), ("3K", 4), ("3000", 4), ("3k steps", 4), ("0.003M", 4), ("30%", 4), ("30 %", 4)]
)
def test_lengths_may_be_written_in_many_ways(length: str, kept: int) -> None:
    even()
    assert len(coefficients("--window", length)) == kept


@pytest.mark.parametrize("number", ["2", "0.002k", "0.000002M", "2steps"])
def test_all_numbers_may_have_units(number: str) -> None:
    even()
    assert [*coefficients("--last", number)] == ["c8.pth", "c9.pth"]


def test_a_target_is_made_of_edm2s_snapshots_by_their_names() -> None:
    phema()
    assert math.fsum(coefficients("--target", "sigma-rel=0.12").values()) == pytest.approx(1)
    assert "sigma-rel=0.12 from 20 power profiles: the sum differs from it by 0." in shown("--target", "sigma-rel=0.12")


USAGE = [
    ("--half-life 0", "--half-life 0 is not a length of training; write"),
    ("--half-life=-5", "is not a length of training"),
    ("--half-life 200%", "is not a length of training"),
    ("--half-life 1e400", "is not a length of training"),
    ("--half-life 5 --decay 0.9", "--half-life and --decay cannot go together"),
    ("--half-life 5 --per-step", "--half-life and --per-step cannot go together"),
    ("--shape 1-sqrt --mode ema", "--shape goes with --mode decay"),
    ("--shape sqrt", "--shape is one of"),
    ("--sigma-rel 0.5", "--sigma-rel 0.5: the width is above 0 and below 0.2887"),
    ("--sigma-rel 1e-300", "--sigma-rel 1e-300: so narrow an average is the last checkpoint alone"),
    ("--sigma-rel 0.1 --gamma 2", "needs one of --sigma-rel and --gamma"),
    ("--gamma nan", "must be 0 or more"),
    ("--gamma 1e308", "1e+07 at most"),
    ("--mode power", "needs one of --sigma-rel and --gamma"),
    ("--mode posthoc", "needs --target"),
    ("--target sigma-rel=0.5", "--target sigma-rel=0.5: the width is above 0 and below 0.2887"),
    ("--target gamma=1e308", "--target gamma=1e308: gamma is 0 or more, and 1e+07 at most"),
    ("--target gamma=nan", "gamma is 0 or more"),
    ("--target half-life=0.0001", "--target half-life=0.0001: a half-life is 0.01 steps or more"),
    ("--target snapshot", "--target snapshot is not a profile"),
    ("--target gamma=3 --profile d*=snapshot", "--profile 'd*=snapshot': no checkpoint matches 'd*'"),
    ("--target gamma=3 --sigma-rel 0.1", "--sigma-rel goes with --mode power"),
    ("--weights 0.9,0.1", "--weights has 2 numbers for 10 checkpoints. To see them, leave --weights out"),
    ("--weights 1", "--weights has 1 number for 10 checkpoints"),
    ("--weights 1,nan", "must be finite"),
    ("--weights 1,x", "write numbers with commas"),
    ("--weights 1,-1", "sum to 0"),
    ("--window -5", "is not a length of training"),
    ("--min-gap 0", "must be 1 or more"),
    ("--every 0steps", "must be 1 or more"),
    ("--from-step 3k --to-step 2k", "--from-step 3000 is after --to-step 2000"),
    ("--last x", "--last x is not a whole number; write one such as 5"),
    ("--metric loss", "go with --best"),
    ("--lower-is-better", "go with --best"),
    ("--best 1 --metric=", "is not the name of a metric"),
]


@pytest.mark.parametrize(("options", "message"), USAGE)
def test_options_that_cannot_be_are_wrong_usage(tmp_path: Path, options: str, message: str) -> None:
    even()
    assert message in refused(tmp_path, "avg", "run", *options.split(), code=2)


@pytest.mark.parametrize("options", ["--half-life 5%", "--sigma-rel 0.1", "--per-step", "--shape cosine --by steps"])
def test_rules_over_steps_refuse_files_without(tmp_path: Path, options: str) -> None:
    nameless()
    message = refused(tmp_path, "avg", "run", *options.split(), code=2)
    assert "a checkpoint has no" in message or "add --by files" in message


@pytest.mark.parametrize("options", ["--half-life 5%", "--sigma-rel 0.1", "--per-step --decay 0.9"])
def test_rules_over_steps_refuse_two_files_at_one_step(tmp_path: Path, options: str) -> None:
    stepped(10, 20, 20, 30)
    message = refused(tmp_path, "avg", "run", *options.split(), code=2)
    assert "increase" in message
    assert "run/c1.pth, run/c2.pth have the same step, 20" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--window 5", "--window 5: only run/c9.pth is in it; the checkpoint before it is 1000 steps older."),
        ("--min-gap 100k", "--min-gap 100000: of 10 checkpoints, only run/c9.pth is left."),
        ("--every 100ksteps", "of 10 checkpoints, only run/c9.pth is left."),
        ("--from-step 20k", "no checkpoint in this range; they go from step 1000 to 10000"),
        ("--best 3", "has no number under 'metric', neither inside nor in its name, trainer_state.json"),
        ("--mode difference", "run/c0.pth: does not say how many weights are in its raw (model)"),
    ],
)
def test_selections_that_leave_nothing_are_refused(tmp_path: Path, options: str, message: str) -> None:
    even()
    assert message in refused(tmp_path, "avg", "run", *options.split())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ((math.nan, 0.6), "its 'metric' is NaN"),
        ((math.inf, 0.6), "its 'metric' is inf, and it would be among the best 1"),
        (("good", 0.6), "its 'metric' is no number that can be ranked"),
        ((True, 0.6), "its 'metric' is no number that can be ranked"),
        (({"top1": 0.5}, 0.6), "It has epoch, metric.top1, val.acc."),
        ((torch.ones(2), 0.6), "its 'metric' is a tensor, and not of one number"),
        ((None, 0.6), "has no number under 'metric'"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(tmp_path: Path, metrics: tuple[Any, ...], message: str) -> None:
    scored(*metrics)
    assert message in refused(tmp_path, "avg", "run", "--best", "1")


def test_ties_go_to_the_earlier_one() -> None:
    timm()
    assert [*coefficients("--best", "3")] == ["checkpoint-2.pth.tar", "checkpoint-4.pth.tar", "checkpoint-5.pth.tar"]


@pytest.mark.parametrize("layout", ["litema", "ema-pytorch"])
def test_the_difference_of_exponential_averages_is_refused(tmp_path: Path, layout: str) -> None:
    for i in (1, 2):
        content = {
            "litema": {"model.w": torch.ones(3), "model_ema.w": torch.ones(3) * i, "model_ema.decay": torch.tensor(0.9),
                       "model_ema.num_updates": torch.tensor(i)},
            "ema-pytorch": {"initted": torch.tensor(True), "step": torch.tensor(i), "ema_model.w": torch.ones(3) * i},
        }[layout]  # fmt: skip
        write(f"run/c{i}.pt", content)
    message = refused(tmp_path, "avg", "run", "--mode", "difference")
    assert "is an EMA, and --mode difference takes means of weights that count the same" in message


def test_profiles_that_cannot_be_told_are_refused_with_the_way_to_tell(tmp_path: Path) -> None:
    for i in (1, 2):
        write(f"run/{i}.pt", {"model": weights(i), "model_ema": weights(i), "step": i})
    message = refused(tmp_path, "avg", "run", "--target", "gamma=2")
    assert "nothing tells which steps its ema (model_ema) is an average of" in message
    assert "--profile 1.pt=decay:0.9999" in message


def test_snapshots_that_cannot_make_a_target_are_told_the_rule_for_them(tmp_path: Path) -> None:
    even()
    message = refused(tmp_path, "avg", "run", "--target", "half-life=100", code=2)
    assert "more than 10% is no fit" in message
    assert "To average snapshots alone, use --sigma-rel, --gamma or --half-life without --mode posthoc." in message


def test_step_0_is_no_source_of_a_target(tmp_path: Path) -> None:
    stepped(0, 10, 20)
    message = refused(tmp_path, "avg", "run", "--target", "gamma=2")
    assert "has step 0, and --mode posthoc needs one above 0. Leave it out with --from-step 1." in message


def test_icefalls_means_end_at_the_last_period_in_which_they_were_updated() -> None:
    """Its script takes average_period from the first file, and rounds batch_idx_train down to a multiple of it."""
    for n, batches in ((25, 1099), (30, 1549)):
        content = {"model": weights(0), "model_avg": weights(n), "batch_idx_train": batches, "average_period": 100}
        write(f"run/epoch-{n}.pt", content)
    assert [*coefficients("--mode", "difference").values()] == [-1000 / 500, 1500 / 500]


def test_the_table_of_scripts_takes_the_files_that_they_take() -> None:
    """The rows of docs/averaging.md on folders with all that the scripts of others leave in them."""
    for i in range(1, 9):
        write(f"fairseq/checkpoint{i}.pt", {"model": weights(i), "optimizer_history": [{"num_updates": 100 * i}]})
        write(f"fairseq/checkpoint_{i}_{100 * i - 50}.pt", {"model": weights(-i)})
        write(f"icefall/epoch-{i}.pt", {"model": weights(i), "model_avg": weights(9), "batch_idx_train": 100 * i})
        write(f"wenet/epoch_{i}.pt", weights(i))
        Path(f"wenet/epoch_{i}.yaml").write_text(f"epoch: {i}\nloss_dict:\n  acc: 0.5\n  loss: {abs(i - 4)}\n")
        metrics = {"metric": i % 5, "args": {"eval_metric": "top1"}}
        write(f"timm/checkpoint-{i}.pth.tar", {"state_dict": weights(i), "epoch": i} | metrics)
    write("wenet/init.pt", weights(99))
    write("fairseq/checkpoint_last.pt", {"model": weights(8)})
    write("fairseq/checkpoint_best.pt", {"model": weights(3)})
    Path("timm/model_best.pth.tar").hardlink_to("timm/checkpoint-4.pth.tar")

    def mean(*arguments: str) -> float:
        result = run("avg", *arguments, "-o", "a.pth", "--force")
        assert result.code == 0, result.err
        content = torch.load("a.pth")
        found = content.get("model", content.get("state_dict", content))["w"]
        return float(found[0, 0])

    assert mean("fairseq/checkpoint[0-9]*.pt", "--last", "5", "--state", "raw") == 6
    assert mean("fairseq/checkpoint_[0-9]*.pt", "--last", "5", "--state", "raw") == -6
    assert mean(*[f"icefall/epoch-{i}.pt" for i in (4, 5, 6)], "--state", "raw") == 5
    assert mean("wenet/epoch_*.pt", "--best", "3", "--metric", "loss") == 4
    assert mean("timm/checkpoint-*.pth.tar", "--best", "3") == pytest.approx((4 + 3 + 8) / 3)
    assert mean("timm/checkpoint-*.pth.tar") == 4.5


def test_the_page_shows_what_the_tool_draws() -> None:
    even(8)
    for path in Path("run").iterdir():
        path.rename(path.with_name(f"step_{1000 + 1000 * int(path.stem[1:])}.pth"))
    page = (Path(__file__).parents[2] / "docs" / "averaging.md").read_text(encoding="utf-8")
    blocks = page.split("```text\n", 1)[1].split("```", 1)[0].split("$ ckpt ")[1:]
    assert len(blocks) == 4
    for block in blocks:
        command, *lines = block.splitlines()
        drawn = [line.rstrip() for line in run(*command.split()).out.splitlines()]
        assert drawn[1:9] == lines, command
