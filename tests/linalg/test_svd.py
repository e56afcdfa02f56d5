from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import decaying, matrix, rounding

import svdlib

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, data=st.data(), seed=st.integers(0, 99))
def test_truncated_is_best(shape, data, seed):
    rank = data.draw(st.integers(1, min(shape)))
    A = matrix(shape, seed)
    svd = svdlib.truncated_svd(A, rank)
    expected = torch.linalg.svdvals(A)
    torch.testing.assert_close(svd.S, expected[:rank])
    error = torch.linalg.matrix_norm(A - svd.matrix())
    floor = rounding(A) * expected.norm().item()
    torch.testing.assert_close(error, expected[rank:].norm(), atol=floor, rtol=0)
    eye = torch.eye(rank, dtype=A.dtype)
    for product in (svd.U.mT @ svd.U, svd.Vh @ svd.Vh.mT):
        torch.testing.assert_close(product, eye, atol=rounding(A), rtol=0)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, data=st.data(), seed=st.integers(0, 99))
def test_randomized_is_orthonormal_and_near_best(shape, data, seed):
    rank = data.draw(st.integers(1, min(shape)))
    A = matrix(shape, seed)
    g = torch.Generator().manual_seed(seed)
    svd = svdlib.randomized_svd(A, rank, oversample=1, power_iters=3, generator=g)
    eye = torch.eye(rank, dtype=A.dtype)
    for product in (svd.U.mT @ svd.U, svd.Vh @ svd.Vh.mT):
        torch.testing.assert_close(product, eye, atol=rounding(A), rtol=0)
    sigma = torch.linalg.svdvals(A)
    # Three power iterations bring a sketch of Gaussian matrices this small within 1.5 at worst.
    best = sigma[rank:].norm()
    assert torch.linalg.matrix_norm(A - svd.matrix()) <= 2 * best + rounding(A) * sigma[0]


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (3, 60, 80)])
def test_low_rank_matrices_are_found_exactly(shape, generator):
    *batch, m, n = shape
    A = matrix((*batch, m, 5)) @ matrix((*batch, 5, n), 1)
    svd = svdlib.randomized_svd(A, 5, generator=generator)
    torch.testing.assert_close(svd.matrix(), A)


@pytest.mark.parametrize(
    "tail", [torch.ones(50), 0.9 ** torch.arange(50)], ids=["flat", "decaying"]
)
def test_mean_error_keeps_the_bound_that_other_columns_break(tail):
    """Halko, Martinsson and Tropp (2011), Theorems 10.6 and 9.3, without power iterations."""
    k, p = 10, 5
    sigma = torch.cat([torch.full((k,), 1e6), tail]).double()
    A = decaying(60, 80, sigma)
    bound = (1 + (k / (p - 1)) ** 0.5) * sigma[k]
    bound += torch.e * (k + p) ** 0.5 / p * sigma[k:].norm()
    bound += sigma[k]  # for the cut from k + p to k terms
    g = torch.Generator().manual_seed(0)
    stacked = A.expand(100, -1, -1)
    svd = svdlib.randomized_svd(stacked, k, oversample=p, power_iters=0, generator=g)
    assert torch.linalg.matrix_norm(stacked - svd.matrix(), 2).mean() <= bound
    Q = torch.linalg.qr(matrix((100, 60, k + p), 3)).Q
    assert torch.linalg.matrix_norm(A - Q @ (Q.mT @ A), 2).mean() > 1e3 * bound


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


def steep(m, n, dtype=torch.float64):
    """Singular values from 1 to 1e-12."""
    return decaying(m, n, torch.logspace(0, -12, min(m, n, 100), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 300), (300, 20), (70, 90), (64, 1500)])
@pytest.mark.parametrize("kind", ["flat", "steep", "deficient", "zero"])
def test_truncated_is_as_accurate_as_lapack(dtype, shape, kind):
    A = {
        "flat": matrix(shape),
        "steep": steep(*shape),
        "deficient": matrix((shape[0], 3)) @ matrix((3, shape[1]), 1),
        "zero": torch.zeros(shape),
    }[kind].to(dtype)
    rank = min(shape) // 2
    U, S, Vh = svd = svdlib.truncated_svd(A, rank)
    exact = torch.linalg.svdvals(A.double())
    assert (S - exact[:rank]).abs().max() <= rounding(A) * exact[0]
    eye = torch.eye(rank, dtype=dtype)
    for product in (U.mT @ U, Vh @ Vh.mT):
        torch.testing.assert_close(product, eye, atol=rounding(A), rtol=0)
    best = exact[rank:].norm()
    assert torch.linalg.matrix_norm(A - svd.matrix()) <= best + rounding(A) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(150, 400), (400, 150)])
