"""`lora='product'`: the average of LoRA updates is exact, whatever their ranks and scales."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ckpt_tools
from ckpt_tools.errors import AlignmentError, LayoutError, UnsupportedError, UsageError

Weights = dict[str, Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kohya(seed: int, rank: int, alpha: float | None, dtype: torch.dtype = torch.float32) -> Weights:
    made = {}
    for i, name in enumerate(("lora_unet_down_blocks_0_to_q", "lora_te_fc")):
        made[f"{name}.lora_down.weight"] = random(rank, 6, seed=seed * 10 + i, dtype=dtype)
        made[f"{name}.lora_up.weight"] = random(5, rank, seed=seed * 10 + i + 5, dtype=dtype)
        if alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(alpha).to(dtype)
    made["lora_unet_conv.lora_down.weight"] = random(rank, 3, 3, 3, seed=seed + 90, dtype=dtype)
    made["lora_unet_conv.lora_up.weight"] = random(4, rank, 1, 1, seed=seed + 91, dtype=dtype)
    if alpha is not None:
        made["lora_unet_conv.alpha"] = torch.tensor(alpha).to(dtype)
    return made


def update(state: Weights, module: str, down: str = "lora_down", up: str = "lora_up") -> np.ndarray[Any, Any]:
    """s B A in float64, as sd-scripts merges it: alpha is the rank where there is none."""
    a, b = (state[f"{module}.{name}.weight"].double().numpy() for name in (down, up))
    rank = a.shape[0]
    alpha = state[f"{module}.alpha"].double().item() if f"{module}.alpha" in state else rank
    return alpha / rank * (b.reshape(b.shape[0], rank) @ a.reshape(rank, -1))


def save_all(folder: Path, states: list[Weights]) -> list[Path]:
    paths = [folder / f"lora-{i}.safetensors" for i in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    return paths


MODULES = ("lora_unet_down_blocks_0_to_q", "lora_te_fc", "lora_unet_conv")


@pytest.mark.parametrize(
    "members",
    [
        [(4, 4.0), (4, 4.0), (4, 4.0)],
        [(4, 8.0), (2, 1.0), (8, 3.0)],
        [(4, None), (4, None)],
        [(4, None), (3, None)],
        [(4, 1.0)],
    ],
)
@pytest.mark.parametrize("weights", [None, [0.7, 0.5, -0.2]])
def test_the_product_of_the_output_is_the_average_of_the_products(
    members: list[tuple[int, float | None]], weights: list[float] | None, tmp_path: Path
) -> None:
    states = [kohya(i, rank, alpha) for i, (rank, alpha) in enumerate(members)]
    options: dict[str, Any] = {} if weights is None else {"mode": "weights", "weights": weights[: len(states)]}
    c = [1 / len(states)] * len(states) if weights is None else [w / sum(weights[: len(states)]) for w in weights]
    ckpt_tools.average(save_all(tmp_path, states), lora="product", out=tmp_path / "out.safetensors", **options)
    found = load_file(tmp_path / "out.safetensors")
    assert list(found) == list(load_file(tmp_path / f"lora-{len(states) - 1}.safetensors"))
    for module in MODULES:
        want = sum(c[i] * update(state, module) for i, state in enumerate(states))
        assert found[f"{module}.lora_down.weight"].shape[0] == sum(rank for rank, _ in members)
        np.testing.assert_allclose(update(found, module), want, rtol=1e-5, atol=1e-6)


def test_the_factors_stack_the_members_and_keep_their_dtype(tmp_path: Path) -> None:
    states = [kohya(i, 2, 2.0, torch.bfloat16) for i in range(2)]
    ckpt_tools.average(save_all(tmp_path, states), lora="product", out=tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for module in MODULES:
        downs, ups = ([state[f"{module}.lora_{name}.weight"] for state in states] for name in ("down", "up"))
        assert found[f"{module}.lora_down.weight"].equal(torch.cat(downs, 0))
        assert found[f"{module}.lora_up.weight"].equal(torch.cat([up * 0.5 for up in ups], 1))
        assert found[f"{module}.alpha"].equal(torch.tensor(4.0).to(torch.bfloat16))


def test_an_alpha_that_rounds_is_made_up_for_by_the_factors(tmp_path: Path) -> None:
    states = [kohya(i, 7, 1.37, torch.float16) for i in range(3)]
    ckpt_tools.average(save_all(tmp_path, states), lora="product", dtype="float32", out=tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for module in MODULES:
        want = sum(update(state, module) for state in states) / 3
        np.testing.assert_allclose(update(found, module), want, rtol=1e-5, atol=1e-6)


def test_other_tensors_are_averaged_as_ever(tmp_path: Path) -> None:
    states = [kohya(i, 2, 2.0) | {"head.weight": torch.full((3,), float(i)), "step": torch.tensor(i)} for i in range(2)]
    ckpt_tools.average(save_all(tmp_path, states), lora="product", out=tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found["head.weight"].equal(torch.full((3,), 0.5))
    assert found["step"] == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("enc.q_proj.lora_A", "enc.q_proj.lora_B"),  # loralib
        ("enc.q_proj.lora_a.weight", "enc.q_proj.lora_b.weight"),  # torchtune
        ("unet.attn.processor.to_q_lora.down.weight", "unet.attn.processor.to_q_lora.up.weight"),  # diffusers
        ("unet.attn.to_q.lora.down.weight", "unet.attn.to_q.lora.up.weight"),
        ("base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_B.default.weight"),
        ("lora_A.weight", "lora_B.weight"),
    ],
)
def test_names_of_other_libraries(first: str, second: str, tmp_path: Path) -> None:
    states = [{first: random(2, 5, seed=i), second: random(4, 2, seed=i + 5)} for i in range(3)]
    paths = [tmp_path / f"{i}.pth" for i in range(3)]
    for path, state in zip(paths, states, strict=True):
        torch.save({"model": state}, path)
    report = ckpt_tools.average(paths, lora="product", out=tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    want = sum(state[second].double() @ state[first].double() for state in states) / 3
    assert torch.allclose(found[second].double() @ found[first].double(), want, atol=1e-6)
    assert any("No alpha is stored" in note for note in report.notes)


def adapter(folder: Path, states: Weights, **config: Any) -> Path:
    folder.mkdir()
    save_file(states, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return folder


def peft(seed: int, **ranks: int) -> Weights:
    made = {}
    for i, (module, rank) in enumerate(ranks.items()):
        made[f"base_model.model.{module}.lora_A.weight"] = random(rank, 6, seed=seed * 10 + i)
        made[f"base_model.model.{module}.lora_B.weight"] = random(5, rank, seed=seed * 10 + i + 5)
    return made


def test_the_configuration_of_peft_has_the_new_rank_and_alpha(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / f"a-{i}", peft(i, q=4, v=4)) for i in range(3)]
    ckpt_tools.average(paths, lora="product", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (12, 24)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert load_file(tmp_path / "out/adapter_model.safetensors")["base_model.model.q.lora_A.weight"].shape == (12, 6)


def test_patterns_name_the_modules_with_another_rank(tmp_path: Path) -> None:
    options = {"rank_pattern": {"w": 2}, "alpha_pattern": {"w": 6}}
    paths = [adapter(tmp_path / f"a-{i}", peft(i, q=4, v=4, w=2), **options) for i in range(2)]
    ckpt_tools.average(paths, lora="product", out=tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"w": 4}, {"w": 12})


def test_an_adapter_of_peft_needs_a_folder(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / f"a-{i}", peft(i, q=4)) for i in range(2)]
    with pytest.raises(UsageError, match="rank and the scale of a PEFT adapter are in its adapter_config.json"):
        ckpt_tools.average(paths, lora="product", out=tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa_niter_4"},
        {"target_parameters": ["experts.up"]},
    ],
)
def test_other_adapters_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    paths = [adapter(tmp_path / f"a-{i}", peft(i, q=4), **config) for i in range(2)]
    with pytest.raises(UnsupportedError, match="averages plain LoRA alone. Merge each adapter"):
        ckpt_tools.average(paths, lora="product", out=tmp_path / "out")


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight", "lora_E"])
def test_updates_that_are_no_plain_products_are_refused(name: str, tmp_path: Path) -> None:
    states = [peft(i, q=4) | {f"base_model.model.q.{name}": torch.ones(5)} for i in range(2)]
    with pytest.raises(UnsupportedError, match="more than the product of two factors"):
        ckpt_tools.average(save_all(tmp_path, states), lora="product", out=tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"q.lora_A.weight": torch.ones(3, 6)}, UnsupportedError, "inner sizes differ"),
        ({"v.lora_A.weight": torch.ones(4, 7)}, AlignmentError, r"the LoRA update of 'base_model.model.v' is"),
        ({"v.lora_B.weight": None}, UnsupportedError, r"has no '.*v\.lora_B\.weight' beside it"),
        ({"v.lora_A.weight": torch.ones(4, 6).half()}, AlignmentError, "Choose the dtype"),
        ({"v.lora_A.weight": None, "v.lora_B.weight": None}, AlignmentError, r"no LoRA factor '.*v\.lora_A\.weight'"),
    ],
)
def test_updates_that_do_not_fit_are_refused(
    change: dict[str, Tensor | None], error: type[Exception], said: str, tmp_path: Path
) -> None:
    other = peft(1, q=4, v=4) | {f"base_model.model.{name}": t for name, t in change.items()}  # type: ignore[dict-item]
    states = [{name: t for name, t in other.items() if t is not None}, peft(0, q=4, v=4)]
    with pytest.raises(error, match=said):
        ckpt_tools.average(save_all(tmp_path, states), lora="product", out=tmp_path / "out.safetensors")


def test_intersection_averages_what_all_share(tmp_path: Path) -> None:
    states = [peft(0, q=4), peft(1, q=4, v=4)]
    report = ckpt_tools.average(
        save_all(tmp_path, states), lora="product", keys="intersection", out=tmp_path / "out.safetensors"
    )
    assert {name.split(".")[2] for name in load_file(tmp_path / "out.safetensors")} == {"q"}
    assert {name.split(".")[2] for name in report.left_out} == {"v"}


def test_checkpoints_without_factors_are_refused(tmp_path: Path) -> None:
    states = [{"w": torch.ones(2) * i} for i in range(2)]
    with pytest.raises(LayoutError, match="holds no LoRA factors"):
        ckpt_tools.average(save_all(tmp_path, states), lora="product", out=tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match="`lora` is one of factors, product"):
        ckpt_tools.average(save_all(tmp_path, states), lora="products", out=tmp_path / "out.safetensors")


def test_the_note_on_factors_names_the_option(tmp_path: Path) -> None:
    report = ckpt_tools.average(
        save_all(tmp_path, [kohya(0, 2, 2.0), kohya(1, 2, 2.0)]), out=tmp_path / "out.safetensors"
    )
    assert any("use `lora='product'`" in note for note in report.notes)


def test_factors_that_a_schedule_free_optimizer_trains_are_averaged_as_its_averages(tmp_path: Path) -> None:
    paths, exact = [], torch.zeros(4, 5).double()
    for i in range(2):
        y, z = ({"q.lora_A": random(2, 5, seed=i + at), "q.lora_B": random(4, 2, seed=i + at + 5)} for at in (0, 50))
        kept = {number: {"z": z[name]} for number, name in enumerate(y)}
        group = {"params": [0, 1], "betas": (0.9, 0.99), "train_mode": True}
        paths.append(tmp_path / f"{i}.pth")
        torch.save({"model": y, "optimizer": {"state": kept, "param_groups": [group]}}, paths[-1])
        x = {name: y[name].double() / 0.9 + (1 - 1 / 0.9) * z[name].double() for name in y}
        exact += x["q.lora_B"] @ x["q.lora_A"] / 2
    ckpt_tools.average(paths, lora="product", state="eval", out=tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert torch.allclose(found["q.lora_B"].double() @ found["q.lora_A"].double(), exact, atol=1e-6)


PEFT = "base_model.model."


def run_of_peft(folder: Path, ranks: dict[str, int], seed: int, **config: Any) -> tuple[Weights, dict[str, Any]]:
    """Write an adapter as PEFT does."""
    state = {}
    for i, (module, rank) in enumerate(ranks.items()):
        state[f"{PEFT}{module}.lora_A.weight"] = random(rank, 6, seed=100 * seed + i)
        state[f"{PEFT}{module}.lora_B.weight"] = random(5, rank, seed=100 * seed + i + 50)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base", **config}
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return state, config


def of_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """What PEFT's get_pattern_key finds."""
    key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), module)
    return pattern.get(key, default)


