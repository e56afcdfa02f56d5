"""Several layers reduced at once: what the network loses, and ranks that meet a tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from svdlib import checks
from svdlib.layers.factorize import opened
from svdlib.layers.kinds import groups, low_rank_layers, matrix, stored
from svdlib.objective import Batches, Objective
from svdlib.ranks.losses import (
    Moments,
    Task,
    cut_weight,
    full_losses,
    habits,
    measuring,
    profiled_layers,
    replaced,
    task,
)


def verify_ranks(
    model: nn.Module,
    ranks: Mapping[str, int],
    x: Batches,
    y: Tensor | None = None,
    memory: int = 2**28,
    *,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
) -> dict[str, float]:
    """What the network loses with all these layers reduced at once. Layer effects need not add.

    Args:
        x, y, objective, accuracy: as in `loss_profile`.

    Returns:
        loss, accuracy (per cent), increase (of the loss, paired by image), se, error_increase
        (per cent), and parameters: of the whole model with each reduced layer stored as two
        factors, where that is smaller.

    Raises:
        ValueError: as `loss_profile`, or a rank above the matrix's smaller side.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> verify_ranks(net, {"0": 2}, torch.rand(20, 8), torch.arange(20) % 3)["parameters"]
    55.0
    """
    whole = opened(model)
    with measuring(whole):
        given = task(whole, x, y, objective, accuracy, memory)
        return _Reduced(model, whole, list(ranks), given, memory).measure(ranks)


def refine_ranks(
    model: nn.Module,
    x: Batches,
    y: Tensor | None = None,
    ranks: Mapping[str, int] | None = None,
    *,
    tolerance: float,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
    memory: int = 2**28,
) -> dict[str, int]:
    """Raise or lower ranks until the verified loss increase meets a tolerance, cheaply stored.

    A pattern search on the network with all layers reduced at once. While the increase is above
    the tolerance, the layer whose rank buys the most loss per parameter is raised; then each
    layer, the one that saves most first, is lowered as long as the tolerance holds, by steps
    that start at a quarter of its rank and halve down to one.

    Args:
        x, y: data to choose by: a validation split, never the test set. As in `loss_profile`; an
            iterable of batches is looked at several times.
        objective, accuracy: as in `loss_profile`.
        ranks: where to start, as `reveal_ranks` gives it.
        tolerance: the largest admissible increase of the mean loss, at least 0.

    Raises:
        ValueError: a negative or infinite tolerance, no ranks, a generator for data, or as
            `verify_ranks`.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> x, y = torch.rand(20, 8), net(torch.rand(20, 8)).argmax(1)
    >>> refine_ranks(net, x, y, {"0": 6, "2": 3}, tolerance=1.0)
    {'0': 1, '2': 1}
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0 and finite, not {tolerance}")
    if ranks is None:
        raise ValueError("ranks must say where to start, {layer: rank}")
    whole = opened(model)
    with measuring(whole):
        given = task(whole, x, y, objective, accuracy, memory, why="refine_ranks")
        reduced = _Reduced(model, whole, list(ranks), given, memory)
        current = {name: min(rank, reduced.limit[name]) for name, rank in ranks.items()}
        # Full rank in every layer is the network itself, up to rounding.
        slack = tolerance + 1e-6 * abs(reduced.full_loss())
        while reduced.increase(current) > slack:
            raised = [
                reduced.moved(current, name, min(rank + max(1, rank // 4), reduced.limit[name]))
                for name, rank in current.items()
                if rank < reduced.limit[name]
            ]
            if not raised:
                break
            current = min(raised, key=partial(reduced.price, current))
        for fraction in (4, 8, 16, 32, 64, None):
            lowered = True
            while lowered:
                lowered = False
                for name in sorted(current, key=lambda layer: -sum(reduced.shape[layer])):
                    step = 1 if fraction is None else current[name] // fraction
                    trial = reduced.moved(current, name, current[name] - step)
                    if 0 < step < current[name] and reduced.increase(trial) <= slack:
                        current, lowered = trial, True
        return current


class _Reduced:
    """The network with several layers reduced at once.

    Args:
        original: the network as it is, whose parameters count.
        model: the same `opened`, which is measured.
    """

    def __init__(
        self,
        original: nn.Module,
        model: nn.Module,
        layers: Sequence[str],
        given: Task | tuple[Tensor, Tensor],
        memory: int,
    ) -> None:
        known = profiled_layers(model, layers)
        self.model = model
        self.given, self.memory, self.layers = given, memory, known
        if not isinstance(given, Task):
            self.habit = habits(model, given[0])
            self.full, correct = full_losses(model, *given, memory, self.habit)
            self.full_accuracy = 100 * correct.double().mean().item()
        self.weight = {name: layer.weight for name, layer in known.items()}
        self.factors, self.shape = {}, {}
        for name, layer in known.items():
            U, S, Vh = torch.linalg.svd(matrix(layer), full_matrices=False)
            self.factors[name] = (U * S.unsqueeze(-2), Vh)
            self.shape[name] = (U.shape[-2], Vh.shape[-1])
        self.limit = {name: min(shape) for name, shape in self.shape.items()}
        earlier = low_rank_layers(original)
        self.most = {name: layer.rank for name, layer in earlier.items()}
        inside = [earlier[name].factors if name in earlier else () for name in known]
        now = {id(f.weight): f.weight.numel() for factors in inside for f in factors}
        now |= {id(w): w.numel() for name, w in self.weight.items() if name not in earlier}
        self.others = sum(p.numel() for p in original.parameters()) - sum(now.values())
        self.known: dict[tuple[int, ...], dict[str, float]] = {}

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Of the whole model, each layer as two factors where that is smaller."""
        # A weight that two layers share is there once.
        kept = {
            id(self.weight[name]): groups(self.layers[name])
            * stored(min(r, self.most.get(name, r)), *self.shape[name])
            for name, r in ranks.items()
        }
        return self.others + sum(kept.values())

    def moved(self, ranks: Mapping[str, int], layer: str, rank: int) -> dict[str, int]:
        """With another rank for a layer, and for those that share its weight."""
        alike = [name for name in ranks if self.weight[name] is self.weight[layer]]
        return {**ranks, **dict.fromkeys(alike, rank)}

    def measure(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """See `verify_ranks`; each choice of ranks is measured once."""
        key = tuple(ranks[name] for name in self.factors)
        if key not in self.known:
            weights: dict[Tensor, Tensor] = {}
            given: dict[int, int] = {}
            for name, (US, Vh) in self.factors.items():
                rank = checks.positive_int(ranks[name], f"the rank of layer {name!r}", least=0)
                if rank > self.limit[name]:
                    raise ValueError(
                        f"layer {name!r} has rank {self.limit[name]} at most, not {rank}"
                    )
                weight = self.weight[name]
                if given.setdefault(id(weight), rank) != rank:
                    raise ValueError(f"layer {name!r} shares its weight; give both the same rank")
                if rank < self.limit[name]:
                    weights[weight] = cut_weight(self.layers[name], US, Vh, rank)
            means, accuracy = self.means(weights)
            self.known[key] = {
                **means,
                "error_increase": accuracy - means["accuracy"],
                "parameters": float(self.parameters(ranks)),
            }
        return self.known[key]

    def means(self, weights: Mapping[Tensor, Tensor]) -> tuple[dict[str, float], float]:
        """`Moments.means` with these weights replaced, and the accuracy of the network itself."""
        if isinstance(self.given, Task):
            both = self.given.means(self.model, lambda: [replaced(weights)], 1)
            return {name: mean for name, [_, mean] in both.items()}, both["accuracy"][0]
        images, labels = self.given
        moments = Moments.zeros(1, images.device)
        size = self.habit.images(self.model, images, self.memory)
        for x, y, full in zip(*(t.split(size) for t in (images, labels, self.full)), strict=True):
            with replaced(weights):
                z = self.model(self.habit.given(x))
            moments.add(slice(0, 1), z[None], y, full)
        return {
            name: mean for name, [mean] in moments.means(len(images)).items()
        }, self.full_accuracy

    def full_loss(self) -> float:
        """The mean loss of the network itself."""
        if isinstance(self.given, Task):
            return self.given.means(self.model, tuple, 0)["loss"][0]
        return self.full.mean().item()

    def increase(self, ranks: Mapping[str, int]) -> float:
        """Infinite where the network gives no number."""
        increase = self.measure(ranks)["increase"]
        return increase if math.isfinite(increase) else math.inf

    def price(self, now: Mapping[str, int], then: Mapping[str, int]) -> float:
        """Change of loss per parameter; a free change costs nothing but its loss."""
        spent = max(self.parameters(then) - self.parameters(now), 1)
        return (self.increase(then) - self.increase(now)) / spent
