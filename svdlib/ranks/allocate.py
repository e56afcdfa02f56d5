"""Ranks for all layers at once under a budget, from what each rank costs and what it loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Choices:
    """What a layer may become: its ranks (R,), what each costs and what error it leaves.

    Costs rise and errors fall; the last is the layer as it is, without error.
    """

    ranks: np.ndarray
    costs: np.ndarray
    errors: np.ndarray


def choices(
    m: int, n: int, errors: np.ndarray, *, cost: float | None = None, multiple_of: int = 1
) -> Choices:
    """The ranks r of an m × n layer of which two factors cost less than the layer: r (m + n) < m n.

    Args:
        errors: at ranks 0, 1, … min(m, n).
        cost: that of the whole layer, its m n numbers by default; factors cost their share of it.
        multiple_of: ranks are multiples of this; the whole layer may always stay.

    >>> choices(4, 4, np.array([1.0, 0.5, 0.2, 0.1, 0.0])).ranks
    array([1, 4])
    """
    whole = m * n if cost is None else cost
    limit = (m * n - 1) // (m + n)
    ranks = np.arange(multiple_of, limit + 1, multiple_of)
    # errors that are measured may rise with the rank: then the lower rank's stands
    falling = np.minimum.accumulate(errors)[ranks]
    return Choices(
        np.append(ranks, min(m, n)),
        np.append(ranks * (m + n) * (whole / (m * n)), whole),
        np.append(falling, 0.0).clip(min=0),
    )


def allocate(layers: Mapping[str, Choices], budget: float) -> dict[str, int]:
    """Ranks of the least total error whose total cost is within a budget.

    Errors are taken to add up. Of each layer the choices on the lower convex hull of (cost, error)
    are gone through from the cheapest on, always the step of all layers that saves most error for
    its cost, which is exact wherever the budget ends between two steps (Everett 1963). What is
    left of the budget is then spent on the steps that fit.

    Returns:
        {layer: rank}, the full rank of those that stay as they are.

    Raises:
        ValueError: the cheapest choices cost more.

    >>> layer = Choices(np.array([1, 2, 9]), np.array([2, 4, 9]), np.array([0.5, 0.1, 0.0]))
    >>> allocate({"a": layer, "b": layer}, 13)
    {'a': 9, 'b': 2}
    >>> allocate({"a": layer, "b": layer}, 8)
    {'a': 2, 'b': 2}
    """
    at = dict.fromkeys(layers, 0)
    left = budget - least(layers)
    if left < 0:
        raise ValueError(f"a budget of {budget:g} is too small; the least is {least(layers):g}")
    steps = [
        (
            -(each.errors[a] - each.errors[b]) / max(each.costs[b] - each.costs[a], 1e-300),
            place,
            name,
            b,
        )
        for place, (name, each) in enumerate(layers.items())
        for hull in [_hull(each)]
        for a, b in pairwise(hull)
    ]
    for _, _, name, b in sorted(steps):
        each, now = layers[name], at[name]
        able = [i for i in range(now, b + 1) if each.costs[i] - each.costs[now] <= left]
        best = min(able, key=lambda i: each.errors[i])
        left -= each.costs[best] - each.costs[now]
        at[name] = best
    return {name: int(each.ranks[at[name]]) for name, each in layers.items()}


def least(layers: Mapping[str, Choices]) -> float:
    """What the cheapest choices cost together.

    >>> least({"a": Choices(np.array([1, 9]), np.array([2, 9]), np.array([0.5, 0.0]))})
    2.0
    """
    return float(sum(each.costs[0] for each in layers.values()))


def _hull(each: Choices) -> list[int]:
    """The places of the choices on the lower convex hull, from the cheapest on."""
    hull: list[int] = []
    for i in range(len(each.ranks)):
        while len(hull) > 1:
            a, b = hull[-2:]
            run, rise = each.costs[i] - each.costs[a], each.errors[i] - each.errors[a]
            if (each.errors[b] - each.errors[a]) * run < rise * (each.costs[b] - each.costs[a]):
                break
            hull.pop()
        if not hull or each.errors[i] < each.errors[hull[-1]]:
            hull.append(i)
    return hull
