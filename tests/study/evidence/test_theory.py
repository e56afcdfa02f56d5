import pandas as pd
import pytest
import torch
from matrices import decaying

from svdlib.study.evidence import theory

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


@pytest.mark.parametrize("tail", ["flat tail", "slow tail", "fast tail"])
def test_bounds_hold_of_sketches_and_break_of_columns_that_ignore_the_matrix(tail, generator):
    A = theory.stepped(40, 60, 6, generator)[tail]
    given = 6, [2, 4, 10], [0, 1], 100, generator
    real, blind = (
        theory.against_bounds(theory.sketch_errors(A, *given, basis).assign(matrix=tail))
        for basis in (theory.range_basis, theory.blind_basis)
    )
    assert (real.worst > 1e3 * real.tail_bound).all()
    for bound in ("bound", "sharp_bound"):
        assert (real.high <= real[bound]).all() and (blind.low > blind[bound]).all()
        assert (blind[f"beyond_{bound}"] == blind.n).all()
    assert (real.beyond_tail_bound <= real.n * real.tail_chance).all()
    assert (blind.beyond_tail_bound == blind.n).all()
    assert (real.sharp_bound < real.bound).all()


def test_the_sharp_bound_is_within_a_few_times_the_mean_error(generator):
    """So a sketch that is some times worse breaks it, not only one that is blind."""
    A = theory.stepped(40, 60, 6, generator)["flat tail"]
    errors = theory.sketch_errors(A, 6, [3, 10], [0, 1, 2], 100, generator)
    table = theory.against_bounds(errors.assign(matrix="A"))
    assert (table.sharp_bound < 5 * table["mean"]).all()


def test_draws_beyond_a_bound_are_counted():
    errors = pd.DataFrame({"error": [1.0, 3.0, 6.0], "sharp_bound": 2.0, "bound": 5.0})
    errors = errors.assign(matrix="A", power_iters=0, oversample=2, tail_bound=6.0)
    table = theory.against_bounds(pd.concat([errors.assign(tail_chance=1.0, worst=9.0)] * 2))
    counts = table[["n", "beyond_sharp_bound", "beyond_bound", "beyond_tail_bound"]]
    assert counts.values.tolist() == [[6, 4, 2, 0]]
    assert table.low.item() < table["mean"].item() < table.high.item()


def test_stepped_matrices_have_the_spectra_they_are_named_for(generator):
    tails = {"flat tail": 1.0, "slow tail": 3**-0.5, "fast tail": 0.8**2}
    for name, A in theory.stepped(20, 12, 4, generator).items():
        sigma = torch.linalg.svdvals(A)
        expected = torch.tensor([1e6, 1.0, tails[name]], dtype=A.dtype)
        torch.testing.assert_close(sigma[[3, 4, 6]], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rank", "oversamples", "words"),
    [
        (10, [], "oversamples of 2 or more"),
        (10, [5, 1], r"not \[5, 1\]"),
        (100, [2, 20], "ranks 2 to 29, not 100"),
        (1, [2], "ranks 2 to 47, not 1"),
    ],
)
def test_sketches_beyond_the_bounds_are_refused(rank, oversamples, words, generator):
    with pytest.raises(ValueError, match=words):
        theory.sketch_errors(torch.eye(50), rank, oversamples, [0], 2, generator)


def test_oversampling_and_power_iterations_help(generator):
    A = decaying(40, 60, 1 / torch.arange(1, 41, dtype=torch.float64))
    table = theory.sketch_errors(A, 5, [2, 10], [0, 2], draws=50, generator=generator)
    mean = table.groupby(["oversample", "power_iters"]).error.mean()
    assert mean[10, 0] < mean[2, 0] and mean[2, 2] < mean[2, 0]
