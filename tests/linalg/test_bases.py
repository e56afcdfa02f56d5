import pytest
import torch
from matrices import decaying, matrix, rounding

import svdlib
from svdlib.linalg.bases import (
    dominant_basis,
    gram,
    normalized,
    orthonormal,
    range_basis,
    sketched_basis,
)


def spread(m, k, smallest, dtype):
    sigma = torch.logspace(0, smallest, k, dtype=torch.float64)
    return decaying(m, k, sigma).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [0, -3, -6, -8, -12])
def test_bases_are_orthonormal_and_span_the_same(dtype, smallest):
    Y = spread(300, 20, smallest, dtype)
    Q = orthonormal(Y)
    eye = torch.eye(20, dtype=dtype)
    torch.testing.assert_close(Q.mT @ Q, eye, atol=rounding(Y), rtol=0)
    norm = torch.linalg.matrix_norm
    assert norm(Y - Q @ (Q.mT @ Y)) <= rounding(Y) * norm(Y)


@pytest.mark.parametrize("kind", ["zero", "deficient"])
def test_deficient_columns_fall_back_to_householder(kind):
    Y = torch.zeros(30, 4) if kind == "zero" else matrix((30, 2)) @ matrix((2, 4), 1)
    Q = orthonormal(Y)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(4, dtype=Y.dtype), atol=rounding(Y), rtol=0)
    torch.testing.assert_close(Q @ (Q.mT @ Y), Y)


def test_a_batch_gives_each_its_own():
    Y = matrix((3, 40, 5))
    Q = orthonormal(Y)
    for one, alone in zip(Q, Y, strict=True):
        torch.testing.assert_close(one, orthonormal(alone))


def test_spread_is_a_lower_bound_of_the_condition():
    Y = spread(80, 6, -4, torch.float64)
    Q, found = normalized(Y)
    assert 1 < found <= 1.01e4  # κ = 1e4; R is off by κ² ε, 1e-8
    assert torch.linalg.cond(Q) < 1.1  # 1 + κ² ε
    assert normalized(torch.zeros(5, 2))[1] == float("inf")


def test_both_ways_of_iterating_find_the_range(generator):
    """A flat spectrum leaves out normalisations, a steep one does not."""
    for smallest in (-1, -9):
        A = spread(60, 12, smallest, torch.float64) @ matrix((12, 90))
        Q = range_basis(A, torch.randn(90, 12, generator=generator, dtype=A.dtype), 3)
        off = torch.linalg.matrix_norm(Q @ (Q.mT @ A) - A)
        assert off <= rounding(A) * torch.linalg.matrix_norm(A)


def test_gram_bases_agree_with_the_svd(generator):
    A = decaying(15, 80, torch.cat([torch.ones(6), torch.full((9,), 1e-3)]).double())
    A = A.expand(3, -1, -1)
    U = torch.linalg.svd(A).U[..., :6]
    exact = U @ U.mT
    G = gram(A)
    torch.testing.assert_close(G, A @ A.mT)
    omega = torch.randn(3, 15, 8, generator=generator, dtype=A.dtype)
    for basis in (
        dominant_basis(G, 6),
        dominant_basis(G, 6, start=dominant_basis(G + 1e-3 * matrix(G.shape), 6)),
        sketched_basis(G, omega, 6, 3),
    ):
        # What one step from a start that is 1e-3 off leaves, (σ_7/σ_6)² of it, a thousandfold.
        torch.testing.assert_close(basis @ basis.mT, exact, atol=1e-6, rtol=0)


def test_gram_sketch_has_the_law_of_the_plain_sketch():
    """Mean error over 2,000 draws, with and without the detour by the Gram matrix."""
    A = decaying(12, 60, 0.7 ** torch.arange(12, dtype=torch.float64)).expand(2000, -1, -1)
    g = torch.Generator().manual_seed(0)
    omega = torch.randn(2000, 12, 6, generator=g, dtype=A.dtype)
    Q = sketched_basis(gram(A), omega, 4, 0)
    ours = torch.linalg.matrix_norm(A - Q @ (Q.mT @ A))
    plain = svdlib.randomized_svd(A, 4, oversample=2, power_iters=0, generator=g)
    theirs = torch.linalg.matrix_norm(A - plain.matrix())
    spread = (ours.var() / 2000 + theirs.var() / 2000).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4 * spread
