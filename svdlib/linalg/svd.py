"""Truncated and randomized singular value decompositions, batched, on the tensor's own device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from svdlib import checks, threads
from svdlib.linalg.bases import normalized, orthonormal, range_basis
from svdlib.linalg.operators import Operator, sketched_operator

METHODS = ("rsvd", "truncsvd")
OVERSAMPLE, POWER_ITERS = 10, 2  # generous, after Halko, Martinsson and Tropp
# Norms whose squares are no problem in these types; other matrices are scaled first.
MODERATE = {torch.float32: (1e-10, 1e15), torch.float64: (1e-100, 1e100)}
BLOCK = 2**22  # elements of A in each block of a residual
Factors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class SVD:
    """The leading part of a singular value decomposition, A ≈ U diag(S) Vh.

    ``U`` (…, m, k) and ``Vh`` (…, k, n) have orthonormal columns and rows; ``S`` (…, k) descends.
    ``error`` (…), in float64, is the Frobenius norm of A − U diag(S) Vh before any rounding to
    half precision. Unpacks as ``U, S, Vh``.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: Tensor
    source: Tensor | None = None  # A, if it required a gradient

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.S, self.Vh))

    @property
    def rank(self) -> int:
        """The number k of terms."""
        return self.S.shape[-1]

    def matrix(self) -> Tensor:
        """The rank-k matrix U diag(S) Vh (…, m, n); in half precision, rounded once.

        Unlike that of U or Vh, its gradient with respect to A is finite even if singular values
        below the k-th are zero or equal. For the gradient G of the rank-k matrix, and U_2 and V_2
        the singular vectors of A − A_k, first-order perturbation gives

            G − (I − UUᵀ) G (I − VVᵀ) + U (c ∘ M + d ∘ Nᵀ) V_2ᵀ + U_2 (cᵀ ∘ N + dᵀ ∘ Mᵀ) Vᵀ,

        M = Uᵀ G V_2, N = U_2ᵀ G V, c_ij = σ_j² / (σ_i² − σ_j²), d_ij = σ_i σ_j / (σ_i² − σ_j²),
        i ≤ k < j.
        """
        if self.source is not None and torch.is_grad_enabled():
            return cast(Tensor, _RankK.apply(self.source, *(factor.detach() for factor in self)))
        U, S, Vh = _work(self.U), _work(self.S).unsqueeze(-2), _work(self.Vh)
        return ((U * S) @ Vh).to(self.U.dtype)

    @torch.no_grad()
    def spectral_error(
        self, A: Tensor, *, power_iters: int = 4, generator: torch.Generator | None = None
    ) -> Tensor:
        """An upper bound (…) of the spectral norm of A − U diag(S) Vh, with probability 1 − 1e-10.

        Halko, Martinsson and Tropp (2011), Lemma 4.1: for Gaussian ω_1 … ω_10,
        ‖M‖ ≤ 10 √(2/π) max_i ‖M ω_i‖ except with probability 10⁻¹⁰. Here M = (E Eᵀ)^q E, of norm
        ‖E‖^(2q+1), for the error E, q = ``power_iters``, and ω by ``generator``, on A's device; at
        q = 4 the bound is within a factor of about two.
        """
        q = checks.positive_int(power_iters, "power_iters", least=0)
        shape = (*self.U.shape[:-1], self.Vh.shape[-1])
        if A.shape != shape:
            raise ValueError(f"this is the SVD of a matrix of shape {shape}, not {tuple(A.shape)}")
        A, U, S, Vh = _work(A), _work(self.U), _work(self.S).unsqueeze(-1), _work(self.Vh)
        scale = _powers(A)
        A, S = A * scale, S * scale
        Y = _gaussian(A, 10, generator)
        Y = A @ Y - U @ (S * (Vh @ Y))
        logarithm = torch.zeros(A.shape[:-2], dtype=torch.float64, device=A.device)
        for _ in range(q):
            size = torch.linalg.matrix_norm(Y, keepdim=True)
            logarithm += size.double().log()[..., 0, 0]
            Y = Y / size.clamp(min=torch.finfo(Y.dtype).tiny)
            Y = A.mT @ Y - Vh.mT @ (S * (U.mT @ Y))
            Y = A @ Y - U @ (S * (Vh @ Y))
        largest = torch.linalg.vector_norm(Y, dim=-2).amax(-1).double()
        logarithm += (10 * math.sqrt(2 / math.pi) * largest).log()
        return (logarithm / (2 * q + 1)).exp() / scale.double()[..., 0, 0]


