"""PEFT: the adapter of `lora='product'` loads, and its update is the average of the members' updates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import ckpt_tools


class Base(nn.Module):
    """A linear layer, a transposed one, a convolution and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.q = nn.Linear(6, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.gpt = Conv1D(6, 6)
        self.conv = nn.Conv2d(1, 3, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.gpt(self.layers[1](self.layers[0](self.q(self.tokens(ids)))))
        return self.head(x) + self.conv(x[None, None]).sum()


MODULES = ("tokens", "q", "layers.0", "layers.1", "gpt", "conv")


def base() -> Base:
    torch.manual_seed(7)
    return Base().double()


def save_adapter(folder: Path, seed: int, config: dict[str, Any]) -> Path:
    """Save an adapter with random factors."""
    options: dict[str, Any] = {"target_modules": ["tokens", "q", "layers.0", "layers.1", "gpt", "conv"], **config}
    model = get_peft_model(base(), LoraConfig(**options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * (0.1 if "lora" in name else 1.0)
    model.save_pretrained(folder)
    return folder


def changes(folder: Path) -> dict[str, torch.Tensor]:
    """What a loaded adapter does to each weight: those of the merged model less those of the base, in float64."""
    model = PeftModel.from_pretrained(base(), str(folder))
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    merged, own = model.merge_and_unload().state_dict(), base().state_dict()
    return {name: merged[name] - own[name] for name in own}


CONFIGS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"r": 3, "lora_alpha": 6}] * 3,
    "of other ranks": [{"r": 3, "lora_alpha": 6}, {"r": 2, "lora_alpha": 5}, {"r": 4, "lora_alpha": 4}],
    "rank-stabilized": [{"r": 3, "lora_alpha": 5, "use_rslora": True}] * 2,
    "one rank-stabilized": [{"r": 3, "lora_alpha": 5, "use_rslora": True}, {"r": 3, "lora_alpha": 5}],
    "with patterns": [
        {"r": 3, "lora_alpha": 6, "rank_pattern": {"layers.1": 2, "q": 4}, "alpha_pattern": {"^q": 3, "conv": 9}}
    ]
    * 3,
    "with a module of its own": [{"r": 3, "lora_alpha": 6, "modules_to_save": ["head"]}] * 2,
    "with biases": [{"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["q", "layers.0"]}] * 2,
}


@pytest.mark.parametrize("weights", [None, [0.6, 0.9, -0.5]])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_average_of_updates_is_exact(kind: str, weights: list[float] | None, tmp_path: Path) -> None:
    members = [save_adapter(tmp_path / f"adapter-{i}", i, config) for i, config in enumerate(CONFIGS[kind])]
    c = (weights or [1.0] * 3)[: len(members)]
    c = [each / sum(c) for each in c]
    ckpt_tools.average(members, lora="product", mode="weights", weights=c, out=tmp_path / "out")
    found, each = changes(tmp_path / "out"), [changes(member) for member in members]
    for name in found:
        want = sum(share * change[name] for share, change in zip(c, each, strict=True))
        torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-6)
    assert any(change.abs().max() > 1e-3 for change in found.values())


def test_adapters_of_transformers_load_with_their_configuration(tmp_path: Path) -> None:
    members = [save_adapter(tmp_path / f"adapter-{i}", i, {"r": 2, "lora_alpha": 4}) for i in range(2)]
    ckpt_tools.average(members, lora="product", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    own = json.loads((members[1] / "adapter_config.json").read_text())
    assert {key for key in own if own[key] != config[key]} == {"r", "lora_alpha"}
    assert (config["r"], config["lora_alpha"]) == (4, 8)
