"""What a joint table says: its front, its optimum under a budget, and greedy ways through it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from svdlib import checks


def front(joint: pd.DataFrame, cost: str = "parameters") -> pd.DataFrame:
    """The combinations of ranks that no other beats in both loss and cost, and those close by.

    Args:
        joint: what `joint_profile` returns.
        cost: "parameters" or "multiply_adds".

    Returns:
        The rows of ``joint`` in the order of their cost, with ``excess``: by how much a row's
        loss is above the smallest at its cost or less, 0 on the front, else at most the row's se.

    Raises:
        ValueError: a table that `joint_profile` didn't make, NaN losses, an unknown cost.

    >>> joint = pd.DataFrame({"loss": [3.0, 1.0, 1.1, 2.0], "se": 0.2, "parameters": [1, 2, 2, 3]})
    >>> front(joint)[["loss", "parameters", "excess"]].round(2).values.tolist()
    [[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.1, 2.0, 0.1]]
    """
    checks.one_of(cost, ("parameters", "multiply_adds"), "cost")
    _check(joint, ["loss", "se", cost])
    ordered = joint.sort_values([cost, "loss"], kind="stable")
    lowest = ordered.loss.cummin()
    first = ordered.loss < lowest.shift(fill_value=math.inf)
    excess = ordered.loss - lowest
    return ordered.assign(excess=excess)[first | (excess > 0) & (excess <= ordered.se)]


def layers_of(joint: pd.DataFrame) -> list[str]:
    """The columns of ranks: those that stand before the loss."""
    _check(joint, ["loss", "increase", "se", "parameters"])
    layers = [str(name) for name in joint.columns[: joint.columns.get_loc("loss")]]
    if joint.duplicated(layers).any():
        raise ValueError(
            "the table has a combination of ranks more than once; give one network's at a time"
        )
    return layers


def _check(joint: pd.DataFrame, needed: list[str]) -> None:
    if lacking := [name for name in needed if name not in joint]:
        raise ValueError(f"the table lacks {', '.join(lacking)}; see joint_profile")
    if not np.isfinite(joint[[*needed]].to_numpy(float)).all():
        raise ValueError("the table has NaN or infinite losses")


def optimal(joint: pd.DataFrame, **budget: float) -> dict[str, int]:
    """The combination with the smallest loss, or the fewest parameters, under a budget."""
    layers = layers_of(joint)
    ((limited, limit),) = budget.items()
    eligible = _within(joint, limited, limit)
    order = ["loss", "parameters"] if limited == "parameters" else ["parameters", "loss"]
    best = eligible.sort_values(order, kind="stable").iloc[0]
    return {name: int(best[name]) for name in layers}


def walk(joint: pd.DataFrame, parameters: int, rising: bool) -> dict[str, int]:
    """The ranks at the end of greedy steps in one layer each, by change of loss per parameter."""
    layers = layers_of(joint)
    grids = [sorted(joint[name].unique()) for name in layers]
    shape = tuple(map(len, grids))
    if len(joint) != math.prod(shape):
        raise ValueError("a search in steps needs every combination of the table's ranks, once")
    ordered = joint.sort_values(layers)
    loss = ordered.loss.to_numpy().reshape(shape)
    weights = ordered.parameters.to_numpy().reshape(shape)
    _within(joint, "parameters", parameters)
    moves = np.eye(len(shape), dtype=int) * (1 if rising else -1)
    at = tuple(0 if rising else size - 1 for size in shape)
    visited = [at]
    while rising or weights[at] > parameters:
        steps = [
            ((loss[to] - loss[at]) / max(abs(int(weights[to]) - int(weights[at])), 1), to)
            for to in map(tuple, moves + at)
            if all(0 <= place < size for place, size in zip(to, shape, strict=True))
            and (not rising or weights[to] <= parameters)
        ]
        if not steps:
            break
        at = min(steps)[1]
        visited.append(at)
    best = min(visited, key=loss.__getitem__) if rising else at
    return {name: int(grid[place]) for name, grid, place in zip(layers, grids, best, strict=True)}


def _within(joint: pd.DataFrame, limited: str, limit: float) -> pd.DataFrame:
    eligible = joint[joint[limited] <= limit]
    if eligible.empty:
        raise ValueError(
            f"no combination of ranks meets the budget; {joint[limited].min():.12g} is the "
            f"smallest {limited} in the table"
        )
    return eligible
