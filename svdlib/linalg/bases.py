"""Orthonormal bases of the ranges that matter, by matrix products as far as these are stable."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis (…, m, k) of the range of Y (…, m, k), m ≥ k, by Cholesky QR twice.

    With YᵀY = RᵀR the columns of Q = Y R⁻¹ are orthonormal up to κ(Y) roundings, and a second
    pass makes that one rounding (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya 2015). All of it
    is matrix products. The Gram matrix is summed in float64, so that float32 columns may have
    κ(Y) up to 1e7 (Yamazaki, Tomov and Dongarra 2015). Where Cholesky fails, or the first pass
    leaves columns far from orthonormal, Householder's QR takes over; also where a gradient is
    asked for.

    >>> Q = orthonormal(torch.tensor([[3.0, 1.0], [4.0, 1.0], [0.0, 1.0]]))
    >>> torch.allclose(Q.T @ Q, torch.eye(2), atol=1e-6)
    True
    """
    Q, _ = normalized(Y)
    Q, spread = normalized(Q)
    return Q if spread < 2 else torch.linalg.qr(Y).Q


def normalized(Y: Tensor) -> tuple[Tensor, float]:
    """Columns with the range of Y (…, m, k), roughly orthonormal, and how unlike Y's were.

    One pass of Cholesky QR, enough between power iterations; Householder's QR where it fails.

    Returns:
        the columns (…, m, k), and the ratio of R's largest diagonal entry to its smallest (the
        largest of a batch): a lower bound of κ(Y), infinite where Householder took over.

    >>> normalized(torch.diag(torch.tensor([4.0, 1.0])))
    (tensor([[1., 0.],
            [0., 1.]]), 4.0)
    """
    if not Y.requires_grad:
        wide = Y.double()
        R, failed = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
        if not bool(failed.any()):
            diagonal = R.diagonal(dim1=-2, dim2=-1)
            spread = float((diagonal.amax(-1) / diagonal.amin(-1)).max())
            eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
            return Y @ torch.linalg.solve_triangular(R, eye, upper=True).to(Y.dtype), spread
    return torch.linalg.qr(Y).Q, math.inf


def range_basis(A: Tensor, omega: Tensor, power_iters: int) -> Tensor:
    """An orthonormal basis Q (…, m, l) of the range of (A Aᵀ)^q A Ω, with a Gaussian Ω (…, n, l).

    Two products without normalising between them square the spread of the columns, which must
    stay under 1/√ε or small directions are rounded away. Where the first sketch shows that it
    would not, columns are normalised after every product.

    >>> A = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> range_basis(A, torch.ones(3, 1), power_iters=0).abs()
    tensor([[1.],
            [0.]])
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


def randomized_basis(A: Tensor, omega: Tensor, rank: int, power_iters: int) -> Tensor:
    """The randomized SVD's left singular vectors U_k (…, m, k) of A, from its sketch A Ω."""
    Q = range_basis(A, omega, power_iters)
    return Q @ dominant_basis(gram(Q.mT @ A), rank)


def gram(A: Tensor) -> Tensor:
    """The Gram matrices A Aᵀ (…, m, m) of A (…, m, n).

    >>> gram(torch.tensor([[3.0, 4.0]]))
    tensor([[25.]])
    """
    m = A.shape[-2]
    if A.ndim > 2 and m < 64:
        A = F.pad(A, (0, 0, 0, -m % 8))  # see `taller`
    return (A @ A.mT)[..., :m, :m]


def taller(A: Tensor) -> Tensor:
    """A (S, m, n) with what lies behind its rows, up to a multiple of 8, if there is room.

    MKL's batched product of 15 rows takes three times as long as that of 16, whatever the 16th
    holds.

    >>> taller(torch.zeros(2, 16, 30)[:, :15, :9]).shape
    torch.Size([2, 16, 9])
    """
    stacks, m, n = A.shape
    size, stride = (stacks, m + -m % 8, n), A.stride()
    ends = [(number - 1) * step for number, step in zip(size, stride, strict=True)]
    room = (A.storage_offset() + sum(ends) + 1) * A.itemsize <= A.untyped_storage().nbytes()
    if m < 64 and room and stride[0] >= size[1] * stride[1] and stride[1] >= n:
        return A.as_strided(size, stride)
    return A


