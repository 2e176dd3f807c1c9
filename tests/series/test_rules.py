"""Rules against runs of 2,000 steps whose averages were kept, published figures, and the original classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, getcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from torch import nn

from ckpt_tools.errors import UsageError
from ckpt_tools.series.rules import amounts, decay, difference, ema, power
from ckpt_tools.series.schedules import Schedule

STEPS = 2000
SAVED = [1, 7, 50, 400, 401, 900, 1500, 1999, 2000]
spaced = st.lists(st.integers(1, 500), min_size=1, max_size=20).map(lambda gaps: np.cumsum(gaps).tolist())


def walk(seed: int = 0, steps: int = STEPS) -> np.ndarray:
    """The weights of a run, one row a step, from step 1 on."""
    return np.random.default_rng(seed).standard_normal((steps, 3)).cumsum(axis=0)


def summed(coefficients: Sequence[float], weights: np.ndarray) -> np.ndarray:
    return np.asarray(coefficients) @ weights


@pytest.mark.parametrize("shape", decay.SHAPES)
@pytest.mark.parametrize("n", range(2, 21))
def test_decay_is_the_run_whose_updates_were_scaled(shape: str, n: int) -> None:
    weights = walk(n, n)
    reached = weights[0].copy()
    for i in range(1, n):  # update i of n, scaled by the learning rate at i / n of the decay
        x = i / n
        factor = {
            "linear": 1 - x,
            "1-sqrt": 1 - x**0.5,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * x),
            "inverse-sqrt": 1 - x**0.5,
        }[shape]
        reached += factor * (weights[i] - weights[i - 1])
    assert summed(decay.decay(range(n), shape=shape), weights) == pytest.approx(reached, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("n", range(2, 21))
def test_1_sqrt_is_the_minus_sqrt_of_megatron_and_linear_is_uniform(n: int) -> None:
    """Its coefficients are the differences of 1 - sqrt(i / n), the first what is left to 1; here in 50 digits."""
    getcontext().prec = 50
    factors = [1 - (Decimal(i) / n).sqrt() for i in range(n)]
    expected = [a - b for a, b in pairwise(factors)] + [factors[-1]]
    expected[0] = 1 - sum(expected[1:])
    assert decay.decay(range(n), shape="1-sqrt") == pytest.approx([float(c) for c in expected], rel=1e-14)
    assert decay.decay(range(n), shape="linear") == pytest.approx([1 / n] * n, rel=1e-14)
    published = [0.316, 0.131, 0.1, 0.085, 0.075, 0.067, 0.062, 0.058, 0.054, 0.051]
    assert decay.decay(range(10), shape="1-sqrt") == pytest.approx(published, abs=6e-4)


@given(spaced, st.sampled_from([*decay.SHAPES]), st.integers(1, 9), st.integers(0, 10**6))
def test_decay_does_not_depend_on_the_unit_or_the_origin_of_steps(
    steps: list[int], shape: str, unit: int, origin: int
) -> None:
    moved = [origin + unit * step for step in steps]
    coefficients = decay.decay(steps, shape=shape)
    assert decay.decay(moved, shape=shape) == pytest.approx(coefficients, abs=1e-9)
    assert math.fsum(coefficients) == pytest.approx(1, abs=1e-12)
    assert min(coefficients) >= 0


def test_decay_over_uneven_steps_scales_every_step_by_where_it_is() -> None:
    """Files at every step of a run, most of which are left out: a gap is scaled as its last step is."""
    every = walk(5, 101)
    kept = [0, 10, 15, 60, 100]
    whole = 100 * 5 / 4
    reached = every[0].copy()
    for a, b in pairwise(kept):
        for step in range(a + 1, b + 1):
            reached += (1 - b / whole) * (every[step] - every[step - 1])
    found = summed(decay.decay(kept, shape="linear"), every[kept])
    assert found == pytest.approx(reached, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 400.0])
def test_power_is_the_power_ema_of_a_run(gamma: float) -> None:
    weights = walk(1)
    average = np.zeros(3)
    for t in range(1, STEPS + 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * weights[t - 1]
    found = summed(power.power(range(1, STEPS + 1), gamma=gamma), weights)
    assert found == pytest.approx(average, rel=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 6.94, 100.0])
def test_power_of_some_snapshots_is_that_of_a_run_that_stood_still_before_each(gamma: float) -> None:
    weights = walk(2)
    average = np.zeros(3)
    for t in range(1, STEPS + 1):
        now = weights[next(step for step in SAVED if step >= t) - 1]
        beta = (1 - 1 / t) ** (gamma + 1)
        average = beta * average + (1 - beta) * now
    found = summed(power.power(SAVED, gamma=gamma), weights[[step - 1 for step in SAVED]])
    assert found == pytest.approx(average, rel=1e-10)


@given(st.floats(0.001, 0.288))
def test_gamma_of_a_width_and_back_is_the_width(sigma_rel: float) -> None:
    gamma = power.gamma_of(sigma_rel)
    assert gamma > 0
    assert power.sigma_of(gamma) == pytest.approx(sigma_rel, rel=1e-12)
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    assert gamma == pytest.approx(max(roots[np.isreal(roots)].real), rel=1e-7)


def test_the_widths_of_edm2_have_its_exponents() -> None:
    assert power.gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert power.gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, math.nan])
def test_power_rejects_a_width_that_no_profile_has(sigma_rel: float) -> None:
    with pytest.raises(UsageError, match=r"above 0 and below 0\.2887"):
        Schedule("power", sigma_rel=sigma_rel).check()


@pytest.mark.parametrize(("half_life", "steps"), [(100, 100.0), ("100", 100.0), ("0.1k", 100.0), ("5%", 100.0)])
def test_a_half_life_is_the_ema_of_every_step(half_life: int | str, steps: float) -> None:
    weights = walk(3)
    average = weights[SAVED[0] - 1].copy()
    for t in range(SAVED[0] + 1, STEPS + 1):
        now = weights[next(step for step in SAVED if step >= t) - 1]
        d = 0.5 ** (1 / steps)
        average = d * average + (1 - d) * now
    found = Schedule("ema", half_life=half_life).coefficients(SAVED)
    assert summed(found, weights[[step - 1 for step in SAVED]]) == pytest.approx(average, rel=1e-10)


def test_a_half_life_of_files_halves_in_so_many_files() -> None:
    schedule = Schedule(half_life=2, by="files")
    assert schedule.mode == "ema"
    found = schedule.coefficients([None] * 9)
    assert found[-1] / found[-3] == pytest.approx(2)
    assert found == pytest.approx(ema.ema(9, decay=0.5**0.5))
    assert Schedule(half_life="50%", by="files").coefficients([None] * 4) == pytest.approx(ema.ema(4, decay=0.5**0.5))


@pytest.mark.parametrize(
    ("gamma", "exponent", "least", "after"),
    [(1.0, 2 / 3, 0.0, 0), (5.0, 0.75, 0.1, 0), (1.0, 2 / 3, 0.2, 4), (30.0, 1.0, 0.0, 9)],
)
def test_timms_warmup_with_all_of_its_options_is_model_ema_v3(
    gamma: float, exponent: float, least: float, after: int
) -> None:
    weights = torch.tensor(walk(4, 30))
    model = nn.Module()
    model.w = nn.Parameter(weights[0].clone())
    average = ModelEmaV3(
        model, decay=0.8, min_decay=least, update_after_step=after, use_warmup=True, warmup_gamma=gamma,
        warmup_power=exponent, foreach=False,
    )  # fmt: skip
    for i in range(1, 30):
        model.w.data = weights[i].clone()
        average.update(model, step=i)
    schedule = Schedule(
        "ema", decay=0.8, warmup="timm", warmup_gamma=gamma, warmup_power=exponent, min_decay=least, update_after=after
    )
    schedule.check()
    found = summed(schedule.coefficients([None] * 30), weights.numpy())
    assert found == pytest.approx(average.module.w.detach().numpy(), rel=1e-12)


def test_difference_is_the_mean_of_the_window_between_two_running_means() -> None:
    weights = walk(6)
    means = {n: weights[:n].mean(axis=0) for n in (100, 700, 2000)}
    found = summed(difference.difference([100, 700, 2000]), np.stack([*means.values()]))
    assert found == pytest.approx(weights[100:2000].mean(axis=0), rel=1e-12)
    assert difference.difference([100, 700, 2000])[1] == 0


@pytest.mark.parametrize(
    ("updates", "message"),
    [([5], "two checkpoints or more"), ([None, 5], "does not say"), ([5, 5], "must be over more"), ([9, 5], "over 5")],
)
def test_difference_rejects_counts_that_make_no_window(updates: list[int | None], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        difference.difference(updates)


@given(st.integers(2, 300), st.booleans())
def test_the_decay_of_a_series_makes_an_average_as_old_as_a_third_of_it(n: int, corrected: bool) -> None:
    schedule = Schedule("ema", bias_correction=corrected)
    found = schedule.coefficients(range(n))
    age = math.fsum(c * (n - 1 - i) for i, c in enumerate(found))
    assert age == pytest.approx((n - 1) / 3, rel=0.01)
    assert set(schedule.fitted(range(n))) == {"decay"}
    assert not Schedule("ema", decay=0.9, bias_correction=corrected).fitted(range(n))


def test_the_decay_that_fits_may_be_of_steps() -> None:
    steps = list(range(1000, 20_000, 1000))
    schedule = Schedule("ema", per_step=True)
    found = schedule.coefficients(steps)
    assert math.fsum(c * (steps[-1] - at) for c, at in zip(found, steps, strict=True)) == pytest.approx(6000, rel=0.01)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({}, "uniform"),
        ({"decay": None}, "uniform"),
        ({"decay": 0.9}, "ema"),
        ({"per_step": True}, "ema"),
        ({"weights": [1.0]}, "weights"),
        ({"shape": "cosine"}, "decay"),
        ({"sigma_rel": 0.1}, "power"),
        ({"gamma": 3.0, "by": "files"}, "power"),
    ],
)
def test_options_without_a_mode_mean_the_mode_that_takes_them(options: dict[str, object], mode: str) -> None:
    assert Schedule(**options).mode == mode


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("swa", "uniform"),
        ("SWA", "uniform"),
        ("mean", "uniform"),
        ("Average", "uniform"),
        ("EMA", "ema"),
        ("Power", "power"),
    ],
)
def test_modes_have_the_names_that_other_tools_give_them(name: str, mode: str) -> None:
    assert Schedule(name).mode == mode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "files"}, "`by` goes with `mode='ema'` or `mode='decay'` or `mode='power'`"),
        ({"mode": "ema", "by": "step"}, "`by` is one of auto, steps, files, not 'step'"),
        ({"mode": "ema", "half_life": "0"}, "not a length of training"),
        ({"mode": "ema", "half_life": "120%"}, "not a length of training"),
        ({"mode": "ema", "half_life": "soon"}, "not a length of training"),
        ({"mode": "ema", "half_life": 5, "decay": 0.9}, "`half_life` and `decay` cannot go together"),
        ({"mode": "ema", "warmup_gamma": 2.0}, "`warmup_gamma` goes with `warmup='timm'`"),
        ({"mode": "ema", "warmup": "litema", "update_after": 2}, "`update_after` goes with `warmup='timm'`"),
        ({"mode": "ema", "warmup": "timm", "min_decay": 2.0}, "between 0 and 1"),
        ({"mode": "ema", "warmup": "timm", "update_after": -1}, "must be 0 or more"),
        ({"mode": "decay", "shape": "sine"}, "`shape` is one of linear, 1-sqrt, cosine, inverse-sqrt, not 'sine'"),
        ({"mode": "power"}, "needs one of `sigma_rel` and `gamma`"),
        ({"mode": "power", "gamma": 1.0, "sigma_rel": 0.1}, "needs one of"),
        ({"mode": "power", "gamma": -1.0}, "must be 0 or more"),
        ({"mode": "difference", "decay": 0.9}, "`decay` goes with `mode='ema'`"),
    ],
)
def test_check_refuses_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Schedule(**options).check()


@pytest.mark.parametrize("options", [{"sigma_rel": 0.1}, {"half_life": 100}, {"mode": "decay", "by": "steps"}])
def test_rules_of_steps_refuse_series_without_them(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="a checkpoint has none.*add `by='files'`"):
        Schedule(**options).coefficients([10, None])
    with pytest.raises(UsageError, match="do not increase.*two are at 10"):
        Schedule(**options).coefficients([10, 10])


@given(spaced)
def test_every_rule_but_given_weights_sums_to_one(steps: list[int]) -> None:
    for schedule in (
        Schedule("ema"), Schedule("ema", half_life="20%"), Schedule("decay"), Schedule("power", sigma_rel=0.1),
        Schedule("decay", shape="cosine", by="files"), Schedule("power", gamma=2.0, by="files"),
    ):  # fmt: skip
        coefficients = schedule.coefficients(steps)
        assert len(coefficients) == len(steps)
        assert math.fsum(coefficients) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "steps"), [("20k", 20_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("300", 300), (7, 7), ("0.25k", 250)]
)
def test_parse_steps_reads_units(text: str | int, steps: int) -> None:
    assert amounts.parse_steps("every", text) == steps


@pytest.mark.parametrize("text", ["", "k", "20kk", "1.5", "5%", "-3", "0.0001k", True, 1.0, None])
def test_parse_steps_refuses_what_is_no_whole_number(text: object) -> None:
    with pytest.raises(UsageError, match="`every=.*is not a whole number of steps"):
        amounts.parse_steps("every", text)  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma_rel", ["0.001", "0.0123", "0.05", "0.1", "0.2", "0.27", "0.288"])
def test_gamma_of_a_width_is_the_root_in_50_digits(sigma_rel: str) -> None:
    getcontext().prec = 50
    square = 1 / Decimal(sigma_rel) ** 2
    low, high = Decimal(0), square  # the cubic grows above its largest root, and is below 0 before it
    for _ in range(200):
        gamma = (low + high) / 2
        below = (gamma + 2) ** 2 * (gamma + 3) < (gamma + 1) * square
        low, high = (gamma, high) if below else (low, gamma)
    assert power.gamma_of(float(sigma_rel)) == pytest.approx(float(low), rel=1e-12, abs=1e-13)


def test_a_width_that_no_training_can_tell_from_the_last_step_is_refused() -> None:
    assert power.sigma_of(power.gamma_of(1e-7)) == pytest.approx(1e-7, rel=1e-12)
    for narrow in (9e-8, 1e-300):
        with pytest.raises(UsageError, match="the last checkpoint alone. Give 1e-07 or more"):
            power.gamma_of(narrow)


def test_megatrons_weights_count_files_also_where_steps_are_uneven() -> None:
    """Its tools/checkpoint/weighted_merge.py knows the number of the checkpoints alone."""
    uneven = [1000, 2000, 5000, 5500, 10000]
    assert Schedule(shape="1-sqrt", by="files").coefficients(uneven) == decay.decay(range(5), shape="1-sqrt")
    assert Schedule(shape="linear", by="files").coefficients(uneven) == pytest.approx([0.2] * 5)
