import torch
from matrices import decaying

from svdlib.study import theory

# Tolerances: torch.testing's own, in float64; the bounds are those of theory.


def test_errors_are_those_of_the_residual(generator):
    """Against the singular values of A − Q Qᵀ A formed in full, for the same draws."""
    from svdlib.linalg.bases import range_basis

    A = decaying(20, 30, 0.8 ** torch.arange(20, dtype=torch.float64))
    table = theory.sketch_errors(A, 4, [3], [1], draws=6, generator=generator)
    g = torch.Generator().manual_seed(0)
    Q = range_basis(A.expand(6, -1, -1), torch.randn(6, 30, 7, generator=g, dtype=A.dtype), 1)
    residual = torch.linalg.matrix_norm(A - Q @ (Q.mT @ A), 2) / 0.8**4
    torch.testing.assert_close(torch.tensor(table.error, dtype=A.dtype), residual)


def test_the_paper_s_bound_holds_in_the_mean_and_the_tail_bound_every_time(generator):
    for decay in (0.5, 0.9, 1.0):
        A = decaying(40, 60, decay ** torch.arange(40, dtype=torch.float64))
        table = theory.sketch_errors(A, 6, [2, 4, 10], [0, 1], draws=50, generator=generator)
        means = table.groupby(["oversample", "power_iters"])[["error", "bound"]].mean()
        assert (means.error <= means.bound).all()
        assert (table.error <= table.tail_bound).all()
        assert (table.error >= 0.99).sum() > 0  # a rank-k+p error can be below σ_{k+1}


def test_oversampling_and_power_iterations_help(generator):
    A = decaying(40, 60, 1 / torch.arange(1, 41, dtype=torch.float64))
    table = theory.sketch_errors(A, 5, [2, 10], [0, 2], draws=50, generator=generator)
    mean = table.groupby(["oversample", "power_iters"]).error.mean()
    assert mean[10, 0] < mean[2, 0] and mean[2, 2] < mean[2, 0]
