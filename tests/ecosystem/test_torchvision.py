"""torchvision's reference scripts (references/classification): `model`, and `model_ema`, an AveragedModel or None."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from small import differences, load, pair, save, train, weights_of
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torchvision.models import resnet18

import ckpt_tools


def trained() -> tuple[torch.nn.Module, AveragedModel, torch.optim.Optimizer]:
    """Train as the scripts do, whose ExponentialMovingAverage is an AveragedModel with buffers."""
    model = resnet18(num_classes=3)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    optimizer = train(model, 2, lambda: average.update_parameters(model), lr=0.01)
    return model, average, optimizer


@pytest.mark.shows("torchvision", "read raw")
@pytest.mark.shows("torchvision", "read EMA")
def test_both_sets_of_the_reference_script_are_read(tmp_path: Path) -> None:
    model, average, optimizer = trained()
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
        "model_ema": average.state_dict(),
    }
    path = save(tmp_path / "model_3.pth", checkpoint)
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), model.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), average.module.state_dict())
    assert ckpt_tools.open_checkpoint(path).state.layout == "torchvision"


@pytest.mark.shows("torchvision", "read raw")
def test_a_run_without_average_is_read_as_raw(tmp_path: Path) -> None:
    model = resnet18(num_classes=3)
    path = save(tmp_path / "model_0.pth", {"model": model.state_dict(), "epoch": 0, "model_ema": None})
    checkpoint = ckpt_tools.open_checkpoint(path)
    assert checkpoint.state.which == "raw"
    assert not differences(checkpoint, model.state_dict())
    with pytest.raises(ckpt_tools.CkptError, match="no ema weights"):
        ckpt_tools.open_checkpoint(path, state="ema")


@pytest.mark.shows("torchvision", "write")
@pytest.mark.shows("torchvision", "library loads")
def test_model_and_average_load_as_the_script_loads_them(tmp_path: Path) -> None:
    model, average, _ = trained()
    source = pair(tmp_path / "own.pth", weights_of(model), weights_of(average.module))
    out = tmp_path / "model_3.pth"
    ckpt_tools.convert(source, to="torchvision", updates=2, out=out)
    checkpoint = load(out)
    again = resnet18(num_classes=3)
    again.load_state_dict(checkpoint["model"])
    mirror = AveragedModel(resnet18(num_classes=3), use_buffers=True)
    mirror.load_state_dict(checkpoint["model_ema"])
    assert not differences(again.state_dict(), model.state_dict())
    assert not differences(mirror.state_dict(), average.state_dict())


@pytest.mark.shows("deit", "read raw")
@pytest.mark.shows("deit", "read EMA")
@pytest.mark.shows("deit", "write")
@pytest.mark.shows("deit", "library loads")
def test_the_same_without_a_wrapper_is_the_layout_of_deit(tmp_path: Path) -> None:
    model, average, _ = trained()
    source = pair(tmp_path / "own.pth", weights_of(model), weights_of(average.module))
    out = tmp_path / "checkpoint.pth"
    ckpt_tools.convert(source, to="deit", out=out)
    again, mirror = resnet18(num_classes=3), resnet18(num_classes=3)
    again.load_state_dict(load(out)["model"])
    mirror.load_state_dict(load(out)["model_ema"])
    assert not differences(again.state_dict(), model.state_dict())
    assert not differences(mirror.state_dict(), average.module.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(out, state="raw"), model.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(out, state="ema"), average.module.state_dict())
