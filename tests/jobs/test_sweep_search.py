"""Searches and greedy soups: candidates that depend on scores."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swept_series import OPTIMUM, N, error_of, scored, series

from ckpt_tools import average, open_checkpoint
from ckpt_tools.errors import UsageError
from ckpt_tools.jobs.sweep.results import Result

Save = Callable[..., Path]


def error_of_ema(decay: float) -> float:
    value = 0.0
    for i in range(1, N):
        value = decay * value + (1 - decay) * i
    return abs(value - OPTIMUM)


def test_a_search_finds_the_optimum_in_few_evaluations(save: Save, here: Path) -> None:
    series(save)
    found = scored(decay=[0.2, 0.9], search="decay", evaluations=9)
    assert found.evaluations == 1 + N + 9
    values = [each.options["decay"] for each in found.candidates if "decay" in each.options]
    assert len(values) == 9
    errors = {value: error_of_ema(value) for value in [0.2 + 0.005 * i for i in range(141)]}
    exact = min(errors, key=errors.__getitem__)
    best = min((each for each in found.candidates if "decay" in each.options), key=lambda each: each.metrics["error"])
    assert best.options["decay"] == pytest.approx(exact, abs=0.02)
    assert any(note.startswith("Search of decay") for note in found.notes)


def test_a_search_takes_amounts_and_names_with_dashes(save: Save, here: Path) -> None:
    series(save)
    found = scored(half_life="50,1k", search="half-life", evaluations=4)
    values = [each.options["half_life"] for each in found.candidates if "half_life" in each.options]
    assert len(values) == 4
    assert all(50 < value < 1000 for value in values)


def test_a_search_that_ends_at_its_edge_says_so(save: Save, here: Path) -> None:
    series(save)
    found = scored(decay=[0.01, 0.2], search="decay")
    assert any("at the edge of the search" in note for note in found.notes)


def test_the_greedy_soup_is_the_one_of_the_published_procedure(save: Save, here: Path) -> None:
    series(save)
    found = scored(greedy=True)
    soup: list[int] = []
    for i in sorted(range(N), key=lambda i: abs(i - OPTIMUM)):
        if not soup or abs(sum([*soup, i]) / (len(soup) + 1) - OPTIMUM) <= abs(sum(soup) / len(soup) - OPTIMUM):
            soup.append(i)
    assert f"Greedy soup: {', '.join(f'c-{i}.pth' for i in soup)}." in found.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_greedy_soup_is_made_from_the_sum_of_those_before_and_one_more(
    save: Save, here: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(8, 300, generator=generator, dtype=torch.float64) + OPTIMUM
    for i, row in enumerate(rows):
        model = {"w": row.to(dtype), "tied": row.to(dtype), "n": torch.tensor(i)}
        save(f"run/c-{i}.pth", {"model": model, "step": 100 * i + 100})
    (here / "scores.py").write_text(
        f"def score(state):\n    return {{'error': ((state['w'].double() - {OPTIMUM}) ** 2).mean().item()}}\n"
    )
    sys.modules.pop("scores", None)
    found = scored(greedy=True, keep=99, scratch="s")
    soups = [each for each in found.candidates if each.label.startswith("greedy") and 3 < len(each.checkpoints) < 8]
    assert len(soups) > 3
    assert not [*Path("s").glob("sum*")]
    for each in soups:
        average([f"run/{name}" for name in each.checkpoints], out="alone.pth", force=True)
        ours, alone = open_checkpoint(str(each.file)), open_checkpoint("alone.pth")
        assert torch.equal(ours["n"], alone["n"])
        ulp = torch.nextafter(alone["w"].abs(), torch.tensor(9.0, dtype=dtype)) - alone["w"].abs()
        assert ((ours["w"] - alone["w"]).abs() <= (4 if dtype == torch.float64 else 1) * ulp).all()
        assert ours.provenance == alone.provenance


@pytest.mark.parametrize("fixed", [{"sigma_rel": 0.1}, {"shape": "linear"}, {"mode": "ema"}])
def test_a_search_is_of_the_mode_that_takes_its_option(save: Save, here: Path, fixed: dict[str, Any]) -> None:
    series(save)
    found = scored(**fixed, search="decay", evaluations=4)
    searched = [each for each in found.candidates if each.label.startswith("decay=")]
    assert len(searched) == len({each.coefficients for each in searched}) == 4
    for each in searched:
        assert each.options["mode"] == "ema"
        assert each.metrics["error"] == error_of(**each.options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "uniform", "search": "decay"}, r"`search='decay'` goes with `mode='ema'`"),
        ({"decay": [0.99, 0.5], "search": "decay"}, "a search from 0.99 to 0.5 in 8 evaluations"),
        ({"decay": [0.5, 1.0], "search": "decay"}, "a search from 0.5 to 1 in 8 evaluations"),
        ({"warmup_gamma": [1, 9], "search": "warmup_gamma"}, r"at 9: `warmup_gamma` goes with `warmup='timm'`"),
        ({"sigma_rel": [0.1, 0.5], "search": "sigma_rel"}, r"`search='sigma_rel'` at 0.5: "),
        ({"mode": "stock"}, "`mode='stock'` is not swept: uniform, ema, decay, power, difference are"),
        ({"mode": "uniform,weights"}, "`mode='weights'` is not swept"),
        ({"metrics": "table.csv"}, "`metrics` goes with `best`"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_evaluation(
    save: Save, here: Path, options: dict[str, Any], says: str
) -> None:
    series(save)
    with pytest.raises(UsageError, match=says):
        scored(**options)
    assert not Path("calls").exists()


@pytest.mark.parametrize("along", [{"per_step": True}, {"by": "steps"}])
def test_a_search_of_a_decay_per_step_has_ends_for_steps(save: Save, here: Path, along: dict[str, Any]) -> None:
    series(save)
    found = scored(**along, search="decay", evaluations=4)
    values = [each.options["decay"] for each in found.candidates if "decay" in each.options]
    # Checkpoints are 100 steps apart.
    assert all(0.3 < value**100 < 1 - 1 / (2 * N) for value in values)


def test_neighbours_in_a_search_are_told_apart_in_its_table_and_its_command(save: Save, here: Path) -> None:
    series(save, optimum=1e-4)
    found = scored(decay=[0.5, 0.99999999], search="decay", evaluations=20)
    labels = [each.label for each in found.candidates]
    assert len(labels) == len(set(labels))
    for each in found.candidates:
        if each.kind == "average" and each.label.startswith("decay="):
            assert each.label == f"decay={each.options['decay']:.12g}"
    best = max((each for each in found.candidates if "decay" in each.options), key=lambda each: -each.metrics["error"])
    assert any(note.startswith(f"Search of decay: {best.options['decay']:.12g} is best") for note in found.notes)


def test_a_soup_that_is_another_candidate_is_that_candidate(save: Save, here: Path) -> None:
    series(save, optimum=4.6)
    found = scored(last=[2, 3], greedy=True)
    assert found.best == "last=2"
    (best,) = [each for each in found.candidates if each.label == "last=2"]
    assert best.same == ("greedy c-5.pth+c-4.pth",)
    calls = len(Path("calls").read_text().splitlines())
    assert (found.evaluations, found.reused) == (calls, 0)
    assert len({each.coefficients + each.checkpoints for each in found.candidates}) == len(found.candidates)


def test_all_evaluations_of_a_sweep_are_counted_from_the_start(save: Save, here: Path) -> None:
    series(save)
    told: list[tuple[int, int]] = []

    def on_result(result: Result, done: int, total: int) -> None:
        told.append((done, total))

    plan = scored(last=3, decay=[0.2, 0.9], search="decay", greedy=True, evaluations=5, dry_run=True)
    scored(last=3, decay=[0.2, 0.9], search="decay", greedy=True, evaluations=5, on_result=on_result)
    assert {total for _, total in told} == {plan.evaluations} == {1 + N + 5 + N - 1}
    assert [done for done, _ in told] == [*range(1, len(told) + 1)]


def test_a_plan_has_the_bytes_of_searches_and_soups(save: Save, here: Path) -> None:
    series(save)
    plain = scored(last=3, dry_run=True)
    searched = scored(last=3, search="decay", evaluations=5, dry_run=True)
    size = plain.bytes_written // (1 + N)
    assert searched.bytes_written - plain.bytes_written == pytest.approx(5 * size, rel=0.2)
    # The first two are made for one read of the last three.
    assert searched.bytes_read - plain.bytes_read == pytest.approx(4 * plain.bytes_read * 3 / N, rel=0.2)
    greedy = scored(last=3, greedy=True, dry_run=True)
    sums = 12 * 8  # bytes of float64
    assert greedy.bytes_written - plain.bytes_written == pytest.approx((N - 1) * (size + sums), rel=0.2)


def test_a_soup_that_is_known_is_not_summed_again(save: Save, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series(save)
    found = scored(greedy=True)

    def never(*_: Any) -> None:
        raise AssertionError("a sum is written")

    monkeypatch.setattr("ckpt_tools.jobs.sweep.running_sum.write", never)
    again = scored(greedy=True)
    assert (again.candidates, again.evaluations) == (found.candidates, 0)
