"""What answers the panels: one trained perceptron at any ranks, and sketches of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import clock
from svdlib.linalg.bases import range_basis
from svdlib.linalg.svd import randomized_svd
from svdlib.network.opened import find_layers
from svdlib.ranks.joint import front, joint_profile, layers_of
from svdlib.study.evidence.theory import random_basis, residual_norms, sharp_bound
from svdlib.study.running import inputs


class Cuts:
    """A perceptron (linear layers with ReLU between), decomposed once, and images to look at.

    With the first layer's W = U Σ Vᵀ, the numbers Vᵀ x of all images are computed once. A forward
    pass at ranks (r_1, r_2, …) starts from their first r_1, so that little is left to do.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        self.joint = joint_profile(model, x, y, progress=False)
        self.layers = layers_of(self.joint)
        self.best = front(self.joint).query("excess == 0").reset_index(drop=True)
        linear = find_layers(model).values()
        matrices = [layer.weight.double().cpu() for layer in linear]
        self.factors = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
        self.biases = [0 if layer.bias is None else layer.bias.double().cpu() for layer in linear]
        self.full = tuple(len(sigma) for _, sigma, _ in self.factors)
        self.x, self.y = x.cpu(), y.cpu()
        ranks = self.joint[self.layers].itertuples(index=False, name=None)
        self._places = {key: place for place, key in enumerate(ranks)}
        self._codes = self.x.double() @ self.factors[0][2].mT
        self._full_logits = self.logits(self.full)

    @torch.no_grad()
    def logits(self, ranks: Sequence[int]) -> Tensor:
        """The outputs (n, classes) for all images, in float64."""
        hidden = self.x
        layers = zip(ranks, self.factors, self.biases, strict=True)
        for number, (rank, (U, sigma, Vh), bias) in enumerate(layers):
            codes = hidden.relu() @ Vh[:rank].mT if number else self._codes[:, :rank]
            hidden = codes @ (U[:, :rank] * sigma[:rank]).mT + bias
        return hidden

    def weights(self, rank: int) -> Tensor:
        """The first layer's matrix (m, features) at this rank."""
        U, sigma, Vh = self.factors[0]
        return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]

    def at(self, ranks: Sequence[int]) -> pd.Series:
        """The row of the joint table for exactly these ranks."""
        return self.joint.iloc[self._places[tuple(ranks)]]

    def best_within(self, parameters: int) -> pd.Series:
        """The combination with the smallest loss among those with no more parameters."""
        count = np.searchsorted(self.best.parameters.to_numpy(), parameters, side="right")
        return self.best.iloc[max(int(count) - 1, 0)]

    def misread(self, ranks: Sequence[int], count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
        """Images that only the cut misreads, the clearest first, and logits before and after it.

        The margin sorts them: the correct class's logit minus the largest other, below 0 if misread.
        """
        logits = torch.stack([self._full_logits, self.logits(ranks)])
        own = self.y.expand(2, -1).unsqueeze(2)
        others = logits.scatter(2, own, -torch.inf).amax(2)
        before, after = logits.gather(2, own)[..., 0] - others
        at = after.where(before > 0, torch.inf).argsort(stable=True)[:count]
        return at, logits[0, at], logits[1, at]


class Sketch(NamedTuple):
    """One sketch of A (m, n) with k + p columns."""

    sigma: Tensor  #: A's singular values, σ_i = i^(−decay)
    found: Tensor  #: singular values of its approximation of rank k
    error: float  #: ‖A − Q Qᵀ A‖ of this draw
    best: float  #: σ_{k+1}, the smallest error of any matrix of rank k
    bound: float | None  #: of the mean error (`sharp_bound`); None if k or p is below 2
    seconds: float  #: time of `randomized_svd`
    note: str  #: what is special about this choice, in a sentence; empty if nothing is


def sketch(
    m: int, n: int, decay: float, rank: int, oversample: int, power_iters: int, seed: int = 0
) -> Sketch:
    """Sketch a random matrix (m, n) with σ_i = i^(−decay), of rank min(m, n) − 1 at most."""
    side, note = min(m, n), ""
    if rank >= side:
        note = f"A {m} × {n} matrix has no rank above {side}; k = {side - 1} is shown."
        rank = side - 1
    sigma = torch.arange(1, side + 1, dtype=torch.float64) ** -decay
    left, right = _bases(m, n)
    A = (left * sigma) @ right.mT
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"power_iters": power_iters, "generator": generator}
    start = clock.now()
    found = randomized_svd(A, rank, oversample=oversample, **options).S
    seconds = clock.now() - start
    columns, error, bound = rank + oversample, 0.0, None
    if columns >= side:
        exact = "nothing is random any more, the SVD is exact."
        note = note or f"k + p = {columns} columns span all {side}: {exact}"
    else:
        omega = torch.randn(n, columns, dtype=A.dtype, generator=generator.manual_seed(seed))
        error = residual_norms(A, range_basis(A, omega, power_iters)[None]).item()
        if rank >= 2 and oversample >= 2:
            bound = float(sigma[rank]) * sharp_bound(sigma, rank, oversample, power_iters)
        else:
            note = note or "The theorem needs k ≥ 2 and p ≥ 2: no bound is shown."
    return Sketch(sigma, found, error, float(sigma[rank]), bound, seconds, note)


@lru_cache(maxsize=4)
def _bases(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Random orthonormal columns, cached since they take longer than all the rest."""
    generator = torch.Generator().manual_seed(0)
    return random_basis(m, min(m, n), generator), random_basis(n, min(m, n), generator)


@inputs.refusing(whole="rank seeds epochs", widths="sizes")
def check(rank: int, sizes: Sequence[int]) -> None:
    """Refuse what 09_explorer could not use."""
    inputs.below_full(rank, sizes)
    inputs.few_combinations(sizes)
