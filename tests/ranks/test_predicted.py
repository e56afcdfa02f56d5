import copy

import pytest
import torch
import torch.nn.functional as F
from modules import network
from torch import nn

import svdlib
from svdlib.network.kinds import layer_of
from svdlib.ranks.predicted import METHODS, predicted_profile


def cut(model, layer, rank):
    model = copy.deepcopy(model)
    weight = model.get_submodule(layer).weight.data
    U, S, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    weight.copy_(((U[:, :rank] * S[:rank]) @ Vh[:rank]).view_as(weight))
    return model


@pytest.fixture(params=["tanh", "convolutions"])
def case(request):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(30, 12, generator=g, dtype=torch.float64)
    y = torch.randint(3, (30,), generator=g)
    model = network(request.param).double()
    model(x)
    return model.eval(), x, y


def test_predictions_are_the_gradients_of_each_image(case):
    """By autograd, an image at a time: ⟨∂ℓ/∂W, W_j − W⟩."""
    model, x, y = case
    gradient, fisher = (predicted_profile(model, x, y, by) for by in ("gradient", "fisher"))
    for (layer, rank), row in gradient.set_index(["layer", "rank"]).iterrows():
        changed = cut(model, layer, rank).get_submodule(layer).weight - (
            weight := model.get_submodule(layer).weight
        )
        inner = torch.stack(
            [
                (torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), weight)[0] * changed)
                .sum()
                .detach()
                for a, b in zip(x, y, strict=True)
            ]
        )
        assert row.increase == pytest.approx(inner.mean().abs().item(), abs=1e-10)
        assert row.se == pytest.approx(inner.std().item() / 30**0.5, abs=1e-10)
        second = fisher.set_index(["layer", "rank"]).loc[(layer, rank)]
        assert second.increase == pytest.approx(inner.square().mean().item() / 2, abs=1e-10)


def test_the_output_s_error_is_that_of_the_cut_layer(case):
    model, x, y = case
    profile = predicted_profile(model, x, y, "output").set_index(["layer", "rank"])
    layers = {name: model.get_submodule(name) for name in profile.index.unique("layer")}
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, h, name=name: seen.update({name: h[0].clone()}))
    with torch.no_grad():
        model(x)
        for (name, rank), row in profile.iterrows():
            layer = layers[name]
            whole, low = (
                layer_of(layer).apply(seen[name], m.get_submodule(name).weight.flatten(1))
                for m in (model, cut(model, name, rank))
            )
            expected = (whole - low).square().sum() / whole.square().sum()
            assert row.increase == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("by", METHODS)
def test_rules_take_predictions_and_the_model_is_left_as_it_was(case, by):
    model, x, y = case
    model.train()
    before = copy.deepcopy(model.state_dict())
    profile = predicted_profile(model, x, y, by, memory=1000)
    assert (
        profile.equals(predicted_profile(model, x, y, by))
        or profile.increase.sub(predicted_profile(model, x, y, by).increase).abs().max() < 1e-10
    )
    ranks = svdlib.reveal_ranks(profile, "budget", parameters=100)
    assert all(rank >= 1 for rank in ranks.values())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_bad_input(case):
    model, x, y = case
    with pytest.raises(ValueError, match="unknown method 'loss'; known: output, gradient, fisher"):
        predicted_profile(model, x, y, "loss")
    with pytest.raises(ValueError, match="called more than once"):
        layer = nn.Linear(12, 12).double()
        predicted_profile(nn.Sequential(layer, layer), x, y % 12)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x).mean(1).tanh())


def test_a_shared_weight_is_predicted_as_one():
    """Its gradient is that of all its uses."""
    model, x, y = Tied().double(), torch.arange(36).view(12, 3) % 20, torch.arange(12) % 20
    profile = predicted_profile(model, x, y, "gradient")
    assert set(profile.shared) == {"embed"}
    W = model.embed.weight
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), W)
    for rank in range(9):
        changed = svdlib.truncated_svd(W.detach(), max(rank, 1)).matrix() * (rank > 0) - W.detach()
        for found in profile[profile["rank"] == rank].increase:
            assert found == pytest.approx((gradient * changed).sum().abs().item(), abs=1e-10)


def test_batches_are_refused_in_a_sentence(case):
    model, x, y = case
    for data in ([(x, y)], (x, y)):
        with pytest.raises(
            ValueError, match=r"inputs and labels as two tensors.*loss_profile takes"
        ):
            predicted_profile(model, data)
