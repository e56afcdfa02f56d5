"""The randomized SVD of sparse matrices and operators, which can only be multiplied by."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from svdlib import checks
from svdlib.linalg.bases import orthonormal

# Layouts of sparse matrices; those of blocks are not multiplied by everywhere.
BLOCKS = (torch.sparse_bsr, torch.sparse_bsc)
SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, *BLOCKS)
PROBES = 32  # columns that the error is estimated with


class Operator(Protocol):
    """A matrix known by its products A X and Aᵀ Y; ``dtype`` and ``device`` are optional."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def mT(self) -> Operator: ...

    def __matmul__(self, X: Tensor) -> Tensor: ...


def sketched_operator(
    A: Operator, rank: int, oversample: int, power_iters: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, S and Vh from a sketch with k + p columns, and an estimate of their Frobenius error.

    For the residual M and a Gaussian ω, E ‖M ω‖² = ‖M‖_F². The root of the mean over 32 of them has
    a relative standard deviation of at most (2·32)^(−½), about an eighth.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR|CSC|BSR|BSC) tensor support is in beta")
        return _sketched(A, rank, oversample, power_iters, generator)


def _sketched(
    A: Operator, rank: int, oversample: int, power_iters: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = tuple(getattr(A, "shape", ()))
    known = not isinstance(A, Tensor) or A.layout in SPARSE
    if len(shape) != 2 or not (known and hasattr(A, "mT") and hasattr(A, "__matmul__")):
        needed = "a floating-point torch tensor, or an operator with shape (m, n), @ and mT"
        found = f"{A.layout} of shape {shape}" if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(f"A must be {needed}, not {found}")
    m, n = (checks.positive_int(side, "a side of the operator") for side in shape)
    dtype = getattr(A, "dtype", torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"operators and sparse matrices are of float32 or float64, not {dtype}")
    device = torch.device(getattr(A, "device", "cpu"))
    rank = checks.rank(rank, (m, n))
    checks.generator(generator, device)
    A = A.to_sparse() if isinstance(A, Tensor) and A.layout in BLOCKS else A
    gaussian = partial(torch.randn, n, dtype=dtype, device=device, generator=generator)
    At = A.mT
    Q = orthonormal(_times(A, gaussian(min(rank + oversample, m, n)), m))
    for _ in range(power_iters):
        Q = orthonormal(_times(A, orthonormal(_times(At, Q, n)), m))
    U, S, Vh = torch.linalg.svd(_times(At, Q, n).mT, full_matrices=False)
    U, S, Vh = Q @ U[:, :rank], S[:rank], Vh[:rank]
    probes = gaussian(PROBES)
    residual = _times(A, probes, m) - (U * S) @ (Vh @ probes)
    return U, S, Vh, residual.double().square().sum().div(PROBES).sqrt()


def _times(A: Operator, X: Tensor, rows: int) -> Tensor:
    Y, needed = A @ X, (rows, X.shape[1])
    if not isinstance(Y, Tensor) or Y.shape != needed:
        found = tuple(Y.shape) if isinstance(Y, Tensor) else type(Y).__name__
        raise ValueError(f"the operator times {tuple(X.shape)} must give {needed}, not {found}")
    checks.finite(Y, "the operator's product")
    return Y
