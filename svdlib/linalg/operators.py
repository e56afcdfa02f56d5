"""The randomized SVD of what can only be multiplied by: sparse matrices and operators."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from svdlib import checks
from svdlib.linalg.bases import orthonormal


class Operator(Protocol):
    """What `randomized_svd` needs of a matrix that it does not see: A X and Aᵀ Y.

    A sparse tensor is one. One's own may also say its ``dtype`` and ``device``, float32 on the
    CPU otherwise.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def mT(self) -> Operator:
        """Its transpose, an operator of shape (n, m)."""

    def __matmul__(self, X: Tensor) -> Tensor:
        """A X (m, k) of a dense X (n, k)."""


# Columns that the error is estimated with.
PROBES = 32


def sketched_operator(
    A: Operator, rank: int, oversample: int, power_iters: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, S, Vh of a sketch with k + p columns, normalised after every product, and their error.

    The Frobenius error of the residual M is estimated by probes, E ‖M ω‖² = ‖M‖_F² for a Gaussian
    ω: with 32 of them its relative standard deviation is at most (2·32)^(−½), about an eighth.

    Raises:
        ValueError: no operator, a rank out of range, products that are not finite or of another
            shape.
    """
    m, n, dtype, device = _described(A)
    rank = checks.positive_int(rank, "rank")
    if rank > min(m, n):
        raise ValueError(f"rank must be at most min(m, n) = {min(m, n)}, not {rank}")
    checks.generator(generator, device)

    def drawn(columns: int) -> Tensor:
        return torch.randn(n, columns, dtype=dtype, device=device, generator=generator)

    At = A.mT
    Q = orthonormal(_times(A, drawn(min(rank + oversample, m, n)), m))
    for _ in range(power_iters):
        Q = orthonormal(_times(A, orthonormal(_times(At, Q, n)), m))
    U, S, Vh = torch.linalg.svd(_times(At, Q, n).mT, full_matrices=False)
    U, S, Vh = Q @ U[:, :rank], S[:rank], Vh[:rank]
    probes = drawn(PROBES)
    left = _times(A, probes, m) - (U * S) @ (Vh @ probes)
    return U, S, Vh, left.double().square().sum().div(PROBES).sqrt()


def _described(A: Operator) -> tuple[int, int, torch.dtype, torch.device]:
    shape = tuple(getattr(A, "shape", ()))
    lacking = [name for name in ("mT", "__matmul__") if not hasattr(A, name)]
    if len(shape) != 2 or lacking:
        raise ValueError(
            f"a floating-point torch tensor is needed, or an operator with shape (m, n), A @ X and "
            f"A.mT @ Y, not {type(A).__name__}"
        )
    m, n = (checks.positive_int(side, "a side of the operator") for side in shape)
    dtype = getattr(A, "dtype", torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"operators and sparse matrices are of float32 or float64, not {dtype}")
    return m, n, dtype, torch.device(getattr(A, "device", "cpu"))


def _times(A: Operator, X: Tensor, rows: int) -> Tensor:
    """A X, dense, of the right shape and finite."""
    Y = A @ X
    if not isinstance(Y, Tensor) or Y.shape != (rows, X.shape[1]):
        told = tuple(Y.shape) if isinstance(Y, Tensor) else type(Y).__name__
        raise ValueError(
            f"the operator times {tuple(X.shape)} must give {(rows, X.shape[1])}, not {told}"
        )
    checks.finite(Y, "the operator's product")
    return Y
