"""Which low-rank approximation replaces an ensemble's weights, when, and how in a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from svdlib import checks
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.linalg.bases import dominant_basis, gram, randomized_basis, sketched_basis
from svdlib.linalg.svd import METHODS, OVERSAMPLE, POWER_ITERS


@dataclass(frozen=True)
class Projection:
    """Which low-rank approximation replaces the weights while a network trains, and when.

    Args:
        method: "truncsvd" (the best approximation) or "rsvd" (the randomized one).
        rank: one for all layers or one a layer; a layer whose smaller side is no larger than
            its rank stays as it is.
        every: "epoch", "step", or a number of steps.
        oversample, power_iters: of the randomized method, see `randomized_svd`. Where
            rank + oversample reaches the smaller side it equals the truncated method.

    Raises:
        ValueError: an unknown method or ``every``, a rank below 1 or not whole.

    >>> Projection("rsvd", rank=10).every
    'epoch'
    """

    method: Literal["rsvd", "truncsvd"]
    rank: int | tuple[int, ...]
    every: Literal["epoch", "step"] | int = "epoch"
    oversample: int = OVERSAMPLE
    power_iters: int = POWER_ITERS

    def __post_init__(self) -> None:
        checks.one_of(self.method, METHODS, "method")
        if isinstance(self.rank, Iterable):
            ranks = tuple(checks.positive_int(rank, "rank") for rank in self.rank)
            object.__setattr__(self, "rank", ranks)
        else:
            checks.positive_int(self.rank, "rank")
        if isinstance(self.every, str):
            checks.one_of(self.every, ("epoch", "step"), "every")
        else:
            checks.positive_int(self.every, "every")
        checks.positive_int(self.oversample, "oversample", least=0)
        checks.positive_int(self.power_iters, "power_iters", least=0)

    @classmethod
    def published(cls, method: Literal["rsvd", "truncsvd"], rank: int = 10) -> Projection:
        """What the paper's code does, where it departs from the paper's text.

        It projects after every step; its truncated SVD zeroes σ_j for j > rank counting from 0,
        which keeps rank + 1 terms; its randomized SVD draws ``rank`` vectors in all, with two
        power iterations.

        >>> Projection.published("truncsvd").rank
        11
        """
        checks.one_of(method, METHODS, "method")
        exact = cls("truncsvd", checks.positive_int(rank, "rank") + 1, every="step")
        if method == "truncsvd":
            return exact
        return replace(exact, method="rsvd", rank=rank, oversample=0, power_iters=2)

    def ranks(self, layers: int) -> tuple[int, ...]:
        """The rank of each of so many layers.

        Raises:
            ValueError: ranks were given one a layer, for another number of layers.
        """
        if isinstance(self.rank, int):
            return (self.rank,) * layers
        if len(self.rank) != layers:
            raise ValueError(f"{layers} layers need {layers} ranks, not {self.rank}")
        return self.rank


Projections = Projection | None | Sequence[Projection | None]

# Up to this many rows the randomized method works on the Gram matrix, beyond on the matrix.
GRAM_ROWS = 64


def project_stacks_(
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    projection: Projection,
    generator: torch.Generator | None = None,
    bases: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """Project the layers of an ensemble in place, without leaving the device.

    The rank-k matrix of W is U Uᵀ W, with U the leading singular vectors of its shorter side:
    exact ones for "truncsvd", those of a sketch for "rsvd". Layers whose shorter sides are equal
    share one batched factorization.

    Args:
        weights: stacks (S, out, in), one a layer.
        ranks: one a layer; a layer with rank ≥ min(out, in) is left untouched.
        bases: what the previous call returned, where the weights have changed little since.

    Returns:
        the basis U (S, min(out, in), rank) of each layer, None for one left untouched.

    >>> W = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    >>> _ = project_stacks_([W], [2], Projection("truncsvd", rank=2))
    >>> torch.linalg.matrix_rank(W)
    tensor([2, 2, 2])
    """
    sides = [W if W.shape[-2] <= W.shape[-1] else W.mT for W in weights]
    found: list[Tensor | None] = [None] * len(sides)
    alike: dict[tuple[int, int], list[int]] = {}
    for layer, (A, rank) in enumerate(zip(sides, ranks, strict=True)):
        if rank < A.shape[-2]:
            alike.setdefault((A.shape[-2], rank), []).append(layer)
    for (rows, rank), layers in alike.items():
        starts = [bases[layer] if bases else None for layer in layers]
        # With so many columns a sketch would span everything: the exact answer costs less.
        exact = projection.method == "truncsvd" or rank + projection.oversample >= rows
        if exact or rows <= GRAM_ROWS:
            G = torch.cat([gram(sides[layer]) for layer in layers])
            start = _joined(starts)
            if exact:
                U = dominant_basis(G, rank, start)
            else:
                sketch = (projection.oversample, projection.power_iters, generator)
                U = sketched_basis(G, rank, *sketch, start)
            parts = U.chunk(len(layers))
        else:
            sketch = (projection.oversample, projection.power_iters, generator)
            parts = tuple(randomized_basis(sides[layer], rank, *sketch) for layer in layers)
        for layer, U in zip(layers, parts, strict=True):
            A = sides[layer]
            A.copy_(U @ (U.mT @ A) if 4 * rank < rows else (U @ U.mT) @ A)
            found[layer] = U
    return found


def _joined(starts: list[Tensor | None]) -> Tensor | None:
    given = [U for U in starts if U is not None]
    return torch.cat(given) if len(given) == len(starts) else None


@dataclass
class Group:
    """Networks that share a projection, and the bases that its last use found."""

    projection: Projection
    networks: list[int]
    ranks: tuple[int, ...]
    bases: list[Tensor | None]

    def is_due(self, done: int, steps: int) -> bool:
        """Whether a projection follows the step number ``done`` (from 1), of so many an epoch."""
        every = {"epoch": steps, "step": 1}.get(str(self.projection.every), self.projection.every)
        return done % int(every) == 0

    def project_(self, weights: Sequence[Tensor], generator: torch.Generator) -> None:
        """Project these networks' part of the stacks ``weights``, in place."""
        low, high = self.networks[0], self.networks[-1] + 1
        contiguous = high - low == len(self.networks)
        parts = [w[low:high] if contiguous else w[self.networks] for w in weights]
        bases = project_stacks_(parts, self.ranks, self.projection, generator, self.bases)
        if not contiguous:
            for weight, part in zip(weights, parts, strict=True):
                weight[self.networks] = part
        if self.projection.every == "step":
            self.bases = bases


