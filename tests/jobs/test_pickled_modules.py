"""Modules that were pickled whole: averaged and converted as their state dicts, none of their classes loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckpt_tools import average, convert, open_checkpoint

Save = Callable[..., Path]


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Linear(4, 2))
    made[1].running_mean += seed
    return made


def mean(*seeds: int) -> dict[str, torch.Tensor]:
    states = [net(seed).state_dict() for seed in seeds]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).float()
        for name, last in states[-1].items()
        if last.is_floating_point()
    }


def assert_holds(found: dict[str, Any], want: dict[str, torch.Tensor]) -> None:
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "out"])
def test_average_of_whole_modules_is_the_state_dict_of_their_mean(save: Save, tmp_path: Path, out: str) -> None:
    paths = [save(f"e{i}.pt", net(i)) for i in range(3)]
    average(paths, out=tmp_path / out)
    where = tmp_path / out / "model.safetensors" if out == "out" else tmp_path / out
    found = load(where) if out.endswith("pth") else load_file(where)
    assert_holds(found, mean(0, 1, 2))
    net(9).load_state_dict(found)


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors"])
def test_convert_of_a_whole_module_makes_a_state_dict(save: Save, tmp_path: Path, out: str) -> None:
    convert(save("e.pt", net(4)), to="plain", out=tmp_path / out)
    assert_holds(dict(open_checkpoint(tmp_path / out)), mean(4))


@pytest.mark.parametrize("key", ["net_swa", "averaged", "model_ema"])
def test_average_takes_an_averaged_module_for_the_average_of_the_module_beside_it(
    save: Save, tmp_path: Path, key: str
) -> None:
    paths = []
    for i in range(2):
        averaged = AveragedModel(net(i))
        averaged.update_parameters(net(i + 10))
        paths.append(save(f"e{i}.pt", {"model": net(i + 20), key: averaged, "epoch": i}))
    report = average(paths, out=tmp_path / "out.pth")
    assert report.inputs[0].state == f"ema ({key})"
    found = load(tmp_path / "out.pth")
    assert {*found} == {"model", "epoch"}
    parameters = {name for name, _ in net(0).named_parameters()}
    assert_holds(found["model"], {name: tensor for name, tensor in mean(10, 11).items() if name in parameters})
