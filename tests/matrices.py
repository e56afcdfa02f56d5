"""Random matrices for the tests of linear algebra, and how exactly they can be decomposed."""

import torch


def matrix(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(m, n, sigma, seed=0):
    """A matrix with the given singular values and random singular vectors."""
    U = torch.linalg.qr(matrix((m, len(sigma)), seed)).Q
    V = torch.linalg.qr(matrix((n, len(sigma)), seed + 1)).Q
    return U * sigma @ V.mT


def rounding(A):
    """10 max(m, n) ε: what a backward stable factorization of A (m, n) may be off, over its norm.

    LAPACK promises p(m, n) ε with a "modestly growing" p (Users' Guide, section 4.9), and bounds
    the orthogonality of computed factors likewise; linear is what is usual, and ten leaves room
    for the smallest. Kernels of different processors differ within this bound, not beyond.
    """
    return 10 * max(A.shape[-2:]) * torch.finfo(A.dtype).eps
