"""Stripping: training state goes, weights stay bit for bit wherever they stand, and torch reads what is left."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, same_bits
from safetensors.torch import save_file
from torch import nn

import ckpt_tools
from ckpt_tools.errors import LayoutError, UnsupportedError, UsageError, WriteError
from ckpt_tools.formats import read_header
from ckpt_tools.jobs.inspect import describe

Save = Callable[..., Path]


def trained(name: str = "AdamW", **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and an optimizer of torch that has made two steps."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def payload(tree: Any) -> int:
    """Bytes of the distinct storages of all tensors in a tree."""
    found: dict[int, int] = {}

    def walk(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            found[node.untyped_storage().data_ptr()] = node.untyped_storage().nbytes()
        for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ():
            walk(child)

    walk(tree)
    return sum(found.values())


def test_strip_keeps_both_sets_and_removes_the_optimizer(runs: list[Path], tmp_path: Path) -> None:
    before = hashlib.sha256(runs[3].read_bytes()).digest()
    report = ckpt_tools.strip(runs[3], out=tmp_path / "s.pth")
    assert hashlib.sha256(runs[3].read_bytes()).digest() == before
    with torch.serialization.safe_globals([argparse.Namespace]):
        old = torch.load(runs[3], weights_only=True)
    new = load(tmp_path / "s.pth")
    assert set(old) - set(new) == {"optimizer", "saver"}
    assert same_bits(new["state_dict"], old["state_dict"])
    assert same_bits(new["state_dict_ema"], old["state_dict_ema"])
    assert (new["arch"], new["epoch"], new["metric"], new["args"]) == (
        old["arch"], old["epoch"], old["metric"], vars(old["args"]),
    )  # fmt: skip
    assert report.kept == ("ema (state_dict_ema)", "raw (state_dict)")
    entries = {entry.place: entry.nbytes for entry in report.entries}
    assert entries["optimizer"] == payload(old["optimizer"])
    assert report.bytes_written == (tmp_path / "s.pth").stat().st_size < runs[3].stat().st_size - entries["optimizer"]
    assert subprocess.run(["unzip", "-tqq", tmp_path / "s.pth"], check=False).returncode == 0


@pytest.mark.parametrize(
    ("state", "kept"), [("ema", "state_dict_ema"), ("raw", "state_dict"), ("state_dict", "state_dict")]
)
def test_strip_keeps_one_chosen_set_in_its_place(runs: list[Path], tmp_path: Path, state: str, kept: str) -> None:
    ckpt_tools.strip(runs[0], out=tmp_path / "s.pth", state=state)
    with torch.serialization.safe_globals([argparse.Namespace]):
        old = torch.load(runs[0], weights_only=True)
    new = load(tmp_path / "s.pth")
    assert {"state_dict", "state_dict_ema"} & set(new) == {kept}
    assert same_bits(new[kept], old[kept])
    assert new["arch"] == old["arch"]


def test_strip_finds_the_other_weights_by_their_names(save: Save, tmp_path: Path) -> None:
    model, _ = trained()
    nets = {"a": {"net": model.state_dict()}, "b": {"module." + k: v + 1 for k, v in model.state_dict().items()}}
    path = save("c.pth", {"nets": nets, "criterion": {"center": torch.zeros(3)}, "epoch": 3})
    report = ckpt_tools.strip(path, state="nets.b")
    new = load(Path(report.out))
    assert Path(report.out) == tmp_path / "c-stripped.pth"
    assert same_bits(new["nets"].pop("b"), nets["b"])
    assert (new["nets"], new["epoch"]) == ({"a": {}}, 3)
    assert new["criterion"]["center"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "LBFGS"])
def test_strip_removes_torch_optimizers_under_any_name(save: Save, name: str) -> None:
    if name == "LBFGS":
        model = nn.Linear(3, 2)
        optimizer: Any = torch.optim.LBFGS(model.parameters())
    else:
        model, optimizer = trained(name)
    state = optimizer.state_dict()
    path = save("c.pth", {"net": model.state_dict(), "my_opt": state, "opts": [state], "epoch": 1})
    new = load(Path(ckpt_tools.strip(path).out))
    assert "my_opt" not in new
    assert same_bits(new["net"], model.state_dict())


@pytest.mark.parametrize(
    ("around", "gone"),
    [
        (
            {
                "optimizer_states": ["opt"], "lr_schedulers": [{"last_epoch": 3}],
                "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {"ModelCheckpoint{}": {"best": "x"}},
            },
            {"optimizer_states", "lr_schedulers", "loops", "callbacks"},
        ),
        (
            {"last_optimizer_state": "opt", "optimizer_history": [{"n": torch.ones(2)}]},
            {"last_optimizer_state", "optimizer_history"},
        ),
        (
            {"opt": {"state": [{"grad_avg": torch.ones(9), "step": 3}], "hypers": [{"lr": 0.1, "mom": 0.9}]}},
            {"opt"},
        ),
        ({"optimizer": "opt", "scaler": {"scale": 2.0, "_growth_tracker": 0}}, {"optimizer", "scaler"}),
        ({"opt": "opt"}, {"opt"}),
        ({"optim": {"state.net.weight.exp_avg": torch.ones(3)}}, {"optim"}),
        (
            {"optimizer_state_dict": "opt", "scheduler_state_dict": {"a": 1}},
            {"optimizer_state_dict", "scheduler_state_dict"},
        ),
        ({"rng_state": torch.get_rng_state(), "cuda_rng_state": [torch.ones(9)]}, {"rng_state", "cuda_rng_state"}),
        ({"random_states": {"numpy": np.random.RandomState(0).get_state()}}, {"random_states"}),
        ({"optimizer": torch.optim.SGD([torch.ones(2)], lr=1.0)}, {"optimizer"}),
    ],
)  # fmt: skip
def test_strip_removes_training_state_of_many_libraries(save: Save, around: dict[str, Any], gone: set[str]) -> None:
    model, optimizer = trained()
    state = optimizer.state_dict()
    around = {k: state if v == "opt" else [state] if v == ["opt"] else v for k, v in around.items()}
    path = save("c.pth", {"state_dict": model.state_dict(), **around, "epoch": 3, "hyper_parameters": {"lr": 0.1}})
    report = ckpt_tools.strip(path)
    new = load(Path(report.out))
    assert set(new) == {"state_dict", "epoch", "hyper_parameters"}
    assert {entry.place for entry in report.entries} == gone
    assert same_bits(new["state_dict"], model.state_dict())


HISTORY = [{"optimizer_name": "FairseqAdam", "num_updates": 7, "lr_scheduler_state": {"best": 2.5}}]


@pytest.mark.parametrize("job", ["strip", "average"])
def test_jobs_keep_the_history_of_optimizers_without_which_fairseq_loads_nothing(
    save: Save, tmp_path: Path, job: str
) -> None:
    model, optimizer = trained()
    tree = {"model": model.state_dict(), "optimizer_history": HISTORY, "last_optimizer_state": optimizer.state_dict()}
    getattr(ckpt_tools, job)(save("checkpoint_last.pt", tree), out=tmp_path / "out.pt")
    new = load(tmp_path / "out.pt")
    assert new.keys() == {"model", "optimizer_history"}
    assert new["optimizer_history"] == HISTORY


def test_strip_takes_no_checkpoint_for_an_optimizer_of_fastai(save: Save) -> None:
    model, optimizer = trained()
    tree = {"state": model.state_dict(), "hypers": {"lr": 0.1}, "optimizer": optimizer.state_dict()}
    new = load(Path(ckpt_tools.strip(save("own.pth", tree)).out))
    assert new.keys() == {"state", "hypers"}
    assert same_bits(new["state"], model.state_dict())


def test_strip_removes_training_state_one_level_below(save: Save) -> None:
    model, optimizer = trained()
    inner = {
        "model": model.state_dict(), "optimizers": {"AdamW": optimizer.state_dict()}, "rng": [{"python": (3, (1, 2))}],
        "schedulers": {"Cosine": {"last_epoch": 3}}, "timestamp": {"epoch": 3},
    }  # fmt: skip
    report = ckpt_tools.strip(save("c.pth", {"state": inner, "version": 2}))
    new = load(Path(report.out))
    assert set(new["state"]) == {"model", "timestamp"}
    assert [entry.place for entry in report.entries][0] == "state.optimizers"
    assert same_bits(new["state"]["model"], model.state_dict())


def test_strip_keeps_configuration_and_modules_named_like_training_state(save: Save) -> None:
    config = {"optimizer": {"name": "adamw", "lr": 0.1}, "scheduler": {"name": "cosine"}}
    nets = {"encoder": {"w": torch.ones(2)}, "scaler": {"mean": torch.ones(2)}}
    flat = {"scheduler": torch.ones(2), "rng_state": torch.ones(3), "w": torch.ones(4)}
    tree = {"config": config, "model": nets, "optimizer": {"state": {}, "param_groups": [{"lr": 1}]}, "metric": 3.0}
    new = load(Path(ckpt_tools.strip(save("c.pth", tree)).out))
    assert (new["config"], new["metric"], set(new["model"])) == (config, 3.0, {"encoder", "scaler"})
    report = ckpt_tools.strip(save("flat.pth", flat))
    assert not report.anything


def test_strip_keeps_the_swa_average_of_lightning(save: Save) -> None:
    model, optimizer = trained()
    average = OrderedDict((k, v + 1) for k, v in model.state_dict().items())
    swa = {"n_averaged": 3, "latest_update_epoch": 9, "average_model_state": average}
    tree = {
        "state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"StochasticWeightAveraging": swa, "ModelCheckpoint{}": {"best_model_score": torch.ones(1)}},
    }  # fmt: skip
    path = save("c.ckpt", tree)
    report = ckpt_tools.strip(path)
    new = load(Path(report.out))
    assert set(new) == {"state_dict", "callbacks"}
    assert set(new["callbacks"]) == {"StochasticWeightAveraging"}
    assert new["callbacks"]["StochasticWeightAveraging"]["n_averaged"] == 3
    assert same_bits(new["callbacks"]["StochasticWeightAveraging"]["average_model_state"], average)
    assert any("'callbacks' holds weights, which stay: " in note for note in report.notes)
    assert ckpt_tools.open_checkpoint(report.out, state="ema").keys() == average.keys()
    # The average has parameters alone, so that the buffers, which are the raw ones', must not go.
    alone = ckpt_tools.strip(path, state="ema", out=path.with_name("ema.ckpt"))
    assert "state_dict" in load(Path(alone.out))
    assert any("'state_dict' stays" in note for note in alone.notes)
    raw = ckpt_tools.strip(path, state="raw", out=path.with_name("raw.ckpt"))
    assert set(load(Path(raw.out))) == {"state_dict"}


def test_strip_keeps_and_names_averages_in_an_optimizer(save: Save) -> None:
    model, optimizer = trained()
    shadow = tuple(p.detach() + 1 for p in model.parameters())
    tree = {
        "state_dict": model.state_dict(),
        "optimizer_states": [{"opt": optimizer.state_dict(), "ema": shadow, "decay": 0.9}],
    }
    report = ckpt_tools.strip(save("c.ckpt", tree))
    new = load(Path(report.out))
    assert [list(entry) for entry in new["optimizer_states"]] == [["ema"]]
    assert all(a.equal(b) for a, b in zip(new["optimizer_states"][0]["ema"], shadow, strict=True))
    assert report.notes[0] == "'optimizer_states' holds weights, which stay: optimizer_states.0.ema."


def test_strip_knows_weights_by_their_names(save: Save) -> None:
    model, _ = trained()
    best = {"module." + k: v + 1 for k, v in model.state_dict().items()}
    report = ckpt_tools.strip(
        save("c.pth", {"model": model.state_dict(), "callbacks": {"keeper": {"best": best}, "n": 3}})
    )
    assert same_bits(load(Path(report.out))["callbacks"]["keeper"]["best"], best)


def test_strip_names_float32_copies_that_go_with_the_optimizer(save: Save) -> None:
    model, optimizer = trained()
    tree = {
        "model": model.bfloat16().state_dict(),
        "optimizer": {"optimizer": optimizer.state_dict(), "fp32_from_fp16_params": [[torch.ones(3)]]},
    }
    report = ckpt_tools.strip(save("c.pt", tree))
    assert "'optimizer.fp32_from_fp16_params' looks like a float32 copy" in report.notes[0]
    assert set(load(Path(report.out))) == {"model"}


def test_strip_keeps_ties_and_writes_views_compact(save: Save) -> None:
    whole = torch.randn(1000, 10)
    head = nn.Parameter(torch.randn(10, 10))
    tree = {"model": {"view": whole[:3], "a": head, "b": head}, "optimizer": {"state": {}, "param_groups": []}}
    report = ckpt_tools.strip(save("c.pth", tree))
    new = load(Path(report.out))["model"]
    assert new["view"].equal(whole[:3])
    assert new["a"].data_ptr() == new["b"].data_ptr()
    assert report.compacted == 997 * 10 * 4
    assert new["view"].untyped_storage().nbytes() == 120


def test_strip_counts_no_bytes_shared_with_the_weights(save: Save) -> None:
    w = torch.randn(100)
    tree = {"model": {"w": w}, "optimizer": {"state": {0: {"z": w, "m": torch.ones(7)}}, "param_groups": []}}
    (entry,) = ckpt_tools.strip(save("c.pth", tree)).entries
    assert (entry.place, entry.tensors, entry.nbytes) == ("optimizer", 2, 28)


def test_strip_copies_nan(save: Save) -> None:
    tree = {"model": {"w": torch.tensor([float("nan"), 1.0])}, "optimizer": {"state": {}, "param_groups": []}}
    assert same_bits(load(Path(ckpt_tools.strip(save("c.pth", tree)).out))["model"], tree["model"])


def test_strip_writes_a_legacy_file_as_zip(runs: list[Path], tmp_path: Path) -> None:
    ckpt_tools.strip(runs[1], out=tmp_path / "s.pth")
    assert "optimizer" not in load(tmp_path / "s.pth")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_strip_keeps_a_dcp_folder(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    model, optimizer = trained()
    tree = {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 3}
    dcp.save(tree, checkpoint_id=tmp_path / "d", no_dist=True)
    report = ckpt_tools.strip(tmp_path / "d")
    assert (report.out, [entry.place for entry in report.entries]) == (str(tmp_path / "d-stripped"), ["optim"])
    assert report.entries[0].nbytes >= payload(tree["optim"])  # each tensor is a file of torch's in the file
    found = {"model": {k: torch.zeros_like(v) for k, v in model.state_dict().items()}, "epoch": 0}
    dcp.load(found, checkpoint_id=report.out, no_dist=True)
    assert same_bits(found["model"], model.state_dict())
    assert found["epoch"] == 3
    assert ckpt_tools.diff(tmp_path / "d", report.out).verdict == "identical"
    with pytest.raises(WriteError, match="exists already"):
        ckpt_tools.strip(tmp_path / "d")


def test_strip_writes_nothing_if_there_is_nothing_to_strip(save: Save, tmp_path: Path) -> None:
    weights = {"w": torch.ones(3)}
    paths = [save("a.pth", weights), save("b.pth", {"state_dict": weights, "callbacks": {}, "optimizer": None})]
    save_file(weights, tmp_path / "c.safetensors")
    (tmp_path / "m").mkdir()
    save_file(weights, tmp_path / "m" / "model.safetensors")
    before = sorted(tmp_path.rglob("*"))
    for path in (*paths, tmp_path / "c.safetensors", tmp_path / "m"):
        report = ckpt_tools.strip(path)
        assert (report.anything, report.written, report.bytes_written) == (False, False, 0)
    assert sorted(tmp_path.rglob("*")) == before


def test_strip_plan_equals_the_report_and_a_dry_run_writes_nothing(save: Save, tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save("c.pth", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    plans: list[Any] = []
    dry = ckpt_tools.strip(path, dry_run=True, on_plan=plans.append)
    assert (plans, list(tmp_path.iterdir())) == ([dry], [path])
    done = ckpt_tools.strip(path)
    assert (done.written, done.entries, done.bytes_written) == (True, dry.entries, Path(done.out).stat().st_size)
    taken = ckpt_tools.strip(path, dry_run=True)
    assert any("The real run would stop" in note and "exists already" in note for note in taken.notes)


OPTIMIZER = {"state": {}, "param_groups": []}


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"model": nn.Linear(2, 2), "optimizer": OPTIMIZER}, LayoutError, r"'model' is a pickled object \(torch\.nn"),
        ({"model": {"e": torch.eye(2).to_sparse()}, "optimizer": OPTIMIZER}, UnsupportedError, r"'model\.e' is sparse"),
        ({"model": {"w": torch.ones(1), "x": np.ones(2)}, "optimizer": OPTIMIZER}, LayoutError, r"'model\.x' is a p"),
        ({"optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": []}}, LayoutError, "training state alone"),
        ({"state": {0: {"m": torch.ones(2)}}, "param_groups": []}, LayoutError, "training state alone"),
    ],
)  # fmt: skip
def test_strip_rejects_a_loss_of_weights(
    save: Save, tmp_path: Path, tree: Any, error: type[Exception], message: str
) -> None:
    path = save("c.pth", tree)
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        ckpt_tools.strip(path)
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], before)


def test_strip_rejects_bad_targets(save: Save, tmp_path: Path) -> None:
    path = save("c.pth", {"model": {"w": torch.ones(2)}, "optimizer": OPTIMIZER})
    save("c-stripped.pth", {"mine": 1})
    with pytest.raises(WriteError, match=r"c-stripped\.pth: exists already\. Pass `force=True`"):
        ckpt_tools.strip(path)
    with pytest.raises(WriteError, match="is one of the inputs"):
        ckpt_tools.strip(path, out=path, force=True)
    with pytest.raises(UsageError, match=r"the checkpoint is a file named \*\.pth"):
        ckpt_tools.strip(path, out=tmp_path / "c.safetensors")
    with pytest.raises(LayoutError, match=r"has no ema weights"):
        ckpt_tools.strip(path, state="ema")
    assert ckpt_tools.strip(path, force=True).written


def test_strip_handles_hostile_nesting(save: Save) -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep, "b": deep}
    tree = {"model": {"w": torch.ones(2)}, "callbacks": deep}
    assert set(load(Path(ckpt_tools.strip(save("c.pth", tree)).out))) == {"model"}


# What is odd


def average(model: nn.Module, lead: str = "") -> dict[str, torch.Tensor]:
    return {lead + name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("lead", "inner"), [("model.", ""), ("", "net."), ("module.", ""), ("model.", "net.module.")])
def test_strip_keeps_weights_in_a_callback_whatever_their_prefix(lead: str, inner: str, save: Save) -> None:
    model, optimizer = trained()
    weights = {lead + name: tensor for name, tensor in model.state_dict().items()}
    # Half of the names are enough: an average may leave the buffers out.
    kept = {name: tensor for name, tensor in average(model, inner).items() if "running" not in name}
    path = save(
        "c.ckpt",
        {
            "state_dict": weights,
            "callbacks": {"Mine": {"w": kept, "n": 1}},
            "optimizer_states": [optimizer.state_dict()],
        },
    )
    report = ckpt_tools.strip(path)
    assert report.notes == ("'callbacks' holds weights, which stay: callbacks.Mine.w.",)
    new = load(Path(report.out))
    assert set(new) == {"state_dict", "callbacks"}
    assert same_bits(new["callbacks"]["Mine"]["w"], kept)


def test_strip_keeps_weights_in_training_state_of_an_unknown_layout(save: Save) -> None:
    model, optimizer = trained()
    path = save(
        "c.pth", {"netG": model.state_dict(), "callbacks": {"best": average(model)}, "optimG": optimizer.state_dict()}
    )
    new = load(Path(ckpt_tools.strip(path).out))
    assert same_bits(new["netG"], model.state_dict())
    assert same_bits(new["callbacks"]["best"], average(model))
    assert set(new) == {"netG", "callbacks"}


@pytest.mark.parametrize("several", [lambda state: [state, state], lambda state: {"g": state, "d": state}])
def test_strip_removes_optimizers_under_any_name(several: Callable[[Any], Any], save: Save) -> None:
    model, optimizer = trained()
    path = save("c.pth", {"weights": model.state_dict(), "opts": several(optimizer.state_dict()), "epoch": 3})
    report = ckpt_tools.strip(path)
    assert [entry.place for entry in report.entries] == ["opts"]
    assert set(load(Path(report.out))) == {"weights", "epoch"}


def test_strip_removes_optimizers_deep_inside(save: Save) -> None:
    model, optimizer = trained()
    inner = {"model": model.state_dict(), "adam": optimizer.state_dict(), "lr_scheduler": {"last_epoch": 1}, "step": 3}
    report = ckpt_tools.strip(save("c.pth", {"run": {"trainer": inner}, "list": [inner | {"step": 4}]}))
    new = load(Path(report.out))
    assert set(new["run"]["trainer"]) == set(new["list"][0]) == {"model", "step"}
    assert same_bits(new["run"]["trainer"]["model"], model.state_dict())


def test_strip_keeps_modules_named_like_training_state(save: Save) -> None:
    _, optimizer = trained()
    weights = {"scheduler.weight": torch.ones(2), "optimizer_net.weight": torch.ones(3), "scaler": torch.ones(4)}
    for tree in (
        {**weights, "optimizer": optimizer.state_dict()},
        {"model": {**weights, "optimizer": optimizer.state_dict()}},
    ):
        new = load(Path(ckpt_tools.strip(save("c.pth", tree), force=True).out))
        assert same_bits(new.get("model", new), weights)


def test_strip_removes_an_optimizer_with_averages_by_name(save: Save) -> None:
    model, _ = trained()
    state = {"exp_avg": average(model), "exp_avg_sq": average(model)}
    new = load(Path(ckpt_tools.strip(save("c.pth", {"model": model.state_dict(), "optimizer": state})).out))
    assert set(new) == {"model"}


def test_strip_handles_names_that_collide_in_training_state(save: Save) -> None:
    model, _ = trained()
    state = {"kept": {"a._orig_mod.w": torch.ones(2), "a.w": torch.ones(2)}}
    new = load(Path(ckpt_tools.strip(save("c.pth", {"model": model.state_dict(), "optimizer": state})).out))
    assert set(new) == {"model"}


@pytest.mark.parametrize("training", [True, False])
def test_strip_notes_averages_of_a_schedule_free_optimizer(training: bool, save: Save) -> None:
    """schedulefree's optimizers swap weights and averages in eval() and train(), and say which in each group."""
    model, optimizer = trained()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["train_mode"] = training
    for entry in state["state"].values():
        entry["z"] = entry.pop("exp_avg")
    report = ckpt_tools.strip(save("c.pth", {"model": model.state_dict(), "optimizer": state}))
    assert ["schedule-free" in note and "optimizer.eval()" in note for note in report.notes] == [True] * training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", [["optimizer"], ["trainer", "opts", "main"]])
