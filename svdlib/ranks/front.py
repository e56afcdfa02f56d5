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
        the rows of ``joint`` in the order of their cost, with ``excess``: by how much a row's
        loss is above the least at its cost or less, 0 on the front. Those off the front are
        within one standard error, their own.

    Raises:
        ValueError: a table that `joint_profile` didn't make, NaN losses, an unknown cost.

    >>> joint = pd.DataFrame({"loss": [3.0, 1.0, 1.1, 2.0], "se": 0.2, "parameters": [1, 2, 2, 3]})
    >>> front(joint)[["loss", "parameters", "excess"]].round(2).values.tolist()
    [[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.1, 2.0, 0.1]]
    """
    checks.one_of(cost, ("parameters", "multiply_adds"), "cost")
    if lacking := {"loss", "se", cost} - set(joint):
        raise ValueError(f"the table lacks {', '.join(sorted(lacking))}; see joint_profile")
    if not np.isfinite(joint[["loss", "se"]].to_numpy(float)).all():
        raise ValueError("the table has NaN or infinite losses")
    ordered = joint.sort_values([cost, "loss"], kind="stable")
    least = ordered.loss.cummin()
    first = ordered.loss < least.shift(fill_value=math.inf)
    excess = ordered.loss - least
    return ordered.assign(excess=excess)[first | (excess > 0) & (excess <= ordered.se)]


def layers_of(joint: pd.DataFrame) -> list[str]:
    """The columns of ranks: those that stand before the loss.

    Raises:
        ValueError: a table that `joint_profile` didn't make, NaN losses, ranks that come twice.
    """
    needed = ["loss", "increase", "se", "parameters"]
    if lacking := [name for name in needed if name not in joint]:
        raise ValueError(f"the table lacks {', '.join(lacking)}; see joint_profile")
    if not np.isfinite(joint[["loss", "increase"]].to_numpy()).all():
        raise ValueError("the table has NaN or infinite losses")
    layers = [str(name) for name in joint.columns[: joint.columns.get_loc("loss")]]
    if joint.duplicated(layers).any():
        raise ValueError(
            "the table has a combination of ranks more than once; give one network's at a time"
        )
    return layers


def optimal(joint: pd.DataFrame, parameters: int | None, increase: float | None) -> dict[str, int]:
    """The combination with the least loss, or the fewest parameters, under a budget."""
    layers = layers_of(joint)
    if parameters is not None:
        able, by = joint[joint.parameters <= parameters], ["loss", "parameters"]
        least = f"{joint.parameters.min()} parameters are the fewest in the table"
    else:
        able, by = joint[joint.increase <= increase], ["parameters", "loss"]
        least = f"{joint.increase.min():.3g} is the least increase in the table"
    if not len(able):
        raise ValueError(f"no combination of ranks meets the budget; {least}")
    best = able.sort_values(by, kind="stable").iloc[0]
    return {name: int(best[name]) for name in layers}


def walk(joint: pd.DataFrame, parameters: int, rising: bool) -> dict[str, int]:
    """From one end of the table towards a budget, a step of the grid in one layer at a time.

    Each step is the best by the change of the verified loss for a parameter.
    """
    layers = layers_of(joint)
    grids = [sorted(joint[name].unique()) for name in layers]
    shape = tuple(map(len, grids))
    if len(joint) != math.prod(shape):
        raise ValueError("a search in steps needs every combination of the table's ranks, once")
    ordered = joint.sort_values(layers)
    loss = ordered.loss.to_numpy().reshape(shape)
    weights = ordered.parameters.to_numpy().reshape(shape)
    if weights[(0,) * len(shape)] > parameters:
        raise ValueError(
            f"no combination of ranks meets the budget; {weights.min()} parameters are the "
            "fewest in the table"
        )
    at = (0,) * len(shape) if rising else tuple(size - 1 for size in shape)
    visited = [at]
    while rising or weights[at] > parameters:
        steps = []
        for axis in range(len(shape)):
            to = (*at[:axis], at[axis] + (1 if rising else -1), *at[axis + 1 :])
            if 0 <= to[axis] < shape[axis] and (not rising or weights[to] <= parameters):
                spent = max(abs(int(weights[to]) - int(weights[at])), 1)
                steps.append(((loss[to] - loss[at]) / spent, to))
        if not steps:
            break
        at = min(steps)[1]
        visited.append(at)
    best = min(visited, key=loss.__getitem__) if rising else at
    return {name: int(grid[place]) for name, grid, place in zip(layers, grids, best, strict=True)}
