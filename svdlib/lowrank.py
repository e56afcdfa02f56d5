"""Truncated and randomized singular value decompositions, batched, on the tensor's own device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svdlib import checks


@dataclass(frozen=True, eq=False)
class SVD:
    """The leading part of a singular value decomposition, A ≈ U diag(S) Vh.

    ``U`` (…, m, k) and ``Vh`` (…, k, n) have orthonormal columns and rows, ``S`` (…, k) falls.
    Unpacks as ``U, S, Vh``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.S, self.Vh))

    @property
    def rank(self) -> int:
        """The number k of terms."""
        return self.S.shape[-1]

    def matrix(self) -> Tensor:
        """The rank-k matrix U diag(S) Vh, of shape (…, m, n)."""
        return (self.U * self.S.unsqueeze(-2)) @ self.Vh


def truncated_svd(A: Tensor, rank: int) -> SVD:
    """The first ``rank`` terms of the SVD: the best approximation of that rank.

    By the Eckart–Young theorem no matrix of rank k is nearer to A than A_k = Σ_{i≤k} σ_i u_i v_iᵀ,
    in the spectral or the Frobenius norm (Algorithm 2 of the paper). The sign of each pair is
    fixed: the entry of u_i that is largest in magnitude is positive.

    Args:
        A: matrices (…, m, n) in floating point.
        rank: the number k of terms, 1 ≤ k ≤ min(m, n).

    Raises:
        ValueError: a rank out of range, an integer, empty or non-finite matrix.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> truncated_svd(A, rank=2).S
    tensor([3., 2.])
    """
    rank = _check(A, rank)
    U, S, Vh = torch.linalg.svd(_work(A), full_matrices=False)
    return _result(U[..., :rank], S[..., :rank], Vh[..., :rank, :], A.dtype)


def randomized_svd(
    A: Tensor,
    rank: int,
    *,
    oversample: int = 10,
    power_iters: int = 2,
    generator: torch.Generator | None = None,
) -> SVD:
    """A nearly best approximation of the given rank, from a random sketch of A's range.

    Stage A of Halko, Martinsson and Tropp (2011, Algorithms 4.1 and 4.4; Algorithm 1 of the
    paper): Y = (A Aᵀ)^q A Ω with an n × (k+p) Gaussian Ω, orthonormalised between products, and
    Q an orthonormal basis of Y's range. Stage B (Algorithm 5.1): the SVD of the small Qᵀ A,
    multiplied by Q and cut to k terms. Without power iterations, their Theorem 10.6 bounds

        E ‖A − Q Qᵀ A‖ ≤ [1 + √(k/(p−1))] σ_{k+1} + (e √(k+p) / p) (Σ_{j>k} σ_j²)^½ .

    Args:
        A: matrices (…, m, n) in floating point; each has a sketch of its own.
        rank: the number k of terms, 1 ≤ k ≤ min(m, n).
        oversample: p ≥ 0, further columns of the sketch. Where k + p reaches min(m, n) the
            sketch would be as large as A, and the result is exact.
        power_iters: q ≥ 0; each shrinks the tail of the spectrum by another factor σ².
        generator: the source of Ω, on A's device; torch's global one if None.

    Raises:
        ValueError: a rank out of range, negative oversampling or power iterations, a generator
            of another device, an integer, empty or non-finite matrix.

    >>> g = torch.Generator().manual_seed(0)
    >>> A = torch.randn(100, 5, generator=g) @ torch.randn(5, 80, generator=g)
    >>> U, S, Vh = randomized_svd(A, rank=5, generator=g)
    >>> torch.allclose(U * S @ Vh, A, atol=1e-4)
    True
    """
    rank = _check(A, rank)
    oversample = checks.positive_int(oversample, "oversample", least=0)
    power_iters = checks.positive_int(power_iters, "power_iters", least=0)
    if generator is not None and generator.device.type != A.device.type:
        raise ValueError(f"the generator is on {generator.device} but the matrix on {A.device}")
    if rank + oversample >= min(A.shape[-2:]):
        return truncated_svd(A, rank)
    work = _work(A)
    Q = range_basis(work, rank + oversample, power_iters, generator)
    U, S, Vh = torch.linalg.svd(Q.mT @ work, full_matrices=False)
    return _result(Q @ U[..., :rank], S[..., :rank], Vh[..., :rank, :], A.dtype)


def range_basis(
    A: Tensor, columns: int, power_iters: int, generator: torch.Generator | None
) -> Tensor:
    """An orthonormal basis Q (…, m, columns) of the range of (A Aᵀ)^q A Ω, Ω Gaussian."""
    shape = (*A.shape[:-2], A.shape[-1], columns)
    omega = torch.randn(shape, dtype=A.dtype, device=A.device, generator=generator)
    Q: Tensor = torch.linalg.qr(A @ omega).Q
    for _ in range(power_iters):
        # Without these QRs the columns align with u_1 and the small directions are lost to rounding.
        Q = torch.linalg.qr(A.mT @ Q).Q
        Q = torch.linalg.qr(A @ Q).Q
    return Q


