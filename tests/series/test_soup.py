"""Greedy soup, against the procedure as the paper writes it down."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.series.soup import Soup, greedy


def chosen(values: list[float], optimum: float) -> tuple[Soup, list[Soup]]:
    """Run it on models that are numbers, whose average should be near an optimum."""
    score = {i: -abs(value - optimum) for i, value in enumerate(values)}
    search, asked = greedy([score[i] for i in range(len(values))]), []
    try:
        soup = next(search)
        while True:
            asked.append(soup)
            mean = math.fsum(values[i] for i in soup) / len(soup)
            soup = search.send(-abs(mean - optimum))
    except StopIteration as stop:
        return stop.value, asked


def published(values: list[float], optimum: float) -> set[int]:
    """Recipe 1 of the paper: sort by score; add each model if the score of the average is not worse."""

    def score(ingredients: list[int]) -> float:
        return -abs(math.fsum(values[i] for i in ingredients) / len(ingredients) - optimum)

    ranked = sorted(range(len(values)), key=lambda i: score([i]), reverse=True)
    ingredients: list[int] = []
    for i in ranked:
        if not ingredients or score([*ingredients, i]) >= score(ingredients):
            ingredients.append(i)
    return set(ingredients)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.floats(-10, 10))
def test_the_soup_is_that_of_the_published_procedure(values: list[float], optimum: float) -> None:
    soup, asked = chosen(values, optimum)
    assert set(soup) == published(values, optimum)
    assert len(asked) == len(values) - 1


def test_a_soup_without_scores_is_empty() -> None:
    assert chosen([], 0) == ((), [])


def test_a_member_without_a_score_is_left_out() -> None:
    search = greedy([math.nan, 1.0, 0.5])
    assert next(search) == (1, 2)
    with pytest.raises(StopIteration) as stop:
        search.send(math.nan)
    assert stop.value.value == (1,)
