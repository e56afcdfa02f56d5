"""What theory promises of a random sketch, and what sketches do."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from svdlib.linalg.bases import range_basis


def mean_bound(m: int, n: int, rank: int, oversample: int) -> float:
    """The largest mean of ‖A − Q Qᵀ A‖ / σ_{k+1}, for a sketch without power iterations.

    Halko, Martinsson and Tropp (2011), equation 1.8, as the paper prints it:

        E ‖A − Q Qᵀ A‖ ≤ [1 + 4 √(k+p) / (p−1) · √min(m, n)] σ_{k+1} ,   p ≥ 2.

    >>> round(mean_bound(100, 200, rank=10, oversample=6), 3)
    33.0
    """
    return 1 + 4 * (rank + oversample) ** 0.5 / (oversample - 1) * min(m, n) ** 0.5


def tail_bound(m: int, n: int, rank: int, oversample: int) -> float:
    """What ‖A − Q Qᵀ A‖ / σ_{k+1} exceeds with probability 6 p^(−p) at most.

    Halko, Martinsson and Tropp (2011), equation 1.9: [1 + 11 √(k+p) · √min(m, n)].

    >>> round(tail_bound(100, 200, rank=10, oversample=6), 1)
    441.0
    """
    return 1 + 11 * (rank + oversample) ** 0.5 * min(m, n) ** 0.5


@torch.no_grad()
def sketch_errors(
    A: Tensor,
    rank: int,
    oversamples: Sequence[int],
    power_iters: Sequence[int],
    draws: int,
    generator: torch.Generator,
) -> pd.DataFrame:
    """The spectral error ‖A − Q Qᵀ A‖ / σ_{k+1} of many sketches of A (m, n), m ≤ n.

    Its norm is the square root of the largest eigenvalue of (I − Q Qᵀ) A Aᵀ (I − Q Qᵀ).

    Returns:
        a row a draw: oversample, power_iters, error, bound (`mean_bound`), tail_bound (`tail_bound`).

    >>> g = torch.Generator().manual_seed(0)
    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])).double()
    >>> table = sketch_errors(A, 1, [2], [0, 2], draws=5, generator=g)
    >>> len(table), bool((table.error > 0).all())
    (10, True)
    """
    m, n = A.shape
    G = (A @ A.mT).double()
    next_sigma = torch.linalg.eigvalsh(G)[-rank - 1].clamp(min=0).sqrt()
    tables = []
    for p in oversamples:
        for q in power_iters:
            shape = (draws, n, rank + p)
            omega = torch.randn(shape, dtype=A.dtype, device=A.device, generator=generator)
            Q = range_basis(A.expand(draws, m, n), omega, q).double()
            left = torch.eye(m, dtype=Q.dtype, device=Q.device) - Q @ Q.mT
            largest = torch.linalg.eigvalsh(left @ G @ left)[:, -1].clamp(min=0)
            part = pd.DataFrame({"error": (largest.sqrt() / next_sigma).tolist()})
            tables.append(
                part.assign(
                    oversample=p,
                    power_iters=q,
                    bound=mean_bound(m, n, rank, p),
                    tail_bound=tail_bound(m, n, rank, p),
                )
            )
    return pd.concat(tables, ignore_index=True)
