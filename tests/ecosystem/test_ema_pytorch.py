"""ema-pytorch: both models are read, and an EMA that loads ours goes on as the original does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from ema_pytorch import EMA
from small import Net, differences, load, pair, save, train, weights_of

import ckpt_tools

OPTIONS = {"beta": 0.9, "update_every": 1, "update_after_step": 1}


def averaged(updates: int = 5) -> tuple[Net, EMA]:
    model = Net()
    ema = EMA(model, **OPTIONS)
    train(model, updates, ema.update)
    return model, ema


@pytest.mark.shows("ema-pytorch", "read raw")
@pytest.mark.shows("ema-pytorch", "read EMA")
def test_both_models_are_read_under_bare_names(tmp_path: Path) -> None:
    model, ema = averaged()
    path = save(tmp_path / "ema.pt", ema.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), model.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), ema.ema_model.state_dict())
    assert ckpt_tools.open_checkpoint(path).state.layout == "ema-pytorch"


@pytest.mark.shows("ema-pytorch", "read EMA")
def test_an_average_saved_without_its_online_model_is_read(tmp_path: Path) -> None:
    model = Net()
    ema = EMA(model, include_online_model=False, **OPTIONS)
    train(model, 4, ema.update)
    path = save(tmp_path / "ema.pt", ema.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path), ema.ema_model.state_dict())
    with pytest.raises(ckpt_tools.CkptError, match="no raw weights"):
        ckpt_tools.open_checkpoint(path, state="raw")


@pytest.mark.shows("ema-pytorch", "write")
@pytest.mark.shows("ema-pytorch", "library loads")
def test_the_next_update_goes_on_where_the_original_does(tmp_path: Path) -> None:
    model, original = averaged()
    source = pair(tmp_path / "own.pth", weights_of(model), weights_of(original.ema_model))
    out = tmp_path / "ema.pt"
    ckpt_tools.convert(source, to="ema-pytorch", updates=5, out=out)
    twin = copy.deepcopy(model)
    ours = EMA(Net(), **OPTIONS)
    ours.load_state_dict(load(out))
    assert not differences(ours.state_dict(), original.state_dict())
    train(model, 1)
    ours.online_model.load_state_dict(model.state_dict())
    ours.update()
    original.update()
    assert not differences(ours.ema_model.state_dict(), original.ema_model.state_dict())
    assert differences(ours.ema_model.state_dict(), twin.state_dict()), "the update copied the model over the average"


@pytest.mark.shows("ema-pytorch", "write")
@pytest.mark.shows("ema-pytorch", "library loads")
def test_one_set_alone_is_written_as_both_models(tmp_path: Path) -> None:
    _, original = averaged()
    source = save(tmp_path / "plain.pth", weights_of(original.ema_model))
    out = tmp_path / "ema.pt"
    ckpt_tools.convert(source, to="ema-pytorch", updates=5, out=out)
    ours = EMA(Net(), **OPTIONS)
    ours.load_state_dict(load(out))
    assert not differences(ours.ema_model.state_dict(), original.ema_model.state_dict())
    assert not differences(ours.online_model.state_dict(), original.ema_model.state_dict())
    assert ours.step.item() == 5
    assert ours.initted.item() is True
