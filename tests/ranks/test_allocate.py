"""Ranks under a budget, against all combinations there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdlib.ranks.allocate import Choices, allocate, choices, least


@st.composite
def layers(draw, convex=False):
    """One to four layers with up to five choices each, costs whole, errors falling to 0."""
    made = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        number = draw(st.integers(1, 5))
        steps = draw(st.lists(st.integers(1, 9), min_size=number, max_size=number))
        falls = draw(st.lists(st.integers(0, 20), min_size=number - 1, max_size=number - 1))
        if convex:
            steps, falls = [3] * number, sorted(falls, reverse=True)
        errors = np.cumsum([0, *falls[::-1]])[::-1].astype(float)
        made[name] = Choices(np.arange(1, number + 1), np.cumsum(steps), errors)
    return made


def totals(made, ranks):
    """Cost and error of a choice of ranks."""
    places = {name: list(each.ranks).index(ranks[name]) for name, each in made.items()}
    cost = sum(each.costs[places[name]] for name, each in made.items())
    return cost, sum(each.errors[places[name]] for name, each in made.items())


def best(made, budget):
    """The least error within the budget, of all combinations."""
    names = list(made)
    every = itertools.product(*(made[name].ranks for name in names))
    found = (totals(made, dict(zip(names, ranks, strict=True))) for ranks in every)
    return min(error for cost, error in found if cost <= budget)


def largest_step(made):
    """The most that one step along a lower convex hull saves, from the hull's definition."""
    largest = 0.0
    for each in made.values():
        points = list(zip(each.costs, each.errors, strict=True))
        at = 0
        while at < len(points) - 1:
            slopes = [
                (points[i][1] - points[at][1]) / (points[i][0] - points[at][0])
                for i in range(at + 1, len(points))
            ]
            step = at + 1 + max(i for i, slope in enumerate(slopes) if slope == min(slopes))
            largest = max(largest, points[at][1] - points[step][1])
            at = step
    return largest


@settings(max_examples=150, deadline=None)
@given(made=layers(), spare=st.integers(0, 60))
def test_within_budget_and_at_most_one_step_from_the_best(made, spare):
    """The relaxed problem, in which a step may be taken in part, has an error below the best, and
    differs from the steps that fit by part of one step."""
    budget = least(made) + spare
    cost, error = totals(made, allocate(made, budget))
    assert cost <= budget
    assert best(made, budget) <= error <= best(made, budget) + largest_step(made) + 1e-9


@settings(max_examples=100, deadline=None)
@given(made=layers(convex=True), spare=st.integers(0, 60))
def test_exact_where_errors_are_convex_and_steps_cost_the_same(made, spare):
    budget = least(made) + spare
    assert totals(made, allocate(made, budget))[1] == best(made, budget)


@settings(max_examples=50, deadline=None)
@given(made=layers(), less=st.floats(1e-6, 10))
def test_a_budget_below_the_least_is_refused(made, less):
    with pytest.raises(ValueError, match=f"too small; the least is {least(made):g}"):
        allocate(made, least(made) - less)
    assert set(allocate(made, least(made)).values()) == {1}


def test_choices_cost_less_than_the_layer():
    made = choices(30, 20, np.linspace(1, 0, 21))
    assert made.ranks.tolist() == [*range(1, 12), 20]
    assert (made.costs[:-1] == 50 * made.ranks[:-1]).all() and made.costs[-1] == 600
    np.testing.assert_allclose(made.errors, 1 - made.ranks / 20)
    assert choices(20, 30, np.linspace(1, 0, 21), multiple_of=4).ranks.tolist() == [4, 8, 20]
    assert choices(20, 30, np.linspace(1, 0, 21), multiple_of=12).ranks.tolist() == [20]
    shares = choices(30, 20, np.linspace(1, 0, 21), cost=7 * 600)
    assert (shares.costs == 7 * made.costs).all()


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 2)])
def test_where_no_factors_pay_the_layer_is_the_only_choice(shape):
    made = choices(*shape, np.linspace(1, 0, 1 + min(shape)))
    assert made.ranks.tolist() == [min(shape)] and made.costs.tolist() == [shape[0] * shape[1]]
    assert allocate({"a": made}, made.costs[0]) == {"a": min(shape)}


def test_of_errors_that_rise_the_lower_rank_s_stands():
    errors = np.array([1.0, 0.3, 0.5, 0.2, -0.1, 0.1, 0.2, 0.1, 0.0, 0.4])
    made = choices(9, 9, errors)
    assert made.errors.tolist() == [0.3, 0.3, 0.2, 0.0, 0.0]
    assert allocate({"a": made}, 2 * 18) == {"a": 1}  # rank 2 costs more for nothing


def test_nothing_to_choose_from():
    assert allocate({}, 0) == {} and least({}) == 0
