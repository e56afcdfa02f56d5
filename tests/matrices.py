"""Random matrices for the tests of linear algebra."""

import torch


def matrix(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(m, n, sigma, seed=0):
    """A matrix with the given singular values and random singular vectors."""
    U = torch.linalg.qr(matrix((m, len(sigma)), seed)).Q
    V = torch.linalg.qr(matrix((n, len(sigma)), seed + 1)).Q
    return U * sigma @ V.mT
