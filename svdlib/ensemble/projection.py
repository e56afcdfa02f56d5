"""Which low-rank approximation replaces an ensemble's weights, when and how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from svdlib import checks
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.layers.project import project_
from svdlib.linalg.bases import dominant_basis, gram, range_basis, sketched_basis, with_spare_rows
from svdlib.linalg.svd import METHODS, OVERSAMPLE, POWER_ITERS
from svdlib.network.opened import Network


@dataclass(frozen=True)
class Projection:
    """Which low-rank approximation replaces the weights while a network trains, and when.

    Args:
        method: "truncsvd" (the best approximation) or "rsvd" (the randomized one).
        rank: one for all layers, or one per layer; a layer of no higher rank stays as it is.
        every: "epoch", "step", or a number of steps.
        oversample, power_iters: see `randomized_svd`.
    """

    method: Literal["rsvd", "truncsvd"]
    rank: int | tuple[int, ...]
    every: Literal["epoch", "step"] | int = "epoch"
    oversample: int = OVERSAMPLE
    power_iters: int = POWER_ITERS

    def __post_init__(self) -> None:
        checks.one_of(self.method, METHODS, "method")
        if isinstance(self.rank, Iterable) and getattr(self.rank, "ndim", True):
            ranks = tuple(checks.positive_int(rank, "rank") for rank in self.rank)
            object.__setattr__(self, "rank", ranks)
        else:
            object.__setattr__(self, "rank", checks.positive_int(self.rank, "rank"))
        if isinstance(self.every, str):
            checks.one_of(self.every, ("epoch", "step"), "every")
        else:
            object.__setattr__(self, "every", checks.positive_int(self.every, "every"))
        checks.positive_int(self.oversample, "oversample", least=0)
        checks.positive_int(self.power_iters, "power_iters", least=0)

    @classmethod
    def published(cls, method: Literal["rsvd", "truncsvd"], rank: int = 10) -> Projection:
        """The projection in the paper's code, unlike its text: after every step.

        The truncated SVD keeps rank + 1 terms, the randomized SVD draws ``rank`` vectors in all.
        """
        rank = checks.positive_int(rank, "rank")
        if method == "truncsvd":
            return cls(method, rank + 1, every="step")
        return cls(method, rank, every="step", oversample=0, power_iters=2)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        layers: Iterable[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> RemovableHandle:
        """Project a model's weights after steps of an optimizer, in a training loop of your own.

        Steps that a gradient scaler skips are not counted.

        Args:
            model: changed in place; layers that can't be projected stay, with one warning.
            optimizer: the one that steps the model's parameters.
            layers: names of layers or parameters, as `project_` takes them; all layers by default.
            generator: the source of sketches, on the model's device.

        Returns:
            a handle; ``handle.remove()`` ends the projections.

        Raises:
            ValueError: ``every="epoch"``, which an optimizer does not know, or as `project_`.

        >>> model = nn.Linear(20, 15)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = Projection("truncsvd", rank=3, every="step").attach(model, optimizer)
        """
        if self.every == "epoch":
            raise ValueError("an optimizer knows no epochs; give every='step' or a number of steps")
        if not (isinstance(model, nn.Module) and isinstance(optimizer, torch.optim.Optimizer)):
            given = f"{type(model).__name__} and {type(optimizer).__name__}"
            raise ValueError(f"attach takes a model and its optimizer, not {given}")  # noqa: TRY004
        net = Network(model)
        chosen = net.choose(layers, "project")
        net.warn()
        ranks = dict(zip(chosen, self.ranks(len(chosen)), strict=True))
        net.check_ties(ranks, "project")
        if not ranks:
            raise ValueError("no layer of the model can be projected")
        sketch = {"oversample": self.oversample, "power_iters": self.power_iters}
        steps = count(1)

        def project(*_: object) -> None:
            if self.is_due(next(steps)):
                project_(model, ranks, self.method, **sketch, generator=generator)

        return optimizer.register_step_post_hook(project)

    def is_due(self, done: int, epoch: int = 0) -> bool:
        """Whether a projection follows step ``done`` (from 1); ``epoch`` is an epoch's steps."""
        every = {"epoch": epoch, "step": 1}.get(str(self.every), self.every)
        return done % int(every) == 0

    def ranks(self, layers: int) -> tuple[int, ...]:
        if isinstance(self.rank, int):
            return (self.rank,) * layers
        if len(self.rank) != layers:
            raise ValueError(f"{layers} layers need {layers} ranks, not {self.rank}")
        return self.rank


