"""Sparse matrices and operators, against the same matrices in dense form."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import matrix

import svdlib


class Product:
    """L R, never formed."""

    def __init__(self, left, right):
        self.left, self.right = left, right
        self.shape = (left.shape[0], right.shape[1])
        self.dtype = left.dtype

    @property
    def mT(self):
        return Product(self.right.mT, self.left.mT)

    def __matmul__(self, X):
        return self.left @ (self.right @ X)


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 5), st.integers(0, 9))
def test_a_matrix_of_low_rank_is_recovered(m, n, rank, seed):
    left, right = matrix((m, rank), seed), matrix((rank, n), seed + 1)
    generator = torch.Generator().manual_seed(seed)
    found = svdlib.randomized_svd(Product(left, right), rank, generator=generator)
    A = left @ right
    torch.testing.assert_close(found.matrix(), A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(A)[:rank], rtol=1e-9, atol=1e-9)
    assert found.error < 1e-9 * A.norm()


@pytest.fixture
def warns_always():
    """Torch gives the warning that a layout is in beta at each matrix, not only at the first."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("warns_always")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_sparse_matrices_of_any_layout(layout, shape, generator):
    A = matrix(shape) * (torch.rand(shape, generator=generator) < 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = (6, 5) if layout.startswith("b") else None
        made = {"layout": getattr(torch, f"sparse_{layout}"), "blocksize": blocks}
        sparse = A.to_sparse(**made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filters = list(warnings.filters)
        found = svdlib.randomized_svd(sparse, 5, oversample=10, power_iters=6, generator=generator)
        assert warnings.filters == filters
    exact = svdlib.truncated_svd(A, 5)
    torch.testing.assert_close(found.S, exact.S, rtol=1e-2, atol=0)
    true = (A - found.matrix()).norm()
    assert true <= 1.01 * exact.error
    assert abs(found.error / true - 1) < 5 / 8  # five standard deviations of the estimate
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(5, dtype=A.dtype))


def test_a_sketch_as_large_as_the_matrix_is_exact(generator):
    A = matrix((12, 9))
    found = svdlib.randomized_svd(
        A.to_sparse(), 4, oversample=50, power_iters=0, generator=generator
    )
    torch.testing.assert_close(found.S, torch.linalg.svdvals(A)[:4])


def test_the_generator_decides_and_the_global_one_stays():
    A = matrix((40, 30)).to_sparse()
    before = torch.random.get_rng_state()
    one, two, other = (
        svdlib.randomized_svd(A, 3, power_iters=0, generator=torch.Generator().manual_seed(seed)).S
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


class Wrong(Product):
    def __matmul__(self, X):
        return super().__matmul__(X)[:-1]


@pytest.mark.parametrize(
    ("A", "given", "message"),
    [
        (torch.eye(5).to_sparse(), {"tol": 0.1}, "takes a rank, not a tol"),
        (torch.eye(5).to_sparse(), {"rank": 6}, r"at most min\(m, n\) = 5 .*not 6"),
        (torch.eye(5).to_sparse(), {"rank": 2, "generator": 0}, "must be a torch.Generator"),
        (torch.eye(5).half().to_sparse(), {"rank": 2}, "float32 or float64, not torch.float16"),
        (torch.eye(5).mul(torch.nan).to_sparse(), {"rank": 2}, "product has NaN"),
        (Wrong(matrix((6, 2)), matrix((2, 5))), {"rank": 2}, r"must give \(6, 5\), not \(5, 5\)"),
        ([[1.0]], {"rank": 1}, "or an operator with shape .* not list"),
        (5, {"rank": 1}, "not int"),
    ],
)
def test_bad_operators(A, given, message):
    with pytest.raises(ValueError, match=message):
        svdlib.randomized_svd(A, **{"oversample": 3} | given)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_bsr, torch.sparse_bsc])
def test_a_stack_of_sparse_matrices_and_the_exact_svd_of_one_are_refused(layout):
    A = matrix((12, 16)).to_sparse(layout=layout, blocksize=(4, 4))
    with pytest.raises(ValueError, match=r"layout torch\.sparse_bs.; see A\.to_dense"):
        svdlib.truncated_svd(A, 2)
    stack = matrix((2, 12, 16)).to_sparse(layout=layout, blocksize=(4, 4))
    with pytest.raises(ValueError, match=r"shape \(m, n\), .* not torch\.sparse_bs. of shape"):
        svdlib.randomized_svd(stack, 2)
