import pandas as pd
import pytest
import torch

import svdlib
from svdlib.study.rivals import training as peers


def images(n):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 784, generator=g), torch.randint(10, (n,), generator=g)
    return svdlib.Data("noise", x, y, x[:10], y[:10])


@pytest.mark.parametrize(
    "projection",
    [None, svdlib.Projection("rsvd", 3, "step", 2, 1), svdlib.Projection("truncsvd", 3, "step")],
)
def test_every_way_enters_the_race(projection):
    pytest.importorskip("jax")
    entrants = peers.entrants((784, 6, 10), (1, 2), images(128), projection)
    table = peers.race(entrants, repeats=2, progress=False)
    assert len(table) == 2 * (2 + 3 * 2) and (table.seconds > 0).all()
    assert set(table.projection) == {"stock"}
    ways = {"the paper's way", "the products alone", "svdlib", "torch.func", "JAX"}
    assert set(table.way) == ways
    assert len(peers.ratios(table)) == 2 * 4


@pytest.mark.parametrize("oversample", [0, 2, 9])
def test_peers_draw_as_many_columns_as_asked(oversample, monkeypatch):
    asked = []
    lowrank = torch.svd_lowrank

    def noted(A, q, niter):
        asked.append((q, niter))
        return lowrank(A, q, niter)

    monkeypatch.setattr(torch, "svd_lowrank", noted)
    W = torch.rand(2, 8, 20, generator=torch.Generator().manual_seed(0))
    projection = svdlib.Projection("rsvd", 3, "step", oversample, 1)
    assert (torch.linalg.matrix_rank(peers._low_rank(W, projection)) == 3).all()
    assert asked == [(min(3 + oversample, 8), 1)]


def test_product_bound_counts_the_products():
    seconds = peers.product_bound((784, 15, 10), images(64))
    assert 0 < seconds < 1


@pytest.mark.parametrize("projection", [None, svdlib.Projection("truncsvd", 3, "step")])
def test_the_operations_of_a_step(projection):
    table = peers.step_operations((784, 6, 10), 2, images(128), projection)
    calls = table.set_index("operation").calls
    assert calls["mm"] == 1 + (projection is not None)  # the second is with x xᵀ
    assert calls["addmm_"] == calls["relu_"] == 1
    assert ("linalg_cholesky_ex" in calls) == (projection is not None)
    assert (table.microseconds > 0).all() and table.microseconds.is_monotonic_decreasing


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([2.0, 3.0], [2.5, 2.0, 3.0, "svdlib"]), ([0.5, 0.5], [0.5, 0.5, 0.5, "JAX"]),
     ([0.5, 1.5], [1.0, 0.5, 1.5, "none"])],
)  # fmt: skip
def test_ratios_are_taken_round_by_round(seconds, expected):
    race = {"projection": "stock", "networks": 8, "round": [1, 2]}
    ways = {"svdlib": [1.0, 1.0], "JAX": seconds}
    table = pd.concat(pd.DataFrame(race | {"way": w, "seconds": s}) for w, s in ways.items())
    found = peers.ratios(table)[["way", "median", "least", "most", "faster"]]
    assert found.values.tolist() == [["JAX", *expected]]
