"""Counterparts: an average at a path of the script's own is the average, and never stays beside a new one."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools import average, convert, open_checkpoint
from ckpt_tools.checkpoints.layouts import states
from ckpt_tools.errors import LayoutError
from ckpt_tools.formats import read_header

Save = Callable[..., Path]
State = dict[str, torch.Tensor]

NAMES = ("stem.weight", "stem.bias", "bn.running_mean", "head.weight")


def weights(value: float, prefix: str = "", names: tuple[str, ...] = NAMES) -> State:
    return OrderedDict((f"{prefix}{name}", torch.full((2, 3), float(value))) for name in names)


def value_of(state: Any) -> float:
    """Return the one value of all tensors."""
    (value,) = {float(x) for tensor in state.values() for x in tensor.unique()}
    return value


def paths_of(tree: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], float]:
    """Return the value of the parameters in each dict of tensors, by path."""
    if not isinstance(tree, dict):
        return {}
    own = {key: value for key, value in tree.items() if isinstance(value, torch.Tensor) and value.dim()}
    tensors = {key: value for key, value in own.items() if "running" not in key}
    found = {path: value_of(tensors)} if tensors else {}
    for key, value in tree.items():
        found |= paths_of(value, (*path, key))
    return found


def nest(path: tuple[str, ...], value: Any) -> Any:
    return nest(path[:-1], {path[-1]: value, "note": "kept"}) if path else value


words = st.sampled_from(
    ["ema", "EMA", "swa_model", "averaged", "avg_net", "shadow", "model_ema2", "ema_weights", "polyak"]
)
plain = st.sampled_from(["module", "params", "state", "values", "inner", "x"])
places = st.lists(plain, max_size=2).flatmap(
    lambda inner: words.map(lambda word: (word, *inner)) | words.map(lambda word: (*inner, word))
)


@settings(max_examples=25)
@given(
    raw=st.sampled_from(["model", "state_dict", "model_state_dict"]),
    place=places,
    prefixes=st.sampled_from([("", ""), ("module.", ""), ("", "module."), ("model.", ""), ("net.module.", "net.")]),
    buffers=st.booleans(),
)
def test_average_takes_an_average_at_any_path_and_puts_it_where_the_raw_weights_were(
    tmp_path: Path, raw: str, place: tuple[str, ...], prefixes: tuple[str, str], buffers: bool
) -> None:
    names = NAMES if buffers else tuple(name for name in NAMES if "running" not in name)
    paths = []
    for i in (1, 2, 3):
        tree = {raw: weights(i, prefixes[0]), **nest(place, weights(10 * i, prefixes[1], names)), "epoch": i}
        paths.append(tmp_path / f"{i}.pth")
        torch.save(tree, paths[-1])
    report = average(paths, out=tmp_path / "out.pth", force=True)
    assert {each.state.removeprefix("ema").strip(" ()") for each in report.inputs} <= {".".join(place), ""}
    found = load(tmp_path / "out.pth")
    assert {name.removeprefix("module.") for name in found[raw]} >= {
        (prefixes[0] + name).removeprefix("module.") for name in NAMES
    }
    assert paths_of(found) == {(raw,): 20.0}  # and no other weights stay
    assert {float(x[0, 0]) for name, x in found[raw].items() if "running" in name} == {20.0 if buffers else 2.0}
    average(paths, state="raw", out=tmp_path / "raw.pth", force=True)
    assert paths_of(load(tmp_path / "raw.pth")) == {(raw,): 2.0}


def test_average_takes_an_average_out_of_the_state_of_a_callback(save: Save, tmp_path: Path) -> None:
    paths = [
        save(f"{i}.ckpt", {"state_dict": weights(i, "net."), "callbacks": {"MyEMA": {"shadow": weights(10 * i)}}})
        for i in (1, 2)
    ]
    average(paths, out=tmp_path / "out.ckpt")
    assert paths_of(load(tmp_path / "out.ckpt")) == {("state_dict",): 15.0}


@pytest.mark.parametrize(
    ("raw", "ema"),
    [("net", "ema"), ("state_dict", "ema"), ("model_state_dict", "model_ema"), ("generator", "ema_state_dict")],
)
def test_average_stands_at_the_key_of_the_raw_weights(save: Save, tmp_path: Path, raw: str, ema: str) -> None:
    paths = [save(f"{i}.pth", {raw: weights(i), ema: weights(10 * i), "epoch": i}) for i in (1, 2, 3)]
    average(paths, out=tmp_path / "out.pth")
    assert paths_of(load(tmp_path / "out.pth")) == {(raw,): 20.0}


def test_average_of_a_path_leaves_no_counterpart_behind(save: Save, tmp_path: Path) -> None:
    paths = [save(f"{i}.pth", {"net": weights(i), "net_ema": weights(10 * i)}) for i in (1, 3)]
    for state, value in (("net", 2.0), ("net_ema", 20.0)):
        average(paths, state=state, out=tmp_path / "out.pth", force=True)
        assert paths_of(load(tmp_path / "out.pth")) == {("net",): value}


def test_average_rejects_several_averages_and_names_them(save: Save, tmp_path: Path) -> None:
    tree = {"model": weights(1), "emas": {"0.999": weights(2), "0.9999": weights(3)}}
    paths = [save(f"{i}.pth", tree) for i in (1, 2)]
    with pytest.raises(
        LayoutError, match=r"is not the only average\. There are emas\.0\.999 and emas\.0\.9999.*state='emas\.0\.999'"
    ):
        average(paths, out=tmp_path / "out.pth")
    average(paths, state="emas.0.9999", out=tmp_path / "out.pth")
    assert paths_of(load(tmp_path / "out.pth"))[("model",)] == 3.0


@pytest.mark.parametrize(
    "other",
    [
        {"ema": {"module": weights(5, names=("other.weight",))}},  # of another model
        {"ema": {"decay": 0.999, "updates": 4}},
        {"semantic_head": {"weight": torch.ones(2)}},
        {"optimizer": {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": []}},
    ],
)
def test_select_takes_the_raw_weights_where_nothing_else_is_of_their_names_and_shapes(
    save: Save, other: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint(save("c.pth", {"model": weights(1), **other}))
    assert checkpoint.state.which == "raw"


def test_convert_knows_an_average_at_a_path_of_its_own(save: Save, tmp_path: Path) -> None:
    path = save("c.pth", {"model": weights(1), "ema": {"module": weights(10), "updates": 7}})
    assert {each.path for each in states(read_header(path)).values()} == {("model",), ("ema", "module")}
    convert(path, to="timm", out=tmp_path / "out.pth")
    assert paths_of(load(tmp_path / "out.pth")) == {("state_dict",): 1.0, ("state_dict_ema",): 10.0}


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        (weights(5, names=("other.weight", "one.more")), r"its ema has other names or shapes than raw \(model\)"),
        ([weights(5), weights(6)], r"is not the only average\. There are ema\.0 and ema\.1"),
    ],
)
def test_average_rejects_an_average_that_cannot_take_the_place_of_the_raw_weights(
    save: Save, tmp_path: Path, ema: Any, message: str
) -> None:
    path = save("c.pth", {"model": weights(1), "ema": ema})
    with pytest.raises(LayoutError, match=message):
        average([path], out=tmp_path / "out.pth")
    average([path], state="raw", out=tmp_path / "out.pth")
    assert paths_of(load(tmp_path / "out.pth")) == {("model",): 1.0}


def test_average_gives_a_tied_tensor_its_average_under_every_name(save: Save, tmp_path: Path) -> None:
    paths = []
    for i in (1, 3):
        shared = torch.full((3, 2), float(i))
        raw = {"emb.weight": shared, "head.weight": shared, "bn.running_mean": torch.full((2,), float(i))}
        ema = {"emb.weight": torch.full((3, 2), 10.0 * i)}
        paths.append(save(f"{i}.pth", {"model": raw, "ema": {"shadow": ema}}))
    average(paths, out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")["model"]
    assert {name: float(tensor.unique()) for name, tensor in found.items()} == {
        "emb.weight": 20.0, "head.weight": 20.0, "bn.running_mean": 2.0,
    }  # fmt: skip
    assert found["emb.weight"].data_ptr() == found["head.weight"].data_ptr()


def test_average_rejects_an_average_of_some_parameters(save: Save, tmp_path: Path) -> None:
    path = save("c.pth", {"model": weights(1), "ema": weights(5, names=NAMES[:2])})
    with pytest.raises(LayoutError, match="cannot take the place"):
        average([path], out=tmp_path / "out.pth")


def test_average_knows_an_average_of_wrapped_modules(save: Save, tmp_path: Path) -> None:
    raw = {"l0._orig_mod.weight": torch.ones(2), "l1.weight": torch.ones(2)}
    ema = {"l0.weight": torch.full((2,), 5.0), "l1.weight": torch.full((2,), 5.0)}
    average([save("c.pth", {"model": raw, "ema": {"m": ema}})], out=tmp_path / "out.pth")
    assert value_of(load(tmp_path / "out.pth")["model"]) == 5.0


@pytest.mark.parametrize("lead", ["net.", "model.backbone.", "module.net."])
def test_average_knows_an_average_of_the_net_beside_which_there_is_a_loss(
    save: Save, tmp_path: Path, lead: str
) -> None:
    paths = []
    for i in (1, 2):
        state = {**weights(i, lead), "loss.center": torch.full((4,), float(i)), "metric.total": torch.ones(1)}
        tree = {"state_dict": state, "callbacks": {"EMACallback": {"ema_weights": weights(10 * i), "decay": 0.9}}}
        paths.append(save(f"{i}.ckpt", tree))
    report = average(paths, out=tmp_path / "out.ckpt")
    found = load(tmp_path / "out.ckpt")
    assert found.keys() == {"state_dict"}
    bare = {name.removeprefix("module."): tensor for name, tensor in found["state_dict"].items()}
    assert value_of({name: t for name, t in bare.items() if name.startswith(lead.removeprefix("module."))}) == 15.0
    assert bare["loss.center"].tolist() == [1.5] * 4
    assert any("averaged from the raw weights: 'loss.center'" in note for note in report.notes)


def test_average_rejects_an_average_of_one_of_two_nets_in_a_dict(save: Save, tmp_path: Path) -> None:
    state = {**weights(1, "generator."), **weights(2, "critic.")}
    path = save("c.pth", {"state_dict": state, "ema_generator": weights(3)})
    with pytest.raises(LayoutError, match=r"the average of 'generator\.\*' alone, and 'critic\.stem\.weight' has none"):
        average([path], out=tmp_path / "out.pth")
    average([path], state="raw", out=tmp_path / "out.pth")
    assert load(tmp_path / "out.pth").keys() == {"state_dict"}


@pytest.mark.parametrize("place", ["list", "tuple"])
def test_average_leaves_no_average_inside_a_list(save: Save, tmp_path: Path, place: str) -> None:
    kind = list if place == "list" else tuple
    paths = [
        save(f"{i}.pth", {"model": weights(i), "extras": kind([{"ema": weights(10 * i), "lr": 0.1}, "note"])})
        for i in (1, 2)
    ]
    average(paths, out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert value_of(found["model"]) == 15.0
    assert found["extras"] == kind([{"lr": 0.1}, "note"])


def test_average_takes_a_list_without_names_for_that_of_the_part_that_it_fits(save: Save, tmp_path: Path) -> None:
    critic = {"c.weight": torch.ones(4, 4), "c.bias": torch.ones(4)}
    shadow = {"decay": 0.9, "num_updates": 3, "shadow_params": list(critic.values())}
    paths = [save(f"{i}.pth", {"model": weights(i), "critic": critic, "ema_critic": shadow}) for i in (1, 2)]
    with pytest.raises(LayoutError, match=r"looks like an average of a part|only 'ema_critic"):
        average(paths, out=tmp_path / "out.pth")
    average(paths, state="raw", out=tmp_path / "out.pth")
    found = load(tmp_path / "out.pth")
    assert {key: {*value} for key, value in found.items()} == {"model": {*NAMES}, "critic": {*critic}}


def test_average_rejects_weights_with_two_modules_of_one_name_beside_an_average(save: Save, tmp_path: Path) -> None:
    raw = {**weights(1), "module.stem.weight": torch.ones(2, 3)}
    path = save("c.pth", {"model": raw, "ema": {"m": weights(5)}})
    with pytest.raises(LayoutError, match=r"'ema\.m' looks like an average"):
        average([path], out=tmp_path / "out.pth")
    average([path], state="raw", out=tmp_path / "out.pth")
    assert value_of(load(tmp_path / "out.pth")["model"]) == 1.0


def test_average_leaves_no_second_average_beside_one_at_the_usual_key_of_raw_weights(
    save: Save, tmp_path: Path
) -> None:
    averaged = {"n_averaged": torch.tensor(7), **weights(20, "module.")}
    path = save("c.pth", {"model": weights(0), "model_avg": {"ema": weights(10), "k": 3}, "state_dict": averaged})
    average([path], out=tmp_path / "out.pth")
    assert paths_of(load(tmp_path / "out.pth")) == {("model",): 20.0}


def test_a_message_lists_few_of_many_averages(tmp_path: Path) -> None:
    history = {f"ema_{i}": {"a.weight": torch.full((2,), float(i))} for i in range(500)}
    torch.save({"model": {"a.weight": torch.ones(2)}, "history": history}, tmp_path / "c.pth")
    with pytest.raises(LayoutError, match=r"There are history\.ema_0, .* and 494 more\. Choose with") as caught:
        average(tmp_path / "c.pth", out=tmp_path / "x.pth")
    assert len(str(caught.value)) < 500


def test_averages_of_other_shapes_are_not_written_as_the_weights_of_torchtitan(tmp_path: Path) -> None:
    averages = {"state.a.weight.ema_params": torch.ones(2), "state.b.weight.ema_params": torch.ones(3)}
    torch.save({"a.weight": torch.ones(4, 2), "b.weight": torch.ones(3), "ema": averages}, tmp_path / "c.pth")
    with pytest.raises(LayoutError, match=r"'a\.weight' has another shape than in the raw weights"):
        average(tmp_path / "c.pth", out=tmp_path / "x.pth")


@pytest.mark.parametrize(
    "hold",
    [list, tuple, lambda tensors: argparse.Namespace(shadow=tensors), lambda tensors: dict(enumerate(tensors))],
    ids=["list", "tuple", "namespace", "numbers"],
)
@pytest.mark.parametrize("key", ["ema", "shadow_weights", "swa_params"])
def test_no_average_without_names_stays_beside_a_new_average(save: Save, here: Path, hold: Any, key: str) -> None:
    for i in (1, 2):
        net = {"a.weight": torch.full((2, 3), float(i)), "a.bias": torch.full((2,), float(i))}
        other = [torch.full((2, 3), float(i))]
        save(
            f"e{i}.pt",
            {"model": net, "extra": {key: hold([t * 0 for t in net.values()])}, "ema_of_loss": other, "step": i},
        )
    report = average(["e1.pt", "e2.pt"], out="o.pt")
    found = torch.load("o.pt", weights_only=True)
    assert found["model"]["a.weight"].tolist() == [[1.5] * 3] * 2
    assert key not in found["extra"]
    assert f"extra.{key}" in report.dropped
    assert len(found["ema_of_loss"]) == 1  # tensors of another shape are of something else
