"""A matrix's dominant left singular subspace, followed while the matrix changes a little."""

from __future__ import annotations

import torch
from torch import Tensor

TURN, UPSET = 0.5, 30.0  # the largest norms of U's change in a step, if exact and if random
SHIFT = 1e-7  # of the trace, added before a Cholesky factorization
LEAST = 1e-36  # added to what is divided by, which may be zero


def turn_(U: Tensor, V: Tensor, H: Tensor, X: Tensor) -> None:
    """Turn a subspace toward the dominant left singular subspace of W, in place.

    U and V (S, m, k) are dual bases of the subspace, UᵀV = I, and nearly orthonormal. With
    C = UᵀW, the matrix is W = V C + N, where UᵀN = 0. Enough are H = C Cᵀ (S, k, k) and X = N Cᵀ
    (S, m, k): one step of orthogonal iteration (Golub and Van Loan, section 7.3.2) leads from U to

        range(W WᵀU) = range(W Cᵀ) = range(V H + X) = range(V + E),   E = X H⁻¹.

    The small E is not rounded beside V. U + E spans nearly the same and stays dual to the old V, so
    that the new C is the old one plus a small product. The subspace's error falls by
    (σ_{k+1}/σ_k)², without waiting for the device. One step of Newton and Schulz makes V + E dual
    to the new U; it converges as the norm of E is kept below TURN.
    """
    L = _cholesky(H, SHIFT, LEAST)
    E = _limited(_solve(_solve_transposed(X, L), L), TURN)
    F = V + E
    U.add_(E)
    torch.baddbmm(F, F, torch.bmm(U.mT, F), beta=2, alpha=-1, out=V)


def turn_randomly_(
    U: Tensor, V: Tensor, H: Tensor, X: Tensor, NN: Tensor, sketch: Tensor, power_iters: int
) -> Tensor:
    """Turn as `turn_` to the subspace of a randomized SVD of W; returns the change of U.

    NN is N Nᵀ (S, m, m), the ``sketch`` a `small_sketch`. The subspace may turn far,
    now and then by almost a right angle, whose tangent UPSET bounds.
    """
    L = _cholesky(H, SHIFT, LEAST)
    E = _solve_transposed(X, L)
    E = E + _missed(E, L, NN, sketch, power_iters)
    E = torch.baddbmm(E, V, torch.bmm(U.mT, E), alpha=-1)  # rounding
    change = _limited(torch.bmm(_solve(E, L), torch.bmm(U.mT, U)), UPSET)
    U.add_(change)
    L = _cholesky(torch.bmm(U.mT, U))
    V.copy_(_solve(_solve_transposed(U, L), L))
    return change


def _missed(F: Tensor, L: Tensor, NN: Tensor, sketch: Tensor, power_iters: int) -> Tensor:
    """What turns V + F L⁻¹ to the subspace of a randomized SVD, times L, to first order.

    W = (V + F L⁻¹) C + R, where R Cᵀ = 0. So for a Gaussian Ω (n, k + p) the sketch W Ω is
    (V + F L⁻¹) L Ω₁ + K Ω₂ with R Rᵀ = N Nᵀ − F Fᵀ = K Kᵀ, and independent Gaussian Ω₁ (k, k + p)
    and Ω₂ (m, k + p). Rotate the columns so that Ω₁ = [T 0] and Ω₂ = [Ω₃ Ω₄]: the range is that of

        V + F L⁻¹ + K Ω₃ T⁻¹ L⁻¹   and   B = K Ω₄.

    (Ω₃T⁻¹ is Ω₂Ω₁⁺ in Halko, Martinsson and Tropp 2011, Theorem 9.1.) The best rank-k matrix in
    that range misses nothing in the directions of B. A power iteration multiplies by W Wᵀ.
    """
    k = L.shape[-1]
    RR = torch.baddbmm(NN, F, F.mT, alpha=-1)
    Y = torch.bmm(_cholesky(RR, 100 * SHIFT), sketch)
    missed, B = Y[..., :k], Y[..., k:]
    for _ in range(power_iters):
        turned = _solve(F + missed, L)
        missed, B = _solve_transposed(torch.bmm(RR, turned), L), torch.bmm(RR, B)
    if B.shape[-1]:
        Q = _solve_transposed(B, _cholesky(torch.bmm(B.mT, B), SHIFT, LEAST))
        missed = torch.baddbmm(missed, Q, torch.bmm(Q.mT, missed), alpha=-1)
    return missed


def small_sketch(omega: Tensor, k: int) -> Tensor:
    """[Ω₃T⁻¹ Ω₄] (…, m, k + p) of `_missed` from a Gaussian Ω (…, k + m, k + p).

    Householder's reduction of its upper part, Ω₁, to [T 0], T (k, k) lower triangular, leaves
    normal numbers below T's diagonal and on it the norms of independent normal vectors with k + p,
    k + p − 1, … entries (Bartlett 1933), and the lower part as Gaussian as it was.
    """
    upper, lower = omega[..., :k, :], omega[..., k:, :]
    T = upper[..., :k].tril(-1) + torch.diag_embed(torch.linalg.vector_norm(upper.triu(), dim=-1))
    tilt = _solve(lower[..., :k], T)
    return torch.cat([tilt, lower[..., k:]], -1)


def _limited(E: Tensor, norm: float) -> Tensor:
    return E.mul_((norm / torch.linalg.vector_norm(E, dim=(1, 2), keepdim=True)).clamp_(max=1))


def _solve(X: Tensor, L: Tensor) -> Tensor:
    """X L⁻¹."""
    return torch.linalg.solve_triangular(L, X, upper=False, left=False)


def _solve_transposed(X: Tensor, L: Tensor) -> Tensor:
    """X L⁻ᵀ."""
    return torch.linalg.solve_triangular(L.mT, X, upper=True, left=False)


def _cholesky(G: Tensor, shift: float = 0.0, least: float = 0.0) -> Tensor:
    """L with L Lᵀ = G plus a part of its trace, and the ``least``, on the diagonal."""
    if shift:
        diagonal = (G := G.clone()).diagonal(dim1=-2, dim2=-1)
        diagonal.add_(diagonal.sum(-1, keepdim=True), alpha=shift).add_(least)
    return torch.linalg.cholesky_ex(G)[0]
