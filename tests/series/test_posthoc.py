"""Post-hoc EMA against runs whose averages were kept, the formulas of EDM2, and least squares of NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools import average
from ckpt_tools.errors import SeriesError, UsageError
from ckpt_tools.series.profiles import Profile, mixture, parse_profile
from ckpt_tools.series.rules.power import gamma_of
from ckpt_tools.series.schedules import Schedule

STEPS = 2000
Save = Callable[..., Path]


def walk(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((STEPS, 3)).cumsum(axis=0)


def kept(weights: np.ndarray, decay: Callable[[int], float]) -> np.ndarray:
    """The average of a run at every step, from its first weights on."""
    averages = [weights[0]]
    for t in range(2, STEPS + 1):
        d = decay(t)
        averages.append(d * averages[-1] + (1 - d) * weights[t - 1])
    return np.array(averages)


def of_power(gamma: float) -> Callable[[int], float]:
    return lambda t: (1 - 1 / t) ** (gamma + 1)


@given(
    st.lists(st.tuples(st.integers(10, 2000), st.floats(0.02, 0.28)), min_size=1, max_size=6, unique=True),
    st.floats(0.03, 0.27),
)
def test_mixture_of_power_profiles_is_the_published_algorithm(sources: list[tuple[int, float]], width: float) -> None:
    """EDM2, algorithm 3, in the closed form of its inner products."""
    profiles = [(float(t), gamma_of(s)) for t, s in sources]
    end, gamma = max(t for t, _ in profiles), gamma_of(width)

    def inner(a: tuple[float, float], b: tuple[float, float]) -> float:
        (ta, ga), (tb, gb) = a, b
        log = math.log(ta / tb)
        ratio = math.exp(gb * log) if ta < tb else math.exp(-ga * log)
        return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * max(ta, tb))

    matrix = np.array([[inner(a, b) for b in profiles] for a in profiles])
    side = np.array([inner(a, (end, gamma)) for a in profiles])
    if np.linalg.cond(matrix) > 1e8:
        return  # two sources that are nearly the same: many mixtures are as near
    solved = np.linalg.solve(matrix, side)
    found, residual = mixture(tuple(Profile(t, "power", g) for t, g in profiles), Profile(end, "power", gamma))
    if abs(solved.sum()) < 0.1:
        return
    solved /= solved.sum()
    assert found == pytest.approx(solved, abs=1e-6)
    square = solved @ matrix @ solved - 2 * solved @ side + inner((end, gamma), (end, gamma))
    assert residual == pytest.approx(math.sqrt(max(square, 0) / inner((end, gamma), (end, gamma))), abs=1e-5)


def test_two_widths_make_a_third_that_was_never_kept() -> None:
    weights = walk(1)
    ends = range(100, STEPS + 1, 100)
    gammas = [gamma_of(0.05), gamma_of(0.10)]
    stored = {g: kept(weights, of_power(g)) for g in gammas}
    sources = [(end, g) for end in ends for g in gammas]
    coefficients, residual = mixture(
        tuple(Profile(float(end), "power", g) for end, g in sources), Profile(STEPS, "power", gamma_of(0.12))
    )
    made = np.asarray(coefficients) @ np.array([stored[g][end - 1] for end, g in sources])
    wanted = kept(weights, of_power(gamma_of(0.12)))[-1]
    assert residual < 0.01
    assert made == pytest.approx(wanted, abs=0.02 * np.abs(weights).max())
    assert np.abs(made - wanted).max() < 0.05 * np.abs(stored[gammas[1]][-1] - wanted).max()


def test_snapshots_and_an_ema_make_a_longer_ema() -> None:
    weights = walk(2)
    ema = kept(weights, lambda t: 0.99)
    ends = range(100, STEPS + 1, 100)
    sources = [Profile(float(end), "exponential", 0.99) for end in ends]
    coefficients, residual = mixture(tuple(sources), Profile(STEPS, "exponential", 0.995))
    made = np.asarray(coefficients) @ np.array([ema[end - 1] for end in ends])
    wanted = kept(weights, lambda t: 0.995)[-1]
    assert residual < 0.35
    assert np.abs(made - wanted).max() < 0.25 * np.abs(weights[-1] - wanted).max()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.floats(0, 50))
def test_snapshots_alone_have_the_mean_of_the_cumulative_profile_until_the_next(
    gaps: Sequence[int], gamma: float
) -> None:
    """The step function that is nearest to a curve has its mean on each step."""
    ends = np.cumsum(gaps).astype(float)
    coefficients, _ = mixture(
        tuple(Profile(end, "snapshot") for end in ends.tolist()), Profile(ends[-1], "power", gamma)
    )
    integral = ends[-1] * (ends / ends[-1]) ** (gamma + 2) / (gamma + 2)
    levels = np.append(np.diff(integral) / np.diff(ends), 1.0)
    assert np.cumsum(coefficients) == pytest.approx(levels, abs=1e-9)


@pytest.mark.parametrize("times", [0.5, 1.5, 2.0, 4.0])
def test_the_residual_with_snapshots_is_the_error_on_random_walks(times: float) -> None:
    """In units of the distance between the last weights and the wanted average, over 400 walks of 240 steps."""
    each, epochs = 20, 12
    weights = np.random.default_rng(5).standard_normal((each * epochs, 400)).cumsum(axis=0)

    def ema(half_life: float) -> np.ndarray:
        d, averages = 0.5 ** (1 / (half_life * each)), [weights[0]]
        for now in weights[1:]:
            averages.append(d * averages[-1] + (1 - d) * now)
        return np.array(averages)

    ends = [each * (i + 1) for i in range(epochs)]
    decay = 0.5 ** (1 / each)
    sources = [Profile(float(end), "exponential", decay) for end in ends] + [
        Profile(float(e), "snapshot") for e in ends
    ]
    coefficients, residual = mixture(tuple(sources), Profile(ends[-1], "exponential", decay ** (1 / times)))
    made = np.asarray(coefficients) @ np.concatenate([ema(1)[np.array(ends) - 1], weights[np.array(ends) - 1]])
    wanted = ema(times)[-1]
    error = np.linalg.norm(made - wanted) / np.linalg.norm(weights[-1] - wanted)
    assert error == pytest.approx(residual, rel=0.3)
    assert math.fsum(coefficients) == pytest.approx(1, abs=1e-12)


def test_an_average_that_is_there_is_taken_as_it_is() -> None:
    sources = (Profile(900.0, "power", 3.0), Profile(1000.0, "power", 6.0), Profile(1000.0, "exponential", 0.99))
    for i, wanted in enumerate(sources[1:], 1):
        coefficients, residual = mixture(sources, wanted)
        assert coefficients == pytest.approx([float(j == i) for j in range(3)], abs=1e-9)
        assert residual < 1e-9


def test_equal_sources_have_equal_parts() -> None:
    source = Profile(500.0, "power", 3.0)
    coefficients, _ = mixture((source, source, Profile(500.0, "power", 9.0)), Profile(500.0, "power", 5.0))
    assert coefficients[0] == pytest.approx(coefficients[1], rel=1e-6)


@pytest.mark.parametrize(
    "profile",
    [
        Profile(2000, "exponential", 0.9),
        Profile(2000, "exponential", 0.9999),
        Profile(7, "power", 0.0),
        Profile(10**7, "power", 900.0),
    ],
)
def test_a_profile_has_the_mass_one(profile: Profile) -> None:
    from ckpt_tools.series.profiles import _quadrature

    nodes, weights = _quadrature(sorted({*profile.edges}))
    assert (profile.density(nodes) * weights).sum().item() == pytest.approx(1, rel=1e-9)


def files(save: Save, **average_of: str) -> None:
    """Ten checkpoints at steps 100 to 1000 with raw weights and EMAs under these keys."""
    weights = walk(3)
    emas = {key: kept(weights, lambda t, d=float(d): d) for key, d in average_of.items()}  # type: ignore[misc]
    for step in range(100, 1001, 100):
        tree: dict[str, Any] = {key: {"w": torch.tensor(ema[step - 1])} for key, ema in emas.items()}
        save(f"c-{step}.pth", {"model": {"w": torch.tensor(weights[step - 1])}, **tree, "step": step})


def loaded(path: str) -> np.ndarray:
    return torch.load(path)["model"]["w"].numpy()


def test_average_takes_raw_weights_and_ema_of_the_same_files(save: Save, here: Path) -> None:
    files(save, model_ema="0.99")
    report = average(
        "c-*.pth",
        mode="posthoc",
        target="decay=0.98",
        profile=["*:model_ema=decay:0.99"],
        allow_misfit=True,
        out="a.pth",
    )
    assert len(report.inputs) == 20
    assert {entry.state for entry in report.inputs} == {"raw (model)", "ema (model_ema)"}
    assert math.fsum(entry.coefficient for entry in report.inputs) == pytest.approx(1)
    weights = walk(3)
    ema = kept(weights, lambda t: 0.99)
    summed = sum(
        entry.coefficient * (weights if entry.state.startswith("raw") else ema)[(entry.step or 0) - 1]
        for entry in report.inputs
    )
    assert loaded("a.pth") == pytest.approx(summed, rel=1e-12)


def test_average_takes_several_emas_of_each_file(save: Save, here: Path) -> None:
    files(save, ema_a="0.99", ema_b="0.999")
    report = average(
        "c-*.pth", mode="posthoc", target="decay=0.995", state=["ema_a", "ema_b"],
        profile=["*:ema_a=decay:0.99", "*:ema_b=decay:0.999"], out="a.pth",
    )  # fmt: skip
    assert len(report.inputs) == 20
    wanted = kept(walk(3), lambda t: 0.995)[999]
    assert np.abs(loaded("a.pth") - wanted).max() < 0.1 * np.abs(walk(3)[999] - wanted).max()
    assert any("relative residual" in note for note in report.notes)


def test_decays_in_the_names_of_files_are_read(save: Save, here: Path) -> None:
    weights = walk(4)
    for d in ("0.99", "0.999"):
        ema = kept(weights, lambda t, d=float(d): d)  # type: ignore[misc]
        for step in range(200, 1001, 200):
            save(f"ema_{d}_{step:06d}.pt", {"w": torch.tensor(ema[step - 1])})
    report = average(["ema_*.pt"], mode="posthoc", target="decay=0.996", dry_run=True)
    assert len(report.inputs) == 10
    assert any("10 exponential profiles" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "needs `target`"),
        ({"target": "wide"}, UsageError, "`target='wide'` is not a profile"),
        ({"target": "sigma-rel=0.5"}, UsageError, "above 0 and below"),
        ({"target": "decay=1"}, UsageError, "a decay is between 0 and 1"),
        ({"target": "gamma=x"}, UsageError, "'x' is not a number"),
        ({"target": "decay=0.99", "profile": ["c-1"]}, UsageError, "write GLOB="),
        ({"target": "decay=0.99", "profile": ["*=often"]}, UsageError, "`profile='often'` is not a profile"),
        (
            {"target": "decay=0.9"},
            SeriesError,
            "nothing tells which steps its ema .*`profile='c-100.pth=decay:0.9999'`",
        ),
        (
            {"target": "decay=0.5", "profile": ["*:model_ema=decay:0.99"]},
            UsageError,
            "differs from it by .*`allow_misfit`",
        ),
    ],
)
def test_average_refuses_a_target_that_cannot_be_made(
    save: Save, here: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    files(save, model_ema="0.99")
    with pytest.raises(error, match=message):
        average("c-*.pth", mode="posthoc", out="a.pth", **options)
    assert not Path("a.pth").exists()


def test_average_refuses_a_decay_of_updates_where_epochs_are_counted(save: Save, here: Path) -> None:
    for epoch in (1, 2):
        args = {"model_ema_decay": 0.9998}
        tree = {"state_dict": {"w": torch.zeros(2)}, "state_dict_ema": {"w": torch.full((2,), float(epoch))}}
        save(f"c-{epoch}.pth", tree | {"epoch": epoch, "args": args})
    with pytest.raises(SeriesError, match="is for an update, and the file counts epochs.*half-life in epochs"):
        average("c-*.pth", mode="posthoc", target="half-life=1")


def test_average_refuses_files_without_a_step(save: Save, here: Path) -> None:
    for name in ("a", "b"):
        save(f"{name}.pth", {"w": torch.full((2,), float(ord(name)))})
    with pytest.raises(SeriesError, match="no step that is known"):
        average("*.pth", mode="posthoc", target="gamma=3")


@pytest.mark.parametrize("text", ["sigma-rel=0.05", "sigma_rel:0.05", "SIGMA-REL = 0.05"])
def test_parse_profile_takes_both_ways_to_write(text: str) -> None:
    assert parse_profile("target", text, 10.0) == Profile(10.0, "power", gamma_of(0.05))


def test_a_half_life_of_a_target_may_be_a_part_of_the_run() -> None:
    schedule = Schedule("posthoc", target="half-life=5%")
    schedule.check()
    assert parse_profile("target", "half-life=5%", 2000.0).value == pytest.approx(0.5 ** (1 / 100))


@pytest.mark.parametrize(
    ("kind", "value"),
    [("power", 8.0), ("power", 1.5), ("exponential", 0.98), ("exponential", 0.995)],
)
@pytest.mark.parametrize("snapshots", [False, True])
def test_mixture_is_the_least_squares_solution_of_numpy(kind: str, value: float, snapshots: bool) -> None:
    """Densities on 200,000 points, summed by the midpoint rule, and with snapshots their integrals."""
    end, points = 400.0, 200_000
    t = (np.arange(points) + 0.5) * end / points

    def density(last: float, kind: str, value: float) -> np.ndarray:
        if kind == "power":
            return np.where(t <= last, (value + 1) / last * (t / last) ** value, 0)
        if kind == "snapshot":
            return np.where(np.abs(t - last - 0.5 * end / points) < 0.1 * end / points, points / end, 0)
        fading = -math.log(value) * value ** np.maximum(last - t, 0)
        return np.where(t <= last, fading + np.where(t < 1, value**last, 0), 0)

    sources = [
        (200.0, "exponential", 0.97), (400.0, "exponential", 0.97), (400.0, "power", 5.0), (300.0, "power", 12.0),
        (400.0, "exponential", 0.99), *[(300.0, "snapshot", 0.0), (400.0, "snapshot", 0.0)] * snapshots,
    ]  # fmt: skip
    columns, wanted = np.stack([density(*each) for each in sources], axis=1), density(end, kind, value)
    if snapshots:  # the last one is left when the others have their parts of 1
        columns, wanted = (np.cumsum(each, axis=0) * end / points for each in (columns, wanted))
        most = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], wanted - columns[:, -1], rcond=None)[0]
        expected = np.append(most, 1 - most.sum())
    else:
        expected = np.linalg.lstsq(columns, wanted, rcond=None)[0]
        expected /= expected.sum()
    residual = np.linalg.norm(columns @ expected - wanted) / np.linalg.norm(wanted)
    found = mixture(tuple(Profile(*each) for each in sources), Profile(end, kind, value))
    assert found[0] == pytest.approx(expected, abs=2e-3 if snapshots else 1e-4)
    assert found[1] == pytest.approx(residual, abs=2e-5)


def test_files_of_guided_diffusion_beside_one_another_are_told_by_their_names(save: Save, here: Path) -> None:
    """model010000.pt, ema_0.9999_010000.pt and ema_0.999_010000.pt, as its TrainLoop names them."""
    for step in range(100, 1001, 100):
        save(f"model{step:06d}.pt", {"w": torch.full((2,), float(step))})
        for rate in ("0.99", "0.999"):
            save(f"ema_{rate}_{step:06d}.pt", {"w": torch.full((2,), float(step) * float(rate))})
    both = average(["."], mode="posthoc", target="decay=0.995", dry_run=True)
    assert len(both.inputs) == 30
    assert any("20 exponential and 10 snapshot profiles" in note for note in both.notes)
    raw = average(["model*.pt"], mode="posthoc", target="gamma=0", dry_run=True)
    assert [entry.coefficient for entry in raw.inputs] == pytest.approx([0.15, *[0.1] * 8, 0.05])


def test_timms_epochs_take_half_lives_in_epochs(save: Save, here: Path) -> None:
    """Raw weights and an EMA of each epoch make another EMA; against a run with 200 updates an epoch."""
    weights, each = walk(7), 200
    ema = kept(weights, lambda t: 0.5 ** (1 / each))
    for epoch in range(1, 11):
        tree = {"state_dict": {"w": torch.tensor(weights[each * epoch - 1])}, "epoch": epoch}
        tree["state_dict_ema"] = {"w": torch.tensor(ema[each * epoch - 1])}
        save(f"checkpoint-{epoch}.pth.tar", tree | {"args": {"model_ema_decay": 0.5 ** (1 / each)}})
    options = {"mode": "posthoc", "target": "half-life=2", "profile": ["*:state_dict_ema=half-life:1"]}
    report = average("*.tar", out="a.pth", **options)  # type: ignore[arg-type]
    assert {entry.state for entry in report.inputs} == {"raw (state_dict)", "ema (state_dict_ema)"}
    wanted = kept(weights, lambda t: 0.5 ** (1 / (2 * each)))[-1]
    made = torch.load("a.pth")["state_dict"]["w"].numpy()
    assert np.abs(made - wanted).max() < 0.02 * np.abs(ema[-1] - wanted).max()
