"""Gradients at layers' outputs against one input at a time, and the losses that are expected of cuts."""

import layer_kinds
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import svdlib
from svdlib.layers.calibrate import Calibration, fits_of
from svdlib.network.chain import task_of
from svdlib.network.kinds import layer_of
from svdlib.network.opened import Network
from svdlib.ranks import sensitivity
from svdlib.ranks.sensitivity import expected_losses, gradients


def found_in(model, *data, objective=None, whole=()):
    net = Network.copy_of(model)
    with net.measuring():
        task = task_of(net, data if len(data) > 1 else data[0], objective=objective)
        task.measure()
        return net, gradients(task, net.layers, whole, False)


@pytest.mark.parametrize("kind", layer_kinds.KINDS)
def test_every_kind_gives_the_gradient_of_each_place(kind):
    """A window's error e changes the output, and so the loss, by Σ gᵀe over its places."""
    layer = layer_kinds.layer(kind)
    x = layer_kinds.inputs(layer, 3)
    z = layer(x).detach()
    g = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    square, count = layer_of(layer).output_square(g)
    rows = g.movedim(layer_of(layer).feature_dim, -1)
    assert count == rows[..., 0].numel()
    rows = rows.flatten(0, -2).unflatten(1, (layer_of(layer).groups, -1)).movedim(1, 0)
    expected = rows.mT @ rows
    m = layer_of(layer).shape[0]
    assert square.shape[-2:] == (m, m)
    if "Transpose" in kind:  # places of a window are alike, and independent
        window = m // expected.shape[-1]
        square = square.unflatten(-1, (-1, window)).unflatten(-3, (-1, window))
        square = square.movedim(-3, -2)
        assert not square[..., ~torch.eye(window, dtype=torch.bool)].any()
        square = square[..., 0, 0]
    torch.testing.assert_close(square.reshape(expected.shape), expected)
    if g.ndim == layer_of(layer).weight.ndim and layer_of(layer).feature_dim == 1:
        alone, _ = layer_of(layer).output_square(g[0])
        first, _ = layer_of(layer).output_square(g[:1])
        torch.testing.assert_close(alone, first)


class Twice(nn.Module):
    """A layer that is called twice, and changed in place after; one that does nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.idle = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 5)

    def forward(self, x):
        self.idle(x)
        return self.last(self.first(self.first(x).relu_()).tanh_())


def test_moments_are_those_of_one_input_at_a_time():
    model, x, y = Twice(), torch.randn(30, 6), torch.arange(30) % 4
    net, found = found_in(model, x, y, whole=["first"])
    square, power = torch.zeros(6, 6).double(), 0.0
    for a, b in zip(x, y, strict=True):
        outs = [model.first(a)]
        outs.append(model.first(outs[0].relu()))
        loss = F.cross_entropy(model.last(outs[1].tanh()), b)
        for z, g in zip(outs, torch.autograd.grad(loss, outs), strict=True):
            square += torch.outer(g, g) / len(x)
            power += (g @ z).item() ** 2 / len(x)
    torch.testing.assert_close(found["first"].square.double(), square, rtol=1e-4, atol=1e-8)
    assert found["first"].power == pytest.approx(power, rel=1e-4)
    assert found["first"].count == 60 and not found["last"].power
    assert not found["idle"].square.any() and found["idle"].square.shape == (5, 5)
    assert all(p.requires_grad for p in net.model.parameters())


def test_no_more_places_are_seen_than_needed(monkeypatch):
    monkeypatch.setattr(sensitivity, "PLACES", 50)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    batches = [(torch.randn(20, 6), torch.arange(20) % 4) for _ in range(9)]
    _, found = found_in(model, batches)
    assert [each.count for each in found.values()] == [60, 60]
    _, few = found_in(model, batches[:3])
    torch.testing.assert_close(found["0"].square, few["0"].square)


def test_a_squared_distance_adds_what_is_expected_of_each_layer_alone():
    """Its second derivative is constant, so that the expected loss is exact of the last layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8)).double()
    x = torch.randn(20_000, 12).double()

    def objective(net, batch):
        with torch.no_grad():
            target = model(batch)
        return 0.5 * (net(batch) - target).square().sum(1)

    net, found = found_in(model, x, objective=objective)
    fits = dict(fits_of(net, ["0", "2"], Calibration(x), found))
    for name, tolerance in (("0", 0.4), ("2", 0.05)):  # the first layer's goes through the tanh
        expected = expected_losses(net.layers[name], fits[name], found[name])
        assert (expected[:-1] >= expected[1:]).all() and expected[-1] == 0
        for rank in (2, 4):
            small = svdlib.factorize(model, {name: rank}, progress=False)
            with torch.no_grad():
                small[int(name)].fill_(net.layers[name], fits[name])
            added = objective(small, x).mean().item()
            assert added == pytest.approx(expected[rank], rel=tolerance)


def test_without_a_fit_or_gradients_the_shares_decide():
    layer = layer_of(nn.Linear(6, 4))
    S = torch.linalg.svdvals(layer.weight.detach().double()).square()
    shares = [1 - S[:rank].sum().item() / S.sum().item() for rank in range(5)]
    assert expected_losses(layer, None, None) == pytest.approx(shares, abs=1e-6)
    power = sensitivity.Gradients(torch.eye(4), 1, 3.0)
    assert expected_losses(layer, None, power) == pytest.approx([1.5 * s for s in shares], abs=1e-6)
