"""Ranks of a network's layers under any budget, by what each rank costs and what it loses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from svdlib.bars import bar
from svdlib.network.kinds import Layer
from svdlib.network.opened import Network
from svdlib.ranks.allocate import Choices, allocate, choices, least

# Halvings of the interval in which the smallest network within an increase is looked for.
HALVINGS = 7


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
        self, added: Callable[[Mapping[str, int]], float], increase: float, progress: bool
    ) -> float:
        """The smallest cost at which ranks are found to have ``added(ranks)`` ≤ ``increase``."""
        low, high = self.smallest_cost, self.total
        if added(self.ranks(low)) <= increase:
            return low
        for _ in bar(range(HALVINGS), progress=progress, desc="budgets", leave=False):
            middle = (low + high) / 2
            low, high = (low, middle) if added(self.ranks(middle)) <= increase else (middle, high)
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
