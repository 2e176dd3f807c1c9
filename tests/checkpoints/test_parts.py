"""Parts: a model in several dicts is averaged as a whole, or not without a word."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import run
from conftest import load
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from ckpt_tools import average, convert
from ckpt_tools.errors import AlignmentError, LayoutError, UsageError

Save = Callable[..., Path]


def network(seed: int, wrapped: bool = False) -> OrderedDict[str, torch.Tensor]:
    """Return the weights of a small network; every ten seeds are of one model."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3 + seed // 10, 2), nn.BatchNorm1d(2))
    return (nn.DataParallel(model) if wrapped else model).state_dict()


def mean(states: list[OrderedDict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return torch.stack([state[name].double() for state in states]).mean(0).float()


@given(
    others=st.lists(
        st.sampled_from(["decoder", "generator", "netD", "critic", "vq.code"]), min_size=1, max_size=3, unique=True
    ),
    first=st.sampled_from(["model", "state_dict"]),
    wrapped=st.booleans(),
)
def test_average_takes_all_parts_of_a_model(tmp_path: Path, others: list[str], first: str, wrapped: bool) -> None:
    keys = [first, *others]
    trees = [{key: network(10 * j + i, wrapped) for j, key in enumerate(keys)} | {"epoch": i} for i in range(3)]
    paths = [tmp_path / f"{i}.pth" for i in range(3)]
    for path, tree in zip(paths, trees, strict=True):
        torch.save(tree, path)
    report = average(paths, out=tmp_path / "out.pth", force=True)
    found = load(tmp_path / "out.pth")
    lead = "module." if wrapped else ""
    for key in keys:
        assert list(found[key]) == [name.removeprefix(lead) for name in trees[0][key]]
        assert found[key]._metadata == network(0)._metadata
        for name in found[key]:
            if found[key][name].is_floating_point():
                assert torch.equal(found[key][name], mean([tree[key] for tree in trees], lead + name))
    assert all(f"raw ({key})" in report.inputs[0].state for key in keys)


def test_average_of_a_part_asked_for_by_its_path_reports_the_others(save: Save, tmp_path: Path) -> None:
    paths = [save(f"{i}.pth", {"model": network(i), "critic": network(10 + i)}) for i in range(2)]
    report = average(paths, state="model", out=tmp_path / "out.pth")
    assert torch.equal(load(tmp_path / "out.pth")["critic"]["0.weight"], network(11)["0.weight"])
    assert any("critic" in note for note in report.notes)


def test_average_takes_the_parts_that_are_asked_for(save: Save, tmp_path: Path) -> None:
    trees = [{"nets": {"a": network(i), "b": network(10 + i), "c": network(20 + i)}} for i in range(2)]
    paths = [save(f"{i}.pth", tree) for i, tree in enumerate(trees)]
    average(paths, state=["nets.a", "nets.c"], out=tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {name.rpartition(".0.")[0] for name in found if name.endswith("0.weight")} == {"nets.a", "nets.c"}
    for part in "ac":
        want = mean([tree["nets"][part] for tree in trees], "0.weight")
        assert torch.equal(found[f"nets.{part}.0.weight"], want)


def test_avg_takes_state_several_times(save: Save, here: Path) -> None:
    for i in range(2):
        torch.save({"enc": network(i), "dec": network(10 + i)}, f"{i}.pth")
    done = run("avg", "0.pth", "1.pth", "--state", "enc", "--state", "dec", "-o", "out.pth", "--json")
    assert done.code == 0
    assert json.loads(done.out)["inputs"][0]["state"] == "enc and dec"
    want = mean([network(10), network(11)], "0.bias")
    assert torch.equal(load(Path("out.pth"))["dec"]["0.bias"], want)


def test_average_rejects_an_average_of_one_part_alone(save: Save, tmp_path: Path) -> None:
    tree = {"model": network(1), "model_ema": network(2), "generator": network(13)}
    path = save("c.pth", tree)
    with pytest.raises(
        LayoutError, match=r"'generator' holds weights, too, and only 'model_ema' is an average.*state='raw'"
    ):
        average([path], out=tmp_path / "out.pth")
    average([path], state="model_ema", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert torch.equal(found["model"]["0.weight"], network(2)["0.weight"])


def test_average_leaves_the_state_of_a_loss_out_of_the_model(save: Save, tmp_path: Path) -> None:
    path = save("c.pth", {"model": network(1), "loss": {"center": torch.ones(1, 4)}})
    average([path], out=tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == network(1).keys()


def test_average_takes_all_dicts_of_a_nested_model(save: Save, tmp_path: Path) -> None:
    trees = [
        {
            "model": {"lm": {"embedding": {"words": network(i)}, "encoder": network(10 + i)}},
            "optimizer": {"x": 1},
            "it": i,
        }
        for i in range(3)
    ]
    paths = [save(f"{i}.pt", tree) for i, tree in enumerate(trees)]
    average(paths, out=tmp_path / "out.pt")
    found = load(tmp_path / "out.pt")["model"]["lm"]
    want = mean([tree["model"]["lm"]["encoder"] for tree in trees], "0.weight")
    assert torch.equal(found["encoder"]["0.weight"], want)
    want = mean([tree["model"]["lm"]["embedding"]["words"] for tree in trees], "0.bias")
    assert torch.equal(found["embedding"]["words"]["0.bias"], want)


def test_average_rejects_parts_in_a_list(save: Save, tmp_path: Path) -> None:
    path = save("c.pth", {"model": network(1), "critics": [network(12), network(13)]})
    with pytest.raises(LayoutError, match=r"'critics\.0' holds weights, too, but in a list\. Use `state='model'`"):
        average([path], out=tmp_path / "out.pth")


@pytest.mark.parametrize("state", [["net", "net.x"], ["net", "net"]])
def test_average_rejects_parts_whose_names_are_not_apart(save: Save, tmp_path: Path, state: list[str]) -> None:
    path = save("c.pth", {"net": network(1), "net.x": network(2)})
    with pytest.raises(LayoutError, match="give one name to two tensors"):
        average([path], state=state, out=tmp_path / "out.pth")


def test_average_leaves_copies_of_the_model_as_they_are(save: Save, tmp_path: Path) -> None:
    """The best weights so far, running gradients, another model of the same kind: none is a part of the model."""
    for key in ("best_state_dict", "grads_avg", "best_ema", "semantic_model", "swav", "momentum_encoder"):
        paths = [save(f"{i}.pth", {"state_dict": network(i), key: network(5 + i)}) for i in (1, 2)]
        report = average(paths, out=tmp_path / "out.pth", force=True)
        found = load(tmp_path / "out.pth")
        assert torch.equal(found["state_dict"]["0.weight"], mean([network(1), network(2)], "0.weight"))
        assert torch.equal(found[key]["0.weight"], network(7)["0.weight"])
        assert any(key in note for note in report.notes)


def test_average_of_several_averages_puts_each_in_the_place_of_its_raw_weights(save: Save, tmp_path: Path) -> None:
    trees = [
        {"netG_A": network(i), "netG_B": network(2 + i), "netG_A_ema": network(4 + i), "netG_B_ema": network(6 + i)}
        for i in (1, 2)
    ]
    paths = [save(f"{i}.pth", tree) for i, tree in enumerate(trees)]
    average(paths, state=["netG_A_ema", "netG_B_ema"], out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert found.keys() == {"netG_A", "netG_B"}
    for key in found:
        assert torch.equal(found[key]["0.weight"], mean([tree[f"{key}_ema"] for tree in trees], "0.weight"))


def test_average_of_a_known_and_another_part_keeps_both(save: Save, tmp_path: Path) -> None:
    paths = [save(f"{i}.pth", {"model": network(i), "generator": network(10 + i)}) for i in (1, 2)]
    for order in (["model", "generator"], ["generator", "model"], ["raw", "generator"]):
        average(paths, state=order, out=tmp_path / "out.pth", force=True)
        found = load(tmp_path / "out.pth")
        assert torch.equal(found["model"]["0.weight"], mean([network(1), network(2)], "0.weight"))
        assert torch.equal(found["generator"]["0.weight"], mean([network(11), network(12)], "0.weight"))


@pytest.mark.parametrize("ema", [{"generator_ema": network(3)}, {"ema": {"enc": network(4), "dec": network(5)}}])
def test_average_rejects_averages_of_some_parts(save: Save, tmp_path: Path, ema: dict[str, object]) -> None:
    raw = {"generator": network(12)} if "generator_ema" in ema else {}
    model = network(22) if raw else {"enc": network(1), "dec": network(12)}
    path = save("c.pth", {"model": model, **raw, **ema})
    if raw:
        ema["generator_ema"] = network(13)
        path = save("c.pth", {"model": model, **raw, **ema})
    with pytest.raises(LayoutError, match="looks like an average of a part"):
        average([path], out=tmp_path / "out.pth")
    average([path], state="raw", out=tmp_path / "out.pth")
    assert "generator_ema" not in load(tmp_path / "out.pth")


def test_average_rejects_a_nested_model_of_averages_alone(save: Save, tmp_path: Path) -> None:
    path = save("c.pth", {"model": {"net_ema": network(1)}})
    with pytest.raises(LayoutError, match=r"look like averages\. Choose with `state='model\.net_ema'`"):
        average([path], state="raw", out=tmp_path / "out.pth")
    average([path], state="model.net_ema", out=tmp_path / "out.pth")
    assert torch.equal(load(tmp_path / "out.pth")["model"]["net_ema"]["0.weight"], network(1)["0.weight"])


@pytest.mark.parametrize("own", [("state_dict_ema", "task_state_ema"), ("model_ema", "ema_heads")])
def test_average_takes_the_average_of_each_part(save: Save, tmp_path: Path, own: tuple[str, str]) -> None:
    """timm's tasks keep the state of a projection in a dict of its own, and its average in another one."""
    raw = ("state_dict", "task_state") if own[0] == "state_dict_ema" else ("model", "heads")
    trees = [
        {
            raw[0]: network(i), raw[1]: {"projection": network(10 + i)},
            own[0]: network(3 + i), own[1]: {"projection": network(13 + i)}, "epoch": i,
        }
        for i in range(3)
    ]  # fmt: skip
    paths = [save(f"{i}.pth", tree) for i, tree in enumerate(trees)]
    for state, keys in (("auto", own), ("ema", own), ("raw", raw)):
        average(paths, state=state, out=tmp_path / "out.pth", force=True)
        found = load(tmp_path / "out.pth")
        assert found.keys() == {*raw, "epoch"}
        want = mean([tree[keys[0]] for tree in trees], "0.weight")  # type: ignore[misc]
        assert torch.equal(found[raw[0]]["0.weight"], want)
        want = mean([tree[keys[1]]["projection"] for tree in trees], "0.weight")  # type: ignore[index]
        assert torch.equal(found[raw[1]]["projection"]["0.weight"], want)


def test_average_gives_averages_of_parts_the_names_of_their_raw_weights(save: Save, tmp_path: Path) -> None:
    """Without their buffers, and with the prefix of a wrapper: nobody could load them so from the place of the raw."""

    def averaged(seed: int) -> dict[str, torch.Tensor]:
        return {f"module.{name}": tensor for name, tensor in network(seed).items() if "_" not in name}

    trees = [
        {"model": network(i), "head": network(10 + i), "model_ema": averaged(3 + i), "head_ema": averaged(13 + i)}
        for i in range(2)
    ]
    average([save(f"{i}.pth", tree) for i, tree in enumerate(trees)], out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    for key, seeds in (("model", (3, 4)), ("head", (13, 14))):
        assert found[key].keys() == network(0).keys()
        assert torch.equal(found[key]["0.weight"], mean([network(seed) for seed in seeds], "0.weight"))
        assert torch.equal(found[key]["1.running_var"], mean([tree[key] for tree in trees], "1.running_var"))


def test_average_rejects_a_part_of_which_the_files_share_no_tensor(save: Save, tmp_path: Path) -> None:
    paths = [save(f"{i}.pth", {"model": network(i), "head": {f"{i}.weight": torch.ones(2)}}) for i in range(2)]
    with pytest.raises(LayoutError, match=r"share no tensor of 'head'"):
        average(paths, keys="intersection", out=tmp_path / "out.pth")


def test_average_rejects_raw_weights_of_averages_alone(save: Save, tmp_path: Path) -> None:
    path = save("c.pth", {"state_dict_ema": network(1), "epoch": 3})
    with pytest.raises(LayoutError, match=r"has no raw weights, only ema \(state_dict_ema\)\. Use `state='ema'`"):
        average([path], state="raw", out=tmp_path / "out.pth")


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_a_part_that_one_file_lacks_is_named(lacking: int, tmp_path: Path) -> None:
    paths = [tmp_path / f"c-{i}.pth" for i in range(3)]
    for i, path in enumerate(paths):
        parts = {"model": {"a.weight": torch.ones(2)}, "generator": {"g.weight": torch.ones(3)}}
        if i == lacking:
            del parts["generator"]
        torch.save(parts, path)
    said = (
        rf"c-{lacking}\.pth has no weights at 'generator', a part of the model \(2 of 3 .* use `state='model'`, which"
    )
    with pytest.raises(AlignmentError, match=said):
        average(paths, out=tmp_path / "x.pth")
    average(paths, state="model", out=tmp_path / "x.pth")


def test_no_state_at_all_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"a.weight": torch.ones(2)}}, tmp_path / "c.pth")
    with pytest.raises(UsageError, match="`state` is empty"):
        average(tmp_path / "c.pth", state=[], out=tmp_path / "x.pth")


def test_an_item_of_a_list_is_chosen_by_its_number_and_written_alone(save: Save, here: Path) -> None:
    """DDIM and NCSN save [model, optimizer, epoch, step, ema]."""
    for i in (1, 2):
        net = {"a.weight": torch.full((2, 3), float(i)), "a.bias": torch.full((2,), float(i))}
        optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
        save(f"c{i}.pth", [net, optimizer, i, i, {name: 10 * tensor for name, tensor in net.items()}])
    with pytest.raises(LayoutError, match=r"There are tensors in 0, 4\. Choose with `state='0'`"):
        average(["c1.pth", "c2.pth"])
    for state, value in (("0", 1.5), ("4", 15.0)):
        report = average(["c1.pth", "c2.pth"], state=state, out=f"o{state}.pth")
        assert set(report.dropped) == {"0", "1", "2", "3", "4"} - {state}
        assert torch.load(f"o{state}.pth", weights_only=True)["a.weight"].tolist() == [[value] * 3] * 2
    report = convert("c1.pth", state="4", to="plain", out="e.pth")
    assert torch.load("e.pth", weights_only=True)["a.bias"].tolist() == [10.0, 10.0]
    assert set(report.dropped) == {"0", "1", "2", "3"}
    with pytest.raises(LayoutError, match="nothing at '7'"):
        average(["c1.pth", "c2.pth"], state="7")