def test_jobs_note_weights_of_a_schedule_free_optimizer_that_was_training(
    training: bool, place: list[str], save: Save, tmp_path: Path
) -> None:
    # As the state of schedulefree's AdamWScheduleFree has it.
    groups = [{"lr": 0.1, "train_mode": training, "weight_sum": 1.0, "params": [0]}]
    tree: Any = {"state": {0: {"z": torch.ones(2), "exp_avg_sq": torch.ones(2)}}, "param_groups": groups}
    for key in reversed(place):
        tree = {key: tree}
    weights = {"w": torch.ones(2)}
    paths = [save(f"{i}.pth", {"model": weights, "epoch": i, **(tree if i == 1 else {})}) for i in (1, 2)]
    with_ema = save("ema.pth", {"model": weights, "model_ema": {"w": torch.zeros(2)}, **tree})
    noted = {
        "average": ckpt_tools.average(paths, out=tmp_path / "a.pth").notes,
        "convert": ckpt_tools.convert(paths[0], to="plain", out=tmp_path / "c.pth").notes,
        "inspect": describe(read_header(paths[0])).notes,
        "ema": ckpt_tools.average(with_ema, out=tmp_path / "e.pth").notes,
    }
    said = f"'{'.'.join(place)}' is of a schedule-free optimizer that was training"
    found = {job: any(said in note for note in notes) for job, notes in noted.items()}
    assert found == {"average": training, "convert": training, "inspect": training, "ema": False}