def one_each(projection: Projections, nets: MLPEnsemble) -> list[Projection | None]:
    """A projection or None for each network.

    Raises:
        ValueError: not as many as networks, something else than a `Projection`, or ranks for
            another number of layers.
    """
    if projection is None or isinstance(projection, Projection):
        projection = [projection] * len(nets)
    each = list(projection)
    if len(each) != len(nets):
        raise ValueError(f"{len(nets)} networks need as many projections, not {len(each)}")
    for choice in each:
        if choice is not None and not isinstance(choice, Projection):
            raise ValueError(f"a projection is a svdlib.Projection or None, not {choice!r}")
        if choice is not None:
            choice.ranks(len(nets.layers))
    return each


def grouped(choices: Sequence[Projection | None], layers: int) -> list[Group]:
    """Networks by projection, so that each projection is one batched call a layer.

    >>> stock, low = None, Projection("truncsvd", 3)
    >>> [group.networks for group in grouped([stock, low, stock, low], layers=2)]
    [[1, 3]]
    """
    members: dict[Projection, list[int]] = {}
    for network, choice in enumerate(choices):
        if choice is not None:
            members.setdefault(choice, []).append(network)
    return [
        Group(choice, networks, choice.ranks(layers), [None] * layers)
        for choice, networks in members.items()
    ]