def _check(A: Tensor, rank: int) -> int:
    if not isinstance(A, Tensor) or not A.dtype.is_floating_point:
        kind = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(f"a floating-point torch tensor is needed, not {kind}")
    if A.ndim < 2 or A.numel() == 0:
        raise ValueError(f"non-empty matrices (…, m, n) are needed, not shape {tuple(A.shape)}")
    rank = checks.positive_int(rank, "rank")
    if rank > min(A.shape[-2:]):
        raise ValueError(
            f"rank must be at most min(m, n) = {min(A.shape[-2:])} for shape "
            f"{tuple(A.shape)}, not {rank}"
        )
    checks.finite(A, "the matrix")
    return rank


def _work(A: Tensor) -> Tensor:
    """A in a type that LAPACK and cuSOLVER know."""
    return A if A.dtype in (torch.float32, torch.float64) else A.float()


def _result(U: Tensor, S: Tensor, Vh: Tensor, dtype: torch.dtype) -> SVD:
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return SVD((U * sign).to(dtype), S.to(dtype), (Vh * sign.mT).to(dtype))


def randomized_basis(
    A: Tensor, rank: int, oversample: int, power_iters: int, generator: torch.Generator | None
) -> Tensor:
    """The randomized SVD's left singular vectors U_k (…, m, k) of A, from its sketch."""
    Q = range_basis(A, rank + oversample, power_iters, generator)
    return Q @ dominant_basis(gram(Q.mT @ A), rank)


def gram(A: Tensor) -> Tensor:
    """The Gram matrices A Aᵀ (…, m, m) of A (…, m, n).

    >>> gram(torch.tensor([[3.0, 4.0]]))
    tensor([[25.]])
    """
    m = A.shape[-2]
    # MKL's batched product of 15 rows takes three times as long as that of 16.
    A = torch.nn.functional.pad(A, (0, 0, 0, -m % 8)) if A.ndim > 2 and m < 64 else A
    return (A @ A.mT)[..., :m, :m]


def dominant_basis(G: Tensor, rank: int, start: Tensor | None = None) -> Tensor:
    """The leading left singular vectors U_k (…, m, k) of A, from its Gram matrix G = A Aᵀ.

    With ``start``, an orthonormal (…, m, k) basis that was dominant before A changed a little,
    one step of subspace iteration replaces the eigenvectors: its error shrinks by the factor
    (σ_{k+1}/σ_k)², which after a small change of a rank-k matrix is of the order of the square
    of that change, and nothing has to wait for the device.

    >>> dominant_basis(torch.diag(torch.tensor([4.0, 1.0])), rank=1).abs()
    tensor([[1.],
            [0.]])
    """
    if start is None:
        return torch.linalg.eigh(G).eigenvectors[..., -rank:]
    return torch.linalg.qr(G @ start).Q


def sketched_basis(
    G: Tensor,
    rank: int,
    oversample: int,
    power_iters: int,
    generator: torch.Generator | None,
    start: Tensor | None = None,
) -> Tensor:
    """The randomized SVD's left singular vectors U_k (…, m, k) of A, from its Gram matrix G = A Aᵀ.

    The columns of A Ω are independent normal vectors with covariance G, and so are those of
    L Ω' where G = L Lᵀ and Ω' is m × (k+p). So the sketch, the power iterations G^q and the SVD
    of Qᵀ A need the m × m matrix alone, and m (k+p) random numbers instead of n (k+p).
    ``start`` is as in `dominant_basis`, for the cut from k+p to k columns.

    >>> G = torch.diag(torch.tensor([4.0, 1.0, 0.0]))
    >>> sketched_basis(G, 1, 0, 30, torch.Generator().manual_seed(0)).abs().round()
    tensor([[1.],
            [0.],
            [0.]])
    """
    small = G.double()
    # A projected matrix is rank-deficient: the shift keeps the Cholesky factor real.
    shift = 1e-14 * small.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(G.shape[-1], dtype=small.dtype, device=G.device)
    L = torch.linalg.cholesky_ex(small + shift * eye).L
    shape = (*G.shape[:-1], rank + oversample)
    Y = L @ torch.randn(shape, dtype=small.dtype, device=G.device, generator=generator)
    for _ in range(power_iters):
        Y = small @ torch.linalg.qr(Y).Q
    Q: Tensor = torch.linalg.qr(Y).Q
    if oversample:
        first = None if start is None else Q.mT @ start.double()
        Q = Q @ dominant_basis(Q.mT @ small @ Q, rank, first)
    return Q.to(G.dtype)
