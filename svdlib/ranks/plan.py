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
    """Ranks under any budget.

    Args:
        options: what each weight may become, by its first layer.
        ties: for each of these all layers with that weight.
        fixed, total: what all else costs, and the whole model.
        budget: what was asked for, in words.
    """

    options: Mapping[str, Choices]
    ties: Mapping[str, list[str]]
    fixed: float
    total: float
    budget: str

    @property
    def least(self) -> float:
        return self.fixed + least(self.options)

    def ranks(self, spent: float) -> dict[str, int]:
        """Those below full rank, of a model that costs at most so much."""
        if spent < self.least:
            raise ValueError(
                f"{self.budget} can't be met: with the lowest ranks in all layers that can be factorized "
                f"{self.least / self.total:.4f} of the whole model is left"
            )
        found = allocate(self.options, spent - self.fixed)
        return {
            name: rank
            for first, rank in found.items()
            if rank < self.options[first].ranks[-1]
            for name in self.ties[first]
        }

    def without(self, names: Collection[str]) -> Plan:
        """With these layers dense."""
        options = dict(self.options)
        for first, each in self.options.items():
            if set(names) & set(self.ties[first]):
                options[first] = Choices(each.ranks[-1:], each.costs[-1:], each.errors[-1:])
        budget = f"{self.budget} with faster=True"
        return replace(self, options=options, budget=budget) if names else self

    def smallest(
        self, added: Callable[[Mapping[str, int]], float], increase: float, progress: bool
    ) -> float:
        """The smallest cost of a network found to add no more loss, by halving the interval.

        Args:
            added: measures the loss that ranks add.
        """
        low, high = self.least, self.total
        for step in bar(range(1 + HALVINGS), progress=progress, desc="budgets", leave=False):
            middle = (low + high) / 2 if step else low
            if added(self.ranks(middle)) <= increase:
                high = middle
            else:
                low = middle
            if high == self.least:
                break
        return high


def plan_of(
    net: Network,
    layers: Mapping[str, Layer],
    errors: Mapping[str, np.ndarray],
    worth: pd.Series,
    multiple_of: int,
    budget: str,
) -> Plan:
    """What there is to choose from, by what each layer is worth, and at last the whole model.

    Args:
        worth: parameters or multiply-adds.

    Raises:
        ValueError: no layer gets cheaper at any rank.
    """
    first = net.first_of_ties(layers)
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(first.get(name, name), []).append(name)
    options, total = {}, float(worth.iloc[-1])
    fixed = total
    for name, names in groups.items():
        (m, n), whole = layers[name].shape, float(layers[name].weight.numel())
        if worth.name == "multiply_adds":
            # an embedding multiplies nothing until it is factorized
            multiplies = all(layers[each].multiplies for each in names)
            whole = float(worth[names].sum()) if multiplies else 0.0
        if whole > 0 and layers[name].max_factor_rank >= multiple_of:
            options[name] = choices(m, n, errors[name], cost=whole, multiple_of=multiple_of)
            fixed -= whole
    if not options:
        raise ValueError("no layer of those asked for gets cheaper at any rank")
    return Plan(options, groups, fixed, total, budget)
