"""Schedule-free optimizers: `state='eval'` gives what their `eval()` would leave in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, same_bits
from hypothesis import given
from hypothesis import strategies as st

import ckpt_tools
from ckpt_tools.errors import LayoutError

Save = Callable[..., Path]
Weights = dict[str, torch.Tensor]


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    random = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "bn.running_mean": (4,), "b.weight": (2, 4), "b.bias": (2,)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def trained(names: Sequence[str] = ("a.weight", "a.bias", "b.weight", "b.bias")) -> list[str]:
    return [*names]


def optimizer(
    z: Mapping[str, torch.Tensor],
    groups: Sequence[Sequence[str]],
    *,
    beta: float = 0.9,
    training: bool = True,
    without_state: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """Lay out what AdamWScheduleFree saves: numbers in the order of the groups, and a z for each number."""
    numbers = {name: i for i, name in enumerate(name for group in groups for name in group)}
    state = {i: {"z": z[name], "exp_avg_sq": z[name] ** 2} for name, i in numbers.items() if name not in without_state}
    facts = {"betas": (beta, 0.999), "train_mode": training, "weight_sum": 1.0, **more}
    return {"state": state, "param_groups": [{**facts, "params": [numbers[n] for n in group]} for group in groups]}


def x_of(y: Weights, z: Weights, names: Sequence[str], beta: float = 0.9) -> Weights:
    """The oracle: NumPy in float64, rounded once to the dtype of y."""
    found = dict(y)
    for name in names:
        wide = y[name].double().numpy() / beta + (1 - 1 / beta) * z[name].double().numpy()
        found[name] = torch.from_numpy(wide.astype(np.float64)).to(y[name].dtype)
    return found


def close(found: Mapping[str, torch.Tensor], expected: Weights) -> bool:
    """Equal but for the order in which float64 adds up, which moves float32 by its last bit at most."""
    return list(found) == list(expected) and all(
        torch.allclose(found[name].double(), expected[name].double(), rtol=2e-7, atol=1e-30) for name in expected
    )


NAMES = trained()


@pytest.mark.parametrize("beta", [0.9, 0.98, 0.5])
def test_eval_is_y_over_beta_and_the_rest_of_z(beta: float, save: Save, tmp_path: Path) -> None:
    y, z = weights(0), weights(1)
    path = save("c.pth", {"model": y, "opt": optimizer(z, [NAMES], beta=beta)})
    ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")
    assert close(load(tmp_path / "x.pth"), x_of(y, z, NAMES, beta))
    assert same_bits(dict(ckpt_tools.open_checkpoint(path, state="eval")), load(tmp_path / "x.pth"))


def test_momentum_is_the_beta_of_sgd(save: Save, tmp_path: Path) -> None:
    y, z = weights(0), weights(1)
    state = optimizer(z, [NAMES])
    for group in state["param_groups"]:
        del group["betas"]
        group["momentum"] = 0.8
    ckpt_tools.convert(save("c.pth", {"model": y, "opt": state}), to="plain", state="eval", out=tmp_path / "x.pth")
    assert close(load(tmp_path / "x.pth"), x_of(y, z, NAMES, 0.8))


def test_an_average_sums_both_tensors_of_each_file_and_rounds_once(save: Save, tmp_path: Path) -> None:
    paths, expected = [], {name: torch.zeros(tensor.shape).double() for name, tensor in weights().items()}
    for i in range(3):
        y, z = weights(i, torch.bfloat16), weights(i + 10, torch.bfloat16)
        paths.append(save(f"{i}.pth", {"model": y, "opt": optimizer(z, [NAMES]), "epoch": i}))
        wide = x_of({n: t.double() for n, t in y.items()}, {n: t.double() for n, t in z.items()}, NAMES)
        expected = {name: expected[name] + wide[name] / 3 for name in expected}
    ckpt_tools.average(paths, state="eval", out=tmp_path / "avg.pth")
    found = load(tmp_path / "avg.pth")["model"]
    assert all(found[name].equal(expected[name].to(torch.bfloat16)) for name in expected)


def test_files_in_train_and_eval_mode_are_averaged_together(save: Save, tmp_path: Path) -> None:
    y, z, x = weights(0), weights(1), weights(2)
    paths = [
        save("1.pth", {"model": y, "opt": optimizer(z, [NAMES])}),
        save("2.pth", {"model": x, "opt": optimizer(z, [NAMES], training=False)}),
    ]
    ckpt_tools.average(paths, state="eval", out=tmp_path / "avg.pth")
    first = x_of({n: t.double() for n, t in y.items()}, z, NAMES)
    assert close(load(tmp_path / "avg.pth")["model"], {n: ((first[n] + x[n].double()) / 2).float() for n in x})


def test_in_eval_mode_the_weights_are_taken_as_they_are(save: Save, tmp_path: Path) -> None:
    path = save("c.pth", {"model": weights(0), "opt": optimizer(weights(1), [NAMES], training=False)})
    report = ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")
    assert same_bits(load(tmp_path / "x.pth"), weights(0))
    assert any("was not training" in note for note in report.notes)


def test_buffers_and_frozen_parameters_stay(save: Save, tmp_path: Path) -> None:
    y, z = weights(0), weights(1)
    some = ["a.weight", "b.weight", "b.bias"]
    path = save("c.pth", {"model": y, "opt": optimizer(z, [some])})
    report = ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")
    assert close(load(tmp_path / "x.pth"), x_of(y, z, some))
    assert any("running statistics" in note for note in report.notes)
    assert load(tmp_path / "x.pth")["bn.running_mean"].equal(y["bn.running_mean"])


def test_a_parameter_without_a_gradient_has_no_z_and_stays(save: Save, tmp_path: Path) -> None:
    y, z = weights(0), weights(1)
    path = save("c.pth", {"model": y, "opt": optimizer(z, [NAMES], without_state=["a.bias"])})
    ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")
    assert close(load(tmp_path / "x.pth"), x_of(y, z, [name for name in NAMES if name != "a.bias"]))


def test_tied_weights_are_one_parameter(save: Save, tmp_path: Path) -> None:
    y, z = weights(0), weights(1)
    y["again.weight"] = y["a.weight"]
    path = save("c.pth", {"model": y, "opt": optimizer(z, [NAMES])})
    ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")
    found = load(tmp_path / "x.pth")
    assert found["again.weight"].data_ptr() == found["a.weight"].data_ptr()
    assert close({n: found[n] for n in weights()}, x_of(weights(0), z, NAMES))


def test_groups_of_other_shapes_are_told_apart(save: Save, tmp_path: Path) -> None:
    """Weight decay for matrices alone: timm's groups have the order of the model, one by one."""
    y, z = weights(0), weights(1)
    path = save("c.pth", {"model": y, "opt": optimizer(z, [["a.bias", "b.bias"], ["a.weight", "b.weight"]])})
    ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")
    assert close(load(tmp_path / "x.pth"), x_of(y, z, NAMES))


