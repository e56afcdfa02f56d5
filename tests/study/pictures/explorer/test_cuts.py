import copy

import pytest
import torch
from torch import nn

import svdlib
from svdlib.study.pictures.explorer import Cuts


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    for layer in net[::2]:  # classes that inputs decide, not biases
        nn.init.zeros_(layer.bias)
    x = 3 * torch.randn(200, 16)
    return net, Cuts(net, x, (net(x) + 0.1 * torch.randn(200, 4)).argmax(1))


@pytest.mark.parametrize("ranks", [(6, 5, 4), (1, 2, 3), (0, 0, 0), (4, 0, 4), (3, 5, 1)])
def test_logits_and_row_are_those_of_the_projected_network(made, ranks):
    net, cuts = made
    projected = copy.deepcopy(net)
    for layer, rank in zip(cuts.layers, ranks, strict=True):
        if rank:
            svdlib.project_(projected, {layer: rank})
        else:
            nn.init.zeros_(projected[int(layer)].weight)
    with torch.no_grad():
        outputs = projected(cuts.x)
    torch.testing.assert_close(cuts.logits(ranks).float(), outputs, rtol=1e-4, atol=1e-5)
    loss = nn.functional.cross_entropy(outputs, cuts.y).item()
    row = cuts.at(ranks)
    assert row.loss == pytest.approx(loss, abs=1e-5)
    assert row[cuts.layers].tolist() == list(ranks)
    assert row.accuracy == pytest.approx(100 * (outputs.argmax(1) == cuts.y).float().mean().item())


def test_the_table_holds_every_combination(made):
    _, cuts = made
    assert len(cuts.joint) == 7 * 6 * 5


def test_the_best_with_no_more_parameters_is_found_by_trying_all(made):
    _, cuts = made
    for parameters in sorted(set(cuts.joint.parameters)):
        eligible = cuts.joint[cuts.joint.parameters <= parameters]
        best = cuts.best_within(parameters)
        assert best.loss == eligible.loss.min()
        assert best.parameters <= parameters


def test_misread_images_come_first_and_the_network_reads_all_of_them(made):
    _, cuts = made
    dense = cuts.logits(cuts.full).argmax(1)
    cut = cuts.logits((1, 1, 1)).argmax(1)
    lost = int(((dense == cuts.y) & (cut != cuts.y)).sum())
    at, before, after = cuts.misread((1, 1, 1), count=lost + 5)
    assert lost > 3
    assert (before.argmax(1) == cuts.y[at]).all()
    wrong = after.argmax(1) != cuts.y[at]
    assert wrong[:lost].all() and not wrong[lost:].any()
