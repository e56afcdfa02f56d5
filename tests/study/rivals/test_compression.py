"""The peers' formulas, where they are another formula's."""

import pytest
import torch
from matrices import matrix
from torch import nn

import svdlib
from svdlib.network.low_rank import low_rank_layers
from svdlib.study.rivals.compression import asvd, calibrated, cut, fisher, svd_llm, truncated

RANKS = {"0": 4, "2": 3}


def network(bias=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(30, 20, bias=bias), nn.Tanh(), nn.Linear(20, 30, bias=bias)
    ).double()


def batches():
    """Inputs of unequal sizes, away from zero."""
    return list((matrix((200, 30), 1) * torch.linspace(3, 0.1, 30) + 0.5).split(50))


def weights(model):
    return {name: layer.weight for name, layer in low_rank_layers(model).items()}


def found_by(formula, model, ranks, *data, **settings):
    return weights(cut(model, ranks, formula(model, ranks, *data, **settings)))


@pytest.mark.parametrize("bias", [False, True])
def test_svd_llm_is_the_best_approximation_of_the_output_not_centred(bias):
    model, data = network(bias), batches()
    found = found_by(svd_llm, model, RANKS, data)
    x = torch.cat(data)
    for name, rank in RANKS.items():
        W = model[int(name)].weight.detach()
        inputs = x if name == "0" else model[:2](x).detach()
        U, S, Vh = torch.linalg.svd(inputs @ W.mT, full_matrices=False)
        torch.testing.assert_close(
            inputs @ found[name].mT, U[:, :rank] * S[:rank] @ Vh[:rank], rtol=1e-5, atol=1e-6
        )
    if not bias:
        ours = svdlib.factorize(model, RANKS, calibration=data)
        torch.testing.assert_close(found, weights(ours), rtol=1e-5, atol=1e-6)


def test_asvd_without_weighing_and_fisher_of_equal_gradients_are_the_truncated_svd():
    model, data = network(), batches()
    plain = weights(svdlib.factorize(model, RANKS))
    torch.testing.assert_close(found_by(truncated, model, RANKS), plain)
    torch.testing.assert_close(found_by(asvd, model, RANKS, data, alpha=0), plain)

    def total(model, batch):
        return model[0].weight.sum() + model[2].weight.sum()

    torch.testing.assert_close(found_by(fisher, model, RANKS, data, total), plain)


def test_they_weigh_columns_by_inputs_and_rows_by_gradients():
    """Of one rank, what weighs most is kept exactly: a column alone, or a row alone."""
    layer, rank = nn.Sequential(nn.Linear(30, 20, bias=False).double()), {"0": 1}
    W = layer[0].weight.detach()
    x = torch.full((5, 30), 1e-9).double()
    x[:, 7] = 1e3
    found = found_by(asvd, layer, rank, [x], alpha=1.0)["0"]
    torch.testing.assert_close(found[:, 7], W[:, 7], rtol=1e-4, atol=1e-6)
    found = found_by(fisher, layer, rank, [x], lambda model, _: model[0].weight[3].sum())["0"]
    torch.testing.assert_close(found[3], W[3], rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model, data = network(), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].eval()
    svd_llm(model, RANKS, data)
    asvd(model, RANKS, data)
    fisher(model, RANKS, data, lambda model, x: model(x).square().mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model] == [False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_calibrated_is_what_factorize_finds_and_a_loss_weighs_the_outputs():
    model, data = network(bias=True), batches()
    ours = weights(svdlib.factorize(model, RANKS, calibration=data))
    torch.testing.assert_close(found_by(calibrated, model, RANKS, data), ours)
    first = lambda model, x: model(x)[:, :1].square().sum(1)  # nothing but one output counts
    layer = found_by(calibrated, model, {"2": 1}, data, first)["2"]
    torch.testing.assert_close(layer[0], model[2].weight[0].detach(), rtol=1e-2, atol=1e-2)