def test_ill_conditioned_input_does_not_break_the_sketch(dtype, shape, generator):
    A = steep(*shape, dtype)
    U, S, Vh = svd = svdlib.randomized_svd(A, 40, generator=generator)
    eye = torch.eye(40, dtype=dtype)
    for product in (U.mT @ U, Vh @ Vh.mT):
        torch.testing.assert_close(product, eye, atol=rounding(A), rtol=0)
    exact = torch.linalg.svdvals(A.double())
    floor = rounding(A) * exact.norm()
    assert (S - exact[:40]).abs().max() <= floor
    assert torch.linalg.matrix_norm(A - svd.matrix()) <= 1.2 * exact[40:].norm() + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [svdlib.truncated_svd, svdlib.randomized_svd])
@pytest.mark.parametrize("noise", [1.0, 1e-4, 0.0])
def test_error_is_the_frobenius_error(dtype, method, noise):
    A = matrix((3, 60, 8)) @ matrix((3, 8, 90), 1) + noise * matrix((3, 60, 90), 2)
    A = A.to(dtype)
    svd = method(A, 8)
    formed = torch.linalg.matrix_norm(A.double() - svd.matrix().double())
    floor = rounding(A) * torch.linalg.matrix_norm(A).max().item()
    # 1 %: a difference of squares, taken where rounding is under 1e-4 of it.
    torch.testing.assert_close(svd.error, formed, rtol=1e-2, atol=floor)


@pytest.mark.parametrize("power_iters", [0, 4])
def test_spectral_error_bounds_the_norm(power_iters, generator):
    A = decaying(60, 80, 0.9 ** torch.arange(60, dtype=torch.float64)).expand(50, -1, -1)
    svd = svdlib.randomized_svd(A, 10, oversample=2, power_iters=0, generator=generator)
    bound = svd.spectral_error(A, power_iters=power_iters, generator=generator)
    norm = torch.linalg.matrix_norm(A - svd.matrix(), 2)
    assert (bound >= norm).all()  # but for a chance of 1e-10
    # (10 √(2/π) max ‖ω‖)^(1/(2q+1)), in a space of 80 dimensions
    assert (bound <= (40 if power_iters == 0 else 2) * norm).all()


def test_spectral_error_of_an_exact_or_another_matrix(generator):
    svd = svdlib.truncated_svd(torch.zeros(4, 3), 2)
    assert svd.spectral_error(torch.zeros(4, 3), generator=generator) == 0
    with pytest.raises(ValueError, match=r"shape \(4, 3\), not \(3, 4\)"):
        svd.spectral_error(torch.zeros(3, 4))


