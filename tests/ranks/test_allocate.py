"""Ranks under a budget, against all combinations there are."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdlib.ranks.allocate import Choices, allocate, choices, least


@st.composite
def layers(draw):
    """One to four layers with up to five choices each: whole costs that rise, any errors."""
    made = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        number = draw(st.integers(1, 5))
        costs = np.cumsum(draw(st.lists(st.integers(0, 9), min_size=number, max_size=number)))
        errors = draw(st.lists(st.integers(-4, 20), min_size=number, max_size=number))
        made[name] = Choices(np.arange(1, number + 1), costs, np.array(errors, float))
    return made


def totals(made, ranks):
    """Cost and error of a choice of ranks."""
    places = {name: list(each.ranks).index(ranks[name]) for name, each in made.items()}
    cost = sum(each.costs[places[name]] for name, each in made.items())
    return cost, sum(each.errors[places[name]] for name, each in made.items())


@settings(max_examples=200, deadline=None)
@given(made=layers(), spare=st.integers(0, 60))
def test_nothing_within_the_budget_is_better(made, spare):
    """Of all combinations, by (error, cost) under a budget of cost, and the reverse."""
    every = itertools.product(*(layer.ranks for layer in made.values()))
    found = [totals(made, dict(zip(made, ranks, strict=True))) for ranks in every]
    budget = least(made) + spare
    cost, error = totals(made, allocate(made, budget))
    assert (error, cost) == min((e, c) for c, e in found if c <= budget)
    budget = min(error for _, error in found) + spare / 2
    cost, error = totals(made, allocate(made, budget, of="error"))
    assert (cost, error) == min((c, e) for c, e in found if e <= budget)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_many_layers_with_many_ranks(scale):
    """Within a step of the lower bound, and no worse than the same costs budgeted by error."""
    rng = np.random.default_rng(0)
    ranks = np.arange(1, 201)
    made = {
        str(place): Choices(
            ranks,
            ranks * rng.uniform(500, 4000),
            scale * rng.lognormal() * np.exp(-ranks / rng.uniform(10, 80)),
        )
        for place in range(40)
    }
    budget = least(made) + 0.3 * sum(layer.costs[-1] for layer in made.values())
    ranks = allocate(made, budget)
    cost, error = totals(made, ranks)
    assert 0.9999 * budget <= cost <= budget
    assert totals(made, allocate(made, error, of="error"))[0] <= cost
    assert allocate(made, budget) == ranks


@settings(max_examples=50, deadline=None)
@given(made=layers(), less=st.floats(1e-6, 10))
def test_a_budget_below_the_least_is_refused(made, less):
    with pytest.raises(ValueError, match=f"smallest reachable cost is {least(made):g}"):
        allocate(made, least(made) - less)
    smallest = sum(layer.errors.min() for layer in made.values())
    with pytest.raises(ValueError, match=f"smallest reachable error is {smallest:g}"):
        allocate(made, smallest - less, of="error")
    assert totals(made, allocate(made, least(made)))[0] == least(made)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="nan is too small; the smallest reachable cost is 3"):
        allocate({"a": Choices(np.array([1]), np.array([3.0]), np.array([1.0]))}, np.nan)
    layer = Choices(np.array([1, 2]), np.array([3.0, 6.0]), np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="must be finite"):
        allocate({"a": layer}, 6)


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
