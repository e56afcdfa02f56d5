"""Error bounds of random sketches, and the errors that sketches have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor

from svdlib.linalg.bases import orthonormal, range_basis
from svdlib.study.evidence.statistics import summarize


def sharp_bound(sigma: Tensor, rank: int, oversample: int, power_iters: int) -> float:
    """Sharper upper bound of the mean of ‖A − Q Qᵀ A‖ / σ_{k+1}, from A's singular values (m,).

    Halko, Martinsson and Tropp (2011), Theorem 10.6, and 10.10 for q power iterations, have

        E ‖A − Q Qᵀ A‖ ≤ [(1 + √(k/(p−1))) σ_{k+1}^s + e √(k+p) / p · (Σ_{j>k} σ_j^{2s})^½]^{1/s}

    with s = 2q + 1, k ≥ 2 and p ≥ 2.
    """
    s = 2 * power_iters + 1
    tail = (sigma[rank:] / sigma[rank]).double().pow(s).norm().item()
    first = 1 + (rank / (oversample - 1)) ** 0.5
    return float((first + math.e * (rank + oversample) ** 0.5 / oversample * tail) ** (1 / s))


def check_sketches(rank: int, oversamples: Sequence[int], side: int) -> None:
    """Raise ValueError unless p ≥ 2, k ≥ 2, and k + p is below the matrices' shorter ``side``."""
    p = max(oversamples, default=0)
    if min(oversamples, default=0) < 2:
        raise ValueError(f"the bounds need oversamples of 2 or more, not {list(oversamples)}")
    if side - p < 3:
        raise ValueError(f"a side of {side} takes oversamples up to {max(side - 3, 0)}, not {p}")
    if not 2 <= rank < side - p:
        raise ValueError(
            f"matrices with a side of {side} and up to {p} oversamples are sketched "
            f"at ranks 2 to {side - p - 1}, not {rank}; lower the rank or the oversamples"
        )


def random_basis(side: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns (side, columns), in float64."""
    return torch.linalg.qr(torch.randn(side, columns, dtype=torch.float64, generator=generator)).Q


def stepped(m: int, n: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Matrices (m, n) of k singular values of 10⁶, and then a flat, slow, or fast tail.

    A Q that ignores A errs by about 10⁶ σ_{k+1}, far above every bound.
    """
    i = torch.arange(min(m, n) - rank, dtype=torch.float64)
    tails = {"flat tail": torch.ones_like(i), "slow tail": (1 + i).rsqrt(), "fast tail": 0.8**i}
    matrices = {}
    for name, tail in tails.items():
        sigma = torch.cat([tail.new_full((rank,), 1e6), tail])
        left, right = (random_basis(side, len(sigma), generator) for side in (m, n))
        matrices[name] = (left * sigma) @ right.mT
    return matrices


def blind_basis(A: Tensor, omega: Tensor, power_iters: int) -> Tensor:
    """A broken sketch, which bounds must refuse: columns that ignore A (…, m, n), m ≤ n."""
    return orthonormal(omega[..., : A.shape[-2], :])


def residual_norms(A: Tensor, Q: Tensor) -> Tensor:
    """‖A − Q Qᵀ A‖ (draws,), in float64, of A (m, n) and orthonormal bases Q (draws, m, l).

    With A = L Pᵀ and orthonormal columns in P it is ‖L − Q Qᵀ L‖, the root of an eigenvalue.
    """
    L, Q = torch.linalg.qr(A.double().mT).R.mT, Q.double()
    # Not (I − Q Qᵀ) A Aᵀ (I − Q Qᵀ): what is under 1e-8 σ_1 would be rounded away.
    left = L - Q @ (Q.mT @ L)
    return torch.linalg.eigvalsh(left @ left.mT)[:, -1].clamp(min=0).sqrt()


@torch.no_grad()
def sketch_errors(
    A: Tensor,
    rank: int,
    oversamples: Sequence[int],
    power_iters: Sequence[int],
    draws: int,
    generator: torch.Generator,
    basis: Callable[[Tensor, Tensor, int], Tensor] = range_basis,
) -> pd.DataFrame:
    """The spectral error ‖A − Q Qᵀ A‖ / σ_{k+1} of many sketches of A (m, n), and its bounds.

    Without power iterations its mean is at most 1 + 4 √(k+p) / (p−1) · √min(m, n), p ≥ 2, and it
    exceeds 1 + 11 √(k+p) · √min(m, n), p ≥ 4, with probability 6 p^(−p) at most: Halko, Martinsson
    and Tropp (2011), equations 1.8 and 1.9. Another printed version of 1.9 has 9 and 3 p^(−p).
    ``basis`` returns Q for A, Ω and q; worst is σ_1 / σ_{k+1}, which no orthonormal Q exceeds.
    """
    m, n = A.shape
    check_sketches(rank, oversamples, min(m, n))
    sigma = torch.linalg.svdvals(A.double())
    tables, worst = [], (sigma[0] / sigma[rank]).item()
    for p, q in itertools.product(oversamples, power_iters):
        shape = (draws, n, rank + p)
        omega = torch.randn(shape, dtype=A.dtype, device=A.device, generator=generator)
        errors = residual_norms(A, basis(A.expand(draws, m, n), omega, q)) / sigma[rank]
        draw = {"error": errors.tolist(), "oversample": p, "power_iters": q}
        root, side = (rank + p) ** 0.5, min(m, n) ** 0.5
        sharp = sharp_bound(sigma, rank, p, q)
        mean = {"bound": 1 + 4 * root / (p - 1) * side, "sharp_bound": sharp}
        tail = {"tail_bound": 1 + 11 * root * side, "tail_chance": min(1.0, 6.0 * p**-p)}
        tables.append(pd.DataFrame(draw | mean | tail | {"worst": worst}))
    return pd.concat(tables, ignore_index=True)


def against_bounds(errors: pd.DataFrame) -> pd.DataFrame:
    """`interval` of `sketch_errors` by matrix, q, and p, and how many are beyond_… a bound."""
    by, bounds = ["matrix", "power_iters", "oversample"], ["bound", "sharp_bound", "tail_bound"]
    errors = errors.reset_index(drop=True)
    beyond = errors[bounds].lt(errors.error, axis=0).add_prefix("beyond_")
    groups = errors.join(beyond).groupby(by, sort=False)
    table = summarize(errors, "error", by).set_index(by)
    promised = groups[[*bounds, "tail_chance", "worst"]].first()
    return table.join(promised).join(groups[[*beyond]].sum()).reset_index()
