"""How `ckpt recal-bn` calls a model of one's own, for statistics and scores, and what it says of bad calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import refused, run

Save = Callable[..., Path]

NETS = """
import torch
from torch import nn

class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.head = nn.BatchNorm1d(3), nn.Linear(3, 4)
    def forward(self, frames, scale):
        return self.head((self.bn(frames * scale[:, None, None])).mean(2))

class Loud(Speech):
    def forward(self, frames, scale): raise RuntimeError("too loud")

def made(number):
    g = torch.Generator().manual_seed(number)
    frames = torch.randn(6, 3, 5, generator=g, dtype=torch.double)
    return frames, torch.rand(6, generator=g, dtype=torch.double), torch.tensor([5, 1, 3, 2, 4, 5]), torch.arange(6) % 4

def speech(): return Speech().double()
def loud(): return Loud().double()
def tuples(): return [(f, s, y) for f, s, _, y in map(made, range(3))]
def dicts(): return [{"frames": f, "scale": s, "lengths": n, "label": y} for f, s, n, y in map(made, range(3))]
def nested(): return [{"a": {"frames": f}, "b": [s], "label": y} for f, s, _, y in map(made, range(3))]
def call(model, batch): return model(batch["a"]["frames"], batch["b"][0])
def nothing(model, batch): call(model, batch)
def away(model, batch):
    call(model, batch)
    model.to("meta")
number = 3
"""


@pytest.fixture
def here(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spoken_nets.py").write_text(NETS)
    import importlib.util

    found = importlib.util.spec_from_file_location("spoken_nets", tmp_path / "spoken_nets.py")
    assert found is not None
    assert found.loader is not None
    nets = importlib.util.module_from_spec(found)
    found.loader.exec_module(nets)
    torch.manual_seed(0)
    save("averaged.pth", nets.speech().state_dict())
    return tmp_path


def arguments(data: str, *more: str, model: str = "speech") -> tuple[str, ...]:
    return (
        "recal-bn",
        "averaged.pth",
        "--model",
        f"spoken_nets.py:{model}",
        "--data",
        f"spoken_nets.py:{data}",
        "-j",
        "0",
        *more,
    )


@pytest.mark.parametrize(
    ("data", "options", "padded"),
    [
        ("tuples", ("--inputs", "2"), False),
        ("dicts", (), False),
        ("dicts", ("--mask", "lengths"), True),
        ("nested", ("--forward", "spoken_nets.py:call"), False),
    ],
)
def test_statistics_and_scores_call_the_model_as_asked(
    here: Path, data: str, options: tuple[str, ...], padded: bool
) -> None:
    done = run(*arguments(data, *options, "--eval", f"spoken_nets.py:{data}", "--json"))
    assert done.code == 0, done.err
    new = torch.load("averaged-bn.pth", weights_only=True)
    columns, losses = [], []
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        frames = torch.randn(6, 3, 5, generator=generator, dtype=torch.double)
        x = (frames * torch.rand(6, generator=generator, dtype=torch.double)[:, None, None]).numpy()
        lengths = [5, 1, 3, 2, 4, 5] if padded else [5] * 6
        columns.append(np.concatenate([row[:, :length] for row, length in zip(x, lengths, strict=True)], 1))
        mean, variance = (new[f"bn.running_{name}"].numpy()[:, None] for name in ("mean", "var"))
        pooled = ((x - mean) / np.sqrt(variance + 1e-5)).mean(2)
        logits = pooled @ new["head.weight"].numpy().T + new["head.bias"].numpy()
        losses += list(np.log(np.exp(logits).sum(1)) - logits[np.arange(6), np.arange(6) % 4])
    whole = np.concatenate(columns, 1)
    np.testing.assert_allclose(new["bn.running_mean"].numpy(), whole.mean(1), rtol=1e-9)
    np.testing.assert_allclose(new["bn.running_var"].numpy(), whole.var(1, ddof=1), rtol=1e-9)
    report: dict[str, Any] = json.loads(done.out)
    assert report["after"]["loss"] == pytest.approx(np.mean(losses), rel=1e-9)
    assert report["after"]["images"] == 18


@pytest.mark.parametrize(
    ("command", "message", "code"),
    [
        (arguments("tuples"), "failed on a batch of shape [6, 3, 5] (TypeError: ", 1),
        (arguments("tuples", "--inputs", "9"), "--inputs 9: a batch has 3 entries", 1),
        (arguments("tuples", "--inputs", "0"), "--inputs 0: must be a whole number from 1 on", 2),
        (
            arguments("nested", "--forward", "spoken_nets.py:calls"),
            "spoken_nets.py has no 'calls'. Did you mean call",
            2,
        ),
        (arguments("nested", "--forward", "spoken_nets.py:number"), "--forward is a int, not a function", 2),
        (arguments("nested", "--forward", "spoken_nets.py:away"), "moves the model from cpu to meta", 1),
        (
            arguments("nested", "--forward", "spoken_nets.py:call", model="loud"),
            "too loud). Does --forward take such",
            1,
        ),
        (
            arguments("nested", "--forward", "spoken_nets.py:nothing", "--eval", "spoken_nets.py:nested"),
            "the model gives a NoneType in place of logits, [N, classes]. Let --forward return them.",
            1,
        ),
        (arguments("dicts", "--mask", "none"), "--mask none: a batch (keys frames, scale, lengths, label) has no", 1),
    ],
)
def test_a_bad_call_is_refused_and_nothing_is_written(
    here: Path, command: tuple[str, ...], message: str, code: int
) -> None:
    assert message in refused(here, *command, code=code)


def test_the_record_says_how_the_model_was_called(here: Path) -> None:
    run(*arguments("nested", "--forward", "spoken_nets.py:call"))
    assert "forward spoken_nets.py:call" in run("inspect", "averaged-bn.pth").out


def test_statistics_far_from_those_stored_are_a_warning_and_bars_are_full_at_one_sigma(here: Path) -> None:
    state = torch.load("averaged.pth", weights_only=True)
    state["bn.running_var"] *= 100
    torch.save(state, "averaged.pth")
    result = run(*arguments("dicts"), columns=100, terminal=True, TERM="xterm")
    said = result.out + result.err
    assert "Warning:\x1b[0m the statistics of 1 layer moved far (by more than 0.5 σ or x4), most in bn." in said
    (line,) = (line for line in said.splitlines() if line.startswith("bn "))
    assert 0 < line.count("█") < 10  # the mean has moved by less than half a sigma
    assert "\x1b[33m█" in line
    again = run("recal-bn", "averaged-bn.pth", *arguments("dicts")[2:], columns=100)
    assert again.code == 0
    assert "moved far" not in again.err