def dominant_basis(G: Tensor, rank: int, start: Tensor | None = None) -> Tensor:
    """The leading left singular vectors U_k (…, m, k) of A, from its Gram matrix G = A Aᵀ.

    With ``start``, such a basis from before A changed a little, one step of orthogonal iteration
    replaces the eigenvectors (Golub and Van Loan, section 7.3.2): its error shrinks by the factor
    (σ_{k+1}/σ_k)², which after a small change of a rank-k matrix is of the order of the square
    of that change, and nothing has to wait for the device. The columns come in the order of
    their singular values, the largest first, so that those of G U are nearly orthogonal, however
    unlike in length, and Cholesky QR is as good as Householder's.

    >>> dominant_basis(torch.diag(torch.tensor([4.0, 1.0])), rank=1).abs()
    tensor([[1.],
            [0.]])
    """
    if start is None:
        return torch.linalg.eigh(G).eigenvectors[..., -rank:].flip(-1)
    return cholesky_qr((G @ start).double(), otherwise=start).to(G.dtype)


def cholesky_qr(Y: Tensor, otherwise: Tensor, shift: float = 0.0) -> Tensor:
    """Y R⁻¹ with YᵀY = RᵀR, in float64; where Cholesky fails, ``otherwise``.

    Orthonormal to κ² roundings, κ being the condition of Y with its columns scaled alike (Demmel
    1989). Whether it failed is decided on the device: nothing waits for it. A ``shift``, a part
    of YᵀY's trace that is added to its diagonal, keeps it from failing, and shortens columns only
    in directions as small as its root (Fukaya et al. 2020).

    >>> Y = torch.diag(torch.tensor([4.0, 1.0])).double()
    >>> cholesky_qr(Y, otherwise=Y)
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)
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


def sketched_basis(
    G: Tensor, omega: Tensor, rank: int, power_iters: int, start: Tensor | None = None
) -> Tensor:
    """The randomized SVD's left singular vectors U_k (…, m, k) of A, from its Gram matrix G = A Aᵀ.

    The columns of A Ω are independent normal vectors with covariance G, and so are those of
    L Ω where G = L Lᵀ and Ω (…, m, k+p) is Gaussian. So the sketch, the power iterations G^q and
    the SVD of Qᵀ A need the m × m matrix alone, and m (k+p) random numbers instead of n (k+p).
    ``start`` is as in `dominant_basis`, for the cut from k+p to k columns.

    >>> G = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
    >>> sketched_basis(G, torch.ones(3, 1), rank=1, power_iters=30).abs().round()
    tensor([[1.],
            [0.],
            [0.]])
    """
    small, columns = G.to(torch.float64, copy=True), omega.shape[-1]
    # A projected matrix is rank-deficient: the shifts help Cholesky on. Where roundings of G all
    # the same make it fail, G itself takes the place of L: columns of the same range.
    _shift_(small, 1e-14)
    L, failed = torch.linalg.cholesky_ex(small)
    L = torch.where((failed == 0)[..., None, None], L, small)
    Y = L @ omega.to(L.dtype)
    any_basis = torch.eye(G.shape[-1], columns, dtype=L.dtype, device=G.device)  # if G is zero
    for _ in range(power_iters):
        Y = small @ cholesky_qr(Y, any_basis, shift=1e-14)
    # The shift shortens columns; a second pass makes them orthonormal.
    Q = cholesky_qr(cholesky_qr(Y, any_basis, shift=1e-14), any_basis)
    if columns > rank:
        first = None if start is None else Q.mT @ start.double()
        Q = Q @ dominant_basis(Q.mT @ small @ Q, rank, first)
    return Q.to(G.dtype)
