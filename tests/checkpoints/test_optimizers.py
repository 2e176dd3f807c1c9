"""Optimizers: named, and weighed in multiples of the parameters, as torch's own have written them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cli_runner import run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from ckpt_tools import average, convert
from ckpt_tools.checkpoints.optimizers import flat_training_state
from ckpt_tools.errors import LayoutError
from ckpt_tools.formats import read_header
from ckpt_tools.jobs.inspect import InspectReport, describe

Save = Callable[..., Path]


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023), as its papers' code keeps it: `exp_avg`."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("exp_avg", torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - group["betas"][1])


def timm(name: str) -> Any:
    """An optimizer of timm by its name; Muon leaves vectors to Adam."""

    def make(parameters: Any, **options: Any) -> Any:
        if name not in list_optimizers():
            pytest.skip(f"this timm has no {name}")
        return create_optimizer_v2([*parameters], opt=name, **options)

    return make


def newer(name: str) -> Any:
    """An optimizer that the oldest torch does not have."""

    def make(parameters: Any, **options: Any) -> Any:
        if not hasattr(torch.optim, name):
            pytest.skip(f"this torch has no {name}")
        return getattr(torch.optim, name)(parameters, **options)

    return make


def trained(make: Any, **options: Any) -> tuple[nn.Module, Any]:
    model = nn.Linear(200, 100)
    optimizer = make(model.parameters(), **options)
    model(torch.randn(4, 200)).square().sum().backward()
    optimizer.step()
    return model, optimizer.state_dict()


def described(save: Save, tree: Any) -> InspectReport:
    return describe(read_header(save("c.pth", tree)))


@pytest.mark.parametrize(
    ("make", "options", "name", "multiple"),
    [
        (torch.optim.SGD, {"lr": 0.1}, "SGD", 0),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "SGD with momentum", 1),
        (torch.optim.Adam, {}, "Adam", 2),
        (torch.optim.Adam, {"amsgrad": True}, "Adam, amsgrad", 3),
        (torch.optim.AdamW, {}, "AdamW", 2),
        (torch.optim.AdamW, {"amsgrad": True}, "AdamW, amsgrad", 3),
        (torch.optim.Adagrad, {}, "Adagrad", 1),
        (torch.optim.RMSprop, {}, "RMSprop", 1),
        (torch.optim.RMSprop, {"momentum": 0.9}, "RMSprop with momentum", 2),
        (torch.optim.RMSprop, {"centered": True}, "RMSprop, centered", 2),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}, "RMSprop with momentum, centered", 3),
        (torch.optim.Adadelta, {}, "Adadelta", 2),
        (torch.optim.Adamax, {}, "Adamax", 2),
        (torch.optim.NAdam, {}, "NAdam", 2),
        (torch.optim.RAdam, {}, "RAdam", 2),
        (torch.optim.ASGD, {}, "ASGD", 1),
        (torch.optim.Rprop, {}, "Rprop", 2),
        (newer("Adafactor"), {}, "Adafactor", (200 + 100 + 100) / 20100),
        (timm("adafactor"), {"lr": 1e-3}, "Adafactor", (200 + 100 + 100) / 20100),
        (timm("adan"), {}, "Adan", 4),
        (timm("lamb"), {}, "LAMB", 2),
        (timm("lars"), {}, "LARS", 1),
        (timm("lion"), {}, "Lion or alike", 1),
        (timm("mars"), {}, "MARS", 3),
        (timm("adabelief"), {}, "AdaBelief or alike", 2),
        (timm("madgrad"), {}, "MADGRAD", 3),
        (timm("novograd"), {}, "NovoGrad", 1),
        (timm("muon"), {}, "Muon, with Adam for some parameters", (20000 + 2 * 100) / 20100),
        (Lion, {}, "Lion or alike", 1),
    ],
)
def test_describe_names_and_weighs_optimizers_of_torch(
    save: Save, make: Any, options: dict[str, Any], name: str, multiple: int
) -> None:
    model, state = trained(make, **options)
    if "decoupled_weight_decay" not in state["param_groups"][0]:  # torch before 2.7
        name = re.sub(r"^AdamW?(?=$|,)", "Adam or AdamW", name)
    (optimizer,) = described(save, {"state_dict": model.state_dict(), "optimizer": state}).optimizers
    assert optimizer.name == name
    assert optimizer.multiple == pytest.approx(multiple, abs=1e-3)  # but for the counters of steps
    held = [t for entry in state["state"].values() for t in entry.values() if isinstance(t, torch.Tensor)]
    assert optimizer.nbytes == sum(t.nbytes for t in held)


U8 = torch.uint8
BNB = "__bnb_optimizer_quant_state__"
N, M = 96, 128  # the parameter is a matrix of N x M, of float32


def zeros(**shapes: Any) -> dict[str, Any]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def eight_bits(*moments: int, **more: Any) -> dict[str, Any]:
    """As bitsandbytes keeps them: codes in blocks of 256 values with a scale each, and the values of the codes."""
    state: dict[str, Any] = {}
    for i, times in enumerate(moments, 1):
        shape = (N, M) if times == 1 else (times, N, M)
        state |= {f"state{i}": torch.zeros(shape, dtype=U8), f"qmap{i}": torch.zeros(256)}
        state |= {f"absmax{i}": torch.zeros(times * N * M // 256)}
    return {**state, **more}


def both_sides() -> list[torch.Tensor]:
    return [torch.zeros(N, N), torch.zeros(M, M)]


CODES = 1 / 4 + (256 + N * M / 256) / (N * M)  # of a moment of 8 bits, in multiples of float32
WHOLE = (N, M)
SIDES = (N * N + M * M) / (N * M)


@pytest.mark.parametrize(
    ("state", "options", "name", "multiple"),
    [
        ({BNB: eight_bits(1, 1)}, "betas", "Adam or AdamW, 8-bit by bitsandbytes", 2 * CODES),
        (eight_bits(1, 1), "betas", "Adam or AdamW, 8-bit by bitsandbytes", 2 * CODES),  # before version 0.43
        ({BNB: eight_bits(1, 1, unorm_vec=torch.zeros(1))}, "betas", "LAMB, 8-bit by bitsandbytes", 2 * CODES),
        ({BNB: eight_bits(2, 1)}, "betas", "AdEMAMix, 8-bit by bitsandbytes", 3 * CODES - 256 / (N * M)),
        ({BNB: eight_bits(1)}, "betas", "Lion, SGD with momentum, RMSprop or Adagrad, 8-bit by bitsandbytes", CODES),
        ({BNB: zeros(state1=WHOLE, state2=WHOLE)}, "betas", "Adam or AdamW, 32-bit by bitsandbytes", 2),
        (zeros(exp_avg_sq_row=N, exp_avg_sq_col=M, exp_avg=WHOLE), "beta1", "Adafactor", 1 + (N + M) / (N * M)),
        (
            zeros(exp_avg=WHOLE, exp_avg_sq_row=N, exp_avg_sq_col=M, exp_avg_res_row=N, exp_avg_res_col=M, RMS=()),
            "betas", "CAME", 1 + 2 * (N + M) / (N * M),
        ),
        (zeros(momentum_buffer=WHOLE), "momentum ns_steps", "Muon", 1),
        (zeros(momentum_buffer=WHOLE), "momentum use_muon", "Muon", 1),
        (zeros(momentum_buffer=WHOLE), "momentum", "SGD with momentum, or alike", 1),
        (
            {**zeros(pre_cond_0=(N, N), inv_pre_cond_0=(N, N)), **zeros(pre_cond_1=(M, M), inv_pre_cond_1=(M, M))},
            "matrix_eps", "Shampoo", 2 * SIDES,
        ),
        (zeros(precond_0=(N, N), inv_precond_0=(N, N), momentum_buffer=WHOLE), "", "Shampoo", 1 + 2 * N / M),
        (
            {
                '["step"]': torch.tensor(0),
                '["block_0", "shampoo", "factor_matrices", 0]': torch.zeros(N, N),
                '["block_0", "shampoo", "factor_matrices", 1]': torch.zeros(M, M),
                '["block_0", "shampoo", "inv_factor_matrices", 0]': torch.zeros(N, N),
                '["block_0", "shampoo", "inv_factor_matrices", 1]': torch.zeros(M, M),
                '["block_0", "adagrad"]': torch.zeros(N, M),
                '["block_0", "filtered_grad"]': torch.zeros(N, M),
            },
            "max_preconditioner_dim", "distributed Shampoo", 2 * SIDES + 2,
        ),
        (
            {**zeros(exp_avg=WHOLE, exp_avg_sq=WHOLE), "GG": both_sides(), "Q": both_sides()},
            "betas", "SOAP", 2 + 2 * SIDES,
        ),
        (zeros(exp_avg=(8, M), exp_avg_sq=(8, M), step=()), "rank update_proj_gap", "GaLore AdamW", 2 * 8 / N),
        (zeros(exp_avg=(8, M), exp_avg_sq=(8, M)), "rank update_proj_gap scale_type", "APOLLO", 2 * 8 / N),
        (zeros(m=WHOLE, vmean=()), "beta1", "Adam-mini", 1),
        (zeros(exp_avg=WHOLE, hessian=WHOLE), "rho", "Sophia", 2),
        (zeros(s=N * M, p0=N * M, exp_avg=WHOLE, exp_avg_sq=WHOLE), "d_coef", "Prodigy", 4),
        (zeros(s=WHOLE, exp_avg=WHOLE, exp_avg_sq=WHOLE), "d growth_rate", "D-Adaptation of Adam", 3),
        (zeros(z=WHOLE, exp_avg_sq=WHOLE), "train_mode weight_lr_power", "schedule-free AdamW", 2),
        (zeros(z=WHOLE), "train_mode weight_lr_power", "schedule-free SGD", 1),
        (zeros(exp_avg=WHOLE, exp_avg_sq=WHOLE, lookahead_slow_buff=WHOLE), "", "Adam family, with Lookahead", 3),
        (zeros(exp_avg=WHOLE, exp_avg_sq=WHOLE, s=WHOLE), "betas", "unknown", 3),
        (zeros(z=WHOLE, n=WHOLE), "lambda_1", "unknown", 2),
        (zeros(exp_avg=()), "betas", "Lion or alike", 1 / (N * M)),
    ],
)  # fmt: skip
def test_describe_names_optimizers_by_what_they_keep_as_published(
    save: Save, state: dict[str, Any], options: str, name: str, multiple: float
) -> None:
    groups = [{"params": [0], "lr": 0.1, **dict.fromkeys(options.split(), 1)}]
    tree = {"state_dict": {"fc.weight": torch.zeros(N, M)}, "optimizer": {"state": {0: state}, "param_groups": groups}}
    (found,) = described(save, tree).optimizers
    assert found.name == name
    assert found.multiple == pytest.approx(multiple, rel=1e-3)
    assert sum(row.nbytes for row in found.kept) == found.nbytes


def test_describe_counts_bytes_and_values_of_each_name(save: Save) -> None:
    state = {0: {BNB: eight_bits(1, 1)}, 1: {BNB: zeros(state1=M, state2=M)}}
    tree = {"state_dict": zeros(w=WHOLE, b=M), "optimizer": {"state": state, "param_groups": [{"params": [0, 1]}]}}
    (found,) = described(save, tree).optimizers
    sizes = {row.name: row.nbytes for row in found.kept}
    assert sizes == {
        **{f"state{i}": N * M + 4 * M for i in (1, 2)},
        **{f"qmap{i}": 4 * 256 for i in (1, 2)},
        **{f"absmax{i}": 4 * N * M // 256 for i in (1, 2)},
    }
    times = {row.name: row.times for row in found.kept}
    assert times["state1"] == 1
    assert found.kept[0].multiple == pytest.approx((N * M + 4 * M) / (4 * (N * M + M)))
    shown = run("inspect", save("again.pth", tree)).out
    assert "8-bit by bitsandbytes" in shown
    assert "x their values)" in shown
    assert "keeps state1 0.26, state2 0.26" in shown


def test_describe_does_not_guess_adamw_without_its_option(save: Save) -> None:
    model, state = trained(torch.optim.AdamW)
    for group in state["param_groups"]:
        group.pop("decoupled_weight_decay", None)
    assert described(save, {"model": model.state_dict(), "opt": state}).optimizers[0].name == "Adam or AdamW"
    for group in state["param_groups"]:
        del group["amsgrad"]
    assert described(save, {"model": model.state_dict(), "opt": state}).optimizers[0].name == "Adam family"


def test_describe_counts_no_momentum_that_is_none(save: Save) -> None:
    state = {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"momentum": 0, "dampening": 0}]}
    assert described(save, {"model": {"w": torch.ones(2)}, "optimizer": state}).optimizers[0].name == "SGD"


@pytest.mark.parametrize(
    ("make", "options", "name"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, "SGD with momentum, before its first step"),
        (torch.optim.Adam, {"amsgrad": True}, "Adam.*, before its first step"),
        (torch.optim.Adagrad, {}, "Adagrad"),
        (torch.optim.Rprop, {}, "without state"),
    ],
)
def test_describe_does_not_call_an_optimizer_plain_before_its_first_step(
    save: Save, make: Any, options: dict[str, Any], name: str
) -> None:
    state = make([nn.Parameter(torch.ones(3))], **options).state_dict()
    (found,) = described(save, {"model": {"w": torch.ones(3)}, "optimizer": state}).optimizers
    assert re.fullmatch(name, found.name)


@pytest.mark.parametrize(
    ("around", "places"),
    [
        (lambda o: {"optimizer_states": [o, o]}, ["optimizer_states.0", "optimizer_states.1"]),
        (lambda o: {"opt": o}, ["opt"]),
        (lambda o: {"optimizer_state_dict": o}, ["optimizer_state_dict"]),
        (lambda o: {"last_optimizer_state": o}, ["last_optimizer_state"]),
        (lambda o: {"optimizers": {"generator": o}}, ["optimizers.generator"]),
        (lambda o: {"state": {"optimizers": {"AdamW": o}}}, ["state.optimizers.AdamW"]),
        (lambda o: {"optimizer": {"optimizer": o, "fp32": [1]}}, ["optimizer.optimizer"]),
    ],
)
def test_describe_finds_optimizers_where_libraries_put_them(save: Save, around: Any, places: list[str]) -> None:
    model, state = trained(torch.optim.AdamW)
    copies = iter([state, trained(torch.optim.AdamW)[1]])
    tree = around(state)
    if "optimizer_states" in tree:
        tree["optimizer_states"] = list(copies)
    found = described(save, {"state_dict": model.state_dict(), **tree}).optimizers
    assert [optimizer.place for optimizer in found] == places
    assert all(optimizer.multiple == pytest.approx(2, abs=1e-3) for optimizer in found)


@pytest.mark.parametrize(
    ("slots", "name"),
    [
        (("grad_avg", "sqr_avg"), "Adam family"),
        (("sqr_avg",), "RMSprop"),
        (("grad_avg",), "SGD with momentum"),
        ((), "without state"),
    ],
)
def test_describe_knows_the_optimizers_of_fastai(save: Save, slots: tuple[str, ...], name: str) -> None:
    # Optimizer.state_dict of fastai/optimizer.py: the state of each parameter, and of each group its options.
    model = nn.Linear(3, 2)
    kept = [{**{slot: torch.zeros_like(p) for slot in slots}, "step": 3} for p in model.parameters()]
    opt = {"state": kept, "hypers": [{"lr": 0.1, "mom": 0.9, "wd": 0.01}]}
    (found,) = described(save, {"model": model.state_dict(), "opt": opt}).optimizers
    assert (found.place, found.name, found.multiple) == ("opt", name, len(slots))


def test_describe_takes_a_file_with_an_optimizer_alone(save: Save) -> None:
    (found,) = described(save, trained(torch.optim.Adagrad)[1]).optimizers
    assert (found.place, found.name, found.multiple) == ("the whole file", "Adagrad", None)


def test_describe_accepts_an_unknown_state(save: Save) -> None:
    for state in ({"state": 3, "param_groups": None}, {"state": {0: [1]}, "param_groups": [3, {1: 2}]}):
        (found,) = described(save, {"model": {"w": torch.ones(2)}, "optimizer": state}).optimizers
        assert (found.name, found.nbytes) == ("without state", 0)
    loop: dict[str, Any] = {}
    loop["a"] = [loop]
    assert described(save, {"model": {"w": torch.ones(2)}, "x": loop}).optimizers == ()


# Dicts without nesting, in which the optimizer has names of its own


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=generator) for name in ("decoder.0.fc.weight", "decoder.0.fc.bias")}


def megatron(seed: int) -> dict[str, Any]:
    kept = ("exp_avg", "exp_avg_sq", "fp32_param")
    state = {f"optimizer.state.{slot}.{name}": t + 7 for slot in kept for name, t in weights(seed).items()}
    return {**weights(seed), **state, "rng_state": torch.zeros(5, dtype=torch.uint8)}


def chained(seed: int) -> dict[str, Any]:
    place = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.bfloat16).bucket_idx_0"
    state = {f"chained_{i}.{place}.{slot}": torch.ones(9) for i in (0, 1) for slot in ("param", "exp_avg")}
    return {**weights(seed), **state}


def flattened(make: Any, prefix: str = "", **options: Any) -> Callable[[int], dict[str, Any]]:
    """As torch flattens an optimizer: NAME is that of a parameter in `state.NAME.exp_avg`."""

    def of(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        optimizer = make(model.parameters(), **options)
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        return {**model.state_dict(), **{f"{prefix}{name}": value for name, value in state.items()}}

    return of


FLAT = {
    "megatron": (megatron, {"optimizer.*", "rng_state"}),
    "chained": (chained, {"chained_0.optimizer.*", "chained_1.optimizer.*"}),
    "adam": (flattened(torch.optim.Adam), {"state.*", "param_groups.*"}),
    "sgd": (flattened(torch.optim.SGD, "trainer.optim.", lr=0.1, momentum=0.9), {"trainer.optim.*"}),
    "adagrad": (flattened(torch.optim.Adagrad, "optimizers."), {"optimizers.*"}),
}


@pytest.mark.parametrize("written", ["pth", "safetensors", "dcp"])
@pytest.mark.parametrize("which", FLAT)
def test_average_and_convert_leave_out_an_optimizer_among_the_weights(which: str, written: str, tmp_path: Path) -> None:
    make, left_out = FLAT[which]
    states, paths = [make(seed) for seed in (3, 8)], []
    for i, state in enumerate(states):
        path = tmp_path / (f"s{i}" if written == "dcp" else f"s{i}.{written}")
        if written == "dcp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is one process
                dcp.save(state, checkpoint_id=path)
        elif written == "pth":
            torch.save(state, path)
        else:
            save_file({name: t.contiguous() for name, t in state.items() if isinstance(t, torch.Tensor)}, path)
        paths.append(path)
    bare = [{name: t for name, t in state.items() if re.match(r"decoder\.|\d\.", name)} for state in states]
    report = average(paths, out=tmp_path / "avg.pth")
    found = torch.load(tmp_path / "avg.pth")
    assert set(found) == set(bare[0])
    for name, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (bare[0][name] + bare[1][name]) / 2)
    tensors_left_out = {each for each in left_out if written != "safetensors" or each != "param_groups.*"}
    assert tensors_left_out <= set(report.dropped)
    converted = convert(paths[1], out=tmp_path / "plain.safetensors")
    loaded = load_file(tmp_path / "plain.safetensors")
    assert set(loaded) == set(bare[1])
    assert all(torch.equal(loaded[name], bare[1][name]) for name in loaded)
    assert tensors_left_out <= set(converted.dropped)


def test_average_takes_modules_that_are_called_like_training_state(tmp_path: Path) -> None:
    names = [
        "optimizer.fc.weight",
        "scaler.weight",
        "lr_scheduler.a",
        "state.fc.weight",
        "state.exp_avg",
        "state.x.sum",
    ]
    for i in range(2):
        torch.save({name: torch.full((2,), float(i)) for name in names}, tmp_path / f"{i}.pth")
    average([tmp_path / "0.pth", tmp_path / "1.pth"], out=tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth")
    assert set(found) == set(names)
    assert all(torch.equal(tensor, torch.full((2,), 0.5)) for tensor in found.values())


def test_average_rejects_files_of_an_optimizer_alone(tmp_path: Path) -> None:
    state = {name: value for name, value in megatron(0).items() if name.startswith("optimizer")}
    save_file(state, tmp_path / "o.safetensors")
    with pytest.raises(LayoutError, match=r"o\.safetensors: holds training state alone, and no weights"):
        average(tmp_path / "o.safetensors", out=tmp_path / "out.pth")


@given(st.lists(st.sampled_from(["optim", "optimizer", "state", "exp_avg", "w", "sum", "a" * 99]), max_size=9))
def test_flat_training_state_begins_with_an_optimizer_and_has_a_slot(parts: list[str]) -> None:
    name = ".".join(parts)
    found = flat_training_state([name, "w"])
    if found:
        assert [name] in found.values()
        assert {"optim", "optimizer", "state"} & set(parts[:3])
        assert {"exp_avg", "sum"} & set(parts)
    if parts[:1] == ["optimizer"] and "exp_avg" in parts:
        assert found == {"optimizer": [name]}