Choices = Sequence[Projection | None]  # one per network
Projections = Projection | None | Choices
Generators = Sequence[torch.Generator | None]  # one per network; empty: torch's global one
GRAM_ROWS = 64  # up to so many the randomized method works on the Gram matrix
AHEAD = 16_384  # numbers per network that sketches between epochs are drawn ahead


def sketch_generators(seeds: Sequence[int], seed: int, device: torch.device) -> Generators:
    """A generator per network, seeded by its own seed and the call's, whatever its neighbors."""
    mixed = [np.random.SeedSequence([seed % 2**64, network % 2**64]) for network in seeds]
    states = [int(sequence.generate_state(1, np.uint64)[0]) >> 1 for sequence in mixed]
    return [torch.Generator(device).manual_seed(state) for state in states]


def sketches(
    generators: Generators, shape: tuple[int, int, int], like: Tensor, frequent: bool
) -> Iterator[Tensor]:
    """Gaussian Ω (layers · networks, rows, columns) without end, ``frequent`` ones drawn ahead."""
    layers, rows, columns = shape
    ahead = max(1, AHEAD // (layers * rows * columns)) if frequent else 1
    drawn = like.new_empty(ahead, layers, len(generators), rows, columns)
    while True:
        numbers = like.new_empty(ahead, layers, rows, columns)
        for network, generator in enumerate(generators):
            drawn[:, :, network] = numbers.normal_(generator=generator)
        yield from drawn.flatten(1, 2).unbind()


class LayerStack:
    """Layers with equally many rows on the shorter side, projected by one batched factorization.

    The rank-k matrix of A (S, m, n) is U Uᵀ A, with U its k < m leading left singular vectors.
    ``sides`` are such A, weights or their transposes, equally high with their spare rows.
    """

    def __init__(
        self, sides: Sequence[Tensor], rank: int, projection: Projection, generators: Generators
    ) -> None:
        networks, rows = sides[0].shape[:2]
        self.sides, self.rank, self.power_iters = sides, rank, projection.power_iters
        columns = rank + projection.oversample
        # With so many columns a sketch would span everything: the exact answer costs less.
        self.exact = projection.method == "truncsvd" or columns >= rows
        self.by_gram = self.exact or rows <= GRAM_ROWS
        self.thin = 4 * rank < rows
        self.tall = [with_spare_rows(A) for A in sides]
        size = self.tall[0].shape[1] if self.by_gram else 0
        # What a sketch misses is as small as a step's change; its square needs float64.
        dtype = sides[0].dtype if self.exact else torch.float64
        self.G = sides[0].new_empty(len(sides) * networks, size, size, dtype=dtype)
        self.P = sides[0].new_empty(len(sides) * networks, *([0, 0] if self.thin else [rows, rows]))
        self.G_of, self.P_of = self.G.split(networks), self.P.split(networks)
        # One sketch for all layers if Ω has A's rows, else one per layer, as columns may differ.
        shapes = [(len(sides), rows)] if self.by_gram else [(1, A.shape[2]) for A in sides]
        own, frequent = generators or [None] * networks, projection.every != "epoch"
        self.sketches = [sketches(own, (*shape, columns), sides[0], frequent) for shape in shapes]
        self.U: Tensor | None = None

    def project_(self, warm: bool) -> None:
        """Project the weights, ``warm`` from the last basis, if they have changed little since."""
        rows = self.sides[0].shape[1]
        if self.by_gram:
            for A, G in zip(self.tall, self.G_of, strict=True):
                wide = A.to(G.dtype)
                torch.bmm(wide, wide.mT, out=G)
            G, start = self.G[:, :rows, :rows], self.U if warm else None
            if self.exact:
                self.U = dominant_basis(G, self.rank, start)
            else:
                omega = next(self.sketches[0])
                U = sketched_basis(G, omega, self.rank, self.power_iters, start)
                self.U = U.to(self.P.dtype)
        else:
            bases = []
            for A, sketch in zip(self.sides, self.sketches, strict=True):
                Q = range_basis(A, next(sketch), self.power_iters)
                bases.append(Q @ dominant_basis(gram(Q.mT @ A), self.rank))
            self.U = torch.cat(bases)
        if self.thin:
            for A, U in zip(self.sides, self.U.chunk(len(self.sides)), strict=True):
                A.copy_(torch.bmm(U, torch.bmm(U.mT, A)))
        else:
            torch.bmm(self.U, self.U.mT, out=self.P)
            for A, P in zip(self.sides, self.P_of, strict=True):
                A.copy_(torch.bmm(P, A))


def layer_stacks(
    weights: list[Tensor], ranks: Sequence[int], projection: Projection, generators: Generators = ()
) -> list[LayerStack]:
    """The layers of an ensemble in as few stacks as possible, without those of rank ≥ min(m, n).

    ``weights`` are (S, out, in), one per layer like the ranks, changed in place by ``project_``;
    generators are one per network, torch's global one by default.
    """
    stacks: dict[tuple[int, int, int], list[Tensor]] = {}
    for W, rank in zip(weights, ranks, strict=True):
        A = W if W.shape[1] <= W.shape[2] else W.mT
        if rank < A.shape[1]:
            stacks.setdefault((rank, A.shape[1], with_spare_rows(A).shape[1]), []).append(A)
    return [LayerStack(sides, rank, projection, generators) for (rank, *_), sides in stacks.items()]


class Group:
    """Networks, numbers among ``weights`` (S, out, in) per layer, that share a projection."""

    def __init__(
        self, projection: Projection, networks: list[int], weights: list[Tensor], own: Generators
    ) -> None:
        self.projection, self.weights, self.projected = projection, weights, False
        low, high = networks[0], networks[-1] + 1
        scattered = high - low > len(networks)
        self.index = torch.tensor(networks, device=weights[0].device)
        own_weights = [W[self.index] if scattered else W[low:high] for W in weights]
        self.copies = list(zip(weights, own_weights, strict=True)) if scattered else []
        self.stacks = layer_stacks(own_weights, projection.ranks(len(weights)), projection, own)

    def project_(self) -> None:
        for W, own in self.copies:
            torch.index_select(W, 0, self.index, out=own)
        warm = self.projected and self.projection.every == "step"
        for stack in self.stacks:
            stack.project_(warm)
        self.projected = True
        for W, own in self.copies:
            W.index_copy_(0, self.index, own)


def per_network(projection: Projections, nets: MLPEnsemble) -> Choices:
    """A projection or None for each network, if they fit the networks."""
    if projection is None or isinstance(projection, Projection):
        projection = [projection] * len(nets)
    choices = list(projection)
    if len(choices) != len(nets):
        raise ValueError(f"{len(nets)} networks need as many projections, not {len(choices)}")
    if nets.factorized and any(choices):
        raise ValueError("factorized networks have low rank already; give a tail, no projection")
    for choice in choices:
        if isinstance(choice, Projection):
            choice.ranks(len(nets.layers))
        elif choice is not None:
            raise ValueError(f"a projection is a svdlib.Projection or None, not {choice!r}")
    return choices


def grouped(choices: Choices, weights: list[Tensor], generators: Generators = ()) -> list[Group]:
    """Networks by projection, each then one batched call per layer."""
    groups = []
    for choice in dict.fromkeys(filter(None, choices)):
        networks = [network for network, other in enumerate(choices) if other == choice]
        own = [generators[network] for network in networks if generators]
        groups.append(Group(choice, networks, weights, own))
    return groups