def peft_update(state: Weights, config: dict[str, Any], module: str) -> np.ndarray[Any, Any]:
    a, b = (state[f"{PEFT}{module}.lora_{name}.weight"].double().numpy() for name in "AB")
    assert a.shape[0] == of_pattern(config.get("rank_pattern", {}), module, config["r"])
    return of_pattern(config.get("alpha_pattern", {}), module, config["lora_alpha"]) / a.shape[0] * (b @ a)


@pytest.mark.parametrize(
    ("own", "alphas"),
    [
        ({"q": 2}, {"^q": 3}),  # the end of the names of all others
        ({"b.q": 2, "b.1.q": 3}, {r"b.*q": 5}),
        ({"a.b.q": 1}, {r"a\.b\.q|b\.1\.q": 2.5}),
        ({"b.q": 2, "q": 3}, {}),
    ],
)
def test_ranks_and_alphas_of_single_modules_stay_theirs(
    own: dict[str, int], alphas: dict[str, float], tmp_path: Path
) -> None:
    ranks = {module: own.get(module, 4) for module in ("q", "b.q", "b.1.q", "a.b.q", "c.q")}
    pattern = {f"^{re.escape(module)}": rank for module, rank in own.items()}
    paths = [tmp_path / f"run-{i}" for i in range(2)]
    members = [run_of_peft(path, ranks, i, rank_pattern=pattern, alpha_pattern=alphas) for i, path in enumerate(paths)]
    ckpt_tools.average(paths, lora="product", out=tmp_path / "out")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    for module in ranks:
        want = sum(peft_update(*member, module) for member in members) / 2
        np.testing.assert_allclose(peft_update(found, config, module), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [10**400, 1e308, float("nan"), True, "8", None])
