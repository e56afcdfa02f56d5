"""One warm step against LAPACK, and the law of a randomized one against the plain randomized SVD."""

import pytest
import torch
from matrices import decaying, matrix

import svdlib
from svdlib.linalg.subspace import small_sketch, turn_, turn_randomly_

M, N, RANK = 15, 60, 10
SIGMA = torch.cat([torch.linspace(1, 0.3, RANK), torch.linspace(1e-2, 3e-3, M - RANK)]).double()


def followed(networks, dtype, off=1e-3):
    """W (S, m, n), U and V off its dominant subspace, and the products that `turn_` takes."""
    W = decaying(M, N, SIGMA).to(dtype)
    basis = torch.linalg.svd(W).U[:, :RANK] + off * matrix((M, RANK), 3).to(dtype)
    U = torch.linalg.qr(basis).Q.expand(networks, -1, -1).clone()
    C = U.mT @ W
    rest = W - U @ C
    return W, U, U.clone(), C @ C.mT, rest @ C.mT, rest @ rest.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_leads_to_the_dominant_subspace(dtype):
    W, U, V, H, X, _ = followed(2, dtype)
    exact = torch.linalg.svd(W).U[:, :RANK]
    turn_(U, V, H, X)
    # (σ_11/σ_10)² = 1e-3 of what they were off, 1e-3 times the root of the entries; the basis's
    # change was used to first order, off by its square.
    off = torch.linalg.matrix_norm(V @ U.mT - exact @ exact.mT, 2)
    assert (off < 3e-5).all()
    eye = torch.eye(RANK, dtype=dtype).expand(2, -1, -1)
    # Newton's step squares what V + E is off, here about 1e-5.
    torch.testing.assert_close(U.mT @ V, eye, atol=max(1e-9, 10 * torch.finfo(dtype).eps), rtol=0)


def test_the_new_coordinates_are_the_old_plus_a_small_product():
    """UᵀV = I of the new U and the old V, so that UᵀW needs no product with the old U."""
    W, U, V, H, X, NN = followed(2, torch.float64)
    before, sketch = V.clone(), small_sketch(matrix((2, RANK + M, RANK + 2)), RANK)
    change = turn_randomly_(U, V, H, X, NN, sketch, 0)
    eye = torch.eye(RANK, dtype=W.dtype).expand(2, -1, -1)
    torch.testing.assert_close(U.mT @ before, eye, atol=1e-12, rtol=0)
    torch.testing.assert_close(U.mT @ V, eye, atol=1e-12, rtol=0)
    assert 1e-3 < change.norm() < 1


@pytest.mark.parametrize(("oversample", "power_iters"), [(0, 0), (2, 0), (4, 0), (0, 1), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_random_step_has_the_law_of_the_randomized_svd(oversample, power_iters, dtype):
    """The quartiles of the error over 3,000 draws of each; the tails are too heavy for a mean."""
    draws = 3000
    W, U, V, H, X, NN = followed(draws, dtype)
    g = torch.Generator().manual_seed(0)
    omega = torch.randn(draws, RANK + M, RANK + oversample, generator=g, dtype=dtype)
    turn_randomly_(U, V, H, X, NN, small_sketch(omega, RANK), power_iters)
    W = W.double()
    ours = torch.linalg.matrix_norm(W - V.double() @ (U.double().mT @ W))
    several = W.expand(draws, -1, -1)
    plain = svdlib.randomized_svd(
        several, RANK, oversample=oversample, power_iters=power_iters, generator=g
    )
    theirs = torch.linalg.matrix_norm(several - plain.matrix())
    quartiles = torch.tensor([0.25, 0.5, 0.75]).double()
    # A quartile of 3,000 draws is sure to 1.6 % of a rank; the density makes it 5 % at most.
    torch.testing.assert_close(
        ours.quantile(quartiles), theirs.quantile(quartiles), rtol=0.1, atol=0
    )


@pytest.mark.parametrize("kind", ["zero", "low rank", "nothing new"])
def test_what_has_no_such_subspace_stays(kind):
    W, U, V, *_ = followed(2, torch.float32)
    W = W * (kind != "zero")
    if kind == "low rank":
        W = U[0, :, :3] @ (U[0, :, :3].mT @ W)
    if kind == "nothing new":
        W = U[0] @ (U[0].mT @ W)
    for random in (False, True):
        for _ in range(3):
            C = U.mT @ W
            rest = W - V @ C
            H, X, NN = C @ C.mT, rest @ C.mT, rest @ rest.mT
            if random:
                sketch = small_sketch(matrix((2, RANK + M, RANK)).float(), RANK)
                turn_randomly_(U, V, H, X, NN, sketch, 0)
            else:
                turn_(U, V, H, X)
        kept = V @ (U.mT @ W)
        torch.testing.assert_close(kept, W.expand(2, -1, -1), atol=1e-5, rtol=0)
