"""A random sketch of a matrix with a spectrum of one's choice, against the best and the bound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from svdlib import clock
from svdlib.linalg.bases import range_basis
from svdlib.linalg.svd import randomized_svd
from svdlib.study.evidence.theory import random_basis, residual_norms, sharp_bound


@dataclass(frozen=True, eq=False)
class Sketch:
    """What one sketch of A (m, n) with k + p columns did.

    Attributes:
        sigma: A's singular values, σ_i = i^(−decay).
        found: those of its approximation of rank k.
        error: ‖A − Q Qᵀ A‖, of this draw.
        best: σ_{k+1}, the least error that any matrix of rank k has.
        bound: of the error's mean (`sharp_bound`); None where k or p is under 2.
        seconds: what `randomized_svd` took.
        note: what is special about this choice, in a sentence; empty if nothing is.
    """

    sigma: Tensor
    found: Tensor
    error: float
    best: float
    bound: float | None
    seconds: float
    note: str


def sketch(
    m: int, n: int, decay: float, rank: int, oversample: int, power_iters: int, seed: int = 0
) -> Sketch:
    """Sketch a random matrix (m, n) with σ_i = i^(−decay).

    A rank that the matrix doesn't have is taken as the largest that leaves something, and said
    so in the note; so is a sketch that spans everything.

    >>> one = sketch(60, 40, decay=1.0, rank=5, oversample=5, power_iters=1)
    >>> one.sigma[10] <= one.error <= one.bound
    True
    >>> sketch(60, 40, 1.0, rank=10, oversample=30, power_iters=0).note
    'k + p = 40 columns span all 40: nothing is random any more, the SVD is exact.'
    """
    side = min(m, n)
    note = ""
    if rank >= side:
        note = f"A {m} × {n} matrix has no rank above {side}; k = {side - 1} is shown."
        rank = side - 1
    sigma = torch.arange(1, side + 1, dtype=torch.float64) ** -decay
    left, right = _bases(m, n)
    A = (left * sigma) @ right.mT
    generator = torch.Generator().manual_seed(seed)
    start = clock.now()
    found = randomized_svd(
        A, rank, oversample=oversample, power_iters=power_iters, generator=generator
    ).S
    seconds = clock.now() - start
    columns = rank + oversample
    if columns >= side:
        note = note or (
            f"k + p = {columns} columns span all {side}: nothing is random any more, the SVD is "
            "exact."
        )
        return Sketch(sigma, found, 0.0, float(sigma[rank]), None, seconds, note)
    omega = torch.randn(n, columns, dtype=A.dtype, generator=generator.manual_seed(seed))
    error = residual_norms(A, range_basis(A, omega, power_iters)[None]).item()
    bound = None
    if rank >= 2 and oversample >= 2:
        bound = float(sigma[rank]) * sharp_bound(sigma, rank, oversample, power_iters)
    elif not note:
        note = "The theorem needs k ≥ 2 and p ≥ 2: no bound is shown."
    return Sketch(sigma, found, error, float(sigma[rank]), bound, seconds, note)


@lru_cache(maxsize=4)
def _bases(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Random orthonormal columns: kept, since making them takes longer than all the rest."""
    generator = torch.Generator().manual_seed(0)
    return random_basis(m, min(m, n), generator), random_basis(n, min(m, n), generator)
