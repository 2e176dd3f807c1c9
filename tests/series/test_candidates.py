"""Candidates of a sweep, against the averages that are asked for one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.errors import CkptError, SeriesError, UsageError
from ckpt_tools.series.candidates import Candidate, candidates, values
from ckpt_tools.series.member import Member
from ckpt_tools.series.rules.option import Option
from ckpt_tools.series.schedules import Schedule

MEMBERS = tuple(Member(Path(f"c{i}"), None, 1000 * (i + 1), "step") for i in range(8))  # type: ignore[arg-type]
NAMES = [member.path.name for member in MEMBERS]


def steps(schedule: Schedule, members: Sequence[Member]) -> Sequence[Any]:
    return [member.step for member in members]


def made(rules: dict[str, Any], selections: dict[str, Any] | None = None, **fixed: Any) -> list[Candidate]:
    return [*candidates(MEMBERS, NAMES, rules, selections or {}, steps, **fixed).candidates]


def labels(found: Sequence[Candidate]) -> list[str]:
    return [each.label for each in found if each.label not in NAMES]


@pytest.mark.parametrize(
    ("type_", "text", "expected"),
    [
        (int, "3,5,8", [3, 5, 8]),
        (int, "3", [3]),
        (float, "0.5, 0.9,0.99", [0.5, 0.9, 0.99]),
        (float, "0.01:0.25:0.01", [i / 100 for i in range(1, 26)]),
        (float, "0.1:0.35:0.1", [0.1, 0.2, 0.3]),
        (float, "0.5,0.8:0.9:0.05", [0.5, 0.8, 0.85, 0.9]),
        (int | str, "20k:60k:20k", [20000, 40000, 60000]),
        (int | float | str, "5k,10%,1.5M", ["5k", "10%", "1.5M"]),
        (int | float | str, "1%:3%:1%", ["1%", "2%", "3%"]),
        (str, "uniform,ema", ["uniform", "ema"]),
        (bool, "true,false", [True, False]),
    ],
)
def test_values_are_lists_and_ranges(type_: Any, text: str, expected: list[Any]) -> None:
    assert values(Option("x", type_, None, ""), text) == expected


def test_values_of_a_program_are_taken_as_they_are() -> None:
    assert values(Option("x", int, None, ""), 3) == [3]
    assert values(Option("x", int, None, ""), (3, 5)) == [3, 5]


@pytest.mark.parametrize(
    ("type_", "text", "says"),
    [
        (float, "0.1:0.5:x", "first:last:step"),
        (float, "0.5:0.1:0.1", "go up"),
        (float, "0.1:0.5:0", "go up"),
        (float, "0:1:1e-9", "fewer than 1000"),
        (int | str, "1%:20k:1k", "first:last:step"),
        (float, "0.5,often", "'often'` is not a number"),
        (bool, "perhaps", "neither true nor false"),
    ],
)
def test_values_that_are_none_are_refused(type_: Any, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        values(Option("x", type_, None, ""), text)


def test_all_combinations_and_every_checkpoint_alone_are_candidates() -> None:
    found = made({"mode": ["ema"], "decay": [0.5, 0.9]}, {"last": [3, 5]})
    assert labels(found) == ["last=3 decay=0.5", "last=3 decay=0.9", "last=5 decay=0.5", "last=5 decay=0.9"]
    assert [each.label for each in found[4:]] == NAMES
    for each in found[:4]:
        n, decay = each.options["last"], each.options["decay"]
        assert each.members == MEMBERS[-n:]
        assert each.coefficients == Schedule("ema", decay=decay).coefficients([m.step for m in MEMBERS[-n:]])
        assert each.row(MEMBERS) == (0.0,) * (8 - n) + each.coefficients


def test_options_go_with_the_modes_that_take_them() -> None:
    found = made({"mode": ["uniform", "EMA", "decay"], "decay": [0.5, 0.9], "shape": ["cosine"]})
    assert labels(found) == ["mode=uniform", "mode=ema decay=0.5", "mode=ema decay=0.9", "mode=decay"]
    assert found[-9].options == {"mode": "decay", "shape": "cosine"}


def test_without_a_mode_the_options_tell() -> None:
    found = made({"decay": [0.5], "sigma_rel": [0.1, 0.2]})
    assert labels(found) == ["mode=ema", "mode=power sigma_rel=0.1", "mode=power sigma_rel=0.2"]
    assert labels(made({})) == ["uniform"]
    assert labels(made({"by": ["files"], "half_life": [2]})) == ["ema"]


def test_equal_rows_are_one_candidate() -> None:
    found = made({"mode": ["uniform", "decay"], "shape": ["linear"]}, {"last": [1, 4]})
    assert labels(found) == ["last=4 mode=uniform"]
    alone = found[0]
    assert (alone.label, alone.kind, alone.members) == ("c7", "checkpoint", MEMBERS[-1:])
    assert alone.same == ("last=1 mode=uniform", "last=1 mode=decay")
    assert [each["mode"] for each in alone.same_options] == ["uniform", "decay"]
    rows = [each.row(MEMBERS) for each in found]
    assert len(set(rows)) == len(rows)


def test_what_cannot_be_made_is_left_out_with_its_reason() -> None:
    found = candidates(MEMBERS, NAMES, {}, {"window": ["100", "2500"]}, steps)
    assert labels(found.candidates) == ["window=2500"]
    assert list(found.refused) == ["window=100"]
    assert "only c7 is in it" in found.refused["window=100"]


def test_if_none_can_be_made_the_first_reason_is_the_error() -> None:
    with pytest.raises(SeriesError, match="only c7 is in it"):
        made({}, {"window": ["100", "200"]})


@pytest.mark.parametrize(
    ("rules", "selections", "says"),
    [
        ({}, {"last": [3, "x"]}, "`last='x'` is not a whole number"),
        ({}, {"last": [0, 3]}, "`last=0`: must be 1 or more"),
        ({"mode": ["uniform", "ema"], "decay": [0.9, 1.5]}, {"last": [3, 5]}, "decay of 1.5 is outside"),
        ({"half_life": [2, "x"]}, {}, "`half_life='x'` is not a length of training"),
        ({}, {"from_step": [1000, 9000], "to_step": [7000]}, "`from_step=9000` is after `to_step=7000`"),
    ],
)
def test_a_value_that_is_wrong_in_every_combination_is_an_error(
    rules: dict[str, Any], selections: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        made(rules, selections)


def test_two_values_that_do_not_go_together_are_left_out_where_they_meet() -> None:
    found = candidates(MEMBERS, NAMES, {}, {"from_step": [1000, 3000], "to_step": [2000, 7000]}, steps)
    assert [*found.refused] == ["from_step=3000 to_step=2000"]


@pytest.mark.parametrize(
    ("rules", "selections", "says"),
    [
        ({"mode": ["uniform"], "decay": [0.5]}, {}, "`decay` goes with `mode='ema'`"),
        ({"decay": [0.5 + i / 1000 for i in range(300)]}, {"last": [1, 2, 3, 4]}, "1200 combinations"),
        ({"mode": ["median"]}, {}, "`mode` is one of"),
    ],
)
def test_impossible_sweeps_are_refused(rules: dict[str, Any], selections: dict[str, Any], says: str) -> None:
    with pytest.raises(CkptError, match=says):
        made(rules, selections)


@given(st.lists(st.sampled_from(["uniform", "ema", "decay", "power"]), min_size=1, unique=True), st.data())
def test_every_candidate_is_the_average_of_its_options(modes: list[str], data: st.DataObject) -> None:
    rules: dict[str, Any] = {"mode": modes}
    if "ema" in modes:
        rules["decay"] = data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=1, unique=True))
    if "power" in modes:
        rules["sigma_rel"] = data.draw(st.lists(st.sampled_from([0.05, 0.2]), min_size=1, unique=True))
    last = data.draw(st.lists(st.integers(1, 8), min_size=1, unique=True))
    for each in made(rules, {"last": last}):
        if each.options:
            options = {name: value for name, value in each.options.items() if name != "last"}
            own = MEMBERS[-each.options["last"] :]
            assert each.coefficients == Schedule(**options).coefficients([member.step for member in own])