def test_strip_handles_a_checkpoint_that_contains_itself(save: Save) -> None:
    model, optimizer = trained()
    tree: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    tree["self"] = tree
    new = load(Path(ckpt_tools.strip(save("c.pth", tree)).out))
    assert "optimizer" not in new
    assert same_bits(new["model"], model.state_dict())


def test_strip_keeps_the_only_buffers_beside_an_average_of_parameters(save: Save) -> None:
    raw = {"fc.weight": torch.ones(3, 2), "bn.running_mean": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(3)}
    ema = {"fc.weight": torch.zeros(3, 2)}
    path = save("c.pth", {"model": raw, "model_ema": ema, "optimizer": trained()[1].state_dict()})
    report = ckpt_tools.strip(path, state="auto")
    new = load(Path(report.out))
    assert set(new) == {"model", "model_ema"}
    assert same_bits(new["model"], raw)
    assert any("'model' stays" in note and "bn.running_mean" in note for note in report.notes)
    whole = save("w.pth", {"model": raw, "model_ema": {**raw, **ema}})
    assert set(load(Path(ckpt_tools.strip(whole, state="auto").out))) == {"model_ema"}


@pytest.mark.parametrize("place", [(), ("model",)])
def test_strip_removes_an_optimizer_among_the_names_of_the_weights(place: tuple[str, ...], save: Save) -> None:
    weights = {f"layer.{i}.weight": torch.full((4,), float(i)) for i in range(3)}
    kept = {
        f"optimizer.state.{slot}.{name}": tensor + 1
        for slot in ("exp_avg", "exp_avg_sq")
        for name, tensor in weights.items()
    }
    tree: Any = {**weights, **kept, "optimizer.param_groups": [{"lr": 0.1}]}
    for key in place:
        tree = {key: tree, "epoch": 3}
    report = ckpt_tools.strip(save("c.pth", tree))
    new = load(Path(report.out))
    assert same_bits(new["model"] if place else new, weights)
    entry = report.entries[0]
    assert (entry.place, entry.tensors, entry.nbytes) == (".".join((*place, "optimizer.*")), 6, 96)
