import pytest
import torch

import svdlib
from svdlib.ensemble import projection as projecting
from svdlib.ensemble.projection import Projection, project_stacks_

# Tolerances: ten times the worst seen, on kernels with and without AVX; 1e-4 is the perturbation.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("svd", 10), "unknown method"),
        (("rsvd", 0), "rank must be at least 1"),
        (("rsvd", 1.5), "whole number"),
        (("rsvd", (10, 0)), "rank must be at least 1"),
        (("rsvd", 10, "batch"), "unknown every 'batch'; known: epoch, step"),
        (("rsvd", 10, 0), "every must be at least 1"),
        (("rsvd", 10, "step", -1), "oversample"),
        (("rsvd", 10, "step", 0, -1), "power_iters"),
    ],
)
def test_bad_projection(arguments, message):
    with pytest.raises(ValueError, match=message):
        Projection(*arguments)


def test_published_deviations_by_name():
    assert Projection.published("rsvd", 10) == Projection("rsvd", 10, "step", 0, 2)
    assert Projection.published("truncsvd", 10) == Projection("truncsvd", 11, "step")
    with pytest.raises(ValueError, match="2 layers need 2 ranks"):
        Projection("rsvd", (3, 4, 5)).ranks(2)


@pytest.mark.parametrize("shape", [(15, 40), (40, 15), (70, 90)])
@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
def test_stacks_agree_with_the_svd(shape, method, generator):
    """With a gap after the fifth singular value every method finds the same subspace."""
    g = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(3, shape[0], 5, generator=g)).Q
    V = torch.linalg.qr(torch.randn(3, shape[1], 5, generator=g)).Q
    low = U @ V.mT
    W = low + 1e-4 * torch.randn(3, *shape, generator=g)
    full_U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = (full_U[..., :5] * S[:, None, :5]) @ Vh[:, :5]
    small = torch.randn(3, 4, 4, generator=g)
    projection = Projection(method, 5, oversample=2, power_iters=2)
    ours, kept = W.clone(), small.clone()
    bases = project_stacks_([ours, kept], [5, 5], projection, generator)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert torch.equal(kept, small) and bases[1] is None

    moved = expected + 1e-4 * torch.randn(3, *shape, generator=g)
    warm, cold = moved.clone(), moved.clone()
    project_stacks_([warm, kept], [5, 5], projection, generator, bases)
    project_stacks_([cold, kept], [5, 5], Projection("truncsvd", 5))
    torch.testing.assert_close(warm, cold, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", range(1, 11))
def test_six_hundred_steps_project_as_lapack_does(rank, mnist, monkeypatch):
    """Every step's projection of the paper's networks, by warm Cholesky QR, against the SVD's."""
    data, worst = mnist.head(64 * 600, 100), []

    def compared(weights, *arguments):
        before = [weight.clone() for weight in weights]
        bases = project_stacks_(weights, *arguments)
        for ours, weight in zip(weights, before, strict=True):
            U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
            exact = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
            worst.append((ours - exact).abs().max())
        return bases

    monkeypatch.setattr(projecting, "project_stacks_", compared)
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(2), device="cpu")
    every = Projection("truncsvd", rank, "step")
    svdlib.train(nets, data, epochs=1, projection=every, progress=False)
    assert len(worst) == 1800 and max(worst) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["zero", "dead rows", "low rank", "graded"])
def test_warm_projections_of_odd_matrices(kind, dtype, generator):
    """Zero and rank-deficient weights stay finite; those of that rank or less stay as they are."""
    W = torch.randn(2, 12, 30, dtype=dtype, generator=generator)
    if kind == "zero":
        W.zero_()
    elif kind == "dead rows":
        W[:, 3:] = 0
    elif kind == "low rank":
        W = W[..., :2] @ W[:, :2]
    else:
        W = W.mT[:, :5].mT @ (W[:, :5] * 10.0 ** -torch.arange(5, dtype=dtype)[:, None])
    for method in ("truncsvd", "rsvd"):
        projection = Projection(method, 5, "step", oversample=2, power_iters=1)
        now, bases = W.clone(), None
        for _ in range(4):
            bases = project_stacks_([now], [5], projection, generator, bases)
        # A Gram matrix in that precision sees singular values down to √ε σ_1.
        seen = torch.finfo(dtype).eps ** 0.5 * torch.linalg.matrix_norm(W, 2).max().item()
        torch.testing.assert_close(now, W, atol=seen, rtol=0)
        grown = now + torch.randn(W.shape, dtype=dtype, generator=generator)
        project_stacks_([grown], [5], projection, generator, bases)
        assert (torch.linalg.matrix_rank(grown, rtol=1e-4) == 5).all(), "not held at a lower rank"
