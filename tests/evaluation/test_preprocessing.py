"""Preprocessing: as timm and torchvision prepare images themselves, or a question; and where each value is from."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.evaluation.preprocessing import Preprocessing, described, resolve_preprocessing
from ckpt_tools.formats import read_header

Save = Callable[..., Path]
OWN = {"img_size": 32, "mean": [0.19], "std": [0.12], "crop_pct": 1.0, "interpolation": "bilinear"}
EMPTY = dict.fromkeys(OWN)


class Wrapper(nn.Module):
    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)


@pytest.mark.parametrize(
    "said",
    [
        {"img_size": 32, "mean": [0.19] * 3, "std": [0.12] * 3, "crop_pct": 1.0, "interpolation": "bilinear"},
        {"input_size": [3, 48, 64], "mean": (0.5,), "std": (0.2,), "crop_mode": "squash"},
        {"img_size": None, "mean": None, "std": None, "crop_pct": None, "interpolation": ""},
        {"crop_pct": 0.5},
    ],
)
def test_the_args_of_a_timm_run_are_resolved_as_its_train_script_does(save: Save, said: dict[str, Any]) -> None:
    args = Namespace(model="resnet50", in_chans=None, num_classes=7, **said)
    model = timm.create_model("resnet50", num_classes=7)  # trained at 224, tested at 288
    path = save("a.pth", {"arch": "resnet50", "args": args, "state_dict": {"w": torch.zeros(1)}})
    found = resolve_preprocessing(model, 3, EMPTY, read_header(path))
    assert found.config == resolve_data_config(vars(args), model=model)
    told = {"size": "img_size", "crop": "crop_pct"}
    for name, source in found.sources.items():
        by_args = said.get(told.get(name, name)) or (name == "size" and "input_size" in said)
        assert source == ("the args of the checkpoint" if by_args else "timm's configuration of resnet50")


def test_an_option_replaces_what_the_run_says(save: Save) -> None:
    args = Namespace(model="resnet18", input_size=[3, 48, 48], mean=[0.5] * 3, std="wrong", interpolation="bilinear")
    model = timm.create_model("resnet18")
    header = read_header(save("a.pth", {"arch": "resnet18", "args": args, "state_dict": {"w": torch.zeros(1)}}))
    found = resolve_preprocessing(model, 3, EMPTY | {"img_size": 64, "std": [0.1]}, header)
    assert found.config["input_size"] == (3, 64, 64)
    assert found.config["mean"] == (0.5, 0.5, 0.5)
    assert found.config["std"] == (0.1, 0.1, 0.1)
    assert [found.sources[name] for name in ("size", "mean", "std")] == [
        "the options", "the args of the checkpoint", "the options",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"a\.pth: its args say std='wrong', which is not understood\. Give `std`"):
        resolve_preprocessing(model, 3, EMPTY | {"img_size": 64}, header)


def test_a_model_of_timm_without_a_run_is_prepared_as_for_validation() -> None:
    model = timm.create_model("resnet50")
    assert resolve_preprocessing(model, 3, {}).config == resolve_data_config({}, model=model, use_test_size=True)
    wrapped = resolve_preprocessing(Wrapper(timm.create_model("resnet50", num_classes=0), nn.Linear(3, 2)), 3, {})
    assert wrapped.config == resolve_data_config({}, model=model)
    assert set(wrapped.sources.values()) == {"timm's configuration of resnet50"}


def test_parts_with_images_of_different_kinds_are_a_question() -> None:
    network = Wrapper(timm.create_model("resnet18"), timm.create_model("test_vit"))
    with pytest.raises(UsageError, match=r"Wrapper has parts with images of different kinds \(timm's"):
        resolve_preprocessing(network, 3, EMPTY | {"img_size": 32})
    assert resolve_preprocessing(network, 3, OWN).config["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "mobilenet_v3_small", "shufflenet_v2_x1_0"])
def test_a_network_of_torchvision_has_the_images_of_its_weights(name: str) -> None:
    """Pixel for pixel as the transform of torchvision makes them."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    pixels = np.random.default_rng(0).integers(0, 255, (300, 411, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for network in (
        torchvision.models.get_model(name, num_classes=7),
        Wrapper(torchvision.models.get_model(name)),
    ):
        found = resolve_preprocessing(network, 3, EMPTY)
        made = create_transform(**found.config, is_training=False)(image)
        torch.testing.assert_close(made, weights.transforms()(image), rtol=0, atol=1e-6)
        assert set(found.sources.values()) == {f"torchvision's {weights}"}


