import pytest
import torch

import svdlib
from svdlib.study.rivals import training as peers


def images(n):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 784, generator=g), torch.randint(10, (n,), generator=g)
    return svdlib.Data("noise", x, y, x[:10], y[:10])


def test_race_times_every_way():
    pytest.importorskip("jax")
    choices = [None, svdlib.Projection("rsvd", 3), svdlib.Projection("truncsvd", 3, "step")]
    table = peers.race((784, 5, 10), (1, 2), images(128), choices, repeats=1, progress=False)
    assert len(table) == 3 * (1 + 3 * 2)
    assert set(table.way) == {"the paper's way", "svdlib", "torch.func", "JAX"}
    assert (table.seconds > 0).all()


def test_product_bound_counts_the_products():
    one = peers.product_bound((784, 15, 10), images(64), repeats=1)
    assert 0 < one < 1