def test_names_in_the_groups_prove_any_order(save: Save, tmp_path: Path) -> None:
    y, z = ({f"module.{n}": t.reshape(-1)[:2].clone() for n, t in weights(seed).items()} for seed in (0, 1))
    groups = [["module.b.bias", "module.a.weight"], ["module.b.weight", "module.a.bias"]]
    state = optimizer(z, groups)
    for group, names in zip(state["param_groups"], groups, strict=True):
        group["param_names"] = [name.removeprefix("module.") for name in names]
    ckpt_tools.convert(save("c.pth", {"model": y, "opt": state}), to="plain", state="eval", out=tmp_path / "x.pth")
    assert close(load(tmp_path / "x.pth"), x_of(y, z, [f"module.{name}" for name in NAMES]))


@pytest.mark.parametrize(
    ("groups", "extra"),
    [
        ([["a.bias"], ["a.weight", "b.weight"]], {"c.bias": (4,)}),  # which of two biases is frozen?
        ([["a.weight", "a.bias"], ["c.bias", "b.weight", "b.bias"]], {"c.bias": (4,)}),  # one shape in two groups
        ([["b.weight", "b.bias", "a.weight", "a.bias"]], {}),  # not the order of the model
        ([["a.weight", "a.bias", "b.weight", "b.bias", "other"]], {}),  # of another model
    ],
)
def test_an_order_that_is_not_certain_is_refused(
    groups: list[list[str]], extra: dict[str, tuple[int, ...]], save: Save, tmp_path: Path
) -> None:
    y, z = ({**weights(i), **{name: torch.ones(shape) for name, shape in extra.items()}} for i in (0, 1))
    z["other"] = torch.ones(7)
    path = save("c.pth", {"model": y, "opt": optimizer(z, groups)})
    with pytest.raises(LayoutError, match=r"order of the parameters in 'opt' is not certain.*eval\(\)"):
        ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")


