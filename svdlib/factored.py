"""The ranks of networks that train as thin factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svdlib.networks import MLPEnsemble


@torch.no_grad()
def truncate_(nets: MLPEnsemble, tail: float) -> None:
    """Cut each factorized layer of an ensemble to the smallest rank that keeps all but a tail.

    W = U V (m × r times r × n) is decomposed through U = Q_1 R_1 and Vᵀ = Q_2 R_2: the SVD of
    the r × r matrix R_1 R_2ᵀ = P Σ Oᵀ gives W = (Q_1 P) Σ (Q_2 O)ᵀ. Each network keeps the
    smallest rank j ≥ 1 with (Σ_{i>j} σ_i²)^½ ≤ tail · (Σ σ_i²)^½, its factors balanced, √Σ
    each. Tensors shrink to the largest rank of all networks; shorter factors end in zeros.

    >>> from svdlib import factorize
    >>> nets = MLPEnsemble.from_modules([factorize(net, 20) for net in MLPEnsemble((99, 50, 9))])
    >>> truncate_(nets, tail=0.5)
    >>> nets.ranks[0][0] < 20
    True
    """
    for entry, inner in enumerate(nets.inner):
        if inner:
            first, second = cut(nets.weights[entry], nets.weights[entry + 1], tail)
            nets.weights[entry] = nn.Parameter(first)
            nets.weights[entry + 1] = nn.Parameter(second)


def cut(first: Tensor, second: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """See `truncate_`: the factors V (S, r, n) and U (S, m, r) of one layer, shortened.

    >>> V, U = torch.eye(3, 5)[None], torch.diag(torch.tensor([2.0, 1.0, 0.1]))[None]
    >>> [factor.shape for factor in cut(V, U, tail=0.1)]
    [torch.Size([1, 2, 5]), torch.Size([1, 3, 2])]
    """
    Q1, R1 = torch.linalg.qr(second)
    Q2, R2 = torch.linalg.qr(first.mT)
    P, S, Oh = torch.linalg.svd(R1 @ R2.mT)
    square = S.double().square()
    beyond = square.flip(-1).cumsum(-1).flip(-1)  # the energy from the i-th on
    kept = beyond > tail**2 * square.sum(-1, keepdim=True)
    kept[:, 0] = True
    root = S.sqrt() * kept
    rank = int(kept.sum(-1).max())
    U, V = Q1 @ (P * root.unsqueeze(-2)), (root.unsqueeze(-1) * Oh) @ Q2.mT
    return V[:, :rank].contiguous(), U[..., :rank].contiguous()
