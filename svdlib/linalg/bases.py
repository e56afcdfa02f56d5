"""Orthonormal bases of dominant ranges, by matrix products wherever these are stable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis (…, m, k) of the range of Y (…, m, k), m ≥ k, by Cholesky QR twice.

    With YᵀY = RᵀR the columns of Q = Y R⁻¹ are orthonormal up to κ(Y) roundings, after a second
    pass up to one (Yamamoto et al. 2015); summed in float64, for κ(Y) up to 1e7 (Yamazaki, Tomov
    and Dongarra 2015). Householder's QR takes over beyond that, or for a gradient of Y.
    """
    Q, spread = normalized(normalized(Y)[0])
    return Q if spread < 2 else torch.linalg.qr(Y).Q


def normalized(Y: Tensor) -> tuple[Tensor, float]:
    """One pass of Cholesky QR; and R's largest diagonal entry over its smallest, at most κ(Y)."""
    if not Y.requires_grad:
        wide = Y.double()
        R, failed = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
        if not failed.any():
            diagonal = R.diagonal(dim1=-2, dim2=-1)
            spread = float((diagonal.amax(-1) / diagonal.amin(-1)).max())
            eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
            return Y @ torch.linalg.solve_triangular(R, eye, upper=True).to(Y.dtype), spread
    return torch.linalg.qr(Y).Q, math.inf


def range_basis(A: Tensor, omega: Tensor, power_iters: int) -> Tensor:
    """An orthonormal basis Q (…, m, l) of the range of (A Aᵀ)^q A Ω, with a Gaussian Ω (…, n, l).

    Two products without a normalization between them square the spread of the columns. If that
    would exceed 1/√ε, where small directions are rounded away, every product is normalized.
    """
    Y = _product(A, omega)
    careful = None
    for _ in range(power_iters):
        Q, spread = normalized(Y)
        if careful is None:
            careful = spread > 0.1 * torch.finfo(A.dtype).eps ** -0.5
        Z = (Q.mT @ A).mT  # half as fast again as A.mT @ Q for few columns
        Y = _product(A, normalized(Z)[0] if careful else Z)
    return orthonormal(Y)


def _product(A: Tensor, X: Tensor) -> Tensor:
    """A X; for an A stored by columns as (Xᵀ Aᵀ)ᵀ, half as fast again for few columns."""
    return (X.mT @ A.mT).mT if A.stride(-2) == 1 else A @ X


def gram(A: Tensor) -> Tensor:
    m = A.shape[-2]
    if A.ndim > 2 and m < 64:
        A = F.pad(A, (0, 0, 0, -m % 8))  # MKL is slow at 15 rows
    return (A @ A.mT)[..., :m, :m]


def dominant_basis(G: Tensor, rank: int, start: Tensor | None = None) -> Tensor:
    """The leading left singular vectors U_k (…, m, k) of A, from its Gram matrix G = A Aᵀ.

    ``start`` is such a basis from before a small change of A. One step of orthogonal iteration
    (Golub and Van Loan, section 7.3.2) then reduces the error by (σ_{k+1}/σ_k)², without waiting
    for the device. The columns of G U are nearly orthogonal, so Cholesky QR is accurate.
    """
    if start is None:
        return torch.linalg.eigh(G).eigenvectors[..., -rank:].flip(-1)
    return _cholesky_qr((G @ start).double(), otherwise=start).to(G.dtype)


def _cholesky_qr(Y: Tensor, otherwise: Tensor, shift: float = 0.0) -> Tensor:
    """Y R⁻¹ with YᵀY = RᵀR, in float64; ``otherwise`` if Cholesky fails, decided on the device.

    Orthonormal to κ² roundings, κ being the condition of Y with normalized columns (Demmel 1989),
    but in directions as small as the root of the ``shift`` (Fukaya et al. 2020).
    """
    small = Y.mT @ Y
    if shift:
        _shift_(small, shift)
    R, failed = torch.linalg.cholesky_ex(small, upper=True)
    Q = torch.linalg.solve_triangular(R, Y, upper=True, left=False)
    return torch.where((failed == 0)[..., None, None], Q, otherwise)


def _shift_(G: Tensor, part: float) -> None:
    """Add a part of the trace to the diagonal, in place."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    diagonal += part * diagonal.sum(-1, keepdim=True)


def sketched_basis(G: Tensor, omega: Tensor, rank: int, power_iters: int) -> Tensor:
    """The randomized SVD's left singular vectors U_k (…, m, k) of A, from its Gram matrix G = A Aᵀ.

    The columns of A Ω are independent normal vectors with covariance G, as are those of L Ω with
    G = L Lᵀ and a Gaussian Ω (…, m, k+p): G alone is enough.
    """
    small, columns = G.to(torch.float64, copy=True), omega.shape[-1]
    # A projected matrix is rank-deficient. If Cholesky fails despite the shift, G has L's range.
    _shift_(small, 1e-14)
    L, failed = torch.linalg.cholesky_ex(small)
    L = torch.where((failed == 0)[..., None, None], L, small)
    Y = L @ omega.to(L.dtype)
    any_basis = torch.eye(G.shape[-1], columns, dtype=L.dtype, device=G.device)  # if G is zero
    for _ in range(power_iters):
        Y = small @ _cholesky_qr(Y, any_basis, shift=1e-14)
    # The shift shortens columns; a second pass makes them orthonormal.
    Q = _cholesky_qr(_cholesky_qr(Y, any_basis, shift=1e-14), any_basis)
    if columns > rank:
        Q = Q @ dominant_basis(Q.mT @ small @ Q, rank)
    return Q.to(G.dtype)
