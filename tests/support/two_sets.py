"""Raw and averaged weights, in the layouts that keep both."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

import ckpt_tools

State = dict[str, torch.Tensor]
# These keep both sets whole, whatever they hold.
PAIRS = [
    "timm", "timm-ema", "deit", "torchvision", "model-state-dict", "lightning", "mmengine", "d2go", "ema-pytorch",
    "dit", "icefall", "dino", "fairseq",
]  # fmt: skip


def weights(seed: int = 0, lead: str = "") -> State:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2)))
    return OrderedDict(
        (lead + name, torch.randn_like(t) if t.is_floating_point() else t + seed)
        for name, t in net.state_dict().items()
    )


def opened(path: Path, state: str = "auto") -> State:
    return dict(ckpt_tools.open_checkpoint(path, state=state))


def bn_weights(value: float, lead: str = "") -> State:
    return OrderedDict(
        {f"{lead}a.weight": torch.full((2,), float(value)), f"{lead}bn.running_mean": torch.full((2,), value + 0.5)}
    )


def wrapped(weights: State, counter: str = "n_averaged", count: int = 7) -> State:
    return OrderedDict({counter: torch.tensor(count), **{f"module.{name}": t for name, t in weights.items()}})