def test_a_run_of_torchvisions_references_has_its_sizes(save: Save) -> None:
    network = timm.create_model("resnet50")  # timm has the same names of layers, and other images
    for args, resized, crop in (
        (Namespace(model="resnet50", cache_dataset=False), 256, 224),
        (
            Namespace(
                model="resnet50", cache_dataset=True, val_resize_size=232, val_crop_size=176, interpolation="bilinear"
            ),
            232, 176,
        ),
    ):  # fmt: skip
        path = save("a.pth", {"model": {"w": torch.zeros(1)}, "args": args})
        found = resolve_preprocessing(network, 3, EMPTY, read_header(path))
        preset = torchvision.transforms._presets.ImageClassification(crop_size=crop, resize_size=resized)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 280, 3), dtype=np.uint8))
        made = create_transform(**found.config, is_training=False)(image)
        torch.testing.assert_close(made, preset(image), rtol=0, atol=1e-6)
        assert set(found.sources.values()) == {"the args of the checkpoint"}


def test_a_network_that_says_nothing_of_its_images_is_a_question(save: Save) -> None:
    network = nn.Conv2d(3, 2, 1)
    with pytest.raises(UsageError, match=r"nor Conv2d says how .* Give `img_size`, `mean` and `std`"):
        resolve_preprocessing(network, 3, EMPTY)
    with pytest.raises(UsageError, match=r"Give `std`, as in the training"):
        resolve_preprocessing(network, 3, EMPTY | {"img_size": 32, "mean": [0.5]})
    changed = torchvision.models.resnet18()
    changed.layer4 = nn.Identity()
    with pytest.raises(UsageError, match="nor ResNet says how"):
        resolve_preprocessing(changed, 3, EMPTY)
    args = {"img_size": [24, 24], "mean": [0.5, 0.4, 0.3], "std": [0.1]}
    found = resolve_preprocessing(
        network, 3, EMPTY, read_header(save("a.pth", {"model": {}, "w": torch.zeros(1), "args": args}))
    )
    assert found.config["input_size"] == (3, 24, 24)
    assert found.sources["crop"] == found.sources["interpolation"] == "timm's default"


def test_gray_images_have_the_mean_of_the_means_of_colours() -> None:
    gray = resolve_preprocessing(timm.create_model("resnet18", in_chans=1), 1, {"img_size": 64})
    assert gray.config["input_size"] == (1, 64, 64)
    np.testing.assert_allclose(gray.config["mean"], [np.mean([0.485, 0.456, 0.406])])
    with pytest.raises(UsageError, match="`mean` has 2 numbers for images of 3 channels"):
        resolve_preprocessing(timm.create_model("resnet18"), 3, {"mean": [0.1, 0.2]})


def test_described_says_each_value_and_its_source() -> None:
    config = {
        "input_size": (1, 8, 8), "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic", "mean": (0.0,),
        "std": (1.0,),
    }  # fmt: skip
    found = Preprocessing(config, {"size": "the options", "crop": "timm's default", "mean": "the options"})
    assert described(found.config, found.sources) == (
        "Images: 1x8x8, crop 1 (center), bicubic, mean 0, std 1.",
        "From the options: size, mean; from timm's default: crop.",
    )