def test_a_scale_that_is_no_number_is_refused(alpha: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"run-{i}" for i in range(2)]
    for i, path in enumerate(paths):
        run_of_peft(path, {"q": 4}, i, lora_alpha=alpha)
    with pytest.raises(LayoutError, match=r"no number as lora_alpha|the scale of '.*q', .*, is too large"):
        ckpt_tools.average(paths, lora="product", out=tmp_path / "out")


@pytest.mark.parametrize("key", ["(a+)+$", ".*.*.*.*x", "(", "(?:a|b){30}", "a{99999999999}"])
def test_patterns_that_cannot_be_matched_are_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run_of_peft(path, {"a" * 40 + "b": 4}, 0, alpha_pattern={key: 3})
    with pytest.raises(LayoutError, match=r"adapter_config\.json: the pattern .* (repeats too|is no regular)"):
        ckpt_tools.average(path, lora="product", out=tmp_path / "out")


@pytest.mark.parametrize("form", ["use_bdlora", "kasa_config", "monteclora_config"])
def test_forms_whose_factors_are_no_plain_product_are_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run_of_peft(path, {"q": 4}, 0, **{form: {"nblocks": 2}})
    with pytest.raises(UnsupportedError, match=f"says {form}, and `lora='product'` averages plain LoRA"):
        ckpt_tools.average(path, lora="product", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("text.q_proj.lora_linear_layer.down.weight", "text.q_proj.lora_linear_layer.up.weight"),  # older diffusers
        ("blocks.0.processor.qkv_lora1.down.weight", "blocks.0.processor.qkv_lora1.up.weight"),  # XLabs
    ],
)
def test_each_name_of_a_factor_is_known_beside_others(down: str, up: str, tmp_path: Path) -> None:
    states = [
        {"x.lora_A.weight": random(2, 6, seed=i), "x.lora_B.weight": random(5, 2, seed=i + 5),
         down: random(3, 4, seed=i + 10), up: random(7, 3, seed=i + 15)}
        for i in range(2)
    ]  # fmt: skip
    ckpt_tools.average(save_all(tmp_path, states), lora="product", out=tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for a, b in (("x.lora_A.weight", "x.lora_B.weight"), (down, up)):
        want = sum(state[b].double() @ state[a].double() for state in states) / 2
        np.testing.assert_allclose(found[b].double() @ found[a].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["y.hada_w1_a", "y.lokr_w2", "lora_te_y.lokr_t2", "y.lora_kqv_adapter.linear_in.weight"]
)
def test_products_of_another_form_are_never_averaged_apart(name: str, tmp_path: Path) -> None:
    state = {
        "x.lora_down.weight": random(2, 6, seed=0),
        "x.lora_up.weight": random(5, 2, seed=1),
        name: torch.ones(2, 2),
    }
    with pytest.raises(UnsupportedError, match="belongs to an update that is more than the product of two factors"):
        ckpt_tools.average(save_all(tmp_path, [state, state]), lora="product", out=tmp_path / "out.safetensors")
