"""Two thin factors in place of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated(V: Tensor, U: Tensor, tail: float) -> tuple[Tensor, Tensor, Tensor]:
    """V (S, r, n) and U (S, m, r) of the best W = U V that discards at most a relative tail, and ranks (S,).

    With U = Q_1 R_1 and Vᵀ = Q_2 R_2, the SVD R_1 R_2ᵀ = P Σ Oᵀ gives W = (Q_1 P) Σ (Q_2 O)ᵀ.
    Each matrix keeps the smallest rank j ≥ 1 with (Σ_{i>j} σ_i²)^½ ≤ tail · (Σ σ_i²)^½, its
    factors balanced, √Σ each, zero beyond its rank (Schotthöfer et al. 2022, Algorithm 1, the truncation).
    """
    Q1, R1 = torch.linalg.qr(U)
    Q2, R2 = torch.linalg.qr(V.mT)
    P, S, Oh = torch.linalg.svd(R1 @ R2.mT)
    square = S.double().square()
    tail_energy = square.flip(-1).cumsum(-1).flip(-1)  # from the i-th on
    kept = tail_energy > tail**2 * square.sum(-1, keepdim=True)
    kept[:, 0] = True
    root = S.sqrt() * kept
    return (root.unsqueeze(-1) * Oh) @ Q2.mT, Q1 @ (P * root.unsqueeze(-2)), kept.sum(-1)