class _RankK(torch.autograd.Function):
    """The rank-k matrix as a function of A, see `SVD.matrix`."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
        ctx.save_for_backward(A, U, S, Vh)
        return SVD(U, S, Vh, S).matrix()

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None, None]:
        dtype, (A, U, S, Vh), k = G.dtype, ctx.saved_tensors, ctx.saved_tensors[2].shape[-1]
        A, U, S, Vh, G = (part.double() for part in (A, U, S, Vh, G))
        if torch.is_grad_enabled():  # second derivatives, by torch's own first ones
            U, S, Vh = torch.linalg.svd(A, full_matrices=False)
            (U, U2), (S, S2), (Vh, Vh2) = (
                part.tensor_split([k], dim) for part, dim in ((U, -1), (S, -1), (Vh, -2))
            )
        else:
            U2, S2, Vh2 = torch.linalg.svd(A - (U * S.unsqueeze(-2)) @ Vh, full_matrices=False)
        outside = G - U @ (U.mT @ G)
        gradient = G - (outside - (outside @ Vh.mT) @ Vh)
        first, second = S.unsqueeze(-1), S2.unsqueeze(-2)
        gap = first.square() - second.square()
        # If σ_k is σ_{k+1} the rank-k matrix has no derivative; the result is kept finite.
        smallest = torch.finfo(torch.float64).eps * S[..., :1, None].square()
        gap = torch.where(gap > smallest, gap, torch.inf)
        c, d = second.square() / gap, first * second / gap
        M, N = U.mT @ G @ Vh2.mT, U2.mT @ G @ Vh.mT
        gradient = gradient + U @ (c * M + d * N.mT) @ Vh2 + U2 @ (c.mT * N + d.mT * M.mT) @ Vh
        return gradient.to(dtype), None, None, None


@threads.plain()
def truncated_svd(A: Tensor, rank: int) -> SVD:
    """The first ``rank`` terms of the SVD: the best approximation of that rank.

    By the Eckart–Young theorem no matrix of rank k is nearer to A than A_k = Σ_{i≤k} σ_i u_i v_iᵀ,
    in the spectral or the Frobenius norm (Algorithm 2 of the paper). The entry of each u_i that is
    largest in magnitude is positive. Singular values of skinny float32 matrices, by a Gram matrix
    in float64, are within 1e-6 σ_1 of LAPACK's.

    Args:
        A: matrices (…, m, n) in floating point.
        rank: the number k of terms, 1 ≤ k ≤ min(m, n).

    Raises:
        ValueError: a rank out of range, not a dense, real, finite matrix, or an overflow of A's type.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> truncated_svd(A, rank=2).S
    tensor([3., 2.])
    """
    _check(A)
    rank = checks.rank(rank, A.shape)
    work, scale, norm = _moderate(A)
    return _rounded(_truncated(work, rank, norm), scale, A)


@threads.plain()
def randomized_svd(
    A: Tensor | Operator,
    rank: int | None = None,
    *,
    tol: float | None = None,
    relative: bool = False,
    oversample: int = OVERSAMPLE,
    power_iters: int = POWER_ITERS,
    generator: torch.Generator | None = None,
) -> SVD:
    """A nearly best approximation of a given rank, or to a given error, from a random sketch.

    Stage A of Halko, Martinsson and Tropp (2011, Algorithms 4.1 and 4.4; Algorithm 1 of the
    paper): Y = (A Aᵀ)^q A Ω with an n × (k+p) Gaussian Ω, normalized between products, and
    Q an orthonormal basis of Y's range. Stage B (Algorithm 5.1): the SVD of the small Qᵀ A,
    multiplied by Q and truncated to k terms. Without power iterations, their Theorem 10.6 bounds

        E ‖A − Q Qᵀ A‖ ≤ [1 + √(k/(p−1))] σ_{k+1} + (e √(k+p) / p) (Σ_{j>k} σ_j²)^½ .

    With ``tol`` it solves the fixed-precision problem ‖A − U diag(S) Vh‖_F ≤ tol instead (Yu, Gu
    and Li 2018, Algorithm 2, randQB_EI): Q grows by 32 columns until ‖A‖² − ‖Qᵀ A‖² is small.

    Args:
        A: matrices (…, m, n) in floating point, each with a sketch of its own. Or, with a rank, a
            sparse matrix or anything with ``shape`` (m, n), ``A @ X`` and ``A.mT @ Y``, whose error
            is an estimate, good to about an eighth.
        rank: the number k of terms, 1 ≤ k ≤ min(m, n).
        tol: the largest admissible Frobenius error of one matrix, instead of a rank.
        relative: whether ``tol`` is a fraction of A's Frobenius norm.
        oversample: p ≥ 0; if k + p reaches min(m, n) the result is exact. Not used with ``tol``.
        power_iters: q ≥ 0; each shrinks the tail of the spectrum by another factor σ².
        generator: the source of Ω, on A's device.

    Raises:
        ValueError: as `truncated_svd`; both or neither of rank and tol, a tol below what A's type
            can certify or for an operator, a number out of range, a generator of another device.

    >>> A = torch.randn(100, 5) @ torch.randn(5, 80)
    >>> randomized_svd(A, tol=1e-2, relative=True).rank
    5
    """
    if (rank is None) == (tol is None):
        raise ValueError(f"give either a rank or a tol, not rank={rank!r} and tol={tol!r}")
    oversample = checks.positive_int(oversample, "oversample", least=0)
    power_iters = checks.positive_int(power_iters, "power_iters", least=0)
    if not isinstance(A, Tensor) or A.layout is not torch.strided:
        if rank is None:
            raise ValueError("a sparse matrix or an operator takes a rank, not a tol")
        operator = cast(Operator, A)
        return SVD(*sketched_operator(operator, rank, oversample, power_iters, generator))
    _check(A)
    rank = None if rank is None else checks.rank(rank, A.shape)
    checks.generator(generator, A.device)
    work, scale, norm = _moderate(A)
    if rank is None:
        limit = _limit(work, tol, relative, norm, scale)
        svd = _within(work, limit, norm, power_iters, generator)
    elif rank + oversample >= min(A.shape[-2:]):
        svd = _truncated(work, rank, norm)
    else:
        factors = _of_wide(_sketched, work, rank, rank + oversample, power_iters, generator)
        svd = _result(work, factors, norm)
    return _rounded(svd, scale, A)


def _of_wide(decompose: Callable[..., Factors | None], A: Tensor, *arguments: Any) -> Any:
    """The factors of A from ``decompose``, which is given Aᵀ if A has more rows than columns."""
    if A.shape[-2] <= A.shape[-1]:
        return decompose(A, *arguments)
    factors = decompose(A.mT, *arguments)
    return factors and (factors[2].mT, factors[1], factors[0].mT)


def _sketched(
    A: Tensor, rank: int, columns: int, power_iters: int, generator: torch.Generator | None
) -> Factors:
    Q = range_basis(A, _gaussian(A, columns, generator), power_iters)
    B = Q.mT @ A
    U, S, Vh = _by_gram(B, rank) or _svd_of_wide(B)
    return Q @ U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def _gaussian(A: Tensor, columns: int, generator: torch.Generator | None) -> Tensor:
    shape = (*A.shape[:-2], A.shape[-1], columns)
    return torch.randn(shape, dtype=A.dtype, device=A.device, generator=generator)


def _truncated(A: Tensor, rank: int, norm: Tensor) -> SVD:
    short, long = sorted(A.shape[-2:])
    factors = _of_wide(_by_gram, A, rank) if 2 * short <= long or short <= 64 else None
    if factors is None and 4 * short <= long:
        factors = _of_wide(_svd_of_wide, A)
    U, S, Vh = factors or torch.linalg.svd(A, full_matrices=False)
    return _result(A, (U[..., :rank], S[..., :rank], Vh[..., :rank, :]), norm)


def _by_gram(A: Tensor, rank: int) -> Factors | None:
    """The leading factors from A Aᵀ in float64, or None if they would not be accurate."""
    if A.requires_grad or A.dtype == torch.float64:
        return None
    wide = A.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    squares, U = squares[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)
    lowest = float((squares[..., -1] / squares[..., 0]).nan_to_num().min())
    if lowest <= 1e-8:
        return None
    S = squares.sqrt()
    # A product in A's type would be off by σ_1/σ_k roundings, and takes half the time.
    right = wide if lowest < 1e-2 else A
    Vh = (U / S.unsqueeze(-2)).mT.to(right.dtype) @ right
    return U.to(A.dtype), S.to(A.dtype), Vh.to(A.dtype)


def _svd_of_wide(B: Tensor) -> Factors:
    """The SVD of B (…, l, n), l ≤ n, from that of an l × l matrix: B = (B C) Cᵀ, C orthonormal."""
    C = orthonormal(B.mT)
    U, S, Wh = torch.linalg.svd(B @ C)
    return U, S, Wh @ C.mT


def _within(
    A: Tensor, tol: float, norm: Tensor, power_iters: int, generator: torch.Generator | None
) -> SVD:
    """The fixed-precision problem: A − Q B is never formed until it seems small enough."""
    m, n = A.shape
    Q, B = A.new_empty(m, 0), A.new_empty(0, n)
    square_error = float(norm) ** 2
    while square_error > tol**2 and Q.shape[1] < min(m, n):
        Y = _gaussian(A, min(32, m - Q.shape[1], n - Q.shape[1]), generator)
        Y = A @ Y - Q @ (B @ Y)
        for _ in range(power_iters):
            Y, _ = normalized(Y)
            Z, _ = normalized(A.mT @ Y - B.mT @ (Q.mT @ Y))
            Y = A @ Z - Q @ (B @ Z)
        block = orthonormal(Y)
        block = orthonormal(block - Q @ (Q.mT @ block))
        Q, B = torch.cat([Q, block], 1), torch.cat([B, block.mT @ A])
        square_error = float(norm) ** 2 - float(_norm(B)) ** 2
        if square_error <= tol**2:
            square_error = float(_residual(A, Q, B)) ** 2
    if not Q.shape[1]:
        return _truncated(A, 1, norm)
    U, S, Vh = _svd_of_wide(B)
    # Discarding the terms after the r-th adds their squares to the error.
    errors = square_error + S.double().square().flip(0).cumsum(0).flip(0)
    rank = max(1, int((errors > tol**2).sum()))
    return _result(A, (Q @ U[:, :rank], S[:rank], Vh[:rank]), norm)


def _norm(A: Tensor) -> Tensor:
    """Frobenius norms (…) in float64."""
    rows = torch.linalg.vector_norm(A.detach(), dim=-1)
    return cast(Tensor, torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64))


def _moderate(A: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """A in a type to work in, times powers of two where its squares would not fit; they; norms."""
    work = _work(A)
    norm = _norm(work)
    low, high = MODERATE[work.dtype]
    if ((norm > low) & (norm < high)).all():
        return work, None, norm
    checks.finite(A, "the matrix")
    scale = _powers(work)
    work = work * scale
    return work, scale, _norm(work)


def _powers(A: Tensor) -> Tensor:
    """Powers of two (…, 1, 1) that bring A's largest entries near 1, as far as possible."""
    peak = A.detach().abs().amax((-2, -1), keepdim=True)
    limit = round(-math.log2(torch.finfo(A.dtype).tiny))  # 126 of float32, 1022 of float64
    exponent = peak.double().frexp().exponent.clamp(-limit, limit)
    return torch.where(peak > 0, torch.exp2(-exponent.double()), 1.0).to(A.dtype)


