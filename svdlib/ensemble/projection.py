"""Which low-rank approximation replaces an ensemble's weights, when, and how in a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from svdlib import checks
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.linalg.bases import dominant_basis, randomized_basis, sketched_basis, taller
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


class Alike:
    """Layers that one batched factorization projects: m rows on the shorter side, the same rank.

    The rank-k matrix of A (S, m, n) is U Uᵀ A, with U the k leading left singular vectors: exact
    ones for "truncsvd", those of a sketch for "rsvd". What does not change from one projection to
    the next is made here, once.

    Args:
        sides: A of each layer, its stack of weights or their transposes, of one height with
            what lies behind them (`taller`); changed in place.
        rank: k, less than m.
    """

    def __init__(self, sides: Sequence[Tensor], rank: int, projection: Projection) -> None:
        networks, rows = sides[0].shape[:2]
        self.sides, self.rank, self.projection = sides, rank, projection
        # With so many columns a sketch would span everything: the exact answer costs less.
        self.exact = projection.method == "truncsvd" or rank + projection.oversample >= rows
        self.by_gram = self.exact or rows <= GRAM_ROWS
        self.thin = 4 * rank < rows
        self.tall = [taller(A) for A in sides]
        size = self.tall[0].shape[1] if self.by_gram else 0
        # What a sketch misses is as small as one step's change, and its square would be lost in
        # a Gram matrix of float32.
        like = sides[0] if self.exact else sides[0].new_empty(0, dtype=torch.float64)
        self.G = like.new_empty(len(sides) * networks, size, size)
        self.P = sides[0].new_empty(len(sides) * networks, *([0, 0] if self.thin else [rows, rows]))
        self.G_of, self.P_of = self.G.split(networks), self.P.split(networks)
        self.U: Tensor | None = None

    def project_(self, generator: torch.Generator | None, warm: bool) -> None:
        """Project them, ``warm``: from the last basis, where they have changed little since."""
        rows = self.sides[0].shape[1]
        sketch = (self.projection.oversample, self.projection.power_iters, generator)
        if self.by_gram:
            for A, G in zip(self.tall, self.G_of, strict=True):
                wide = A.to(G.dtype)
                torch.bmm(wide, wide.mT, out=G)
            G, start = self.G[:, :rows, :rows], self.U if warm else None
            if self.exact:
                self.U = dominant_basis(G, self.rank, start)
            else:
                self.U = sketched_basis(G, self.rank, *sketch, start).to(self.P.dtype)
        else:
            self.U = torch.cat([randomized_basis(A, self.rank, *sketch) for A in self.sides])
        if self.thin:
            for A, U in zip(self.sides, self.U.chunk(len(self.sides)), strict=True):
                A.copy_(torch.bmm(U, torch.bmm(U.mT, A)))
        else:
            torch.bmm(self.U, self.U.mT, out=self.P)
            for A, P in zip(self.sides, self.P_of, strict=True):
                A.copy_(torch.bmm(P, A))


def alike(weights: Sequence[Tensor], ranks: Sequence[int], projection: Projection) -> list[Alike]:
    """The layers of an ensemble, those together that can be; without those of rank ≥ min(m, n).

    Args:
        weights: stacks (S, out, in), one a layer.
        ranks: one a layer.

    >>> W = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    >>> (one,) = alike([W, torch.zeros(3, 2, 4)], [2, 2], Projection("truncsvd", rank=2))
    >>> one.project_(None, warm=False)
    >>> torch.linalg.matrix_rank(W)
    tensor([2, 2, 2])
    """
    found: dict[tuple[int, int, int], list[Tensor]] = {}
    for W, rank in zip(weights, ranks, strict=True):
        A = W if W.shape[1] <= W.shape[2] else W.mT
        if rank < A.shape[1]:
            found.setdefault((rank, A.shape[1], taller(A).shape[1]), []).append(A)
    return [Alike(sides, rank, projection) for (rank, *_), sides in found.items()]


class Group:
    """Networks that share a projection.

    Args:
        networks: which of those whose weights are given.
        weights: stacks (S, out, in), one a layer.
    """

    def __init__(
        self, projection: Projection, networks: Sequence[int], weights: Sequence[Tensor]
    ) -> None:
        self.projection, self.networks, self.weights = projection, list(networks), weights
        low, high = networks[0], networks[-1] + 1
        self.apart = high - low > len(networks)
        self.index = torch.tensor(self.networks, device=weights[0].device)
        self.own = [W[self.index] if self.apart else W[low:high] for W in weights]
        self.alike = alike(self.own, projection.ranks(len(weights)), projection)
        self.projected = False

    def is_due(self, done: int, steps: int) -> bool:
        """Whether a projection follows the step number ``done`` (from 1), of so many an epoch."""
        every = {"epoch": steps, "step": 1}.get(str(self.projection.every), self.projection.every)
        return done % int(every) == 0

    def project_(self, generator: torch.Generator | None) -> None:
        """Project the weights of these networks, in place."""
        if self.apart:
            for W, own in zip(self.weights, self.own, strict=True):
                torch.index_select(W, 0, self.index, out=own)
        warm = self.projected and self.projection.every == "step"
        for layers in self.alike:
            layers.project_(generator, warm)
        self.projected = True
        if self.apart:
            for W, own in zip(self.weights, self.own, strict=True):
                W.index_copy_(0, self.index, own)


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


def grouped(choices: Sequence[Projection | None], weights: Sequence[Tensor]) -> list[Group]:
    """Networks by projection, so that each projection is one batched call a layer.

    >>> stock, low = None, Projection("truncsvd", 1)
    >>> [group.networks for group in grouped([stock, low, stock, low], [torch.zeros(4, 2, 3)])]
    [[1, 3]]
    """
    members: dict[Projection, list[int]] = {}
    for network, choice in enumerate(choices):
        if choice is not None:
            members.setdefault(choice, []).append(network)
    return [Group(choice, networks, weights) for choice, networks in members.items()]
