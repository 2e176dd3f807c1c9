"""diffusers: EMAModel's folder and its list of parameters, of a tiny UNet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from small import Weights, differences, load, mean, pair, save, weights_of

import ckpt_tools

CONFIG = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
}


def step(model: UNet2DModel, ema: EMAModel, times: int = 1) -> None:
    for _ in range(times):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        ema.step(model.parameters())


def averaged() -> tuple[UNet2DModel, EMAModel, Weights]:
    """Train for three steps; also return the average as weights with names."""
    model = UNet2DModel(**CONFIG)
    ema = EMAModel(model.parameters(), decay=0.9, model_cls=UNet2DModel, model_config=model.config)
    step(model, ema, 3)
    return model, ema, named(ema)


def named(ema: EMAModel) -> Weights:
    """Put an average into a new model, as the library does it."""
    mirror = UNet2DModel(**CONFIG)
    ema.copy_to(mirror.parameters())
    return weights_of(mirror)


@pytest.mark.shows("diffusers", "read raw")
@pytest.mark.shows("diffusers", "read EMA")
def test_the_folders_of_model_and_average_are_read(tmp_path: Path) -> None:
    model, ema, expected = averaged()
    model.save_pretrained(tmp_path / "unet")
    ema.save_pretrained(tmp_path / "unet_ema")
    raw = ckpt_tools.open_checkpoint(tmp_path / "unet")
    average = ckpt_tools.open_checkpoint(tmp_path / "unet_ema")
    assert (raw.state.which, average.state.which) == ("raw", "ema")
    assert not differences(raw, model.state_dict())
    assert not differences(average, expected)


@pytest.mark.shows("diffusers", "read raw")
@pytest.mark.shows("diffusers", "read EMA")
def test_the_list_in_a_training_checkpoint_gets_the_names_of_the_model_beside_it(tmp_path: Path) -> None:
    model, ema, expected = averaged()
    path = save(tmp_path / "train.pt", {"model": model.state_dict(), "ema": ema.state_dict(), "step": 3})
    assert not differences(ckpt_tools.open_checkpoint(path, state="raw"), model.state_dict())
    assert not differences(ckpt_tools.open_checkpoint(path, state="ema"), expected)


@pytest.mark.shows("diffusers", "write")
@pytest.mark.shows("diffusers", "library loads")
def test_a_folder_that_convert_writes_goes_on_where_the_original_does(tmp_path: Path) -> None:
    model, original, _ = averaged()
    original.save_pretrained(tmp_path / "unet_ema")
    out = tmp_path / "converted"
    ckpt_tools.convert(tmp_path / "unet_ema", to="diffusers", out=out)
    ours = EMAModel.from_pretrained(out, UNet2DModel)
    assert (ours.optimization_step, ours.decay) == (3, 0.9)
    assert not differences(named(ours), named(original))
    step(model, original)
    ours.step(model.parameters())
    assert not differences(named(ours), named(original))


@pytest.mark.shows("diffusers", "write")
@pytest.mark.shows("diffusers", "library loads")
def test_a_model_folder_becomes_the_folder_of_an_average(tmp_path: Path) -> None:
    model, _, _ = averaged()
    model.save_pretrained(tmp_path / "unet")
    out = tmp_path / "unet_ema"
    ckpt_tools.convert(tmp_path / "unet", to="diffusers", updates=7, decay=0.99, out=out)
    ours = EMAModel.from_pretrained(out, UNet2DModel)
    assert (ours.optimization_step, ours.decay) == (7, 0.99)
    assert not differences(named(ours), model.state_dict())
    assert not differences(UNet2DModel.from_pretrained(out).state_dict(), model.state_dict())


@pytest.mark.shows("diffusers", "write")
@pytest.mark.shows("diffusers", "library loads")
def test_a_file_that_convert_writes_is_the_state_of_an_average(tmp_path: Path) -> None:
    model, original, expected = averaged()
    source = pair(tmp_path / "own.pth", weights_of(model), expected)
    out = tmp_path / "ema.pt"
    ckpt_tools.convert(source, to="diffusers", updates=3, decay=0.9, out=out)
    ours = EMAModel(UNet2DModel(**CONFIG).parameters(), decay=0.5)
    ours.load_state_dict(load(out))
    step(model, original)
    ours.step(model.parameters())
    assert not differences(named(ours), named(original))


@pytest.mark.shows("diffusers", "library loads")
def test_an_average_of_folders_is_an_average_that_loads(tmp_path: Path) -> None:
    model, ema, first = averaged()
    ema.save_pretrained(tmp_path / "unet_ema-1")
    step(model, ema)
    ema.save_pretrained(tmp_path / "unet_ema-2")
    out = tmp_path / "averaged"
    ckpt_tools.average([tmp_path / "unet_ema-1", tmp_path / "unet_ema-2"], out=out)
    expected = mean(first, named(ema))
    assert not differences(named(EMAModel.from_pretrained(out, UNet2DModel)), expected)
    assert not differences(UNet2DModel.from_pretrained(out).state_dict(), expected)