def _rounded(svd: SVD, scale: Tensor | None, A: Tensor) -> SVD:
    """The decomposition without the powers of two, and in the matrix's own type."""
    source = A if A.requires_grad and torch.is_grad_enabled() else None
    S, error = svd.S, svd.error
    if scale is not None:
        S, error = S / scale[..., 0], error / scale.double()[..., 0, 0]
    S = S.to(A.dtype)
    if not S.isfinite().all():
        raise ValueError(f"the norm overflows {A.dtype}; scale A down, or give it a wider type")
    return SVD(svd.U.to(A.dtype), S, svd.Vh.to(A.dtype), error, source)


def _residual(A: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Frobenius norms (…) of A − left @ right, formed a block of rows at a time."""
    rows = max(1, BLOCK * A.shape[-2] // A.numel())
    blocks = zip(A.split(rows, -2), left.split(rows, -2), strict=True)
    norms = [_norm(part - factor @ right) for part, factor in blocks]
    return torch.stack(norms).square().sum(0).sqrt()


def _check(A: Tensor) -> None:
    if not isinstance(A, Tensor) or not A.dtype.is_floating_point:
        kind = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(f"a floating-point torch tensor is needed, not {kind}")
    if A.layout != torch.strided:
        raise ValueError(f"a dense matrix is needed, not layout {A.layout}; see A.to_dense()")
    if A.is_meta:
        raise ValueError("the matrix is on device 'meta', where it has no numbers")
    if torch._C._functorch.is_functorch_wrapped_tensor(A):
        raise ValueError(
            "torch.func's transforms, such as vmap and jacrev, can't look into a decomposition; "
            "give a batch (…, m, n), and use torch.autograd"
        )
    if A.ndim < 2 or A.numel() == 0:
        raise ValueError(f"non-empty matrices (…, m, n) are needed, not shape {tuple(A.shape)}")


def _limit(A: Tensor, tol: object, relative: bool, norms: Tensor, scale: Tensor | None) -> float:
    """The tolerance in units of the scaled matrix, if A's type can certify it."""
    if A.ndim > 2:
        raise ValueError(f"tol takes one matrix (m, n), not a batch of shape {tuple(A.shape)}")
    if not (tol := checks.number(tol, "tol")) > 0:
        raise ValueError(f"tol must be positive, not {tol}")
    norm, unit = float(norms), 1.0 if scale is None else float(scale)
    tol *= norm if relative else unit
    # Yu, Gu and Li (2018), Theorem 3: below this ‖A‖² − ‖B‖² is rounding.
    if tol < (smallest := math.sqrt(4 * torch.finfo(A.dtype).eps) * norm):
        limit = f"the smallest is {smallest / unit:.3g} ({smallest / norm:.2g} of the norm)"
        raise ValueError(f"tol {tol / unit:.3g} can't be certified in {A.dtype}; {limit}")
    return tol


def _work(A: Tensor) -> Tensor:
    """A in a type that LAPACK and cuSOLVER know."""
    return A if A.dtype in (torch.float32, torch.float64) else A.float()


def _result(A: Tensor, factors: Factors, norm: Tensor) -> SVD:
    """The SVD with fixed signs and its error: ‖A − A_k‖² = ‖A‖² − Σ σ_i² for a projection of A."""
    U, S, Vh = factors
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    if (signs < 0).any():
        U, Vh = U * signs, Vh * signs.mT
    with torch.no_grad():
        square = norm.square() - S.double().square().sum(-1)
        error = square.clamp(min=0).sqrt()
        # A small difference of large squares is mostly rounding.
        if (square < 1e4 * torch.finfo(A.dtype).eps * norm.square()).any():
            error = _residual(A, U * S.unsqueeze(-2), Vh)
    return SVD(U, S, Vh, error)