@pytest.mark.parametrize("tol", [0.5, 0.05, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tol_is_met_at_nearly_the_smallest_rank(tol, dtype, generator):
    sigma = 0.95 ** torch.arange(120, dtype=torch.float64)
    A = decaying(200, 150, sigma).to(dtype)
    svd = svdlib.randomized_svd(A, tol=tol, relative=True, generator=generator)
    norm = torch.linalg.matrix_norm(A)
    assert torch.linalg.matrix_norm(A - svd.matrix()) <= (tol + rounding(A)) * norm
    tails = sigma.square().flip(0).cumsum(0).flip(0).sqrt() / sigma.norm()
    assert svd.rank <= 1 + int((tails > tol).sum())
    absolute = svdlib.randomized_svd(A, tol=tol * norm.item(), generator=generator)
    assert abs(absolute.rank - svd.rank) <= 1


def test_tol_of_a_flat_small_or_zero_matrix(generator):
    A = matrix((50, 70))
    svd = svdlib.randomized_svd(A, tol=1e-6, relative=True, generator=generator)
    assert svd.rank == 50
    assert svdlib.randomized_svd(A, tol=1e3, generator=generator).rank == 1
    assert svdlib.randomized_svd(0 * A, tol=1e-3, generator=generator).error == 0


def test_gradients_are_those_of_the_svd(generator):
    """Of the singular values of a low-rank matrix, which the sketch finds exactly."""
    A = (matrix((40, 3)) @ matrix((3, 30), 1)).requires_grad_()
    for method in (svdlib.truncated_svd, svdlib.randomized_svd):
        given = {} if method is svdlib.truncated_svd else {"generator": generator}
        (ours,) = torch.autograd.grad(method(A, 3, **given).S.sum(), A)
        (reference,) = torch.autograd.grad(torch.linalg.svdvals(A)[:3].sum(), A)
        torch.testing.assert_close(ours, reference)


def test_noise_and_slow_decay_stay_near_the_best(generator):
    """What scikit-learn asks of its own: low rank, low rank with noise, slow decay."""
    for sigma in (0.5 ** torch.arange(60.0), 1 / (1 + torch.arange(60.0))):
        A = decaying(150, 90, sigma.double()) + 1e-3 * matrix((150, 90), 5)
        exact = torch.linalg.svdvals(A)
        for B in (A, A.mT):
            svd = svdlib.randomized_svd(B, 10, power_iters=5, generator=generator)
            # What is left by the sketch, not by rounding: 0.6 % with these random numbers.
            torch.testing.assert_close(svd.S, exact[:10], rtol=1e-2, atol=0)
            assert svd.error <= 1.001 * exact[10:].norm()


def test_equal_matrices_get_equal_factors_wherever_they_stand():
    A = matrix((30, 500)).float()
    for first, second in zip(
        svdlib.truncated_svd(A, 5), svdlib.truncated_svd(A.mT, 5), strict=True
    ):
        a, b = first.abs(), second.mT.abs() if second.ndim > 1 else second.abs()
        if a.shape == b.shape:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    turned = svdlib.truncated_svd(A.mT, 5)
    assert (turned.U.gather(0, turned.U.abs().argmax(0, keepdim=True)) > 0).all()


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
    A = torch.rand(40, 30)
    with pytest.raises(ValueError, match=r"either a rank or a tol, not rank=1 and tol=0\.1"):
        svdlib.randomized_svd(A, 1, tol=0.1)
    with pytest.raises(ValueError, match="either a rank or a tol"):
        svdlib.randomized_svd(A)
    for tol in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tol must be positive"):
            svdlib.randomized_svd(A, tol=tol)
    with pytest.raises(ValueError, match=r"can't be certified in torch\.float32"):
        svdlib.randomized_svd(A, tol=1e-6, relative=True)
    with pytest.raises(ValueError, match="one matrix"):
        svdlib.randomized_svd(torch.rand(2, 4, 3), tol=0.1)
    with pytest.raises(ValueError, match="norm overflows"):
        svdlib.truncated_svd(torch.full((4, 3), 3e38), 1)
    with pytest.raises(ValueError, match="generator is on meta"):
        svdlib.randomized_svd(torch.rand(4, 3), 1, generator=_Elsewhere())


class _Elsewhere:
    device = torch.device("meta")


@pytest.mark.parametrize("size", [1e-43, 1e-40, 1e-25, 1e-12, 1e30])
@pytest.mark.parametrize("method", ["truncated", "tall", "square", "randomized", "tol"])
def test_entries_whose_squares_do_not_fit(method, size, generator):
    """Scaled by a power of two, nothing is lost but what the subnormal type itself can't hold."""
    shape = {"tall": (200, 30), "square": (90, 80)}.get(method, (80, 120))
    A = (matrix(shape) * size).float()
    exact = torch.linalg.svdvals(A.double())
    if method == "tol":
        found = svdlib.randomized_svd(A, tol=0.5, relative=True, generator=generator)
    elif method == "randomized":
        found = svdlib.randomized_svd(A, 10, generator=generator)
    else:
        found = svdlib.truncated_svd(A, 10)
    error = (exact[found.rank :].square().sum() / exact.square().sum()).sqrt()
    norm = torch.linalg.matrix_norm(A.double())
    assert error - 1e-5 <= found.error / norm <= 1.2 * error
    rebuilt = (found.U.double() * found.S.double()) @ found.Vh.double()
    smallest = 1e-45 * 120  # S is rounded to a multiple of the least number there is
    off = torch.linalg.matrix_norm(A.double() - rebuilt).item()
    assert off == pytest.approx(found.error.item(), rel=1e-3, abs=10 * smallest)
    bound = found.spectral_error(A, generator=generator)
    assert bound >= 0.99 * torch.linalg.matrix_norm(A.double() - rebuilt, 2)
    assert bound <= 3 * torch.linalg.matrix_norm(A.double() - rebuilt, 2)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e-40, 1e40, 1e200, 1e300])
