import pytest
import torch
from torch import nn

import svdlib


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))


@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
def test_every_matrix_gets_the_rank(method):
    net = svdlib.project_(model(), rank=4, method=method)
    for weight in (net[0].weight.flatten(1), net[3].weight):
        assert torch.linalg.matrix_rank(weight) == 4


def test_conv_is_its_out_by_in_kh_kw_matrix():
    before, net = model()[0].weight.detach().flatten(1), model()
    svdlib.project_(net, {"0": 3})
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    torch.testing.assert_close(net[0].weight.flatten(1), U[:, :3] * S[:3] @ Vh[:3])
    assert torch.equal(net[3].weight, model()[3].weight), "only the layer named"


def test_biases_flags_and_optimizer_state_stay():
    net = model()
    net[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    places = [p.data_ptr() for p in net.parameters()]
    biases = [net[0].bias.clone(), net[3].bias.clone()]
    svdlib.project_(net, 2)
    assert [p.data_ptr() for p in net.parameters()] == places
    assert torch.equal(net[0].bias, biases[0]) and torch.equal(net[3].bias, biases[1])
    assert net[0].weight.requires_grad and not net[3].weight.requires_grad
    after = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert all(map(torch.equal, state, after))


@pytest.mark.parametrize("rank", [8, 100])
def test_full_rank_leaves_it_untouched(rank):
    net = model()
    svdlib.project_(net, {"0": rank})
    assert torch.equal(net[0].weight, model()[0].weight)


@pytest.mark.parametrize(
    ("rank", "method", "message"),
    [
        (0, "truncsvd", "at least 1, not 0"),
        (-3, "truncsvd", "at least 1, not -3"),
        (2.5, "truncsvd", "whole number"),
        (True, "truncsvd", "whole number"),
        (2, "svd", "unknown method 'svd'; known: rsvd, truncsvd"),
        ({"0": 2, "7": 2}, "truncsvd", "unknown layer '7'; known: 0, 3"),
        ({"0": 2, "3": 0}, "truncsvd", "layer '3'"),
    ],
)
def test_bad_input_changes_nothing(rank, method, message):
    net = model()
    with pytest.raises(ValueError, match=message):
        svdlib.project_(net, rank, method)
    assert all(map(torch.equal, net.parameters(), model().parameters()))


def test_nan_weights_and_no_weights():
    net = model()
    with torch.no_grad():
        net[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer '3'.*finite"):
        svdlib.project_(net, 2)
    assert torch.equal(net[0].weight, model()[0].weight)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        svdlib.project_(nn.ReLU(), 2)


def test_half_precision_is_rounded_once():
    """Worked in float32: each entry is within a unit roundoff of the float32 projection's."""
    net = nn.Sequential(nn.Linear(40, 30))
    torch.manual_seed(0)
    nn.init.normal_(net[0].weight)
    net.bfloat16()
    exact = svdlib.truncated_svd(net[0].weight.detach().float(), 5).matrix()
    svdlib.project_(net, 5)
    assert torch.equal(net[0].weight, exact.bfloat16())
