"""mmengine: files of a real Runner with EMAHook, whose sets are swapped on saving; its loaders read ours."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from small import Net, differences, load, pair, weights_of
from torch.utils.data import DataLoader, TensorDataset

import ckpt_tools

_numbers = itertools.count()


class Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images).square().mean()

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, torch.Tensor]:
        loss = self(data[0])
        optim_wrapper.update_params(loss)
        return {"loss": loss}


def runner(folder: Path, *, update_buffers: bool = False) -> tuple[Runner, EMAHook]:
    """Set a Runner up; their names are global, so each gets one of its own."""
    hook = EMAHook(ema_type="ExponentialMovingAverage", momentum=0.1, update_buffers=update_buffers)
    made = Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), batch_size=4),
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1}},
        train_cfg={"by_epoch": True, "max_epochs": 2},
        custom_hooks=[hook],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        experiment_name=f"test-{next(_numbers)}",
        log_level="ERROR",
    )
    return made, hook


@pytest.mark.shows("mmengine", "read raw")
@pytest.mark.shows("mmengine", "read EMA")
@pytest.mark.parametrize("update_buffers", [False, True])
def test_the_swapped_sets_of_a_run_are_read_the_right_way_round(tmp_path: Path, update_buffers: bool) -> None:
    made, hook = runner(tmp_path, update_buffers=update_buffers)
    made.train()
    path = tmp_path / "epoch_2.pth"
    assert differences(made.model.state_dict(), hook.ema_model.module.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), made.model.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), hook.ema_model.module.state_dict())
    checkpoint = ckpt_tools.open_checkpoint(path)
    assert (checkpoint.state.which, checkpoint.state.layout) == ("ema", "mmengine")


@pytest.mark.shows("mmengine", "write")
@pytest.mark.shows("mmengine", "library loads")
def test_load_checkpoint_gives_the_average_and_a_resumed_hook_both(tmp_path: Path) -> None:
    made, hook = runner(tmp_path / "run")
    made.train()
    raw, average = weights_of(made.model), weights_of(hook.ema_model.module)
    out = tmp_path / "converted.pth"
    ckpt_tools.convert(pair(tmp_path / "own.pth", raw, average), to="mmengine", updates=4, out=out)

    model = Model()
    load_checkpoint(model, str(out), strict=True)
    assert not differences(model.state_dict(), average)

    again, fresh = runner(tmp_path / "again")
    again.call_hook("before_run")
    again._resume = True
    again.load_checkpoint(str(out), strict=True)
    assert not differences(again.model.state_dict(), raw)
    assert not differences(fresh.ema_model.module.state_dict(), average)
    assert fresh.ema_model.steps.item() == 4


@pytest.mark.shows("mmengine", "write")
def test_a_conversion_of_its_own_file_holds_plain_data_alone(tmp_path: Path) -> None:
    made, hook = runner(tmp_path / "run")
    made.train()
    out = tmp_path / "converted.pth"
    ckpt_tools.convert(tmp_path / "run" / "epoch_2.pth", to="mmengine", out=out)
    converted = load(out)
    assert converted["ema_state_dict"]["steps"].item() == 4
    assert converted["ema_state_dict"]["steps"].dtype is torch.int64
    model = Model()
    load_checkpoint(model, str(out), strict=True)
    assert not differences(model.state_dict(), hook.ema_model.module.state_dict())


@pytest.mark.shows("mmengine", "library loads")
def test_an_average_over_epochs_loads_into_the_model(tmp_path: Path) -> None:
    made, _ = runner(tmp_path / "run")
    made.train()
    out = tmp_path / "averaged.pth"
    ckpt_tools.average(str(tmp_path / "run" / "epoch_*.pth"), state="ema", out=out)
    model = Model()
    load_checkpoint(model, str(out), strict=True)
    assert not differences(model.state_dict(), ckpt_tools.open_checkpoint(out))
