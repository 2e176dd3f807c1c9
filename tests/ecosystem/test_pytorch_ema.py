"""torch_ema (pytorch_ema): a list of averages without names, in the order of the model's parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import Net, differences, load, pair, parameters_of, save, train, weights_of
from torch import nn
from torch_ema import ExponentialMovingAverage

import ckpt_tools


def averaged(updates: int = 3) -> tuple[Net, ExponentialMovingAverage, dict]:
    """Train; also return the average as the library puts it into a model: its parameters, the model's buffers."""
    model = Net()
    ema = ExponentialMovingAverage(model.parameters(), decay=0.9)
    train(model, updates, ema.update)
    with ema.average_parameters():
        expected = weights_of(model)
    return model, ema, expected


@pytest.mark.shows("pytorch-ema", "read raw")
@pytest.mark.shows("pytorch-ema", "read EMA")
def test_the_list_gets_the_names_of_the_weights_beside_it(tmp_path: Path) -> None:
    model, ema, expected = averaged()
    path = save(tmp_path / "both.pth", {"model": model.state_dict(), "ema": ema.state_dict(), "step": 3})
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), model.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), expected)


@pytest.mark.shows("pytorch-ema", "read EMA")
def test_a_list_alone_gets_names_from_another_checkpoint(tmp_path: Path) -> None:
    model, ema, expected = averaged()
    alone = save(tmp_path / "ema.pt", ema.state_dict())
    with pytest.raises(ckpt_tools.CkptError, match="names"):
        ckpt_tools.open_checkpoint(alone)
    out = tmp_path / "named.pth"
    names = save(tmp_path / "model.pth", model.state_dict())
    ckpt_tools.convert(alone, to="plain", names_from=names, out=out)
    again = Net()
    again.load_state_dict(load(out))
    assert not differences(again.state_dict(), expected)


@pytest.mark.shows("pytorch-ema", "write")
@pytest.mark.shows("pytorch-ema", "library loads")
def test_the_next_update_goes_on_where_the_original_does(tmp_path: Path) -> None:
    model, original, expected = averaged()
    source = pair(tmp_path / "own.pth", weights_of(model), expected)
    out = tmp_path / "ema.pt"
    ckpt_tools.convert(source, to="pytorch-ema", updates=3, decay=0.9, out=out)
    ours = ExponentialMovingAverage(Net().parameters(), decay=0.5)
    ours.load_state_dict(load(out))
    assert (ours.num_updates, ours.decay) == (3, 0.9)
    train(model, 1)
    ours.update(model.parameters())
    original.update()
    again = Net()
    ours.copy_to(again.parameters())
    original.copy_to(model.parameters())
    assert not differences(parameters_of(again), parameters_of(model))


class Tied(nn.Module):
    """An embedding that the output layer shares, which `parameters` lists once and `state_dict` twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.shows("pytorch-ema", "read EMA")
@pytest.mark.shows("pytorch-ema", "write")
@pytest.mark.shows("pytorch-ema", "library loads")
def test_tied_weights_stand_in_the_list_once(tmp_path: Path) -> None:
    model = Tied()
    ema = ExponentialMovingAverage(model.parameters(), decay=0.9)
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    ema.update()
    path = save(tmp_path / "both.pth", {"model": model.state_dict(), "ema": ema.state_dict()})
    with ema.average_parameters():
        expected = weights_of(model)
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), expected)
    out = tmp_path / "ema.pt"
    ckpt_tools.convert(path, to="pytorch-ema", out=out)
    ours = ExponentialMovingAverage(Tied().parameters(), decay=0.5)
    ours.load_state_dict(load(out))
    again = Tied()
    ours.copy_to(again.parameters())
    assert not differences(parameters_of(again), {n: expected[n] for n in parameters_of(again)})


class Scaled(nn.Module):
    """Has a buffer that by name and dtype might be a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)


@pytest.mark.shows("pytorch-ema", "read EMA")
def test_a_buffer_that_looks_like_a_parameter_is_told_by_the_model_alone(tmp_path: Path) -> None:
    model = Scaled()
    ema = ExponentialMovingAverage(model.parameters(), decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update()
    with ema.average_parameters():
        expected = weights_of(model)
    path = save(tmp_path / "both.pth", {"model": model.state_dict(), "ema": ema.state_dict()})
    with pytest.raises(ckpt_tools.CkptError, match="or `model`"):
        ckpt_tools.open_checkpoint(path, state="ema")
    out = tmp_path / "named.pth"
    ckpt_tools.convert(path, to="plain", state="ema", model=f"{__file__}:Scaled", out=out)
    assert not differences(load(out), expected)
