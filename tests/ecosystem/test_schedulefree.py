"""schedulefree: `state='eval'` is what optimizer.eval() leaves in the model."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from small import Net, load, save, weights_of
from torch import nn

import ckpt_tools

OPTIMIZERS = {
    "adamw": lambda groups: schedulefree.AdamWScheduleFree(groups, lr=0.05),
    "adamw-beta": lambda groups: schedulefree.AdamWScheduleFree(groups, lr=0.05, betas=(0.95, 0.99)),
    "radam": lambda groups: schedulefree.RAdamScheduleFree(groups, lr=0.05),
    "sgd": lambda groups: schedulefree.SGDScheduleFree(groups, lr=0.5, momentum=0.8),
}


def groups_of(model: nn.Module, how: str) -> Any:
    if how == "one":
        return model.parameters()
    if how == "named":
        return model.named_parameters()
    wide = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": wide, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim == 1]}]


def steps(model: nn.Module, optimizer: Any, n: int) -> None:
    model.train()
    optimizer.train()
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8).to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


def in_float64(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """What the library's own eval() gives, with weights and z as float64."""
    wide = deepcopy(model)
    other = deepcopy(optimizer)
    for (_, p), q in zip(wide.named_parameters(), model.parameters(), strict=True):
        p.data = q.data.double()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    by_name = dict(wide.named_parameters())
    name_of = {id(p): name for name, p in model.named_parameters()}
    for group, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
        group["params"] = [by_name[name_of[id(p)]] for p in theirs["params"]]
    other.state.clear()
    for p in params:
        if "z" in optimizer.state[p]:
            other.state[by_name[name_of[id(p)]]] = {"z": optimizer.state[p]["z"].double()}
    other.eval()
    return weights_of(wide)


@pytest.mark.parametrize("how", ["one", "named", "decay"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_eval_is_what_the_optimizer_leaves_in_the_model(kind: str, how: str, tmp_path: Path) -> None:
    model = Net()
    optimizer = OPTIMIZERS[kind](groups_of(model, how))
    steps(model, optimizer, 12)  # the first ones of RAdam leave the weights as they are
    path = save(tmp_path / "y.pth", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")
    found, exact = load(tmp_path / "x.pth"), in_float64(model, optimizer)
    optimizer.eval()
    trained = dict(model.named_parameters())
    for name, value in weights_of(model).items():
        if name in trained:
            assert (found[name].double() - exact[name]).abs().max() <= 2**-24 * exact[name].abs().max()
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
            assert not torch.equal(found[name], load(path)["model"][name])
        else:
            assert found[name].equal(value)


def test_a_frozen_part_and_a_bfloat16_model(tmp_path: Path) -> None:
    model = Net().to(torch.bfloat16)
    model.stem[1].weight.requires_grad_(False)
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
    steps(model, optimizer, 3)
    path = save(tmp_path / "y.pth", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    ckpt_tools.convert(path, to="plain", state="eval", out=tmp_path / "x.pth")
    found, exact = load(tmp_path / "x.pth"), in_float64(model, optimizer)
    for name, _ in model.named_parameters():
        assert found[name].equal(exact[name].to(torch.bfloat16)), name


def test_a_file_in_eval_mode_is_taken_as_it_is(tmp_path: Path) -> None:
    model = Net()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
    steps(model, optimizer, 2)
    optimizer.eval()
    path = save(tmp_path / "x.pth", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    found = ckpt_tools.open_checkpoint(path, state="eval")
    assert all(found[name].equal(value) for name, value in weights_of(model).items())
