"""Two thin factors in place of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced(V: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors √S Vᵀ (…, r, n) and U √S (…, m, r) of the SVD of W = U V, and its S (…, r).

    With U = Q_1 R_1 and Vᵀ = Q_2 R_2, the SVD R_1 R_2ᵀ = P S Oᵀ gives W = (Q_1 P) S (Q_2 O)ᵀ.
    """
    Q1, R1 = torch.linalg.qr(U)
    Q2, R2 = torch.linalg.qr(V.mT)
    P, S, Oh = torch.linalg.svd(R1 @ R2.mT)
    root = S.sqrt()
    return (root.unsqueeze(-1) * Oh) @ Q2.mT, Q1 @ (P * root.unsqueeze(-2)), S


def ranks_within(S: Tensor, tail: float) -> Tensor:
    """The smallest ranks j ≥ 1 with (Σ_{i>j} σ_i²)^½ ≤ tail · (Σ σ_i²)^½ (Schotthöfer et al. 2022)."""
    square = S.double().square()
    tail_energy = square.flip(-1).cumsum(-1).flip(-1)  # from the i-th on
    kept = tail_energy > tail**2 * square.sum(-1, keepdim=True)
    return kept.sum(-1).clamp(min=1)


def truncated(V: Tensor, U: Tensor, tail: float) -> tuple[Tensor, Tensor, Tensor]:
    """`balanced` factors of the best W = U V that discards at most a relative tail, and ranks (S,).

    Each matrix has a rank of its own; its factors are zero beyond it.
    """
    V, U, S = balanced(V, U)
    ranks = ranks_within(S, tail)
    kept = torch.arange(S.shape[-1], device=S.device) < ranks.unsqueeze(-1)
    return V * kept.unsqueeze(-1), U * kept.unsqueeze(-2), ranks
