"""Optimizers: named, and weighed in multiples of the parameters, as torch's own have written them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_tools.formats import read_header
from ckpt_tools.jobs.inspect import Description, describe

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


def trained(make: Any, **options: Any) -> tuple[nn.Module, Any]:
    model = nn.Linear(200, 100)
    optimizer = make(model.parameters(), **options)
    model(torch.randn(4, 200)).square().sum().backward()
    optimizer.step()
    return model, optimizer.state_dict()


def described(save: Save, tree: Any) -> Description:
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