@given(st.lists(st.sampled_from([(2,), (3,), (2, 2)]), min_size=1, max_size=6), st.data())
def test_frozen_parameters_give_the_right_weights_or_a_refusal(
    tmp_path: Path, shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    y = {f"p{i}.weight": torch.full(shape, float(i)) for i, shape in enumerate(shapes)}
    z = {name: tensor + 100 for name, tensor in y.items()}
    chosen = [name for name in y if data.draw(st.booleans())] or [*y]
    torch.save({"model": y, "opt": optimizer(z, [chosen], beta=0.5)}, tmp_path / "c.pth")
    try:
        found = ckpt_tools.open_checkpoint(tmp_path / "c.pth", state="eval")
    except LayoutError:
        return
    assert close(dict(found), x_of(y, z, chosen, 0.5))


def test_all_parts_of_a_model_are_evaluated(save: Save, tmp_path: Path) -> None:
    y, z = weights(0), weights(1)
    parts = {"model": {"fc.weight": y["a.weight"]}, "generator": {"fc.bias": y["a.bias"], "fc.weight": y["b.weight"]}}
    names = ["a.weight", "a.bias", "b.weight"]
    path = save("c.pth", {**parts, "optimizer": optimizer(z, [names])})
    ckpt_tools.average(path, state="eval", out=tmp_path / "x.pth")
    new, x = load(tmp_path / "x.pth"), x_of(y, z, names)
    assert close(new["model"], {"fc.weight": x["a.weight"]})
    assert close(new["generator"], {"fc.bias": x["a.bias"], "fc.weight": x["b.weight"]})


def test_strip_keeps_the_averages_without_the_optimizer(save: Save, tmp_path: Path) -> None:
    y, z = weights(0), weights(1)
    path = save("c.pth", {"model": y, "opt": optimizer(z, [NAMES]), "epoch": 3})
    report = ckpt_tools.strip(path, state="eval", out=tmp_path / "x.pth")
    assert [note for note in report.notes if "running statistics" not in note] == []
    assert (report.compacted, [entry.place for entry in report.entries]) == (0, ["opt"])
    new = load(tmp_path / "x.pth")
    assert set(new) == {"model", "epoch"}
    assert close(new["model"], x_of(y, z, NAMES))


def test_diff_and_recal_bn_refuse_weights_that_are_in_no_file(save: Save) -> None:
    path = save("c.pth", {"model": weights(0), "opt": optimizer(weights(1), [NAMES])})
    with pytest.raises(LayoutError, match=r"in no file, but computed.*convert\(state='eval'\)"):
        ckpt_tools.diff(path, path, state="eval")
    with pytest.raises(LayoutError, match=r"in no file, but computed"):
        ckpt_tools.recalibrate_checkpoint(path, data="nowhere", state="eval")


@pytest.mark.parametrize(
    ("opt", "said"),
    [
        ({"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}, "no state of a schedule-free"),
        ({"state": {0: {"z": torch.ones(2)}}, "param_groups": [{"params": [0], "betas": (0.9, 0.9)}]}, "does not say"),
        ({"state": {0: {"z": torch.ones(2)}}, "param_groups": [{"params": [0], "train_mode": True}]}, "does not say"),
        (
            {"state": {0: {"z": torch.ones(2)}}, "param_groups": [{"params": [0], "train_mode": True, "momentum": 0}]},
            "does not say",
        ),
    ],
)
def test_a_file_that_does_not_say_enough_is_refused(opt: Any, said: str, save: Save) -> None:
    path = save("c.pth", {"model": {"w": torch.ones(2)}, "optimizer": opt})
    with pytest.raises(LayoutError, match=said):
        ckpt_tools.open_checkpoint(path, state="eval")


@pytest.mark.parametrize("swapped", [False, True])
def test_parts_in_another_order_than_the_optimizer_are_told_by_their_shapes(
    swapped: bool, save: Save, tmp_path: Path
) -> None:
    y, z = weights(0), weights(1)
    parts = {"model": {"fc.weight": y["a.weight"], "fc.bias": y["a.bias"]}, "generator": {"fc.weight": y["b.weight"]}}
    names = ["a.weight", "a.bias", "b.weight"]
    path = save("c.pth", {**parts, "opt": optimizer(z, [names[2:] + names[:2] if swapped else names])})
    ckpt_tools.average(path, state="eval", out=tmp_path / "x.pth")
    new, x = load(tmp_path / "x.pth"), x_of(y, z, names)
    assert close(new["model"], {"fc.weight": x["a.weight"], "fc.bias": x["a.bias"]})
    assert close(new["generator"], {"fc.weight": x["b.weight"]})


@pytest.mark.parametrize("frozen", [False, True])
def test_parts_of_the_same_shapes_are_refused(frozen: bool, save: Save, tmp_path: Path) -> None:
    """The optimizer may have the decoder before the encoder."""
    parts = {"encoder": {"e.weight": torch.ones(4, 4)}, "decoder": {"d.weight": torch.zeros(4, 4)}}
    if frozen:
        parts["decoder"]["d.bias"] = torch.zeros(3)
    z = {name: torch.ones(4, 4) for name in ("e.weight", "d.weight")}
    path = save("c.pth", {"model": parts, "opt": optimizer(z, [["d.weight", "e.weight"]])})
    with pytest.raises(LayoutError, match="the order of the parameters in 'opt' is not certain"):
        ckpt_tools.average(path, state="eval", out=tmp_path / "x.pth")


@pytest.mark.parametrize("of_z", [torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("groups", [[NAMES], [["a.weight", "b.weight"], ["a.bias", "b.bias"]], [NAMES[:2]]])
def test_an_average_of_another_kind_of_numbers_is_refused(
    of_z: torch.dtype, groups: list[list[str]], save: Save, tmp_path: Path
) -> None:
    z = {name: tensor.to(of_z) for name, tensor in weights(1).items()}
    path = save("c.pth", {"model": weights(0), "opt": optimizer(z, groups)})
    with pytest.raises(LayoutError, match="do not match those of raw"):
        ckpt_tools.average(path, state="eval", out=tmp_path / "x.pth")


@pytest.mark.parametrize("place", ["optimizer", "optimizers"])
@pytest.mark.parametrize("to", ["timm", "torchvision", "model-state-dict"])
def test_convert_leaves_out_an_optimizer_that_goes_on_from_other_weights(
    place: str, to: str, save: Save, tmp_path: Path
) -> None:
    y, z = weights(0), weights(1)
    opt = optimizer(z, [NAMES])
    path = save("c.pth", {"model": y, place: [opt] if place == "optimizers" else opt, "epoch": 3})
    report = ckpt_tools.convert(path, state="eval", to=to, updates=1, out=tmp_path / "x.pth")
    assert place in report.dropped
    assert place not in load(tmp_path / "x.pth")
    assert load(tmp_path / "x.pth")["epoch"] == 3
    with pytest.raises(LayoutError, match="holds no state of a schedule-free optimizer"):  # x is not taken for y
        ckpt_tools.average(tmp_path / "x.pth", state="eval", out=tmp_path / "z.pth")


def test_computed_codes_are_not_dequantized(save: Save, tmp_path: Path) -> None:
    y = {"a.weight": torch.ones(4, 3).to(torch.float8_e4m3fn), "a.weight_scale": torch.tensor(0.5)}
    path = save("c.pth", {"model": y, "opt": optimizer({"a.weight": torch.ones(4, 3)}, [["a.weight"]])})
    with pytest.raises(LayoutError, match=r"does not know how 'a\.weight_scale' scales 'a\.weight'|is not certain"):
        ckpt_tools.average(path, state="eval", dequantize=True, out=tmp_path / "x.pth")
