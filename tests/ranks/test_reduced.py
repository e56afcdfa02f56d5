import copy
import math

import pytest
import torch
import torch.nn.functional as F
from modules import network
from torch import nn

import svdlib

# Tolerances: ten times the worst seen, on kernels with and without AVX. Losses are near one.


def test_verified_ranks_are_those_of_the_projected_model():
    model, x, y = network("convolutions"), torch.rand(30, 12), torch.arange(30) % 3
    model(x)
    model.eval()
    ranks = {"1": 2, "4": 3, "7": 1}
    verified = svdlib.verify_ranks(model, ranks, x, y)
    reduced = svdlib.project_(copy.deepcopy(model), ranks)
    with torch.no_grad():
        z, full = reduced(x), model(x)
    assert verified["loss"] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    increase = F.cross_entropy(z, y) - F.cross_entropy(full, y)
    assert verified["increase"] == pytest.approx(increase.item(), abs=1e-6)
    assert verified["accuracy"] == pytest.approx(100 * (z.argmax(1) == y).double().mean().item())
    errors = (z.argmax(1) != y).double().mean() - (full.argmax(1) != y).double().mean()
    assert verified["error_increase"] == pytest.approx(100 * errors.item(), abs=1e-5)
    dense = sum(p.numel() for p in model.parameters())
    shapes = [model[int(name)].weight.flatten(1).shape for name in ranks]
    saved = sum(
        m * n - min(r * (m + n), m * n) for r, (m, n) in zip(ranks.values(), shapes, strict=True)
    )
    assert verified["parameters"] == dense - saved


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("start", [1, 40])
def test_refined_ranks_meet_the_tolerance(trained, tolerance, start):
    ranks = svdlib.refine_ranks(*trained, {"0": start, "2": start}, tolerance=tolerance)
    model, x, y = trained
    verified = svdlib.verify_ranks(model, ranks, x, y)
    assert verified["increase"] <= tolerance + 1e-5
    for name, rank in ranks.items():  # no single rank can still be lowered
        if rank > 1:
            fewer = svdlib.verify_ranks(model, {**ranks, name: rank - 1}, x, y)
            assert fewer["increase"] > tolerance


def tied():
    """Two layers with one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 3))
    model[2].weight = model[0].weight
    return model


def test_a_shared_weight_is_counted_once_and_moves_as_one():
    model, x, y = tied(), torch.rand(30, 12), torch.arange(30) % 3
    verified = svdlib.verify_ranks(model, {"0": 1, "2": 1, "3": 1}, x, y)
    assert verified["parameters"] == 12 + 12 + 3 + (12 + 12) + (12 + 3)
    with pytest.raises(ValueError, match="layer '2' shares its weight; give both the same rank"):
        svdlib.verify_ranks(model, {"0": 1, "2": 3}, x, y)
    for start in (1, 12):
        ranks = {"0": start, "2": start, "3": 3}
        ranks = svdlib.refine_ranks(model, x, y, ranks, tolerance=1e-3)
        assert ranks["0"] == ranks["2"]
        assert svdlib.verify_ranks(model, ranks, x, y)["increase"] <= 1e-3 + 1e-5


def overflowing():
    """At rank 1 of the first layer a logit is 2¹³⁰, infinite in float32; at full rank it is 0."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[2.0**51, 2.0**50], [2.0**51, -(2.0**50)]])
    model[1].weight.data = torch.tensor([[2.0**30, 0.0], [0.0, 2.0**-101]])
    return model, torch.tensor([[2.0**49, -(2.0**50)]]).repeat(4, 1), torch.ones(4).long()


@pytest.mark.parametrize("start", [1, 2])
def test_no_search_ends_where_the_loss_is_no_number(start):
    model, x, y = overflowing()
    assert not math.isfinite(svdlib.verify_ranks(model, {"0": 1, "1": 2}, x, y)["loss"])
    ranks = svdlib.refine_ranks(model, x, y, {"0": start, "1": start}, tolerance=0.5)
    assert ranks == {"0": 2, "1": 1}
    for look in (svdlib.loss_profile, svdlib.joint_profile):
        with pytest.raises(ValueError, match="gives NaN or infinite losses"):
            look(model, x, y, progress=False)
    with pytest.raises(ValueError, match="layer '0' at rank 1 gives NaN or infinite losses"):
        svdlib.search_ranks(model, x, y, lambda rows: rows.increase <= 0.5)


def test_bad_input():
    model, x, y = network("tanh"), torch.rand(9, 12), torch.arange(9) % 3
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        svdlib.refine_ranks(model, x, y, {"0": 2}, tolerance=-1)
    with pytest.raises(ValueError, match="and finite, not inf"):
        svdlib.refine_ranks(model, x, y, {"0": 2}, tolerance=torch.inf)
    with pytest.raises(ValueError, match="unknown layer 'x'"):
        svdlib.verify_ranks(model, {"x": 2}, x, y)
    with pytest.raises(ValueError, match="rank 9 at most, not 10"):
        svdlib.verify_ranks(model, {"0": 10}, x, y)
