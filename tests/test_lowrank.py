import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svdlib
from svdlib.lowrank import dominant_basis, gram, sketched_basis

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def matrix(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(m, n, sigma, seed=0):
    """A matrix with the given singular values and random singular vectors."""
    U = torch.linalg.qr(matrix((m, len(sigma)), seed)).Q
    V = torch.linalg.qr(matrix((n, len(sigma)), seed + 1)).Q
    return U * sigma @ V.mT


@settings(max_examples=40, deadline=None)
@given(shape=shapes, data=st.data(), seed=st.integers(0, 99))
def test_truncated_is_best(shape, data, seed):
    rank = data.draw(st.integers(1, min(shape)))
    A = matrix(shape, seed)
    svd = svdlib.truncated_svd(A, rank)
    expected = torch.linalg.svdvals(A)
    torch.testing.assert_close(svd.S, expected[:rank])
    error = torch.linalg.matrix_norm(A - svd.matrix())
    torch.testing.assert_close(error, expected[rank:].norm(), atol=1e-10, rtol=1e-10)
    eye = torch.eye(rank, dtype=A.dtype)
    torch.testing.assert_close(svd.U.mT @ svd.U, eye, atol=1e-10, rtol=0)
    torch.testing.assert_close(svd.Vh @ svd.Vh.mT, eye, atol=1e-10, rtol=0)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, data=st.data(), seed=st.integers(0, 99))
def test_randomized_is_orthonormal_and_near_best(shape, data, seed):
    rank = data.draw(st.integers(1, min(shape)))
    A = matrix(shape, seed)
    g = torch.Generator().manual_seed(seed)
    svd = svdlib.randomized_svd(A, rank, oversample=1, power_iters=3, generator=g)
    eye = torch.eye(rank, dtype=A.dtype)
    torch.testing.assert_close(svd.U.mT @ svd.U, eye, atol=1e-10, rtol=0)
    torch.testing.assert_close(svd.Vh @ svd.Vh.mT, eye, atol=1e-10, rtol=0)
    best = torch.linalg.svdvals(A)[rank:].norm()
    assert torch.linalg.matrix_norm(A - svd.matrix()) <= 2 * best + 1e-9


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (3, 60, 80)])
def test_low_rank_matrices_are_found_exactly(shape, generator):
    *batch, m, n = shape
    A = matrix((*batch, m, 5)) @ matrix((*batch, 5, n), 1)
    svd = svdlib.randomized_svd(A, 5, generator=generator)
    torch.testing.assert_close(svd.matrix(), A)


def test_mean_error_keeps_the_bound():
    """Halko, Martinsson and Tropp (2011), Theorem 10.6, without power iterations."""
    sigma = 0.9 ** torch.arange(50, dtype=torch.float64)
    A = decaying(60, 80, sigma)
    k, p = 10, 5
    bound = (1 + (k / (p - 1)) ** 0.5) * sigma[k]
    bound += torch.e * (k + p) ** 0.5 / p * sigma[k:].norm()
    g = torch.Generator().manual_seed(0)
    stacked = A.expand(100, -1, -1)
    svd = svdlib.randomized_svd(stacked, k, oversample=p, power_iters=0, generator=g)
    assert torch.linalg.matrix_norm(stacked - svd.matrix(), 2).mean() <= bound


def test_power_iterations_help():
    A = decaying(60, 80, 1 / torch.arange(1, 51, dtype=torch.float64).sqrt())
    errors = []
    for q in range(3):
        g = torch.Generator().manual_seed(0)
        svd = svdlib.randomized_svd(A, 10, oversample=0, power_iters=q, generator=g)
        errors.append(torch.linalg.matrix_norm(A - svd.matrix()).item())
    assert errors[0] > errors[1] > errors[2]


def test_same_generator_same_factors_and_signs():
    A = matrix((30, 40))
    runs = [
        svdlib.randomized_svd(A, 4, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    U = svdlib.truncated_svd(A, 4).U
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_sketches_of_a_batch_are_independent(generator):
    A = matrix((1, 40, 50)).expand(2, -1, -1)
    svd = svdlib.randomized_svd(A, 3, oversample=0, power_iters=0, generator=generator)
    assert not torch.allclose(svd.S[0], svd.S[1])


def test_small_and_degenerate(generator):
    one = svdlib.randomized_svd(torch.full((1, 1), -2.0), 1, generator=generator)
    torch.testing.assert_close(one.matrix(), torch.full((1, 1), -2.0))
    zero = svdlib.randomized_svd(torch.zeros(30, 20), 3, generator=generator)
    assert zero.matrix().abs().max() == 0
    half = svdlib.randomized_svd(matrix((30, 20)).bfloat16(), 3, generator=generator)
    assert half.U.dtype == torch.bfloat16 and half.rank == 3


def test_gram_bases_agree_with_the_svd(generator):
    A = decaying(15, 80, torch.cat([torch.ones(6), torch.full((9,), 1e-3)]).double())
    A = A.expand(3, -1, -1)
    U = torch.linalg.svd(A).U[..., :6]
    exact = U @ U.mT
    G = gram(A)
    torch.testing.assert_close(G, A @ A.mT)
    for basis in (
        dominant_basis(G, 6),
        dominant_basis(G, 6, start=dominant_basis(G + 1e-3 * matrix(G.shape), 6)),
        sketched_basis(G, 6, 2, 3, generator),
    ):
        torch.testing.assert_close(basis @ basis.mT, exact, atol=1e-6, rtol=0)


def test_gram_sketch_has_the_law_of_the_plain_sketch():
    """Mean error over 2,000 draws, with and without the detour by the Gram matrix."""
    A = decaying(12, 60, 0.7 ** torch.arange(12, dtype=torch.float64)).expand(2000, -1, -1)
    g = torch.Generator().manual_seed(0)
    Q = sketched_basis(gram(A), 4, 2, 0, g)
    ours = torch.linalg.matrix_norm(A - Q @ (Q.mT @ A))
    plain = svdlib.randomized_svd(A, 4, oversample=2, power_iters=0, generator=g)
    theirs = torch.linalg.matrix_norm(A - plain.matrix())
    spread = (ours.var() / 2000 + theirs.var() / 2000).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4 * spread


@pytest.mark.parametrize("method", [svdlib.truncated_svd, svdlib.randomized_svd])
@pytest.mark.parametrize(
    ("A", "rank", "message"),
    [
        (torch.rand(4, 3), 0, "rank must be at least 1, not 0"),
        (torch.rand(4, 3), -1, "rank must be at least 1"),
        (torch.rand(4, 3), 1.5, "whole number"),
        (torch.rand(4, 3), 4, r"at most min\(m, n\) = 3"),
        (torch.rand(4), 1, "non-empty matrices"),
        (torch.rand(0, 3), 1, "non-empty matrices"),
        (torch.ones(4, 3, dtype=torch.int64), 1, "floating-point"),
        ([[1.0]], 1, "floating-point torch tensor"),
        (torch.full((4, 3), torch.nan), 1, "finite"),
        (torch.full((4, 3), torch.inf), 1, "finite"),
    ],
)
def test_bad_input(method, A, rank, message):
    with pytest.raises(ValueError, match=message):
        method(A, rank)


def test_bad_sketch():
    with pytest.raises(ValueError, match="oversample must be at least 0"):
        svdlib.randomized_svd(torch.rand(4, 3), 1, oversample=-1)
    with pytest.raises(ValueError, match="power_iters must be at least 0"):
        svdlib.randomized_svd(torch.rand(4, 3), 1, power_iters=-1)
