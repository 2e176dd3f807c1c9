"""Schedules against the classes that users average with during training, updated checkpoint by checkpoint."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import run
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ckpt_tools import average
from ckpt_tools.errors import UsageError
from ckpt_tools.jobs.options import Images, Measuring, Network, Numerics
from ckpt_tools.series import schedules
from ckpt_tools.series.rules.ema import ema, ema_per_step, ema_warmup
from ckpt_tools.series.rules.option import Option
from ckpt_tools.series.rules.uniform import uniform
from ckpt_tools.series.rules.weights import weights
from ckpt_tools.series.schedules import Schedule

N = 7


class Scalar(nn.Module):
    """A model of one float64 parameter, so that a reference class can be read like a recursion."""

    def __init__(self, values: Sequence[float] = (0.0,)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def checkpoints(n: int = N) -> list[Scalar]:
    """Checkpoint i is the unit vector e_i, so that an average of them is the vector of coefficients."""
    return [Scalar([float(i == j) for j in range(n)]) for i in range(n)]


def assert_same(coefficients: Sequence[float], reference: torch.Tensor) -> None:
    assert torch.tensor(coefficients, dtype=torch.float64) == pytest.approx(reference.detach(), rel=1e-13, abs=1e-15)


def test_uniform_agrees_with_torchs_averaged_model() -> None:
    models = checkpoints()
    swa = AveragedModel(models[0])
    for model in models:
        swa.update_parameters(model)
    assert_same(uniform(N), swa.module.w)


def test_ema_agrees_with_torchs_averaged_model() -> None:
    models = checkpoints()
    reference = AveragedModel(models[0], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for model in models:
        reference.update_parameters(model)
    assert_same(ema(N, decay=0.9), reference.module.w)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999, 1.0])
def test_ema_agrees_with_timms_model_ema(decay: float) -> None:
    models = checkpoints()
    first = ModelEma(models[0], decay=decay)
    second = ModelEmaV2(models[0], decay=decay)
    third = ModelEmaV3(models[0], decay=decay, foreach=False)
    for model in models[1:]:
        first.update(model)
        second.update(model)
        third.update(model)  # without a step: with one it drops the first checkpoint, warm-up or not
    coefficients = ema(N, decay=decay)
    assert_same(coefficients, first.ema.w)
    assert_same(coefficients, second.module.w)
    assert_same(coefficients, third.module.w)


def test_timm_warmup_agrees_with_model_ema_v3() -> None:
    models = checkpoints(30)
    ema = ModelEmaV3(models[0], decay=0.8, use_warmup=True, foreach=False)
    for update, model in enumerate(models[1:], 1):
        ema.update(model, step=update)
    assert_same(ema_warmup(30, decay=0.8, warmup="timm"), ema.module.w)


class LitEma:
    """LitEma of latent diffusion, from its formula: the decay grows with the number of updates."""

    def __init__(self, model: Scalar, decay: float) -> None:
        self.shadow = model.w.detach().clone()
        self.decay = decay
        self.num_updates = 0

    def __call__(self, model: Scalar) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.shadow -= (1.0 - decay) * (self.shadow - model.w.detach())


def test_litema_warmup_agrees_with_litema() -> None:
    models = checkpoints(30)
    ema = LitEma(models[0], decay=0.6)
    for model in models[1:]:
        ema(model)
    assert_same(ema_warmup(30, decay=0.6, warmup="litema"), ema.shadow)


def test_ema_per_step_is_an_ema_updated_at_every_step() -> None:
    """Between two checkpoints the weights stand still, so that an update a step is known."""
    steps = [10, 13, 14, 30]
    models = checkpoints(4)
    ema = ModelEmaV2(models[0], decay=0.9)
    for previous, step, model in zip(steps, steps[1:], models[1:], strict=False):
        for _ in range(step - previous):
            ema.update(model)
    assert_same(ema_per_step(steps, decay=0.9), ema.module.w)


def test_ema_with_bias_correction_starts_from_zero_and_divides() -> None:
    value = torch.zeros(N, dtype=torch.float64)
    for model in checkpoints():
        value = 0.9 * value + 0.1 * model.w.detach()
    assert_same(ema(N, decay=0.9, bias_correction=True), value / (1 - 0.9**N))


@given(
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(["plain", "litema", "timm", "per step"]),
)
def test_ema_coefficients_sum_to_one(n: int, decay: float, kind: str) -> None:
    if kind == "plain":
        coefficients = ema(n, decay=decay)
    elif kind == "per step":
        coefficients = ema_per_step(range(0, 3 * n, 3), decay=decay)
    else:
        coefficients = ema_warmup(n, decay=decay, warmup=kind)
    assert len(coefficients) == n
    assert math.fsum(coefficients) == pytest.approx(1.0, abs=1e-12)
    assert min(coefficients) >= 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20).filter(lambda w: abs(sum(w)) > 1e-3))
def test_weights_divides_by_their_sum(given: list[float]) -> None:
    total = math.fsum(given)
    assert weights(given) == pytest.approx([w / total for w in given])
    assert weights(given, normalize=False) == tuple(given)


def test_weights_takes_a_weight_of_zero() -> None:
    assert weights([0, 1, 3]) == (0.0, 0.25, 0.75)


def test_dominant_finds_the_oldest_checkpoint_for_a_decay_near_one() -> None:
    index, share = schedules.dominant(ema(10, decay=0.9999)) or (None, 0.0)
    assert index == 0
    assert share == pytest.approx(0.9999**9)


def test_dominant_finds_none_in_an_even_average() -> None:
    assert schedules.dominant(uniform(10)) is None
    assert schedules.dominant(ema(10, decay=0.9, bias_correction=True)) is None


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, math.inf])
def test_ema_rejects_a_decay_outside_0_1(decay: float) -> None:
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        ema(3, decay=decay)
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        ema_per_step([1, 2], decay=decay)
    with pytest.raises(UsageError, match=r"outside \[0, 1\]"):
        ema_warmup(3, decay=decay, warmup="timm")


def test_ema_and_weights_reject_impossible_options() -> None:
    with pytest.raises(UsageError, match="sum to 0"):
        weights([1, -1])
    with pytest.raises(UsageError, match="sum to 0"):
        weights([0.1, 0.2, -0.3])
    with pytest.raises(UsageError, match="finite"):
        weights([1, math.nan])
    with pytest.raises(UsageError, match="increase"):
        ema_per_step([1, 1], decay=0.9)
    with pytest.raises(UsageError, match="decay of 1"):
        ema(3, decay=1.0, bias_correction=True)
    with pytest.raises(UsageError, match="litema, timm"):
        ema_warmup(3, decay=0.9, warmup="cosine")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule from outside the package: the last checkpoint counts `share`, the others the rest in equal parts."""
    monkeypatch.setattr(schedules, "SCHEDULES", dict(schedules.SCHEDULES))

    def favour(steps: Sequence[int | None], *, share: float) -> list[float]:
        others = len(steps) - 1
        return [(1 - share) / others] * others + [share]

    schedules.register("favour", favour, Option("share", float, 0.5, "favour: what the last checkpoint counts."))


