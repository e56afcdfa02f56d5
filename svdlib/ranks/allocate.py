"""Ranks for all layers at once under a budget, from what each rank costs and what it loses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import bisect

from svdlib.bars import bar
from svdlib.network.kinds import Layer
from svdlib.network.opened import Network


@dataclass(frozen=True)
class Choices:
    """What a layer may become: ranks (R,), what each costs and its error, the cheapest first."""

    ranks: np.ndarray
    costs: np.ndarray
    errors: np.ndarray


def choices(
    m: int, n: int, errors: np.ndarray, *, cost: float | None = None, multiple_of: int = 1
) -> Choices:
    """The ranks of an m × n layer at which two factors cost less than it, and the layer as it is.

    The ``errors`` are at ranks 0, 1, … min(m, n). The layer as it is has none.

    >>> choices(4, 4, np.array([1.0, 0.5, 0.2, 0.1, 0.0])).ranks
    array([1, 4])
    """
    cost = m * n if cost is None else cost
    ranks = np.arange(multiple_of, (m * n - 1) // (m + n) + 1, multiple_of)
    # Measured errors may rise with the rank: then the lower rank's stands.
    falling = np.minimum.accumulate(errors)[ranks]
    return Choices(
        np.append(ranks, min(m, n)),
        np.append(ranks * (m + n) * (cost / (m * n)), cost),
        np.append(falling, 0.0).clip(min=0),
    )


def least(layers: Mapping[str, Choices]) -> float:
    """What the cheapest choices cost together."""
    return float(sum(layer.costs[0] for layer in layers.values()))


def allocate(layers: Mapping[str, Choices], budget: float, *, of: str = "cost") -> dict[str, int]:
    """The ranks with the smallest total error whose total cost is within a budget, exactly.

    Or, with a budget of ``"error"``, those with the smallest total cost. Of equally good ranks the
    cheapest win, or those with the smallest error.

    At a price p, a choice has the excess x = e + p c − min(e + p c) ≥ 0 in its layer, and ranks
    exceed the lower bound of their total e + p c by Σ x (Everett 1963). So ranks within a width of
    the bound are made of few choices. Their Pareto front is built layer by layer, and the width
    doubled until the front holds the optimum. For 75 layers of 300 ranks this takes some 20 ms;
    `scipy.optimize.milp` takes 1 to 2 s, and stops within an absolute tolerance of the optimum.

    >>> layer = Choices(np.array([1, 2, 9]), np.array([2, 4, 9]), np.array([0.5, 0.1, 0.0]))
    >>> allocate({"a": layer, "b": layer}, 13), allocate({"a": layer, "b": layer}, 0.2, of="error")
    ({'a': 2, 'b': 9}, {'a': 2, 'b': 2})
    """
    row = ("cost", "error").index(of)
    options = [np.stack([layer.costs, layer.errors]) for layer in layers.values()]
    if not all(np.isfinite(option).all() for option in options):
        raise ValueError("costs and errors must be finite")
    if not budget >= (lowest := sum(float(option[row].min()) for option in options)):
        limit = f"the smallest reachable {of} is {lowest:.12g}"
        raise ValueError(f"a budget of {budget:.12g} is too small; {limit}")
    # More than the best choices of all layers use is left anyway.
    budget = min(budget, sum(float(option[row, option[1 - row].argmin()]) for option in options))
    price = _price(options, row, budget)
    totals = [price * costs + errors for costs, errors in options]
    excesses = [total - total.min() for total in totals]
    options = [np.vstack(rows) for rows in zip(options, excesses, strict=True)]
    unit = 1.0 if row else price  # of what is left of the budget, as an excess
    rounding = 1e-12 * sum(float(np.abs(total).max()) for total in totals)
    width = rounding + sum(float(excess.max()) for excess in excesses) / 2**20
    while (found := _best_within(width, rounding, options, row, budget, unit)) is None:
        width *= 2
    return {
        name: int(layer.ranks[i]) for (name, layer), i in zip(layers.items(), found, strict=True)
    }


def _price(options: Sequence[np.ndarray], row: int, budget: float) -> float:
    """The price at which the choices with the smallest e + p c come closest to the budget."""

    def missing(price: float) -> float:  # above 0 if the price is too low
        best = [option[row, np.argmin(price * option[0] + option[1])] for option in options]
        return float(budget - sum(best) if row else sum(best) - budget)

    steepest = max((float(np.ptp(errors)) for _, errors in options), default=0.0)
    steps = (np.diff(np.unique(costs)).min(initial=np.inf) for costs, _ in options)
    highest = 2 * steepest / min(steps, default=np.inf)
    if missing(highest) >= 0:
        return highest
    return float(bisect(missing, 0.0, highest, xtol=1e-300, maxiter=10_000))


def _best_within(
    width: float,
    rounding: float,
    options: Sequence[np.ndarray],
    row: int,
    budget: float,
    unit: float,
) -> list[int] | None:
    """The places of the best choices, by (3, R) costs, errors, and excesses of each layer's.

    None if these are not within a width of the lower bound.
    """
    near = [np.flatnonzero(option[2] <= width + rounding) for option in options]
    options = [option[:, places] for option, places in zip(options, near, strict=True)]
    # What the layers that follow use of the budget, at least and at most.
    low, high = (
        np.append(np.cumsum([bound(option[row]) for option in options[:0:-1]])[::-1], 0.0)
        for bound in (np.min, np.max)
    )
    spare = 1e-9 * sum(float(np.abs(option[row]).max()) for option in options)
    front, steps = np.zeros((3, 1)), []
    for number, option in enumerate(options):
        left = budget - np.add.outer(front[row], option[row])
        above = np.add.outer(front[2], option[2]) + unit * np.maximum(left - high[number], 0)
        fits = (above <= width + rounding) & (left - low[number] >= -spare)
        parents, choice = np.nonzero(fits)
        sums = front[:, parents] + option[:, choice]
        order = np.lexsort((sums[1], sums[0]))
        errors = sums[1, order]
        order = order[errors < np.append(np.inf, np.minimum.accumulate(errors)[:-1])]
        front = sums[:, order]
        steps.append((parents[order], near[number][choice[order]]))
    within = np.flatnonzero(front[row] <= budget)
    if not len(within):
        return None
    at = within[0] if row else within[-1]
    if front[2, at] + unit * (budget - front[row, at]) > width:
        return None
    found = []
    for parents, choice in reversed(steps):
        found.append(int(choice[at]))
        at = parents[at]
    return found[::-1]


# Halvings of the interval in which the smallest network within an increase is looked for.
HALVINGS = 7
# Halvings of the interval in which the share of even ranks is looked for: to one rank.
HALVED_SHARES = 30


@dataclass(frozen=True)
class Plan:
    """Ranks under any budget."""

    options: Mapping[str, Choices]  # of each weight, by its first layer
    ties: Mapping[str, list[str]]  # all layers with each weight, by the first
    fixed: float  # cost of everything else
    total: float  # cost of the whole model
    budget: str  # in words

    @property
    def smallest_cost(self) -> float:
        return self.fixed + least(self.options)

    def ranks(self, spent: float) -> dict[str, int]:
        """The ranks below full rank of a model that costs at most ``spent``."""
        if spent < self.smallest_cost:
            raise ValueError(
                f"{self.budget} can't be met: with the lowest ranks in all layers that can be "
                f"factorized {self.smallest_cost / self.total:.4f} of the whole model is left"
            )
        found = allocate(self.options, spent - self.fixed)
        return {
            name: rank
            for first, rank in found.items()
            if rank < self.options[first].ranks[-1]
            for name in self.ties[first]
        }

    def even(self, spent: float) -> dict[str, int]:
        """Ranks of the same share of the largest useful one in all layers, costing at most that."""
        self.ranks(spent)  # refuses what can't be met
        at = lambda share: {
            first: int(share * (len(choice.ranks) - 1)) for first, choice in self.options.items()
        }
        total = lambda places: sum(self.options[first].costs[i] for first, i in places.items())
        low, high = float(total(at(1.0)) <= spent - self.fixed), 1.0
        for _ in range(HALVED_SHARES):
            middle = (low + high) / 2
            fits = total(at(middle)) <= spent - self.fixed
            low, high = (middle, high) if fits else (low, middle)
        return {
            name: int(self.options[first].ranks[i])
            for first, i in at(low).items()
            if i < len(self.options[first].ranks) - 1
            for name in self.ties[first]
        }

    def cost(self, ranks: Mapping[str, int]) -> float:
        """What the whole model costs at these ranks."""
        found = self.fixed
        for first, choice in self.options.items():
            rank = ranks.get(first, choice.ranks[-1])
            found += float(choice.costs[np.searchsorted(choice.ranks, rank)])
        return found

    def without(self, names: Collection[str]) -> Plan:
        """The plan with these layers dense."""
        if not names:
            return self
        options = dict(self.options)
        for first, choice in self.options.items():
            if set(names) & set(self.ties[first]):
                options[first] = Choices(choice.ranks[-1:], choice.costs[-1:], choice.errors[-1:])
        return replace(self, options=options, budget=f"{self.budget} with faster=True")

    def smallest(
        self,
        ranks: Callable[[float], Mapping[str, int]],
        added: Callable[[Mapping[str, int]], float],
        increase: float,
        progress: bool,
    ) -> float:
        """The smallest cost at which ``ranks(cost)`` are found to have ``added`` ≤ ``increase``."""
        low, high = self.smallest_cost, self.total
        if added(ranks(low)) <= increase:
            return low
        shown = bar(range(HALVINGS), progress=progress, desc="choosing ranks", delay=3, leave=False)
        for _ in shown:
            middle = (low + high) / 2
            low, high = (low, middle) if added(ranks(middle)) <= increase else (middle, high)
        return high


def plan_of(
    net: Network,
    layers: Mapping[str, Layer],
    errors: Mapping[str, np.ndarray],
    costs: pd.Series,
    multiple_of: int,
    budget: str,
) -> Plan:
    """The plan for these layers, by their parameters or multiply-adds, last the whole model's."""
    first = net.first_of_ties(layers)
    ties: dict[str, list[str]] = {}
    for name in layers:
        ties.setdefault(first.get(name, name), []).append(name)
    options, fixed = {}, float(costs.iloc[-1])
    for name, names in ties.items():
        (m, n), cost = layers[name].shape, float(layers[name].weight.numel())
        if costs.name == "multiply_adds":
            # an embedding multiplies nothing until it is factorized
            multiplies = all(layers[tied].multiplies for tied in names)
            cost = float(costs[names].sum()) if multiplies else 0.0
        if cost > 0 and layers[name].max_factor_rank >= multiple_of:
            options[name] = choices(m, n, errors[name], cost=cost, multiple_of=multiple_of)
            fixed -= cost
    if not options:
        raise ValueError("no layer of those asked for gets cheaper at any rank")
    return Plan(options, ties, fixed, float(costs.iloc[-1]), budget)