def test_tol_holds_at_every_size_that_float64_has(size, generator):
    A = matrix((40, 30), 0) * size
    svd = svdlib.randomized_svd(A, tol=0.1, relative=True, generator=generator)
    off = (((svd.matrix() - A) / size).norm() / (A / size).norm()).item()
    assert off <= 0.1 and off == pytest.approx((svd.error / size / (A / size).norm()).item())


def test_half_precision_is_worked_in_float32_and_refused_where_it_does_not_fit():
    A = torch.full((200, 300), 250.0, dtype=torch.float16)  # σ_1 = 61,237
    found = svdlib.truncated_svd(A, 1)
    torch.testing.assert_close(found.matrix(), A, rtol=2e-3, atol=0)
    with pytest.raises(ValueError, match=r"norm overflows torch\.float16.* a wider type"):
        svdlib.truncated_svd(torch.full((400, 300), 250.0, dtype=torch.float16), 1)


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (torch.eye(3).to_sparse(), r"layout torch\.sparse_coo; see A\.to_dense"),
        (torch.eye(3, device="meta"), "on device 'meta', where it has no numbers"),
        (torch.eye(3, dtype=torch.complex64), r"not torch\.complex64"),
        ([[1.0]], "not list"),
    ],
)
def test_what_is_no_dense_real_matrix(A, message):
    with pytest.raises(ValueError, match=message):
        svdlib.truncated_svd(A, 1)


def test_a_generator_is_a_generator():
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator or None, not 0"):
        svdlib.randomized_svd(torch.rand(4, 3), 1, generator=0)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 4, 6)])
@pytest.mark.parametrize("method", ["truncated", "randomized"])
def test_the_gradient_of_the_rank_k_matrix_is_that_of_finite_differences(shape, method):
    A = matrix(shape).requires_grad_()

    def low(A):
        if method == "truncated":
            return svdlib.truncated_svd(A, 2).matrix()
        g = torch.Generator().manual_seed(0)
        return svdlib.randomized_svd(A, 2, oversample=2, power_iters=60, generator=g).matrix()

    assert torch.autograd.gradcheck(low, (A,), atol=1e-5)


@pytest.mark.parametrize("method", ["truncated", "randomized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_exactly_deficient_rank(method, dtype, generator):
    """What `project_` leaves: σ_4 = 0 and all that follow."""
    A = (matrix((40, 3)) @ matrix((3, 30), 1)).to(dtype).requires_grad_()
    G = matrix((40, 30), 2, dtype)
    if method == "truncated":
        found = svdlib.truncated_svd(A, 3)
    else:
        found = svdlib.randomized_svd(A, 3, generator=generator)
    (gradient,) = torch.autograd.grad(found.matrix(), A, G)
    U, V = found.U.detach(), found.Vh.detach().mT
    expected = G - (G - U @ (U.mT @ G)) @ (torch.eye(30, dtype=dtype) - V @ V.mT)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e3 * torch.finfo(dtype).eps)
    nothing = torch.zeros(6, 5, dtype=dtype, requires_grad=True)
    svdlib.truncated_svd(nothing, 3).matrix().sum().backward()
    assert nothing.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 5), (4, 7), (2, 5, 4)])
def test_second_derivatives_of_the_rank_k_matrix_are_those_of_finite_differences(shape):
    A = matrix(shape, 0).requires_grad_()
    for decompose in (svdlib.truncated_svd, partial(svdlib.randomized_svd, oversample=20)):
        assert torch.autograd.gradgradcheck(lambda A: decompose(A, 2).matrix(), A)  # noqa: B023


@pytest.mark.parametrize("decompose", [svdlib.truncated_svd, svdlib.randomized_svd])
def test_transforms_of_functions_are_refused(decompose):
    A = matrix((3, 6, 5), 0)
    function = lambda A: decompose(A, 2).matrix().sum()
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.vmap):
        with pytest.raises(ValueError, match="vmap and jacrev"):
            transform(function)(A)