def test_register_adds_a_rule_that_average_and_the_command_line_know(toy: None, here: Path) -> None:
    for i in range(3):
        torch.save({"w": torch.eye(3, dtype=torch.float64)[i]}, f"c-{i}.pth")
    files = [f"c-{i}.pth" for i in range(3)]
    report = average(files, mode="favour", share=0.75, out="a.pth")
    assert [i.coefficient for i in report.inputs] == [0.125, 0.125, 0.75]
    assert torch.load("a.pth")["w"].tolist() == [0.125, 0.125, 0.75]
    average(files, mode="favour", out="b.pth")
    assert torch.load("b.pth")["w"].tolist() == [0.25, 0.25, 0.5]
    assert run("avg", *files, "--mode", "favour", "--share", "0.75", "-o", "c.pth").code == 0
    assert Path("c.pth").read_bytes() == Path("a.pth").read_bytes()
    assert "--share" in run("avg", "--help").out
    assert "share 0.75" in run("inspect", "a.pth").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "uniform", "share": 0.9}, "`share` goes with `mode='favour'`"),
        ({"mode": "favour", "decay": 0.9}, "`decay` goes with `mode='ema'`"),
        ({"mode": "favour", "share": "much"}, "`share` takes numbers, not 'much'"),
        (
            {"mode": "best"},
            "`mode` is one of uniform, ema, weights, decay, power, difference, posthoc, stock, favour, not 'best'",
        ),
    ],
)
def test_average_rejects_options_of_another_rule(toy: None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        average(["gone.pth"], **options)


def test_schedule_check_accepts_options_at_their_defaults_with_any_mode() -> None:
    for mode, own in (("uniform", {}), ("ema", {}), ("weights", {"weights": [1]})):
        options = {"decay": None, "per_step": False, "warmup": None, "weights": None, "normalize": True} | own
        Schedule(mode, **options).check()


def test_average_shows_a_flat_signature_with_the_options_of_every_rule() -> None:
    parameters = inspect.signature(average).parameters
    assert list(parameters)[0] == "paths"
    assert {p.kind for name, p in parameters.items() if name != "paths"} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {name: p.default for name, p in parameters.items()}
    expected = {
        "mode": None, "decay": None, "half_life": None, "per_step": False, "by": "auto", "warmup": None,
        "warmup_gamma": 1.0, "warmup_power": 2 / 3, "min_decay": 0.0, "update_after": 0, "bias_correction": False,
        "shape": None, "target": None, "profile": (), "allow_misfit": False, "base": None, "lora": "factors",
        "dequantize": False, "sigma_rel": None, "gamma": None, "window": None, "min_gap": None, "metrics": None,
        "weights": None, "normalize": True, "order": "auto", "last": None, "best": None, "metric": "metric",
        "lower_is_better": None, "every": None, "from_step": None, "to_step": None, "include_outputs": False,
        "state": "auto", "match": "name", "keys": "strict", "buffers": "average", "dtype": None, "out": "auto",
        "max_shard_size": None, "untie": False, "hash": False, "plot": None, "threads": None, "device": "auto",
        "gpu_memory": None, "allow_nonfinite": False, "force": False, "dry_run": False, "on_plan": None,
        "on_progress": None, "update": None, "replay": None, "recal_bn": None,
        "write_checksums": False, "sign_off": None, "part": None, "finish": False, "resume": False, "cache": None,
        "max_read_rate": None, "drop_cache": False, "exclude": (), "skip_broken": False,
    }  # fmt: skip
    expected |= {option.name: option.default for group in (Network, Measuring, Numerics) for option in group.options()}
    expected |= {option.name: option.default for option in Images.options() if option.name != "data"}
    assert defaults == expected | {"paths": inspect.Parameter.empty}
    assert all(f"\n        {name}: " in (average.__doc__ or "") for name in defaults)
    with pytest.raises(TypeError, match=r"average\(\) got an unexpected keyword argument 'mod'"):
        average(["gone.pth"], mod="ema")
