"""A random sketch of a matrix with a chosen spectrum, its error, the best error, and a bound."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdlib import clock
from svdlib.linalg.bases import range_basis
from svdlib.linalg.svd import randomized_svd
from svdlib.study.evidence.theory import random_basis, residual_norms, sharp_bound


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
