"""torch.optim.swa_utils.AveragedModel: its state is read, and one that we write goes on averaging as its own would."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small import Net, differences, load, pair, save, train, weights_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckpt_tools


def averaged(*, use_buffers: bool, updates: int = 3) -> tuple[Net, AveragedModel]:
    model = Net()
    average = AveragedModel(model, use_buffers=use_buffers)
    train(model, updates, lambda: average.update_parameters(model))
    return model, average


@pytest.mark.shows("averaged-model", "read EMA")
@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_average_is_read_under_the_names_of_the_model(tmp_path: Path, use_buffers: bool) -> None:
    _, average = averaged(use_buffers=use_buffers)
    path = save(tmp_path / "swa.pth", average.state_dict())
    checkpoint = ckpt_tools.open_checkpoint(path)
    assert (checkpoint.state.which, checkpoint.state.layout) == ("ema", "averaged-model")
    assert not differences(checkpoint, average.module.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), average.module.state_dict())


@pytest.mark.shows("averaged-model", "read EMA")
def test_only_the_wrapper_is_taken_off_an_average_of_a_wrapped_model(tmp_path: Path) -> None:
    inner = Net()
    average = AveragedModel(torch.nn.DataParallel(inner))
    path = save(tmp_path / "swa.pth", average.state_dict())
    expected = {f"module.{name}": tensor for name, tensor in inner.state_dict().items()}
    assert not differences(ckpt_tools.open_checkpoint(path), expected)


@pytest.mark.shows("averaged-model", "write")
@pytest.mark.shows("averaged-model", "library loads")
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("rule", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
def test_the_next_update_goes_on_where_the_original_does(tmp_path: Path, use_buffers: bool, rule: object) -> None:
    model, original = averaged(use_buffers=use_buffers)
    original.multi_avg_fn = rule
    plain = save(tmp_path / "plain.pth", weights_of(original.module))
    out = tmp_path / "swa.pth"
    ckpt_tools.convert(plain, to="averaged-model", updates=3, out=out)
    ours = AveragedModel(Net(), use_buffers=use_buffers, multi_avg_fn=rule)
    ours.load_state_dict(load(out))
    assert ours.n_averaged.dtype is torch.int64
    assert ours.n_averaged.item() == 3
    train(model, 1)
    ours.update_parameters(model)
    original.update_parameters(model)
    assert not differences(ours.state_dict(), original.state_dict())


@pytest.mark.shows("averaged-model", "write")
@pytest.mark.shows("averaged-model", "library loads")
def test_the_counter_survives_a_conversion_from_another_layout(tmp_path: Path) -> None:
    model, average = averaged(use_buffers=True, updates=5)
    torchvision_like = {"model": weights_of(model), "model_ema": average.state_dict(), "epoch": 1}
    out = tmp_path / "swa.pth"
    ckpt_tools.convert(save(tmp_path / "both.pth", torchvision_like), to="averaged-model", out=out)
    ours = AveragedModel(Net(), use_buffers=True)
    ours.load_state_dict(load(out))
    assert not differences(ours.state_dict(), average.state_dict())


@pytest.mark.shows("model-state-dict", "read raw")
@pytest.mark.shows("model-state-dict", "read EMA")
@pytest.mark.shows("model-state-dict", "write")
@pytest.mark.shows("model-state-dict", "library loads")
def test_the_layout_of_hand_written_loops_goes_there_and_back(tmp_path: Path) -> None:
    model, average = averaged(use_buffers=True)
    own = pair(tmp_path / "own.pth", weights_of(model), weights_of(average.module))
    assert not differences(ckpt_tools.open_checkpoint(own, state="raw"), model.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(own, state="ema"), average.module.state_dict())
    out = tmp_path / "again.pth"
    both = save(tmp_path / "tv.pth", {"model": weights_of(model), "model_ema": average.state_dict()})
    ckpt_tools.convert(both, to="model-state-dict", out=out)
    again, mirror = copy.deepcopy(model), Net()
    again.load_state_dict(load(out)["model_state_dict"])
    mirror.load_state_dict(load(out)["ema_state_dict"])
    assert not differences(again.state_dict(), model.state_dict())
    assert not differences(mirror.state_dict(), average.module.state_dict())
