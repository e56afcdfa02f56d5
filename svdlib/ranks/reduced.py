"""Several layers reduced at once: what the network loses, and ranks that meet a tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor, nn

from svdlib import checks
from svdlib.network.calls import Batches, Objective
from svdlib.network.chain import task_of
from svdlib.network.low_rank import low_rank_layers
from svdlib.network.opened import Network
from svdlib.network.task import MEMORY, Task, replaced
from svdlib.ranks.profile import profiled_layers


def verify_ranks(
    model: nn.Module,
    ranks: Mapping[str, int],
    x: Batches,
    y: Tensor | None = None,
    memory: int = MEMORY,
    *,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
) -> dict[str, float]:
    """What the network loses with all these layers reduced at once: layer effects need not add.

    Args:
        x, y, memory, objective, accuracy: as in `loss_profile`.

    Returns:
        loss, accuracy (percent), increase (of the loss, paired by image), se, error_increase
        (percentage points), and the model's parameters, each reduced layer stored as two factors
        where that is smaller.

    Raises:
        ValueError: as `loss_profile`, or a rank above the matrix's smaller side.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> verify_ranks(net, {"0": 2}, torch.rand(20, 8), torch.arange(20) % 3)["parameters"]
    55.0
    """
    net = Network.to_measure(model)
    with net.measuring():
        task = task_of(net, x, y, objective, accuracy, memory)
        return _Reduced(model, net, ranks, task).measure(ranks)


def refine_ranks(
    model: nn.Module,
    x: Batches,
    y: Tensor | None = None,
    ranks: Mapping[str, int] | None = None,
    *,
    tolerance: float,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
    memory: int = MEMORY,
) -> dict[str, int]:
    """Raise or lower ranks until the verified loss increase meets a tolerance at low storage.

    A pattern search with all layers reduced at once. While the increase is above the tolerance, the
    layer whose rank buys the most loss per parameter is raised. Then each layer, the one that saves
    most first, is lowered as long as the tolerance holds, by a quarter of its rank down to one.

    Args:
        x, y: data to choose by, never the test set; as in `loss_profile`, but read several times.
        ranks: where to start, as from `reveal_ranks`.
        tolerance: the largest admissible increase of the mean loss, at least 0.
        objective, accuracy, memory: as in `loss_profile`.

    Raises:
        ValueError: as `verify_ranks`; an impossible tolerance, no ranks, a generator for data.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> x, y = torch.rand(20, 8), torch.arange(20) % 3
    >>> refine_ranks(net, x, y, {"0": 6, "2": 3}, tolerance=9.0)
    {'0': 1, '2': 1}
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0 and finite, not {tolerance}")
    if ranks is None:
        raise ValueError("ranks must say where to start, {layer: rank}")
    net = Network.to_measure(model)
    with net.measuring():
        task = task_of(net, x, y, objective, accuracy, memory, why="refine_ranks")
        reduced = _Reduced(model, net, ranks, task)
        limits = {name: layer.full_rank for name, layer in reduced.layers.items()}
        current = {name: min(rank, limits[name]) for name, rank in ranks.items()}
        # Full rank in every layer is the network itself, up to rounding.
        slack = tolerance + 1e-6 * abs(task.measure())
        while reduced.increase(current) > slack:
            raised = [
                reduced.moved(current, name, min(rank + max(1, rank // 4), limits[name]))
                for name, rank in current.items()
                if rank < limits[name]
            ]
            if not raised:
                break
            current = min(raised, key=partial(reduced.price, current))
        for fraction in (4, 8, 16, 32, 64, None):
            lowered = True
            while lowered:
                lowered = False
                for name in sorted(current, key=lambda layer: -sum(reduced.layers[layer].shape)):
                    step = 1 if fraction is None else current[name] // fraction
                    trial = reduced.moved(current, name, current[name] - step)
                    if 0 < step < current[name] and reduced.increase(trial) <= slack:
                        current, lowered = trial, True
        return current


class _Reduced:
    """An opened network with several layers reduced at once; ``original``'s parameters count."""

    def __init__(self, original: nn.Module, net: Network, names: Iterable[str], task: Task) -> None:
        self.task = task
        self.layers = profiled_layers(net, names)
        self.known: dict[tuple[int, ...], dict[str, float]] = {}
        self.factors, self.max_ranks = {}, {}
        earlier = low_rank_layers(original)
        sizes: dict[int, int] = {}  # of weights as they are stored now
        for name, layer in self.layers.items():
            self.factors[name] = layer.decomposed()[::2]  # without Σ
            thin = earlier.get(name)
            self.max_ranks[name] = thin.rank if thin else layer.full_rank
            for factor in thin.factors if thin else (layer,):
                sizes[id(factor.weight)] = factor.weight.numel()
        self.others = sum(p.numel() for p in original.parameters()) - sum(sizes.values())

    def parameters(self, ranks: Mapping[str, int]) -> int:
        stored = {
            id(layer.weight): layer.stored(min(ranks[name], self.max_ranks[name]))
            for name, layer in self.layers.items()
        }
        return self.others + sum(stored.values())

    def moved(self, ranks: Mapping[str, int], layer: str, rank: int) -> dict[str, int]:
        """With another rank for a layer, and for those that share its weight."""
        weight = self.layers[layer].weight
        shared = [name for name in ranks if self.layers[name].weight is weight]
        return {**ranks, **dict.fromkeys(shared, rank)}

    def measure(self, ranks: Mapping[str, int]) -> dict[str, float]:
        key = tuple(ranks[name] for name in self.layers)
        if key in self.known:
            return self.known[key]
        weights: dict[Tensor, Tensor] = {}
        given: dict[int, int] = {}
        for name, layer in self.layers.items():
            rank = checks.positive_int(ranks[name], f"the rank of layer {name!r}", least=0)
            if rank > layer.full_rank:
                raise ValueError(f"layer {name!r} has rank {layer.full_rank} at most, not {rank}")
            if given.setdefault(id(layer.weight), rank) != rank:
                raise ValueError(f"layer {name!r} shares its weight; give both the same rank")
            if rank < layer.full_rank:
                weights[layer.weight] = layer.at_rank(*self.factors[name], rank)
        means = self.task.means(lambda: [replaced(weights)], 1)
        self.known[key] = {
            **{name: reduced for name, [_, reduced] in means.items()},
            "error_increase": means["accuracy"][0] - means["accuracy"][1],
            "parameters": float(self.parameters(ranks)),
        }
        return self.known[key]

    def increase(self, ranks: Mapping[str, int]) -> float:
        increase = self.measure(ranks)["increase"]
        return increase if math.isfinite(increase) else math.inf

    def price(self, now: Mapping[str, int], then: Mapping[str, int]) -> float:
        """Change of loss per parameter, or for one where no parameter is added."""
        spent = max(self.parameters(then) - self.parameters(now), 1)
        return (self.increase(then) - self.increase(now)) / spent
