"""Layers of an ensemble that are projected together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from svdlib.ensemble.traced import traced
from svdlib.linalg.bases import dominant_basis, gram, range_basis, sketched_basis
from svdlib.linalg.subspace import small_sketch, turn_randomly_

if TYPE_CHECKING:
    from svdlib.ensemble.projection import Projection

Generators = Sequence[torch.Generator | None]  # one per network; empty: torch's global one
Measures = tuple[Tensor, ...]  # H, X, and N Nᵀ of `turn_randomly_`
GRAM_ROWS = 64  # up to so many the randomized method works on the Gram matrix
AHEAD = 16_384  # numbers per network that sketches between epochs are drawn ahead
STEPS = {True: 50, False: 16}  # exact or random: after so many, bases are orthonormal anew


def sketch_generators(seeds: Sequence[int], seed: int, device: torch.device) -> Generators:
    """A generator per network, seeded by its own seed and the call's, whatever its neighbors."""
    mixed = [np.random.SeedSequence([seed % 2**64, network % 2**64]) for network in seeds]
    states = [int(sequence.generate_state(1, np.uint64)[0]) >> 1 for sequence in mixed]
    return [torch.Generator(device).manual_seed(state) for state in states]


def sketches(
    generators: Generators, shape: tuple[int, int, int], like: Tensor, ahead: bool, small: int = 0
) -> Iterator[Tensor]:
    """Gaussian Ω (layers · networks, rows, columns) without end, some drawn ``ahead``.

    With a rank ``small`` each becomes a `small_sketch`.
    """
    layers, rows, columns = shape
    number = max(1, AHEAD // (layers * rows * columns)) if ahead else 1
    drawn = like.new_empty(number, layers, len(generators), rows, columns)
    while True:
        numbers = like.new_empty(number, layers, rows, columns)
        for network, generator in enumerate(generators):
            drawn[:, :, network] = numbers.normal_(generator=generator)
        yield from (small_sketch(drawn, small) if small else drawn).flatten(1, 2).unbind()


class LayerStack:
    """Layers with equally many rows on the shorter side, projected by one batched factorization.

    The rank-k matrix of A (S, m, n) is U Uᵀ A, with U its k < m leading left singular vectors.
    ``sides`` are such A, weights or their transposes, of equal height. After small changes of A
    the bases U and V (layers · S, m, k) are turned (`turn_`).
    """

    def __init__(
        self, sides: Sequence[Tensor], rank: int, projection: Projection, generators: Generators
    ) -> None:
        networks, rows = sides[0].shape[:2]
        self.sides, self.rank, self.power_iters = list(sides), rank, projection.power_iters
        self.columns = columns = rank + projection.oversample
        # With so many columns a sketch would span everything: the exact answer costs less.
        self.exact = projection.method == "truncsvd" or columns >= rows
        self.by_gram = self.exact or rows <= GRAM_ROWS
        own, ahead = generators or [None] * networks, projection.every != "epoch"
        # One sketch for all layers if Ω has A's rows, else one per layer, as columns may differ.
        shapes = [(len(sides), rows)] if self.by_gram else [(1, A.shape[2]) for A in sides]
        self.sketches = [sketches(own, (*shape, columns), sides[0], ahead) for shape in shapes]
        shape = len(sides), rank + rows, columns
        self.small = sketches(own, shape, sides[0], ahead, rank)
        self.U = sides[0].new_empty(len(sides) * networks, rows, rank)
        self.V, self.steps = torch.empty_like(self.U), 0
        self.follow: Callable[..., Tensor] | None = None

    def project_(self, warm: bool) -> None:
        """Project the weights, ``warm`` from the last basis, if they have changed little since."""
        if warm and self.by_gram:
            self.renew_()
            self._follow()
            return
        self.U.copy_(self._basis())
        for A, U in zip(self.sides, self.U.chunk(len(self.sides)), strict=True):
            A.copy_(U @ (U.mT @ A))

    def _follow(self) -> None:
        sketch = self.sketch()
        if self.follow is None and self.exact:
            self.follow = traced(follow_, (self.U, *self.sides))
        elif self.follow is None:
            iters = {"power_iters": self.power_iters}
            self.follow = traced(follow_randomly_, (self.tensors(),), *sketch, **iters)
        self.follow(*sketch)

    def tensors(self) -> tuple[Tensor, ...]:
        """What `follow_randomly_` works on."""
        return self.U, self.V, *self.sides

    def sketch(self) -> list[Tensor]:
        """What `follow_randomly_` takes; nothing if the projection is exact."""
        return [] if self.exact else [next(self.small)]

    def no_sketch(self) -> Tensor:
        """Zeros like a sketch."""
        return self.U.new_zeros(*self.U.shape[:2], self.columns)

    def renew_(self) -> Tensor | None:
        """Before some steps, make U orthonormal; returns the triangular R that it is divided by."""
        self.steps += 1
        if self.steps % STEPS[self.exact] != 1:
            return None
        Q, R = torch.linalg.qr(self.U)
        self.U.copy_(Q)
        self.V.copy_(Q)
        return R

    def _basis(self) -> Tensor:
        if not self.by_gram:
            bases = []
            for A, sketch in zip(self.sides, self.sketches, strict=True):
                Q = range_basis(A, next(sketch), self.power_iters)
                bases.append(Q @ dominant_basis(gram(Q.mT @ A), self.rank))
            return torch.cat(bases)
        if self.exact:
            return dominant_basis(torch.cat([gram(A) for A in self.sides]), self.rank)
        # What a sketch misses is as small as a step's change; its square needs float64.
        G = torch.cat([gram(A.double()) for A in self.sides])
        return sketched_basis(G, next(self.sketches[0]), self.rank, self.power_iters)


def follow_(U: Tensor, *sides: Tensor) -> Tensor:
    """Project layers A in place after a small change, U being their bases before and after."""
    for A, basis in zip(sides, U.split(len(sides[0])) if sides else (), strict=True):
        whole = A.clone(memory_format=torch.contiguous_format)
        basis.copy_(dominant_basis(torch.bmm(whole, whole.mT), basis.shape[-1], basis))
        A.copy_(torch.bmm(torch.bmm(basis, basis.mT), whole))
    return U


def follow_randomly_(
    stack: tuple[Tensor, ...], sketch: Tensor, first: Measures = (), power_iters: int = 0
) -> Tensor:
    """The same with a randomized SVD, by `turn_randomly_`; returns the bases' change.

    Each A = V C + N with C = UᵀA becomes V (C + EᵀN) of the new V, E being the change of U. The
    ``stack`` is U, V, and all A, but for a ``first`` one that isn't held as a matrix.
    """
    U, V, *sides = stack
    thin = int(bool(first))
    layers = len(sides) + thin
    parts = list(zip(sides, U.chunk(layers)[thin:], V.chunk(layers)[thin:], strict=True))
    split, measures = [], [first] * thin
    for A, U_l, V_l in parts:
        whole = A.clone(memory_format=torch.contiguous_format)
        C = torch.bmm(U_l.mT, whole)
        N = torch.baddbmm(whole, V_l, C, alpha=-1)
        split.append((C, N))
        measures.append((torch.bmm(C, C.mT), torch.bmm(N, C.mT), torch.bmm(N, N.mT)))
    H, X, NN = (torch.cat(part) for part in zip(*measures, strict=True))
    change = turn_randomly_(U, V, H, X, NN, sketch, power_iters)
    for (A, _, V_l), (C, N), E in zip(parts, split, change.chunk(layers)[thin:], strict=True):
        A.copy_(torch.bmm(V_l, C.baddbmm_(E.mT, N)))
    return change


def layer_stacks(
    weights: list[Tensor], ranks: Sequence[int], projection: Projection, generators: Generators = ()
) -> list[LayerStack]:
    """The layers of an ensemble in as few stacks as possible, without those of rank ≥ min(m, n).

    ``weights`` are (S, out, in), one per layer like the ranks, changed in place by ``project_``;
    generators are one per network, torch's global one by default.
    """
    stacks: dict[tuple[int, int], list[Tensor]] = {}
    for W, rank in zip(weights, ranks, strict=True):
        A = W if W.shape[1] <= W.shape[2] else W.mT
        if rank < A.shape[1]:
            stacks.setdefault((rank, A.shape[1]), []).append(A)
    return [LayerStack(sides, rank, projection, generators) for (rank, _), sides in stacks.items()]
