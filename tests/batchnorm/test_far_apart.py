"""Why recalibrate: an average of Conformers far apart is wrong until its statistics are measured."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from bn_networks import Conformer
from torch import Tensor, nn
from torch.nn import functional as F

import ckpt_tools

WORDS = torch.randn(5, 12, 8, generator=torch.Generator().manual_seed(0))


def spoken(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Words as frames [N, T, C], shifted in time, with noise; and which they are."""
    generator = torch.Generator().manual_seed(seed)
    word = torch.randint(0, 5, (count,), generator=generator)
    shifts = torch.randint(0, 4, (count,), generator=generator).tolist()
    frames = torch.stack([WORDS[i].roll(shift, 0) for i, shift in zip(word.tolist(), shifts, strict=True)])
    return frames + torch.randn(frames.shape, generator=generator), word


def trained(model: nn.Module, steps: int, lr: float, seed: int, decay: float = 0.0) -> nn.Module:
    model = copy.deepcopy(model).train()
    frames, words = spoken(512, 100 + seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=decay)
    for chosen in torch.randint(0, 512, (steps, 32), generator=torch.Generator().manual_seed(seed)):
        optimizer.zero_grad()
        F.cross_entropy(model(frames[chosen]), words[chosen]).backward()
        optimizer.step()
    return model


def right(model: nn.Module) -> float:
    frames, words = spoken(1000, 7)
    with torch.no_grad():
        return 100 * (model.eval()(frames).argmax(1) == words).double().mean().item()


def test_an_average_of_conformers_far_apart_is_wrong_until_it_is_recalibrated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = trained(Conformer(), 60, 0.05, 0)
    runs = [trained(start, 100, 0.2, seed, decay) for seed, decay in ((1, 0.0), (2, 0.01), (3, 0.0), (4, 0.02))]
    for number, run in enumerate(runs):
        torch.save(run.state_dict(), tmp_path / f"step_{number}.pth")
    ckpt_tools.average([str(tmp_path)], out=str(tmp_path / "averaged.pth"))
    model = Conformer()
    model.load_state_dict(torch.load(tmp_path / "averaged.pth", weights_only=True))
    averaged = right(model)
    ckpt_tools.recalibrate_bn(model, spoken(512, 50)[0].split(64))
    single = [*map(right, runs)]
    assert averaged < min(single) - 10
    assert right(model) > max(single)
