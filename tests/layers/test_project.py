import pytest
import torch
from layer_kinds import KINDS, layer
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


class Reads(nn.Module):
    """Modules that read their weights themselves, and a parameter that the model does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(30, 12)
        self.lstm, self.gru = nn.LSTM(12, 8), nn.GRU(8, 7, bidirectional=True)
        self.rnn, self.pair = nn.RNN(14, 9), nn.Bilinear(9, 9, 6)
        self.table = nn.Parameter(torch.randn(6, 10))
        self.scale = nn.Parameter(torch.ones(10))
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        z = self.rnn(self.gru(self.lstm(self.bag(x))[0])[0])[0]
        return self.head((self.pair(z, z) @ self.table) * self.scale)


PARAMETERS = {
    "bag.weight": 5,
    "lstm.weight_ih_l0": 4,
    "lstm.weight_hh_l0": 3,
    "gru.weight_hh_l0_reverse": 2,
    "rnn.weight_ih_l0": 4,
    "pair.weight": 3,
    "table": 2,
}


@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
def test_what_a_module_reads_itself_by_the_name_of_its_parameter(method):
    net, before = Reads(), Reads().state_dict()
    svdlib.project_(net, PARAMETERS, method)
    for name, weight in net.state_dict().items():
        if name in PARAMETERS:
            assert torch.linalg.matrix_rank(weight.flatten(1), rtol=1e-4) == PARAMETERS[name]
            best = svdlib.truncated_svd(before[name].flatten(1), PARAMETERS[name]).matrix()
            if method == "truncsvd":
                torch.testing.assert_close(weight.flatten(1), best)
        else:
            assert torch.equal(weight, before[name]), "only those named"
    svdlib.project_(net, 1)
    after = net.state_dict()
    assert torch.linalg.matrix_rank(after["head.weight"]) == 1
    assert torch.linalg.matrix_rank(after["table"], rtol=1e-4) == 2, "a number is for layers"
    assert svdlib.project_(nn.LSTM(4, 4), {"weight_hh_l0": 2}), "no layer at all"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lstm.bias_hh_l0", "can't project parameter 'lstm.bias_hh_l0': a vector has no rank"),
        ("scale", "a vector has no rank"),
        ("head.weight", "'head.weight': it is in layer 'head'; name that"),
        ("lstm", "unknown layer 'lstm'; known: head"),
    ],
)
def test_parameters_that_can_not_be_projected(name, message):
    with pytest.raises(ValueError, match=message):
        svdlib.project_(Reads(), {name: 2})
    net = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"it is in layer '0\.q_proj'; name that"):
        svdlib.project_(net, {"0.in_proj_weight": 2})


def test_parameters_are_profiled_and_not_factorized():
    net, x, y = Reads(), torch.arange(60).view(20, 3) % 30, torch.arange(20) % 4
    for name in ("lstm.weight_hh_l0", "table"):
        profile = svdlib.loss_profile(net, x, y, layers=[name], ranks=[2, 99], progress=False)
        cut = svdlib.project_(Reads(), {name: 2})
        loss = nn.functional.cross_entropy(cut(x), y).item()
        assert profile.loss[0] == pytest.approx(loss, rel=1e-5)
        assert svdlib.verify_ranks(net, {name: 2}, x, y)["loss"] == pytest.approx(loss, rel=1e-5)
    with pytest.raises(
        ValueError,
        match=r"can't factorize parameter 'lstm\.weight_hh_l0': a LSTM reads it itself .* project_",
    ):
        svdlib.factorize(net, {"lstm.weight_hh_l0": 2, "head": 2})
    assert all(map(torch.equal, net.state_dict().values(), Reads().state_dict().values()))


@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_factorized_layer_is_one_matrix(kind, method, generator):
    dense = nn.Sequential(layer(kind))
    net = svdlib.factorize(dense, {"0": 3})
    first = net[0][0].weight.clone()
    svdlib.project_(net, 2, method, generator=generator)
    assert net[0].rank == 3 and torch.equal(net[0][0].weight, first)
    torch.testing.assert_close(
        net[0].weight, svdlib.project_(dense, {"0": 2})[0].weight, rtol=1e-5, atol=1e-5
    )
    kept = net[0].weight.clone()
    assert torch.equal(svdlib.project_(net, {"0": 3})[0].weight, kept), "a rank that it has"
