"""What the tests share: a small network, a few training steps, and a comparison that tells where two sets differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

Weights = dict[str, torch.Tensor]


class Net(nn.Module):
    """A network with what matters here: parameters of several shapes, BatchNorm's buffers, nested names."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(images).mean((2, 3)))


def train(model: nn.Module, steps: int, after: Callable[[], Any] = lambda: None, lr: float = 0.1) -> torch.optim.SGD:
    """Take some steps on noise; `after` is called after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32)).float().square().mean().backward()
        optimizer.step()
        after()
    return optimizer


def weights_of(model: nn.Module) -> Weights:
    """Take a copy of a state dict, which itself changes with the model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def parameters_of(model: nn.Module) -> Weights:
    """Take a copy of the parameters alone."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def differences(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """List by name what is missing, too much, or differs in dtype, shape or any bit."""
    faults = [f"{name}: missing" for name in expected if name not in found]
    faults += [f"{name}: not expected" for name in found if name not in expected]
    for name in expected:
        if name not in found:
            continue
        a, b = found[name].detach(), expected[name].detach()
        if a.dtype is not b.dtype or a.shape != b.shape:
            faults.append(f"{name}: {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}")
        elif not a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8)):
            faults.append(f"{name}: other values")
    return faults


def mean(*sets: Mapping[str, torch.Tensor]) -> Weights:
    """Average in float64; integers come from the last, as ckpt-tools has it."""
    return {
        name: torch.stack([weights[name].double() for weights in sets]).mean(0).to(last.dtype)
        if last.is_floating_point()
        else last
        for name, last in sets[-1].items()
    }


def load(path: Path) -> Any:
    """Read with torch alone, as safely as it can."""
    return torch.load(path, map_location="cpu", weights_only=True)


def save(path: Path, obj: Any) -> Path:
    torch.save(obj, path)
    return path


def pair(path: Path, raw: Mapping[str, torch.Tensor], ema: Mapping[str, torch.Tensor]) -> Path:
    """Write a checkpoint with both sets, as a hand-written loop does: what convert starts from."""
    return save(path, {"model_state_dict": dict(raw), "ema_state_dict": dict(ema), "epoch": 3})
